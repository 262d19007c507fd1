"""Methods and a task of the kinds that are to come, as a user would write them: about 30 lines each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from mmtransfer.encoders import Edit, Encoder, Taps
from mmtransfer.method import EditMethod, Group, Method
from mmtransfer.tasks import Metric, Task


class Merged:
    """A projection whose weight is `(1 - lam) * W + lam * S`."""

    def __init__(self, projection: nn.Linear, source: torch.Tensor, lam: nn.Parameter) -> None:
        self.projection, self.source, self.lam = projection, source, lam

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        weight = torch.lerp(self.projection.weight, self.source, self.lam)
        return F.linear(x, weight, self.projection.bias)


@dataclass(frozen=True, kw_only=True)
class LearntMerge(EditMethod):
    """A learnt weight between the queries' projection and a random one."""

    name: ClassVar[str] = "learnt-merge"
    title: ClassVar[str] = "Learnt merge"
    paper: ClassVar[str] = "a test"

    start: float = 0.0
    rate: float = 0.1

    def change(self, edit: Edit, encoder: Encoder, layers: list[nn.Module]) -> None:
        generator = torch.Generator().manual_seed(0)
        for layer in layers:
            projection: Any = layer.get_submodule(encoder.description.layer_query)
            source = torch.randn(projection.weight.shape, generator=generator) * projection.weight.std()
            lam = edit.add(layer, "merge_lambda", nn.Parameter(torch.full((1,), self.start)))
            edit.override(projection, Merged(projection, source.to(projection.weight), lam))

    def parameter_groups(self, model: Any) -> dict[str, Group]:
        return {"lambda": Group(model.encoder.edit.parameters, self.rate)}

    def insights(self, model: Any) -> dict[str, dict[str, float]]:
        values = enumerate(model.encoder.edit.parameters)
        return {"Learnt lambda": {f"layer {index}": float(value.detach()) for index, value in values}}


class MaxOverLayers(nn.Module):
    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.out_dim = out_dim
        self.project = nn.Linear(dim, out_dim)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.project(features.amax(dim=1))


@dataclass(frozen=True, kw_only=True)
class MaxReadout(Method):
    """The largest value over the upper two layers, projected."""

    name: ClassVar[str] = "max-readout"
    title: ClassVar[str] = "Max"
    paper: ClassVar[str] = "a test"

    out_dim: int = 24

    def select_taps(self, encoder: Encoder) -> Sequence[Any]:
        return (-2, -1)

    def readout(self, encoder: Encoder) -> nn.Module:
        return MaxOverLayers(encoder.hidden_size, self.out_dim)


class FrameHead(nn.Module):
    def __init__(self, dim: int, num_labels: int) -> None:
        super().__init__()
        self.classifier = nn.Linear(dim, num_labels)

    def forward(self, frames: torch.Tensor, taps: Taps) -> torch.Tensor:
        return self.classifier(frames)


@dataclass(frozen=True, kw_only=True)
class FrameLabels(Task):
    """The class of the recording, for each of its frames; the metric is the share of wrong frames."""

    name: ClassVar[str] = "frames"
    metric: ClassVar[Metric] = Metric("frame_error", "Frame error", higher_is_better=False)

    num_labels: int

    @classmethod
    def of(cls, recordings: Any) -> FrameLabels:
        return cls(num_labels=len(recordings.classes))

    def head(self, dim: int) -> nn.Module:
        return FrameHead(dim, self.num_labels)

    def loss(self, logits: torch.Tensor, labels: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits, labels.repeat_interleave(lengths))

    def decode(self, logits: torch.Tensor, lengths: torch.Tensor) -> list[Any]:
        return [each.tolist() for each in logits.argmax(dim=1).split(lengths.tolist())]

    def score(self, predictions: Sequence[Any], targets: Sequence[Any]) -> dict[str, float]:
        frames = sum(map(len, predictions))
        wrong = sum(
            label != target for each, target in zip(predictions, targets, strict=True) for label in each
        )
        return {"frame_error": wrong / frames, "frames": frames}
