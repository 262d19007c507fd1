"""Fusion of L encoder layers into one sequence (HFF, arXiv 2211.02712), on packed features `(N, L, C)`.

The layout makes concatenation free: a feature projection gives `(N, L, C/2)`, contiguous, and
`.view(N, L/2, C)` of it *is* the concatenation of neighbouring pairs. All modules take `(N, L, C)`, return
`(N, out_dim)`, and let gradients reach the features where they ask for them.
"""

from __future__ import annotations

import torch
from torch import nn

from mmkernels import layer_mix
from mmkernels.nn import LayerProject
from mmtransfer.encoders.autocast import autocast_takes


class Fusion(nn.Module):
    """The sizes of a fusion: `taps`, `dim` and `out_dim` are L, C and the width of the result."""

    def __init__(self, taps: int, dim: int, out_dim: int) -> None:
        super().__init__()
        for name, size in (("taps", taps), ("dim", dim), ("out_dim", out_dim)):
            check_positive(name, size)
        self.taps, self.dim, self.out_dim = taps, dim, out_dim

    def checked(self, x: torch.Tensor) -> torch.Tensor:
        """`x` in the weights' dtype, unless autocast is on; ValueError unless it is `(N, taps, dim)`."""
        if x.dim() != 3 or x.shape[1] != self.taps or x.shape[2] != self.dim:
            raise ValueError(f"features must be (N, {self.taps}, {self.dim}), got shape {tuple(x.shape)}")
        weight = next(self.parameters(), None)
        return x if weight is None or autocast_takes(x) else x.to(weight.dtype)


class WeightedSum(Fusion):
    """Softmax-weighted sum of the taps (SUPERB; not in the paper), projected to `out_dim` if one is given.

    Args:
        taps: L.
        dim: C.
        out_dim: width of a linear projection of the sum; None leaves the sum, of width C.
        norm: normalise each tap first (layer norm without parameters), as s3prl's `normalize`.
        backend: passed to `mmkernels.layer_mix`.

    The parameter `weights` (L,) starts at zero, so the sum starts as the mean; name and values are s3prl's.
    """

    def __init__(
        self, taps: int, dim: int, out_dim: int | None = None, *, norm: bool = False, backend: str = "auto"
    ) -> None:
        super().__init__(taps, dim, dim if out_dim is None else out_dim)
        self.norm, self.backend = norm, backend
        self.weights = nn.Parameter(torch.zeros(taps))
        self.project = nn.Identity() if out_dim is None else nn.Linear(dim, out_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.checked(x)
        mixed = layer_mix(x.unbind(1), self.weights.softmax(0), norm=self.norm, backend=self.backend)
        return self.project(mixed)


class LFF(Fusion):
    """Linear feature fusion: the taps side by side, then a projector of `depth` linear layers.

    With C = 1024 and 12 taps, depth 1 to 4: 7,864,960, 8,275,200, 8,685,440, 9,095,680 parameters.

    Args:
        taps: L.
        dim: C.
        out_dim: width of the result and of the hidden layers, 640 in the paper.
        depth: number of linear layers, ReLU between them; 1 to 4 in the paper.
    """

    def __init__(self, taps: int, dim: int, out_dim: int = 640, *, depth: int = 1) -> None:
        super().__init__(taps, dim, out_dim)
        check_positive("depth", depth)
        self.projector = make_projector(taps * dim, out_dim, depth)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.checked(x)
        return self.projector(x.flatten(1))


class HFFb(Fusion):
    """Balanced hierarchical feature fusion.

    While more than 3 features are left, each goes through its own projection to C/2 and neighbouring pairs
    are concatenated to C again: 12 -> 6 -> 3. An odd count leaves its last, topmost, feature unprojected for
    the next level: 7 -> 4 -> 2. The rest is concatenated and projected by three linear layers.

    With C = 1024 and 12 taps: 18 projections, 12,270,464 parameters, 12,233,600 without norms.

    Args:
        taps: L.
        dim: C, even: a pair of halves makes the width again.
        out_dim: width of the result and of the hidden layers of the top projector, 640 in the paper.
        norm: layer norm in front of each projection (the paper's parameter counts suggest one).
        activation: of the projections: "relu", "gelu", "gelu_tanh", "silu" or "none"; the paper does not say.
        backend: passed to `mmkernels.layer_project`.
    """

    def __init__(
        self,
        taps: int,
        dim: int,
        out_dim: int = 640,
        *,
        norm: bool = True,
        activation: str = "relu",
        backend: str = "auto",
    ) -> None:
        super().__init__(taps, dim, out_dim)
        _check_halves(dim)
        plan = balanced_plan(taps)
        self.levels = nn.ModuleList(
            LayerProject(count - count % 2, dim, dim // 2, norm=norm, activation=activation, backend=backend)
            for count in plan[:-1]
        )
        self.projector = make_projector(plan[-1] * dim, out_dim, depth=3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.checked(x)
        for level in self.levels:
            odd = x.shape[1] % 2
            # A split's backward pass is one concatenation; slices would pad their gradients and add them.
            projected, rest = x.split([x.shape[1] - odd, odd], dim=1) if odd else (x, None)
            pairs = level(projected).view(-1, projected.shape[1] // 2, self.dim)
            x = pairs if rest is None else torch.cat([pairs, rest], dim=1)
        return self.projector(x.flatten(1))


class HFFub(Fusion):
    """Unbalanced hierarchical feature fusion.

    One chain runs from the bottom tap upwards, one from the top tap downwards. A chain starts with two taps,
    each projected to C/2, concatenated to C; it goes on by projecting that and the next tap and concatenating
    the two. One middle tap is left unprojected; it and the ends of the chains are concatenated and projected
    by three linear layers. With 12 taps (0 is the lowest): bottom chain 0, 1, 2, 3, 4, 5, left over 6, top
    chain 11, 10, 9, 8, 7; that is 18 projections, as many as HFFb has, which the paper's equal parameter
    counts ask for; the paper gives no more about the wiring. A chain of one tap passes it unprojected.

    Inside a pair the lower tap's half comes first. Arguments as for `HFFb`.
    """

    def __init__(
        self,
        taps: int,
        dim: int,
        out_dim: int = 640,
        *,
        norm: bool = True,
        activation: str = "relu",
        backend: str = "auto",
    ) -> None:
        super().__init__(taps, dim, out_dim)
        _check_halves(dim)
        bottom, top = chain_lengths(taps)
        self.bottom = Chain(bottom, dim, upwards=True, norm=norm, activation=activation, backend=backend)
        self.top = (
            Chain(top, dim, upwards=False, norm=norm, activation=activation, backend=backend) if top else None
        )
        self.projector = make_projector(min(taps, 3) * dim, out_dim, depth=3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.checked(x)
        if self.top is None:
            bottom, *middle = x.split(self.bottom.taps, dim=1)
            ends = [self.bottom(bottom), *(tap.squeeze(1) for tap in middle)]
        else:
            bottom, middle, top = x.split([self.bottom.taps, 1, self.top.taps], dim=1)
            ends = [self.bottom(bottom), middle.squeeze(1), self.top(top)]
        return self.projector(torch.cat(ends, dim=1))


class Chain(nn.Module):
    """One chain of `HFFub`, `(N, taps, C)` to `(N, C)`: all taps are projected at once, then step by step.

    Modules: `leaves`, the projections of the taps; `steps`, those of the chain so far, taps - 2 of them.
    """

    def __init__(
        self, taps: int, dim: int, *, upwards: bool, norm: bool, activation: str, backend: str
    ) -> None:
        super().__init__()
        self.taps, self.upwards = taps, upwards

        def projections(slots: int) -> LayerProject:
            return LayerProject(slots, dim, dim // 2, norm=norm, activation=activation, backend=backend)

        self.leaves = projections(taps) if taps > 1 else None
        self.steps = nn.ModuleList(projections(1) for _ in range(taps - 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.leaves is None:
            return x[:, 0]
        halves = self.leaves(x)
        chained = (halves[:, :2] if self.upwards else halves[:, -2:]).flatten(1)
        for done, step in enumerate(self.steps, start=2):
            so_far = step(chained.unsqueeze(1)).squeeze(1)
            pair = [so_far, halves[:, done]] if self.upwards else [halves[:, -1 - done], so_far]
            chained = torch.cat(pair, dim=1)
        return chained


def balanced_plan(taps: int) -> list[int]:
    """Feature counts of `HFFb` from the taps to the top projector: [12, 6, 3], [7, 4, 2]."""
    plan = [taps]
    while plan[-1] > 3:
        plan.append(plan[-1] // 2 + plan[-1] % 2)
    return plan


def chain_lengths(taps: int) -> tuple[int, int]:
    """Taps of the bottom and of the top chain of `HFFub`; the one tap between them is in neither."""
    if taps == 1:
        return 1, 0
    return taps // 2, (taps - 1) // 2


def make_projector(in_dim: int, out_dim: int, depth: int) -> nn.Sequential:
    """`depth` linear layers with ReLU between them, all hidden ones `out_dim` wide."""
    layers: list[nn.Module] = [nn.Linear(in_dim, out_dim)]
    for _ in range(depth - 1):
        layers += [nn.ReLU(), nn.Linear(out_dim, out_dim)]
    return nn.Sequential(*layers)


def check_positive(name: str, value: int) -> None:
    """Raise unless `value` is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")


def _check_halves(dim: int) -> None:
    if dim % 2:
        raise ValueError(f"dim must be even (two projections to dim / 2 make the width again), got {dim}")
