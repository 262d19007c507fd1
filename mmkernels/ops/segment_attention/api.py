"""The public function :func:`segment_attention`: checks, choice of backend, gradients."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mmkernels.ops import _common, _derivatives, _inference, _lengths, _segments
from mmkernels.ops.segment_attention import reference
from mmkernels.ops.segment_attention.schema import OPS


class _SegmentAttention(torch.autograd.Function):
    """Arguments: the backend, and the one asked for; then those of the op in the order of its schema.

    The result has the order of memory ``(B, T, H, d)``, as that of the op.
    """

    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        asked: str,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        ends: Tensor,
        lookback: int,
        scale: float | None,
    ) -> Tensor:
        out, lse, extents = OPS[backend][0](q, k, v, ends, lookback, scale, True)
        ctx.save_for_backward(q, k, v, ends, out, lse, extents)
        ctx.options = backend, asked, lookback, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, ends, out, lse, extents = _common.saved_tensors("segment_attention", ctx)
        backend, asked, lookback, scale = ctx.options
        needed = ctx.needs_input_grad[2:5]
        found: list[Tensor | None]
        if _derivatives.beyond_kernels(grad):

            def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                return reference.segment_attention(q, k, v, ends, lookback=lookback, scale=scale)

            found = _derivatives.reference_gradients(
                "segment_attention", asked, attend, (q, k, v), needed, grad.transpose(-3, -2)
            )
        else:
            gradients = OPS[backend][1](grad, q, k, v, out, lse, extents, scale, *needed)
            found = [g.transpose(1, 2) if need else None for g, need in zip(gradients, needed, strict=True)]
        return None, None, *found, None, None, None


def segment_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ends: Tensor,
    *,
    lookback: int = 1,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Causal attention inside segments: a frame attends to itself, to the frames of its segment before it,
    and to ``lookback`` frames before the segment.

    Segments follow each other, so a segment is given by its end alone. Only scores of pairs that see each
    other are computed, and none is kept: the extra memory of forward and backward grows with T, and there is
    no mask.

    Equivalent to (``F`` is ``torch.nn.functional``; every frame in a segment, one head of keys for each)::

        starts, i = F.pad(ends, (1, 0))[:, :-1], torch.arange(q.shape[2])
        start = starts.gather(1, torch.searchsorted(ends, i.expand(len(ends), -1), right=True)) - lookback
        sees = (i >= start[..., None]) & (i <= i[:, None])  # (B, T, T)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=sees[:, None], scale=scale)

    Args:
        q: ``(B, H, T, d)``; float32, float16, bfloat16, on the CPU float64 too; d is a multiple of 8. Any
            strides, as from ``(B, T, H, d).transpose(1, 2)``; a tensor whose last dimension is not dense is
            copied once.
        k, v: ``(B, G, T, d)``, of the dtype of ``q``, where H is a multiple of G: H / G heads of queries in
            turn share a head of keys, as in grouped-query attention.
        ends: ``(B, M)``, int32 or int64, non-decreasing in each row: segment j of a row is its frames
            ``[ends[j - 1], ends[j])``, the first from frame 0 on. Values that decrease or lie outside
            ``[0, T]`` are an error on the CPU; on CUDA, where reading them would wait for the device, and in
            ``torch.func``, they are clamped to ``[0, T]`` and to the largest end before them.
        lookback: how many frames before its segment a frame sees; they may lie in several segments.
        scale: factor of the scores; ``1 / sqrt(d)`` if None.
        backend: ``"auto"``, ``"native"`` (compiled), ``"triton"`` or ``"reference"``.

    Returns:
        ``(B, H, T, d)``, of the dtype of ``q``. In memory it is dense in the order ``(B, T, H, d)``, so that
        ``out.transpose(1, 2).flatten(2)`` is a view. Frames in no segment, those from the last end on, are
        exactly 0, and so are their gradients, even where they hold NaN. Softmax and sums are in float32
        (float64). A row does not depend on the other rows, nor on the padding.

    Gradients flow to ``q``, ``k`` and ``v`` where they are required. The three are kept for the backward pass
    and not copied: overwriting one, or int64 ``ends``, in between is an error there. A NaN or infinite value
    reaches the queries that see its frame. One in ``v`` also reaches others of its row and heads: in the
    kernels those at most 63 frames from a query that sees it, in the reference all. Under autocast, q, k and
    v are cast to its dtype. Forward mode, ``torch.func`` and gradients of gradients are the reference's,
    which holds scores of size T x T: ``"auto"`` takes it by itself, a kernel asked for by name raises.

    Raises:
        TypeError: A value of the wrong type or dtype.
        ValueError: Shapes or devices that do not match, heads that do not divide, d that is no multiple of 8,
            a negative ``lookback``, values of ``ends`` as above, or a backend that cannot serve.
        RuntimeError: In the backward pass: an input was overwritten since the forward pass.

    Source: the blockwise mask of SSR-Connector (arXiv 2410.00168), where ``lookback`` is 1.
    """
    q, k, v = _checked(q, k, v, ends, lookback, scale)
    asked = backend
    if forward_ad._current_level >= 0 or _derivatives.transforms_active():
        backend = _derivatives.backend_in_transforms("segment_attention", backend, (q, k, v, ends))
    backend = _common.choose_backend("segment_attention", backend, q)
    # The compiled op for the CPU checks values by itself; there, this only writes the message.
    op_checks = backend == "native" and q.is_cpu
    if not op_checks:
        _check_values(q, ends)
    if backend == "reference":
        return reference.segment_attention(q, k, v, ends, lookback=lookback, scale=scale)
    arguments = q, k, v, ends.to(torch.int64), lookback, None if scale is None else float(scale)
    try:
        if _common.needs_gradient(q, k, v):
            out: Tensor = _inference.apply(_SegmentAttention, q, backend, asked, *arguments)
        else:
            out, _, _ = OPS[backend][0](*arguments, False)
    except RuntimeError:
        if op_checks:
            _check_values(q, ends)
        raise
    return out.transpose(1, 2)


def _checked(
    q: Tensor, k: Tensor, v: Tensor, ends: Tensor, lookback: int, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The arguments in the dtype of autocast, if it is on."""
    op = "segment_attention"
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        _common.check_tensor(op, name, tensor)
        _common.check_floating(op, name, tensor)
    q, k, v = (_common.as_autocast(tensor) for tensor in (q, k, v))
    if q.dim() != 4:
        raise ValueError(f"{op}: q must have shape (B, H, T, d), got {tuple(q.shape)}")
    batch, heads, frames, size = q.shape
    if size % 8 != 0:
        raise ValueError(f"{op}: d, the last size of q, must be a multiple of 8, got {size}")
    if k.dim() != 4 or (k.shape[0], k.shape[2], k.shape[3]) != (batch, frames, size):
        raise ValueError(f"{op}: k must have shape ({batch}, G, {frames}, {size}), got {tuple(k.shape)}")
    if (k.shape[1] == 0 and heads > 0) or (k.shape[1] > 0 and heads % k.shape[1] != 0):
        raise ValueError(
            f"{op}: the heads of q must be a multiple of those of k, got {heads} and {k.shape[1]}"
        )
    if v.shape != k.shape:
        raise ValueError(f"{op}: v must have the shape of k, {tuple(k.shape)}, got {tuple(v.shape)}")
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype:
            raise TypeError(f"{op}: {name} must have the dtype of q, {q.dtype}, got {tensor.dtype}")
        if tensor.device != q.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, q is on {q.device}")
    _segments.check_ends(op, ends, "q", q)
    if isinstance(lookback, bool) or not isinstance(lookback, (int, torch.SymInt)):
        raise TypeError(f"{op}: lookback must be an integer, got {type(lookback).__name__}")
    if not 0 <= lookback < 2**63:
        raise ValueError(f"{op}: lookback must not be negative and less than 2**63, got {lookback}")
    if isinstance(scale, int) and abs(scale) > sys.float_info.max:
        raise ValueError(f"{op}: scale must be within the range of a float")
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, (int, float, torch.SymFloat))):
        raise TypeError(f"{op}: scale must be a number or None, got {type(scale).__name__}")
    return q, k, v


def _check_values(q: Tensor, ends: Tensor) -> None:
    """Reading values back is free on the CPU only; while tracing and under vmap there is nothing to read."""
    if _lengths.readable(ends) and ends.shape[0] > 0:
        _segments.check_values("segment_attention", ends, "q", q.shape[2])
