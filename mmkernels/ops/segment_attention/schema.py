"""torch ops behind :func:`mmkernels.segment_attention`. ``ends`` is int64.

Results are in the order of memory ``(B, T, H, d)``, in which the projection after attention reads them. For
each frame, ``extents`` has the first key that its query sees, and the end of the queries that see its key.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels import _library
from mmkernels.ops._common import accumulate_dtype


def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, ends: Tensor, lookback: int, scale: float | None, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if not q.device == k.device == v.device == ends.device:
        raise RuntimeError("expected one device for all")
    batch, heads, frames, size = q.shape
    return (
        q.new_empty((batch, frames, heads, size)),
        q.new_empty((batch if save else 0, heads, frames), dtype=accumulate_dtype(q.dtype)),
        q.new_empty((batch, 2, frames), dtype=torch.int32),
    )


def _backward_fake(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    extents: Tensor,
    scale: float | None,
    need_q: bool,
    need_k: bool,
    need_v: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, frames, size = q.shape
    key_heads = k.shape[1]
    return (
        q.new_empty((batch if need_q else 0, frames, heads, size)),
        q.new_empty((batch if need_k else 0, frames, key_heads, size)),
        q.new_empty((batch if need_v else 0, frames, key_heads, size)),
    )


_library.define(
    "segment_attention_fwd",
    "Tensor q, Tensor k, Tensor v, Tensor ends, SymInt lookback, float? scale, bool save",
    "(Tensor, Tensor, Tensor)",
    _forward_fake,
    "mmkernels.ops.segment_attention.triton",
)
_library.define(
    "segment_attention_bwd",
    "Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor extents, float? scale, "
    "bool need_q, bool need_k, bool need_v",
    "(Tensor, Tensor, Tensor)",
    _backward_fake,
    "mmkernels.ops.segment_attention.triton",
)

_ops = torch.ops.mmkernels
#: backend -> (forward op, backward op)
OPS = {
    "native": (_ops.segment_attention_fwd.default, _ops.segment_attention_bwd.default),
    "triton": (_ops.segment_attention_fwd_triton.default, _ops.segment_attention_bwd_triton.default),
}
