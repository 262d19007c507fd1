"""The public function :func:`merge`: checks, choice of backend, gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmkernels.ops import _common
from mmkernels.ops.merge import reference
from mmkernels.ops.merge.schema import OPS


class _Merge(torch.autograd.Function):
    """Arguments: the backend, the number of pairs, the dtype of the results, `lam`, and the groups; then the
    targets and the sources."""

    @staticmethod
    def forward(
        ctx: Any, backend: str, count: int, dtype: torch.dtype, lam: Tensor, groups: list[int], *pairs: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(lam, *pairs)
        ctx.options = backend, count, groups
        ctx.set_materialize_grads(False)
        return tuple(OPS[backend][0](list(pairs[:count]), list(pairs[count:]), lam, groups, dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        lam, *pairs = _common.saved_tensors("merge", ctx)
        backend, count, groups = ctx.options
        needed = ctx.needs_input_grad[5:]
        # Pairs whose result was not used have no gradient.
        used = [index for index, grad in enumerate(grads) if grad is not None]
        need_target = [place for place, index in enumerate(used) if needed[index]]
        need_source = [place for place, index in enumerate(used) if needed[count + index]]
        d_lam, d_target, d_source = OPS[backend][2](
            [grads[index] for index in used],
            [pairs[index] for index in used],
            [pairs[count + index] for index in used],
            lam,
            [groups[index] for index in used],
            ctx.needs_input_grad[3],
            need_target,
            need_source,
        )
        by_pair: dict[int, Tensor] = {
            used[place]: tensor for place, tensor in zip(need_target, d_target, strict=True)
        }
        by_pair |= {count + used[place]: tensor for place, tensor in zip(need_source, d_source, strict=True)}
        return (
            *(None, None, None),
            d_lam if ctx.needs_input_grad[3] else None,
            None,
            *(by_pair.get(index) for index in range(2 * count)),
        )


def merge(
    target: Sequence[Tensor],
    source: Sequence[Tensor],
    lam: Tensor | float | Sequence[float],
    *,
    groups: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
    out: Sequence[Tensor] | None = None,
    backend: str = "auto",
) -> list[Tensor]:
    """Interpolate many pairs of tensors at once: ``(1 - lam[g]) * target[k] + lam[g] * source[k]``."""
    first = target[0]
    backend = _common.choose_backend("merge", backend, first)
    weights = torch.as_tensor(lam, device=first.device).reshape(-1)
    if groups is None:
        groups = list(range(len(target))) if weights.numel() > 1 else [0] * len(target)
    if backend == "reference":
        return reference.merge(target, source, weights, groups=groups, dtype=dtype)
    weights = weights.to(_common.accumulate_dtype(first.dtype))
    if out is not None:
        OPS[backend][1](list(target), list(source), weights, list(groups), list(out))
        return list(out)
    return list(
        _Merge.apply(backend, len(target), dtype or first.dtype, weights, list(groups), *target, *source)
    )
