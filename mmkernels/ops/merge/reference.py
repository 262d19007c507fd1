"""The definition of :func:`mmkernels.merge` in plain torch, written for reading."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmkernels.ops._common import accumulate_dtype
from mmkernels.ops._inference import widened


def merge(
    target: Sequence[Tensor],
    source: Sequence[Tensor],
    lam: Tensor,
    *,
    groups: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """``(1 - lam[g]) * target[k] + lam[g] * source[k]`` with ``g = groups[k]``.

    K pairs of tensors of any shapes, ``lam (G,)`` or a scalar, ``groups`` of K indices -> K tensors, shaped
    like the target.

    The arguments are those of :func:`mmkernels.merge`, unchecked, and ``lam`` is a tensor. Each result is
    computed in float32 (float64 for float64) and rounded once. Differentiable any number of times.
    """
    if groups is None:
        groups = list(range(len(target))) if lam.numel() > 1 else [0] * len(target)
    merged = []
    for a, b, group in zip(target, source, groups, strict=True):
        accumulate = accumulate_dtype(a.dtype)
        weight = widened(lam.reshape(-1)[group], accumulate)
        result = interpolate(a.to(accumulate), b.to(accumulate), weight)
        merged.append(result.to(dtype or a.dtype))
    return merged


def interpolate(target: Tensor, source: Tensor, weight: Tensor) -> Tensor:
    """One pair and a scalar, all of one dtype."""
    difference = source - target
    # An infinity or NaN on the side that has no weight must not come through.
    at_an_end = (weight == 0) | (weight == 1)
    difference = torch.where(at_an_end & ~difference.isfinite(), 0.0, difference)
    # Seen from the nearer end, so that both ends are exact.
    return torch.where(weight < 0.5, target + weight * difference, source - (1 - weight) * difference)
