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
        check_start("init", init, constraint)
        self.num_groups, self.init, self.constraint, self.backend = num_groups, init, constraint, backend
        self.weights = nn.Parameter(torch.empty(num_groups))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weights, start_value(self.init, self.constraint))

    @property
    def lam(self) -> Tensor:
        """``(G,)``, the share of the source in each group."""
        return constrain(self.weights, self.constraint)

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


def constrain(weights: Tensor, constraint: str) -> Tensor:
    """The shares of the source that ``weights`` stand for; see :class:`Merge`."""
    if constraint == "sigmoid":
        return weights.sigmoid()
    return _Clamp.apply(weights) if constraint == "clamp" else weights


def start_value(share: float, constraint: str) -> float:
    """The number that :func:`constrain` makes ``share`` of."""
    return math.log(share / (1 - share)) if constraint == "sigmoid" else share


def check_start(name: str, share: float, constraint: str) -> None:
    """ValueError, with the name, for a share that training cannot start from."""
    allowed, interval = {
        "none": (math.isfinite(share), "finite"),
        "clamp": (0 <= share <= 1, "in [0, 1]"),
        "sigmoid": (0 < share < 1, "between 0 and 1"),
    }[constraint]
    if not allowed:
        raise ValueError(f"{name} must be {interval} with constraint={constraint!r}, got {share}")


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
