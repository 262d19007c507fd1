"""segment_attention and distill_loss against definitions that share nothing with the references, on thousands
of small utterances: each backend, all dtypes."""

from __future__ import annotations

import torch
from connector_oracles import (
    AttentionBatch,
    Bounded,
    attention_batch,
    authors_mask,
    distill_batch,
    token_gradient,
    token_loss,
)
from segment_oracles import EachBackend, leaf_of
from torch import Tensor

from mmkernels import distill_loss, segment_attention
from op_tests import poisoned_memory

SUMS = torch.finfo(torch.float32).eps


class OnEveryBackend(EachBackend):
    #: Batches for attention of each dtype, and their utterances; batches for the loss.
    calls = 10
    attended = 64
    losses = 300
    #: Batches with segments of several blocks, their utterances and frames.
    long_calls = 5
    long = 5
    longer = 200
    #: Errors of a rounded number, in units of its last place.
    rounding = 1.0

    def seeds(self, dtype: torch.dtype, calls: int) -> range:
        """Others for each dtype, so that they add up."""
        first = 1001 * self.dtypes.index(dtype)
        return range(first, first + calls)

    def close(self, found: Tensor, expected: Bounded, dtype: torch.dtype) -> None:
        """Products and results are rounded to ``dtype``, sums to float32. No terms, no error."""
        error = (found.detach().cpu().double() - expected.exact).abs()
        limits = torch.finfo(dtype)
        bound = (self.rounding * limits.eps + 16 * SUMS) * expected.size + limits.eps * limits.smallest_normal
        assert found.shape == expected.exact.shape
        assert found.dtype == dtype
        assert (error <= bound.where(expected.size > 0, 0.0)).all()

    def check_attention(self, device: str, backend: str, dtype: torch.dtype, batch: AttentionBatch) -> None:
        leaves = [leaf_of(x, device, dtype) for x in (batch.q, batch.k, batch.v)]
        with poisoned_memory():
            out = segment_attention(
                *leaves,
                batch.ends.to(device),
                lookback=batch.lookback,
                scale=batch.scale,
                backend=backend,
            )
            found = torch.autograd.grad(out, leaves, batch.grad.to(out))
        for name, tensor in zip(("out", "q", "k", "v"), (out, *found), strict=True):
            self.close(tensor, batch.expected[name], dtype)
        assert found[0].cpu().masked_select(batch.single[:, None, :, None]).eq(0).all()

    def test_segment_attention_has_the_authors_mask(
        self, device: str, backend: str, dtype: torch.dtype
    ) -> None:
        for seed in self.seeds(dtype, self.calls):
            self.check_attention(device, backend, dtype, attention_batch(seed, self.attended))

    def test_segment_attention_of_long_segments(self, device: str, backend: str, dtype: torch.dtype) -> None:
        for seed in self.seeds(dtype, self.long_calls):
            batch = attention_batch(500 + seed, self.long, frames=self.longer)
            self.check_attention(device, backend, dtype, batch)

    def test_distill_loss_is_a_double_loop(self, device: str, backend: str, dtype: torch.dtype) -> None:
        """Sums of squares are exact on the grid: without cosines the mean is rounded once."""
        for seed in self.seeds(dtype, self.losses):
            batch = distill_batch(seed)
            pred = leaf_of(batch.pred, device, dtype)
            flat = batch.counts is None and seed % 8 == 0
            ids = batch.ids.to(device, torch.int32 if seed % 5 == 0 else torch.int64)
            with poisoned_memory():
                loss = distill_loss(
                    pred.flatten(0, 1) if flat else pred,
                    batch.table.to(device, self.dtypes[seed // 3 % len(self.dtypes)]),
                    ids.flatten() if flat else ids,
                    counts=None if batch.counts is None else batch.counts.to(device),
                    cosine_weight=batch.weight,
                    backend=backend,
                )
                (found,) = torch.autograd.grad(loss, pred, torch.full_like(loss, batch.grad))
            distance, angle = batch.loss
            bound = SUMS * distance / 2 if batch.weight == 0 else 4 * SUMS * (distance + batch.weight)
            assert abs(loss.item() - (distance + batch.weight * angle)) <= bound, seed
            gradient = batch.gradient
            error = (found.cpu().double() - gradient.exact).abs()
            bound = (self.rounding * torch.finfo(dtype).eps + 4 * SUMS) * gradient.exact.abs()
            assert (error <= bound + 4 * SUMS * gradient.size).all(), seed


class TestOnEveryBackend(OnEveryBackend):
    pass


def test_the_mask_by_hand() -> None:
    """Boundaries 1 and 4 of six frames, the last of which has none after it."""
    expected = ["100000", "110000", "011000", "011100", "011110", "000011"]
    for lookback, rows in (
        (1, expected),
        (0, ["100000", "110000", "001000", "001100", "001110", "000001"]),
        (2, ["100000", "110000", "111000", "111100", "111110", "000111"]),
    ):
        assert authors_mask([1, 4], 6, lookback).int().tolist() == [[int(c) for c in row] for row in rows]


def test_the_gradient_of_a_token_is_that_of_differences() -> None:
    step = 2.0**-20
    for seed in range(200):
        batch = distill_batch(seed)
        for row, token in batch.tokens:
            z, h = batch.pair(row, token)
            gradient, _ = token_gradient(z, h, batch.weight)
            if not any(z):
                continue
            for column, found in enumerate(gradient):
                ends = []
                for sign in (1, -1):
                    moved = [a + sign * step * (i == column) for i, a in enumerate(z)]
                    distance, angle = token_loss(moved, h)
                    ends.append(distance + batch.weight * angle)
                assert abs((ends[0] - ends[1]) / (2 * step) - found) <= 1e-6
