"""Module around ``mmkernels.merge``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmkernels.ops.merge import merge

CONSTRAINTS = ("none", "clamp", "sigmoid")


class Merge(nn.Module):
    """Learnable merging of pairs of tensors: ``(1 - lam[g]) * target[k] + lam[g] * source[k]``.

    The interpolation weights of learnable attention merging (L-MAM, arXiv 2312.14378): ``lam[g]`` is the
    share of the source in all pairs of group g, such as the matrices of one layer.

    Equivalent to (for a ``Merge`` named ``module``)::

        pairs = zip(target, source, groups)
        out = [torch.lerp(t, s, module.lam[g]) for t, s, g in pairs]

    Args:
        num_groups: number of weights G.
        init: value of every weight at the start.
        constraint: how weights stay in ``[0, 1]``. ``"none"``: they need not. ``"clamp"``: a weight outside
            acts as the nearer end; a gradient that would lead it farther outside is zero, one that leads back
            is passed, so a weight that has reached an end can leave it. ``"sigmoid"``: weights are the
            sigmoid of the parameter.
        backend: passed to ``mmkernels.merge``.

    Parameters: ``weights (G,)``; with ``"sigmoid"`` they are logits. ``lam`` gives the weights as they are
    used.

    The tensors are kept for the backward pass, not copied: overwriting one in between is an error there.

    Raises:
        ValueError: no group, an unknown constraint, or a start outside the weights' range.
    """

    def __init__(
        self, num_groups: int, init: float = 0.05, constraint: str = "none", backend: str = "auto"
    ) -> None:
        super().__init__()
        if num_groups < 1:
            raise ValueError(f"num_groups must be at least 1, got {num_groups}")
        if constraint not in CONSTRAINTS:
            raise ValueError(f"constraint must be one of {', '.join(CONSTRAINTS)}, got {constraint!r}")
        allowed, interval = {
            "none": (math.isfinite(init), "finite"),
            "clamp": (0 <= init <= 1, "in [0, 1]"),
            "sigmoid": (0 < init < 1, "between 0 and 1"),
        }[constraint]
        if not allowed:
            raise ValueError(f"init must be {interval} with constraint={constraint!r}, got {init}")
        self.num_groups, self.init, self.constraint, self.backend = num_groups, init, constraint, backend
        self.weights = nn.Parameter(torch.empty(num_groups))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        start = math.log(self.init / (1 - self.init)) if self.constraint == "sigmoid" else self.init
        nn.init.constant_(self.weights, start)

    @property
    def lam(self) -> Tensor:
        """``(G,)``, the share of the source in each group."""
        if self.constraint == "sigmoid":
            return self.weights.sigmoid()
        return _Clamp.apply(self.weights) if self.constraint == "clamp" else self.weights

    def forward(
        self,
        target: Sequence[Tensor],
        source: Sequence[Tensor],
        groups: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
    ) -> list[Tensor]:
        """Merge each ``target[k]`` with ``source[k]``, of the same shape, into a new tensor.

        ``groups[k]`` is the group of pair k, by default k, or 0 where there is one group. The results have
        the targets' dtypes, or ``dtype``.
        """
        return merge(target, source, self.lam, groups=groups, dtype=dtype, backend=self.backend)

    def extra_repr(self) -> str:
        return f"{self.num_groups}, init={self.init}, constraint={self.constraint!r}"


class _Clamp(torch.autograd.Function):
    """To ``[0, 1]``. Descent moves an entry against its gradient: outside, only a move back has one."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weights: Tensor) -> Tensor:
        return weights.clamp(0, 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (weights,) = ctx.saved_tensors
        outwards = ((weights < 0) & (grad > 0)) | ((weights > 1) & (grad < 0))
        return torch.where(outwards, 0.0, grad)
