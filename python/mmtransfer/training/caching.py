"""Stored inputs of training: features of a frozen encoder, or inputs of a trained one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import psutil
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from transformers import SequenceFeatureExtractor, WhisperFeatureExtractor

from mmtransfer.data import DataError
from mmtransfer.data.features import Collator
from mmtransfer.data.recordings import Clip
from mmtransfer.encoders.encoder import Tap
from mmtransfer.encoders.tapped import TappedEncoder, tap_name
from mmtransfer.encoders.taps import Taps
from mmtransfer.model import AdaptedModel
from mmtransfer.tasks.base import Task

from .finite import NotFiniteError
from .settings import check_integer
from .worker_errors import plain_errors

#: Called with the number of clips just done.
OnClips = Callable[[int], None]


class CachedFeatures(Dataset[dict[str, Any]]):
    """The tapped features of clips, stored once: items are `features` (T, L, C) and `target`.

    Args:
        features: `(N, L, C)`, the valid frames of all clips, one after the other.
        lengths: `(B,)` frames per clip; they sum to N.
        targets: B targets of the task.
        task: makes labels of them.
        slots: indices of the taps that items have, in this order; None for all.
        names: of the clips, for messages.
        faults: a message for each tap with features that are not finite.

    Attributes:
        lengths: frames per clip.
    """

    def __init__(
        self,
        features: torch.Tensor,
        lengths: torch.Tensor,
        targets: Sequence[Any],
        task: Task,
        slots: Sequence[int] | None = None,
        *,
        names: Sequence[str] | None = None,
        faults: Mapping[int, str] | None = None,
    ) -> None:
        self.features, self.targets, self.task = features, list(targets), task
        self.lengths: list[int] = lengths.tolist()
        self.names = names
        self.faults = {} if faults is None else dict(faults)
        self.chosen = list(range(features.shape[1]) if slots is None else slots)
        self.slots = _as_slice(self.chosen)
        self._ends = lengths.cumsum(0).tolist()

    def select(self, slots: Sequence[int]) -> CachedFeatures:
        """The same clips with these taps only; nothing is copied."""
        chosen = copy.copy(self)
        chosen.chosen = list(slots)
        chosen.slots = _as_slice(chosen.chosen)
        return chosen

    def subset(self, indices: Sequence[int]) -> CachedFeatures:
        """Some of the clips, in this order; nothing is copied."""
        chosen = copy.copy(self)
        for name in ("lengths", "targets", "names", "_ends"):
            values = getattr(self, name)
            if values is not None:
                setattr(chosen, name, [values[index] for index in indices])
        return chosen

    def check(self) -> None:
        """NotFiniteError if a chosen tap had features that were not finite when they were made."""
        for slot in self.chosen:
            if slot in self.faults:
                raise NotFiniteError(self.faults[slot])

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> dict[str, Any]:
        end = self._ends[index]
        frames = self.features[end - self.lengths[index] : end]
        return {"features": frames[:, self.slots], "target": self.targets[index]}

    def collate(self, items: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Items as one batch for the model's forward, packed: no frame of padding."""
        features = [item["features"] for item in items]
        # Labels first: the Trainer takes the batch size from the first tensor.
        return {
            "labels": self.task.collate([item["target"] for item in items]),
            "lengths": torch.tensor([len(frames) for frames in features]),
            "features": torch.cat(features),
        }


def _as_slice(slots: list[int]) -> slice | list[int]:
    """Neighbouring slots as a slice, which is a view; others are copied out of each item."""
    first = slots[0]
    return slice(first, first + len(slots)) if slots == list(range(first, first + len(slots))) else slots


class EncoderCollator:
    """Clips as one batch for a model's forward: the encoder's input with its valid lengths."""

    def __init__(self, collator: Collator, encoder: TappedEncoder, task: Task) -> None:
        self.collator, self.task = collator, task
        self.main_input = encoder.description.main_input
        self.time_dim = encoder.description.time_dim
        self.fixed = encoder.description.frames == "fixed"

    def __call__(self, clips: Sequence[Clip]) -> dict[str, torch.Tensor]:
        batch = self.collator(clips)
        for clip, values in zip(clips, batch[self.main_input], strict=True):
            if not bool(values.isfinite().all()):
                raise DataError(f"{clip_name(clip)} holds NaN or infinite samples; leave it out")
        labels = self.task.collate(self.targets(clips))
        return {"labels": labels, **encoder_inputs(batch, self.collator.extractor, self.main_input)}

    def targets(self, clips: Sequence[Clip]) -> list[Any]:
        return [self.task.target(clip) for clip in clips]

    def input_length(self, seconds: float) -> int | None:
        """Valid positions of the main input of a clip of this duration; None where that is not known."""
        extractor = self.collator.extractor
        samples = round(seconds * extractor.sampling_rate)
        if isinstance(extractor, WhisperFeatureExtractor):
            return -(-samples // extractor.hop_length)
        return samples if self.main_input == "input_values" and not self.fixed else None


def encoder_inputs(
    batch: Mapping[str, torch.Tensor], extractor: SequenceFeatureExtractor, main_input: str
) -> dict[str, torch.Tensor]:
    """Of an extractor's tensors and `lengths` in samples: the main input with its valid lengths."""
    inputs = {main_input: batch[main_input]}
    if isinstance(extractor, WhisperFeatureExtractor):
        # The extractor's own mask is of the padded 30 seconds; a mel frame begun by a clip is valid.
        return {**inputs, "lengths": -(-batch["lengths"] // extractor.hop_length)}
    if "attention_mask" in batch:
        return {**inputs, "attention_mask": batch["attention_mask"]}
    return {**inputs, "lengths": batch["lengths"]}


@plain_errors()
def cache_features(
    encoder: TappedEncoder,
    clips: Sequence[Clip],
    collate: EncoderCollator,
    *,
    batch_size: int = 16,
    workers: int = 0,
    on_clips: OnClips | None = None,
) -> CachedFeatures:
    """Run the encoder once over `clips` and keep the tapped features of their valid frames, on the CPU.

    Clips of similar length share a batch; the result is in the order of `clips`. The encoder runs where its
    weights are; `workers` processes decode the clips meanwhile. Taps whose features are not finite are noted
    in `faults`: other taps may serve.

    Raises:
        DataError: after the first batch, if all features would not fit in memory; a clip that holds NaN.
        ValueError: no clips, or a batch size below 1.
    """
    check_integer("batch_size", batch_size)
    if not clips:
        raise ValueError("clips are empty; give at least one")
    names = [clip_name(clip, index) for index, clip in enumerate(clips)]
    faults: dict[int, str] = {}
    order = sorted(range(len(clips)), key=lambda index: clips[index].seconds)
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    device = next(encoder.parameters()).device
    found: list[Taps] = []
    for chosen, batch in zip(batches, _collated(clips, batches, collate, workers), strict=True):
        batch.pop("labels")
        taps = encoder(**{name: tensor.to(device) for name, tensor in batch.items()}).to("cpu")
        found.append(taps)
        for slot, index in _faults(taps, chosen).items():
            place = tap_name(encoder.taps[slot])
            faults.setdefault(slot, f"the features of {names[index]} at {place} are not finite")
        if len(found) == 1:
            sizes = [_relative_size(clip, collate) for clip in clips]
            share = sum(sizes[index] for index in chosen) / sum(sizes)
            _check_room(taps.features.nbytes / share, "features", "--no-cache, fewer taps or fewer clips")
        if on_clips is not None:
            on_clips(len(chosen))
    features, lengths = _in_order(batches, found)
    return CachedFeatures(features, lengths, collate.targets(clips), collate.task, names=names, faults=faults)


def _collated(
    clips: Sequence[Clip], batches: Sequence[Sequence[int]], collate: EncoderCollator, workers: int
) -> DataLoader[Any]:
    """The batches for the encoder, made by other processes while it runs."""
    return DataLoader(
        clips,  # type: ignore[arg-type]
        batch_sampler=[list(each) for each in batches],
        collate_fn=collate,
        num_workers=workers,
        generator=torch.Generator(),
    )


def _in_order(batches: Sequence[Sequence[int]], found: list[Taps]) -> tuple[torch.Tensor, torch.Tensor]:
    """The features of all clips in one tensor, and their lengths; `found` is emptied on the way."""
    lengths = torch.zeros(sum(map(len, batches)), dtype=torch.int64)
    for chosen, taps in zip(batches, found, strict=True):
        lengths[list(chosen)] = taps.lengths
    ends = lengths.cumsum(0).tolist()
    first = found[0].features
    features = first.new_empty(ends[-1], *first.shape[1:])
    for chosen in batches:
        # Given back batch by batch: all of them and the one tensor would take twice the memory.
        for index, frames in zip(chosen, found.pop(0).split(), strict=True):
            features[ends[index] - len(frames) : ends[index]] = frames
    return features, lengths


def _faults(taps: Taps, chosen: Sequence[int]) -> dict[int, int]:
    """For each slot with features that are not finite, the first of the chosen clips that has them."""
    if bool(taps.features.isfinite().all()):
        return {}
    found: dict[int, int] = {}
    for index, features in zip(chosen, taps.split(), strict=True):
        for slot in (~features.isfinite().all(dim=2).all(dim=0)).nonzero().flatten().tolist():
            found.setdefault(slot, index)
    return found


def clip_name(clip: Clip, index: int | None = None) -> str:
    """A clip in messages: its file, or its place."""
    if not isinstance(clip.source, np.ndarray):
        return str(clip.source)
    return "a generated clip" if index is None else f"clip {index}"


def example_name(examples: Any, index: int) -> str:
    """An example of a data set in messages, whether it is cached or a clip."""
    names = getattr(examples, "names", None)
    if names is not None:
        return names[index]
    example = examples[index]
    return clip_name(example, index) if isinstance(example, Clip) else f"example {index}"


class CachedInputs(Dataset[dict[str, Any]]):
    """The encoder's inputs of clips, log-mel frames or samples, each made once: items of `collate`.

    The extractor sees one clip at a time, so that an input does not depend on what else is in its batch.

    Args:
        inputs: one tensor per clip, of the main input's shape without the batch.
        lengths: valid positions of each, along the time axis.
        targets: of the task, one per clip.
        task: makes labels of them.
        main_input: the name of the encoder's input.
        time_dim: the time axis of a clip's tensor.
        names: of the clips, for messages.
    """

    def __init__(
        self,
        inputs: Sequence[torch.Tensor],
        lengths: Sequence[int],
        targets: Sequence[Any],
        task: Task,
        *,
        main_input: str,
        time_dim: int,
        names: Sequence[str] | None = None,
    ) -> None:
        self.inputs, self.lengths, self.targets = list(inputs), list(lengths), list(targets)
        self.names, self.task = names, task
        self.main_input, self.time_dim = main_input, time_dim

    def subset(self, indices: Sequence[int]) -> CachedInputs:
        """Some of the clips, in this order; nothing is copied."""
        chosen = copy.copy(self)
        for name in ("inputs", "lengths", "targets", "names"):
            values = getattr(self, name)
            if values is not None:
                setattr(chosen, name, [values[index] for index in indices])
        return chosen

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {
            "input": self.inputs[index],
            "length": self.lengths[index],
            "target": self.targets[index],
        }

    def collate(self, items: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Items as one batch for the model's forward, padded with zeros to the longest."""
        longest = max(item["input"].shape[self.time_dim] for item in items)
        return {
            "labels": self.task.collate([item["target"] for item in items]),
            "lengths": torch.tensor([item["length"] for item in items]),
            self.main_input: torch.stack([self._pad(item["input"], longest) for item in items]),
        }

    def _pad(self, tensor: torch.Tensor, longest: int) -> torch.Tensor:
        behind = tensor.dim() - 1 - self.time_dim
        return F.pad(tensor, (0, 0) * behind + (0, longest - tensor.shape[self.time_dim]))


@plain_errors()
def cache_inputs(
    clips: Sequence[Clip],
    collate: EncoderCollator,
    *,
    workers: int = 0,
    on_clips: OnClips | None = None,
) -> CachedInputs:
    """The inputs of `clips`, in their order, made by `workers` processes.

    Raises:
        DataError: after the first, if all would not fit in memory; a clip that holds NaN.
    """
    inputs: list[torch.Tensor] = []
    lengths: list[int] = []
    for batch in _collated(clips, [[index] for index in range(len(clips))], collate, workers):
        inputs.append(batch[collate.main_input][0])
        valid = batch["attention_mask"].sum() if "attention_mask" in batch else batch["lengths"][0]
        lengths.append(int(valid))
        if len(inputs) == 1:
            sizes = [_relative_size(each, collate) for each in clips]
            _check_room(inputs[0].nbytes * sum(sizes) / sizes[0], "inputs", "--no-cache or fewer clips")
        if on_clips is not None:
            on_clips(1)
    return CachedInputs(
        inputs,
        lengths,
        collate.targets(clips),
        collate.task,
        main_input=collate.main_input,
        time_dim=collate.time_dim - 1,
        names=[clip_name(clip, index) for index, clip in enumerate(clips)],
    )


def examples_for(
    model: AdaptedModel,
    clips: Sequence[Clip],
    collate: EncoderCollator,
    *,
    features: CachedFeatures | None = None,
    taps: Sequence[Tap] = (),
    inputs: CachedInputs | None = None,
) -> tuple[Any, Callable[[Any], dict[str, torch.Tensor]]]:
    """Examples and their collate function as `model` needs them: what is stored, else the clips.

    Args:
        model: whose edit says which of the two stores serve it.
        clips, collate: for a model that neither serves.
        features: of a frozen encoder, with a slot for each of `taps`.
        inputs: for a model that trains through its encoder.
    """
    if not model.edit_is_empty:
        return (clips, collate) if inputs is None else (inputs, inputs.collate)
    if features is None:
        return clips, collate
    chosen = features.select([taps.index(tap) for tap in model.encoder.taps])
    return chosen, chosen.collate


def _relative_size(clip: Clip, collate: EncoderCollator) -> float:
    """A number that a clip's frames are proportional to."""
    if collate.fixed:
        return 1.0
    most = collate.collator.max_seconds
    return clip.seconds if most is None else min(clip.seconds, most)


class NoRoomError(DataError):
    """What was to be stored does not fit in memory.

    Attributes:
        reason: the message without its remedy.
    """

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(f"{reason}; use {remedy}")
        self.reason = reason


def _check_room(nbytes: float, what: str, remedy: str) -> None:
    """NoRoomError if the machine has no room for so many bytes."""
    available = psutil.virtual_memory().available
    if nbytes > available:
        needed, free = (f"{size / 2**30:.1f} GiB" for size in (nbytes, available))
        raise NoRoomError(f"the cached {what} need {needed} of memory and {free} are free", remedy)
