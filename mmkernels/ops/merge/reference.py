"""The definition of :func:`mmkernels.merge` in plain torch, written for reading."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmkernels.ops._common import accumulate_dtype


class _Interpolate(torch.autograd.Function):
    """`(1 - lam) * target + lam * source` for one pair and a scalar `lam`, all of one dtype.

    With `lam` 0 or 1 it is a copy of one side, also where the other is not finite.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(target: Tensor, source: Tensor, lam: Tensor) -> Tensor:
        difference = source - target
        # Seen from the nearer end, so that both ends are exact.
        between = torch.where(lam < 0.5, target + lam * difference, source - (1 - lam) * difference)
        return torch.where(lam == 0, target, torch.where(lam == 1, source, between))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        target, source, lam = ctx.saved_tensors
        return (1 - lam) * grad, lam * grad, (grad * (source - target)).sum()

    @staticmethod
    def jvp(ctx: Any, d_target: Tensor, d_source: Tensor, d_lam: Tensor) -> Tensor:
        target, source, lam = ctx.saved_tensors
        return (1 - lam) * d_target + lam * d_source + d_lam * (source - target)


def merge(
    target: Sequence[Tensor],
    source: Sequence[Tensor],
    lam: Tensor,
    *,
    groups: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """``(1 - lam[g]) * target[k] + lam[g] * source[k]`` with ``g = groups[k]``.

    The arguments are those of :func:`mmkernels.merge`, unchecked. Each result is computed in float32 (float64
    for float64) and rounded once. Differentiable any number of times.
    """
    if groups is None:
        groups = range(len(target)) if lam.numel() > 1 else [0] * len(target)
    merged = []
    for a, b, group in zip(target, source, groups, strict=True):
        accumulate = accumulate_dtype(a.dtype)
        weight = lam.reshape(-1)[group].to(accumulate)
        result = _Interpolate.apply(a.to(accumulate), b.to(accumulate), weight)
        merged.append(result.to(dtype or a.dtype))
    return merged
