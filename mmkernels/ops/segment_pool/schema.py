"""torch ops behind :func:`mmkernels.segment_pool`. ``ends`` and ``counts`` are int64, ``scores`` of the
accumulation type."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels import _library
from mmkernels.ops._common import accumulate_dtype

#: Values of the argument ``reduce``; the torch ops take their places.
REDUCTIONS = ("mean", "sum", "max", "last", "attention")
MAX, LAST, ATTENTION = map(REDUCTIONS.index, ("max", "last", "attention"))


def _forward_fake(
    x: Tensor, ends: Tensor, scores: Tensor | None, counts: Tensor | None, reduce: int, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if ends.device != x.device:
        raise RuntimeError("expected one device for all")
    batch, segments = ends.shape
    held = batch if save and reduce == ATTENTION else 0
    indexed = batch if save and reduce == MAX else 0
    return (
        x.new_empty((batch, segments, x.shape[2])),
        x.new_empty((held, segments, 2), dtype=accumulate_dtype(x.dtype)),
        x.new_empty((indexed, segments, x.shape[2]), dtype=torch.int32),
    )


def _backward_fake(
    grad: Tensor,
    x: Tensor | None,
    ends: Tensor,
    scores: Tensor | None,
    counts: Tensor | None,
    stats: Tensor,
    index: Tensor,
    frames: int,
    reduce: int,
    need_x: bool,
    need_scores: bool,
) -> tuple[Tensor, Tensor]:
    batch, _, width = grad.shape
    return (
        grad.new_empty((batch if need_x else 0, frames, width)),
        grad.new_empty((batch if need_scores else 0, frames), dtype=accumulate_dtype(grad.dtype)),
    )


_library.define(
    "segment_pool_fwd",
    "Tensor x, Tensor ends, Tensor? scores, Tensor? counts, int reduce, bool save",
    "(Tensor, Tensor, Tensor)",
    _forward_fake,
    "mmkernels.ops.segment_pool.triton",
)
_library.define(
    "segment_pool_bwd",
    "Tensor grad, Tensor? x, Tensor ends, Tensor? scores, Tensor? counts, Tensor stats, Tensor index, "
    "SymInt frames, int reduce, bool need_x, bool need_scores",
    "(Tensor, Tensor)",
    _backward_fake,
    "mmkernels.ops.segment_pool.triton",
)

_ops = torch.ops.mmkernels
#: backend -> (forward op, backward op)
OPS = {
    "native": (_ops.segment_pool_fwd.default, _ops.segment_pool_bwd.default),
    "triton": (_ops.segment_pool_fwd_triton.default, _ops.segment_pool_bwd_triton.default),
}
