"""The public function :func:`segment_pool`: checks, choice of backend, gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mmkernels.ops import _common, _derivatives, _inference, _lengths, _segments
from mmkernels.ops.segment_pool import reference
from mmkernels.ops.segment_pool.schema import MAX, OPS, REDUCTIONS


class _SegmentPool(torch.autograd.Function):
    """Arguments: the backend, and the one asked for; then those of the op in the order of its schema."""

    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        asked: str,
        x: Tensor,
        ends: Tensor,
        scores: Tensor | None,
        counts: Tensor | None,
        reduce: int,
    ) -> Tensor:
        out, stats, index = OPS[backend][0](x, ends, scores, counts, reduce, True)
        # Only the gradient of the scores depends on the frames.
        frames = x if ctx.needs_input_grad[4] else None
        ctx.save_for_backward(frames, ends, scores, counts, stats, index)
        ctx.options = backend, asked, x.shape[1], reduce
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = _common.saved_tensors("segment_pool", ctx)
        need_x, need_scores = ctx.needs_input_grad[2], ctx.needs_input_grad[4]
        if _derivatives.beyond_kernels(grad):
            dx, d_scores = _reference_gradients(ctx, grad, *saved)
        else:
            backend, _, frames, reduce = ctx.options
            dx, d_scores = OPS[backend][1](grad, *saved, frames, reduce, need_x, need_scores)
        return None, None, dx if need_x else None, None, d_scores if need_scores else None, None, None


def _reference_gradients(
    ctx: Any,
    grad: Tensor,
    x: Tensor | None,
    ends: Tensor,
    scores: Tensor | None,
    counts: Tensor | None,
    stats: Tensor,
    index: Tensor,
) -> list[Tensor | None]:
    """The gradients of frames and scores, computed by the reference."""
    _, asked, frames, reduce = ctx.options
    if x is None:  # the result is linear in the frames: its gradient is that at any of them
        x = ends.new_zeros((ends.shape[0], frames, grad.shape[2]), dtype=grad.dtype)

    def pool(x: Tensor, scores: Tensor | None) -> Tensor:
        if reduce == MAX:
            return reference.take_frames(x, index.to(torch.int64))
        return reference.segment_pool(x, ends, reduce=REDUCTIONS[reduce], scores=scores, counts=counts)

    needed = ctx.needs_input_grad[2], ctx.needs_input_grad[4]
    return _derivatives.reference_gradients("segment_pool", asked, pool, (x, scores), needed, grad)


def segment_pool(
    x: Tensor,
    ends: Tensor,
    *,
    reduce: str = "mean",
    scores: Tensor | None = None,
    counts: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """One vector for each segment of each row of frames: their mean, sum, maximum, last frame, or a weighted
    sum.

    Segments follow each other, so a segment is given by its end alone. Each frame is read once, and frames in
    no segment are not read. The extra memory is the result; segments of more than 64 frames add partial sums.

    Equivalent to (``reduce="mean"``; ``F`` is ``torch.nn.functional``)::

        starts, frame = F.pad(ends, (1, 0))[:, :-1], torch.arange(x.shape[1])
        inside = (frame >= starts[..., None]) & (frame < ends[..., None])  # (B, M, T)
        out = inside.to(x.dtype) @ x / inside.sum(-1, keepdim=True).clamp(min=1)

    Args:
        x: ``(B, T, D)``: T frames in each of B rows; float32, float16, bfloat16, on the CPU float64 too. Any
            strides; a tensor whose last dimension is not dense is copied once.
        ends: ``(B, M)``, int32 or int64, non-decreasing in each row: segment j of a row is its frames
            ``[ends[j - 1], ends[j])``, the first from frame 0 on. Frames from the last end on are in no
            segment. Values that decrease or lie outside ``[0, T]`` are an error on the CPU; on CUDA, where
            reading them would wait for the device, and in ``torch.func``, they are clamped to ``[0, T]`` and
            to the largest end before them.
        reduce: ``"mean"``, ``"sum"``, ``"max"`` (the first of equal values; NaN where a frame has one),
            ``"last"`` (the last frame), or ``"attention"`` (frames weighted by the softmax of ``scores``
            inside each segment).
        scores: ``(B, T)``, for attention only, of any floating dtype; read in float32 (float64 for float64).
            ``-inf`` leaves a frame out. NaN and ``inf`` are an error on the CPU, and NaN in the result of
            that segment elsewhere. Those of frames in no segment are not read.
        counts: ``(B,)`` integers in ``[0, M]``: how many segments of each row there are. The later ends are
            not read, and their results are zero.
        backend: ``"auto"``, ``"native"`` (compiled), ``"triton"`` or ``"reference"``.

    Returns:
        A dense tensor ``(B, M, D)`` of the dtype of ``x``, zero for segments without frames. Sums are in
        float32 (float64), for any number of frames, and rounded once. A segment's result does not depend on
        the other rows, nor on the padding.

    Gradients flow to ``x`` and ``scores`` where they are required, in one pass. Every frame in no segment has
    the gradient zero, even if it holds NaN. That of a maximum goes to the frame that it came from. ``x`` is
    kept for the backward pass only for the gradient of ``scores``, and not copied: overwriting it, or
    ``ends``, in between is an error there. Forward mode, ``torch.func`` and gradients of gradients are the
    reference's: ``"auto"`` takes it by itself, a kernel asked for by name raises.

    Raises:
        TypeError: A value of the wrong type or dtype.
        ValueError: Shapes or devices that do not match, an unknown ``reduce``, ``scores`` missing or unused,
            values of ``ends``, ``counts`` or ``scores`` as above, or a backend that cannot serve.
        RuntimeError: In the backward pass: an input was overwritten since the forward pass.

    Source: the pooling of SSR-Connector (arXiv 2410.00168), and its selection of boundary frames
    (``"last"``).
    """
    _check_tensors(x, ends, reduce, scores, counts)
    asked = backend
    if forward_ad._current_level >= 0 or _derivatives.transforms_active():
        backend = _derivatives.backend_in_transforms("segment_pool", backend, (x, ends, scores, counts))
    backend = _common.choose_backend("segment_pool", backend, x)
    # The compiled op for the CPU checks values by itself; there, this only writes the message.
    op_checks = backend == "native" and x.is_cpu
    if not op_checks:
        _check_values(x, ends, scores, counts)
    if backend == "reference":
        return reference.segment_pool(x, ends, reduce=reduce, scores=scores, counts=counts)
    wide = _common.accumulate_dtype(x.dtype)
    segments = ends.to(torch.int64)
    weights = None if scores is None else scores.to(wide)
    limits = None if counts is None else counts.to(torch.int64)
    code = REDUCTIONS.index(reduce)
    try:
        if _common.needs_gradient(x, weights):
            arguments = x, segments, weights, limits, code
            pooled: Tensor = _inference.apply(_SegmentPool, x, backend, asked, *arguments)
        else:
            pooled, _, _ = OPS[backend][0](x, segments, weights, limits, code, False)
    except RuntimeError:
        if op_checks:
            _check_values(x, ends, scores, counts)
        raise
    return pooled


def _check_tensors(
    x: Tensor, ends: Tensor, reduce: str, scores: Tensor | None, counts: Tensor | None
) -> None:
    op = "segment_pool"
    _common.check_tensor(op, "x", x)
    _common.check_floating(op, "x", x)
    if x.dim() != 3:
        raise ValueError(f"{op}: x must have shape (B, T, D), got {tuple(x.shape)}")
    _segments.check_ends(op, ends, "x", x)
    if reduce not in REDUCTIONS:
        raise ValueError(f"{op}: reduce must be one of {', '.join(REDUCTIONS)}, got {reduce!r}")
    if (reduce == "attention") != (scores is not None):
        given = "none" if scores is None else f"scores with reduce={reduce!r}"
        raise ValueError(f"{op}: scores are needed for reduce='attention', and for it alone, got {given}")
    _common.check_parameter(op, "scores", scores, [(x.shape[0], x.shape[1])], x.device)
    if counts is not None:
        _lengths.check_kind(op, "counts", counts, "x", x)


def _check_values(x: Tensor, ends: Tensor, scores: Tensor | None, counts: Tensor | None) -> None:
    """Where reading values is free."""
    if not _lengths.readable(x) or ends.shape[0] == 0:
        return
    op, frames, segments = "segment_pool", x.shape[1], ends.shape[1]
    valid = torch.ones_like(ends, dtype=torch.bool)
    if counts is not None:
        _lengths.check_range(op, "counts", counts, segments)
        valid = torch.arange(segments) < counts.unsqueeze(-1)
    _segments.check_values(op, ends, "x", frames, valid)
    if scores is not None and segments > 0 and frames > 0:
        last = torch.where(valid, ends, 0).amax(1, keepdim=True)
        wrong = (torch.arange(frames) < last) & ~(scores < torch.inf)
        if (place := _lengths.first_place(wrong)) is not None:
            raise ValueError(
                f"{op}: scores must be numbers or -inf; row {place[0]} has {scores[place].item()} at frame "
                f"{place[1]}"
            )
