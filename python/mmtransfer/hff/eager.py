"""The fusions as the paper's code would have them: lists of LayerNorm, Linear, ReLU, and torch.cat.

The same numbers, options and state dicts as `fusions`; for tests, and as the baseline of benchmarks. They
take the features as `(N, L, C)` or as a list of L tensors `(N, C)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from mmkernels.activations import ACTIVATIONS

from .fusions import balanced_plan, chain_lengths, make_projector

Features = torch.Tensor | Sequence[torch.Tensor]


class EagerWeightedSum(nn.Module):
    """The twin of `fusions.WeightedSum`: stack, normalise, multiply, sum, as s3prl's Featurizer does."""

    def __init__(self, taps: int, dim: int, out_dim: int | None = None, *, norm: bool = False) -> None:
        super().__init__()
        self.dim, self.norm = dim, norm
        self.weights = nn.Parameter(torch.zeros(taps))
        self.project = nn.Identity() if out_dim is None else nn.Linear(dim, out_dim)

    def forward(self, x: Features) -> torch.Tensor:
        stacked = torch.stack(_as_list(x))
        if self.norm:
            stacked = F.layer_norm(stacked, (self.dim,))
        return self.project((self.weights.softmax(0)[:, None, None] * stacked).sum(0))


class EagerLFF(nn.Module):
    """The twin of `fusions.LFF`: concatenate, then project."""

    def __init__(self, taps: int, dim: int, out_dim: int = 640, *, depth: int = 1) -> None:
        super().__init__()
        self.projector = make_projector(taps * dim, out_dim, depth)

    def forward(self, x: Features) -> torch.Tensor:
        return self.projector(torch.cat(_as_list(x), dim=1))


class EagerProjections(nn.Module):
    """The twin of `mmkernels.nn.LayerProject`: one LayerNorm and one Linear per slot, on a list.

    In its state dict the slots are stacked as they are there.
    """

    def __init__(self, slots: int, dim: int, *, norm: bool = True, activation: str = "relu") -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        self.norms = nn.ModuleList(nn.LayerNorm(dim) if norm else nn.Identity() for _ in range(slots))
        self.linears = nn.ModuleList(nn.Linear(dim, dim // 2) for _ in range(slots))
        self.activation = ACTIVATIONS[activation]
        self.register_state_dict_post_hook(_stack_slots)
        self.register_load_state_dict_pre_hook(_unstack_slots)

    def forward(self, features: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [
            self.activation(linear(norm(x)))
            for norm, linear, x in zip(self.norms, self.linears, features, strict=True)
        ]


class EagerHFFb(nn.Module):
    """The twin of `fusions.HFFb`: lists of projections, and a concatenation per pair."""

    def __init__(
        self, taps: int, dim: int, out_dim: int = 640, *, norm: bool = True, activation: str = "relu"
    ) -> None:
        super().__init__()
        plan = balanced_plan(taps)
        self.levels = nn.ModuleList(
            EagerProjections(count - count % 2, dim, norm=norm, activation=activation) for count in plan[:-1]
        )
        self.projector = make_projector(plan[-1] * dim, out_dim, depth=3)

    def forward(self, x: Features) -> torch.Tensor:
        features = _as_list(x)
        for level in self.levels:
            even = len(features) - len(features) % 2
            halves = level(features[:even])
            pairs = [torch.cat(halves[i : i + 2], dim=1) for i in range(0, even, 2)]
            features = pairs + features[even:]
        return self.projector(torch.cat(features, dim=1))


class EagerHFFub(nn.Module):
    """The twin of `fusions.HFFub`."""

    def __init__(
        self, taps: int, dim: int, out_dim: int = 640, *, norm: bool = True, activation: str = "relu"
    ) -> None:
        super().__init__()
        bottom, top = chain_lengths(taps)
        self.bottom = EagerChain(bottom, dim, upwards=True, norm=norm, activation=activation)
        self.top = EagerChain(top, dim, upwards=False, norm=norm, activation=activation) if top else None
        self.lengths = bottom, top
        self.projector = make_projector(min(taps, 3) * dim, out_dim, depth=3)

    def forward(self, x: Features) -> torch.Tensor:
        features = _as_list(x)
        bottom, top = self.lengths
        ends = [self.bottom(features[:bottom]), *features[bottom : len(features) - top]]
        if self.top is not None:
            ends.append(self.top(features[len(features) - top :]))
        return self.projector(torch.cat(ends, dim=1))


class EagerChain(nn.Module):
    """The twin of `fusions.Chain`."""

    def __init__(self, taps: int, dim: int, *, upwards: bool, norm: bool, activation: str) -> None:
        super().__init__()
        self.upwards = upwards
        self.leaves = EagerProjections(taps, dim, norm=norm, activation=activation) if taps > 1 else None
        self.steps = nn.ModuleList(
            EagerProjections(1, dim, norm=norm, activation=activation) for _ in range(taps - 2)
        )

    def forward(self, features: list[torch.Tensor]) -> torch.Tensor:
        if self.leaves is None:
            return features[0]
        halves = self.leaves(features)
        if not self.upwards:
            halves.reverse()
        half = halves[0]
        for index, following in enumerate(halves[1:]):
            chained = torch.cat([half, following] if self.upwards else [following, half], dim=1)
            if index < len(self.steps):
                (half,) = self.steps[index]([chained])
        return chained


def _as_list(x: Features) -> list[torch.Tensor]:
    return list(x.unbind(1)) if isinstance(x, torch.Tensor) else list(x)


def _slot_keys(module: EagerProjections, prefix: str) -> dict[str, list[str]]:
    """The stacked key of each group of per-slot parameters."""
    slots = range(len(module.linears))
    keys = {name: [f"{prefix}linears.{slot}.{name}" for slot in slots] for name in ("weight", "bias")}
    if isinstance(module.norms[0], nn.LayerNorm):
        for name in ("weight", "bias"):
            keys[f"norm_{name}"] = [f"{prefix}norms.{slot}.{name}" for slot in slots]
    return {prefix + name: group for name, group in keys.items()}


def _stack_slots(module: EagerProjections, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    for stacked, keys in _slot_keys(module, prefix).items():
        state[stacked] = torch.stack([state.pop(key) for key in keys])


def _unstack_slots(module: EagerProjections, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for stacked, keys in _slot_keys(module, prefix).items():
        if stacked in state:
            state.update(zip(keys, state.pop(stacked), strict=True))
