"""torch ops behind :func:`mmkernels.merge`. Targets have one dtype, sources have one dtype, ``lam`` is of the
accumulation type, ``(G,)``; ``groups`` has the entry of ``lam`` of each pair."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels import _library


def _check(target: list[Tensor], source: list[Tensor], lam: Tensor, groups: list[int]) -> None:
    if not len(target) == len(source) == len(groups):
        raise RuntimeError("target, source and groups: expected lists of one length")
    if any(a.shape != b.shape for a, b in zip(target, source, strict=True)):
        raise RuntimeError("source: expected the shapes of target")
    if any(tensor.device != lam.device for tensor in (*target, *source)):
        raise RuntimeError("expected one device for all")


def _forward_fake(
    target: list[Tensor], source: list[Tensor], lam: Tensor, groups: list[int], dtype: torch.dtype
) -> list[Tensor]:
    _check(target, source, lam, groups)
    return [tensor.new_empty(tensor.shape, dtype=dtype) for tensor in target]


def _out_fake(
    target: list[Tensor], source: list[Tensor], lam: Tensor, groups: list[int], out: list[Tensor]
) -> None:
    _check(target, source, lam, groups)
    if len(out) != len(target) or any(tensor.device != lam.device for tensor in out):
        raise RuntimeError("out: expected a tensor for each pair, on one device with them")


def _backward_fake(
    grad: list[Tensor],
    target: list[Tensor],
    source: list[Tensor],
    lam: Tensor,
    groups: list[int],
    need_lam: bool,
    need_target: list[int],
    need_source: list[int],
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    _check(target, source, lam, groups)
    return (
        lam.new_empty((lam.shape[0] if need_lam else 0,)),
        [target[index].new_empty(target[index].shape) for index in need_target],
        [source[index].new_empty(source[index].shape) for index in need_source],
    )


_PAIRS = "Tensor[] target, Tensor[] source, Tensor lam, int[] groups"

_library.define(
    "merge_fwd", f"{_PAIRS}, ScalarType dtype", "Tensor[]", _forward_fake, "mmkernels.ops.merge.triton"
)
# Writes into memory that the caller gives; it has no derivative.
_library.define("merge_out", f"{_PAIRS}, Tensor(a!)[] out", "()", _out_fake, "mmkernels.ops.merge.triton")
_library.define(
    "merge_bwd",
    f"Tensor[] grad, {_PAIRS}, bool need_lam, int[] need_target, int[] need_source",
    "(Tensor, Tensor[], Tensor[])",
    _backward_fake,
    "mmkernels.ops.merge.triton",
)

_ops = torch.ops.mmkernels
#: backend -> (forward op, op into given memory, backward op)
OPS = {
    "native": (_ops.merge_fwd.default, _ops.merge_out.default, _ops.merge_bwd.default),
    "triton": (_ops.merge_fwd_triton.default, _ops.merge_out_triton.default, _ops.merge_bwd_triton.default),
}
