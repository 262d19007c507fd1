"""Batches of clips of like length: an order that follows from seed and epoch, and little padding."""

from __future__ import annotations

import numpy as np
import pytest

from mmtransfer.training.batches import LengthBatches


def cut(order: list[int], size: int) -> list[list[int]]:
    return [order[start : start + size] for start in range(0, len(order), size)]


@pytest.fixture
def lengths() -> list[float]:
    """As those of dialogues: most of 2 to 4 seconds, some of 20."""
    return np.random.default_rng(0).lognormal(1.06, 0.55, 1500).clip(0.4, 22).tolist()


def test_every_clip_once(lengths) -> None:
    assert sorted(LengthBatches(lengths, 16, seed=0)) == list(range(1500))
    assert sorted(LengthBatches(lengths[:5], 16, seed=0)) == list(range(5))


def test_padding_is_below_fifteen_percent(lengths) -> None:
    batches = cut(list(LengthBatches(lengths, 16, seed=3)), 16)
    padded = sum(len(batch) * max(lengths[index] for index in batch) for batch in batches)
    assert 1 - sum(lengths) / padded < 0.15
    # Without the order nearly half of a batch is padding.
    plain = cut(np.random.default_rng(1).permutation(1500).tolist(), 16)
    assert 1 - sum(lengths) / sum(len(b) * max(lengths[i] for i in b) for b in plain) > 0.4


def test_the_order_follows_from_seed_and_epoch(lengths) -> None:
    def order(seed: int, epoch: int) -> list[int]:
        sampler = LengthBatches(lengths, 16, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 2) == order(0, 2)
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4


def test_batches_are_not_in_the_order_of_their_lengths(lengths) -> None:
    batches = cut(list(LengthBatches(lengths, 16, seed=0)), 16)
    longest = np.array([max(lengths[index] for index in batch) for batch in batches[:-1]])
    assert abs(np.corrcoef(longest, np.arange(len(longest)))[0, 1]) < 0.3


def test_clips_meet_others_in_the_next_epoch(lengths) -> None:
    sampler = LengthBatches(lengths, 16, seed=0)
    first = {frozenset(batch) for batch in cut(list(sampler), 16)}
    sampler.set_epoch(1)
    assert not first & {frozenset(batch) for batch in cut(list(sampler), 16)}
