"""The clips of a comparison with what is stored of them: features of the frozen encoder, inputs of a trained
one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.progress import Progress

from mmtransfer.data.recordings import Recordings
from mmtransfer.encoders.tapped import TappedEncoder
from mmtransfer.model import AdaptedModel
from mmtransfer.training.batches import example_lengths, find_infeasible, without
from mmtransfer.training.caching import (
    CachedFeatures,
    CachedInputs,
    EncoderCollator,
    cache_features,
    cache_inputs,
    examples_for,
)

#: Test clips that a model is scored on while it trains.
CURVE_CLIPS = 100
#: Clips of the step with the encoder in the loop.
WHOLE_STEP_CLIPS = 4

Examples = tuple[Any, Callable[[Any], dict[str, torch.Tensor]]]


class Store:
    """Train and test clips as each model needs them.

    Args:
        recordings: the clips.
        encoder: the frozen one, with the taps of all methods that read its features.
        collate: makes its input.
        workers: processes that decode clips.

    Attributes:
        infeasible: the training clips that the task's loss cannot use; they are left out of training.
    """

    def __init__(
        self, recordings: Recordings, encoder: TappedEncoder, collate: EncoderCollator, workers: int
    ) -> None:
        self.encoder, self.collate, self.workers = encoder, collate, workers
        self.clips: dict[str, Any] = {"train": recordings.train, "test": recordings.test}
        self.features: dict[str, CachedFeatures] = {}
        self.inputs: dict[str, CachedInputs] = {}
        self.infeasible: list[str] = []

    def cache_features(self, progress: Progress) -> None:
        """Run the frozen encoder over all clips and keep its features."""
        bar = progress.add_task("Features", total=sum(map(len, self.clips.values())), detail="")
        for split, clips in self.clips.items():
            self.features[split] = cache_features(
                self.encoder,
                clips,
                self.collate,
                workers=self.workers,
                on_clips=lambda count: progress.advance(bar, count),
            )

    def cache_inputs(self, progress: Progress) -> None:
        """Make the encoder's inputs of all clips and keep them."""
        bar = progress.add_task("Inputs", total=sum(map(len, self.clips.values())), detail="")
        for split, clips in self.clips.items():
            self.inputs[split] = cache_inputs(
                clips,
                self.collate,
                workers=self.workers,
                on_clips=lambda count: progress.advance(bar, count),
            )

    def drop_infeasible(self) -> None:
        """Leave out the training clips that the task's loss cannot use."""
        stores: tuple[dict[str, Any], ...] = (self.features, self.inputs, self.clips)
        known = next(parts["train"] for parts in stores if parts)
        dropped = find_infeasible(known, self.collate, self.encoder, self.collate.task)
        for parts in stores:
            if parts:
                parts["train"] = without(parts["train"], dropped)
        self.infeasible = list(dropped.values())

    def examples(self, split: str, model: AdaptedModel) -> Examples:
        """A data set and its collate function as a model needs them."""
        return examples_for(
            model,
            self.clips[split],
            self.collate,
            features=self.features.get(split),
            taps=self.encoder.taps,
            inputs=self.inputs.get(split),
        )

    def curve_examples(self, model: AdaptedModel) -> Examples:
        """Those of `curve_clips`."""
        examples, collate = self.examples("test", model)
        chosen = self.curve_clips()
        if isinstance(examples, (CachedFeatures, CachedInputs)):
            return examples.subset(chosen), collate
        return [examples[index] for index in chosen], collate

    def curve_clips(self) -> list[int]:
        """The test clips that scores on the way are of, evenly over all lengths."""
        return evenly(self.clips["test"], CURVE_CLIPS)

    def whole_step_batch(self) -> dict[str, torch.Tensor]:
        """A batch for the encoder of a few training clips around the median length."""
        lengths = example_lengths(self.clips["train"], self.collate)
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        first = max(len(order) // 2 - WHOLE_STEP_CLIPS // 2, 0)
        return self.collate([self.clips["train"][index] for index in order[first : first + WHOLE_STEP_CLIPS]])


def evenly(clips: Sequence[Any], count: int) -> list[int]:
    """Indices of at most `count` clips, evenly over all lengths, in their order."""
    order = sorted(range(len(clips)), key=lambda index: clips[index].seconds)
    if len(order) <= count:
        return sorted(order)
    return sorted(order[(2 * place + 1) * len(order) // (2 * count)] for place in range(count))
