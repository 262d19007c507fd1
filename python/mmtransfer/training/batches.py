"""The order of training examples: batches of like length, and clips that a loss cannot use."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler

from mmtransfer.data.recordings import Clip
from mmtransfer.encoders.tapped import TappedEncoder
from mmtransfer.method import Compressor
from mmtransfer.tasks.base import Task

from .caching import CachedFeatures, CachedInputs, EncoderCollator, example_name

#: Clips are sorted by length within groups of so many batches: enough for batches of like length, and few
#: enough that the same clips seldom meet again.
_BATCHES_OF_A_GROUP = 24


class LengthBatches(Sampler[int]):
    """An order of examples in which each run of `batch_size` has like lengths.

    The order is random and follows from `seed` and the epoch alone, so a run that is resumed has the same.

    Args:
        lengths: of the examples, in any unit.
        batch_size: as the batches are cut.
        seed: of the order.
    """

    def __init__(self, lengths: Sequence[float], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed = lengths, batch_size, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the training loop at the start of each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed((self.seed << 20) + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        size = self.batch_size
        batches: list[list[int]] = []
        for start in range(0, len(order), _BATCHES_OF_A_GROUP * size):
            group = order[start : start + _BATCHES_OF_A_GROUP * size]
            group.sort(key=self.lengths.__getitem__, reverse=True)
            batches += [group[first : first + size] for first in range(0, len(group), size)]
        # A batch that is not full comes last, so that all others are cut where they were made.
        full = [batch for batch in batches if len(batch) == size]
        rest = [batch for batch in batches if len(batch) < size]
        for index in torch.randperm(len(full), generator=generator).tolist():
            yield from full[index]
        for batch in rest:
            yield from batch


def example_lengths(examples: Any, collate: Any) -> list[float]:
    """A length of each example: frames, positions of the input, or seconds; clips are not decoded."""
    if isinstance(examples, (CachedFeatures, CachedInputs)):
        return list(examples.lengths)
    most = collate.collator.max_seconds if isinstance(collate, EncoderCollator) else None
    seconds = [example.seconds for example in examples]
    return seconds if most is None else [min(each, most) for each in seconds]


def drop_infeasible(
    examples: Any, collate: Any, encoder: TappedEncoder, task: Task, readout: Any = None
) -> tuple[Any, list[str]]:
    """The examples that the task's loss can use, and the names of the others; see `find_infeasible`."""
    dropped = find_infeasible(examples, collate, encoder, task, readout)
    return without(examples, dropped), list(dropped.values())


def find_infeasible(
    examples: Any, collate: Any, encoder: TappedEncoder, task: Task, readout: Any = None
) -> dict[int, str]:
    """The examples that the task's loss, or a readout that compresses, cannot use: a sentence on each.

    For CTC a transcript needs a frame for each of its characters and one between two that are equal; for an
    aligner it needs a character that this one knows.
    """
    found: dict[int, str] = {}
    counts = frame_counts(examples, collate, encoder)
    if counts is None and not isinstance(readout, Compressor):
        return found
    for index in range(len(examples)):
        target = _target(examples, index, task)
        needed = task.frames_needed(target)
        if isinstance(readout, Compressor):
            needed = max(needed, readout.frames_needed(target))
            if not readout.knows(target):
                # A language model would be taught to write it without having heard anything.
                found[index] = f"{example_name(examples, index)} (no character that the aligner knows)"
        if counts is not None and needed > counts[index]:
            name = example_name(examples, index)
            found[index] = f"{name} ({needed} frames needed, {counts[index]} there)"
    return found


def without(examples: Any, dropped: Collection[int]) -> Any:
    """The examples but for those of these indices."""
    if not dropped:
        return examples
    kept = [index for index in range(len(examples)) if index not in dropped]
    if isinstance(examples, (CachedFeatures, CachedInputs)):
        return examples.subset(kept)
    return [examples[index] for index in kept]


def frame_counts(examples: Any, collate: Any, encoder: TappedEncoder) -> list[int] | None:
    """Frames that the encoder makes of each example, for clips from their durations; None if not known."""
    if isinstance(examples, CachedFeatures):
        return examples.lengths
    if encoder.description.frames == "fixed":
        return None
    lengths: Sequence[Any] = example_lengths(examples, collate)
    if not isinstance(examples, CachedInputs):
        lengths = [collate.input_length(seconds) for seconds in lengths]
        if None in lengths:
            return None
    return encoder.parts.frame_lengths(torch.tensor(lengths, dtype=torch.int64)).tolist()


def _target(examples: Any, index: int, task: Task) -> Any:
    if isinstance(examples, (CachedFeatures, CachedInputs)):
        return examples.targets[index]
    example = examples[index]
    return task.target(example) if isinstance(example, Clip) else example["target"]
