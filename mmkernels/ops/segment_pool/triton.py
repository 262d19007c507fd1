"""The functions behind the ``_triton`` ops of :func:`mmkernels.segment_pool`: checks, memory, launches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops._common import accumulate_dtype
from mmkernels.ops._triton import dense_rows, expect, expect_optional, on_device
from mmkernels.ops.segment_pool.schema import ATTENTION, LAST, MAX, REDUCTIONS
from mmkernels.ops.segment_pool.triton_backward import (
    segment_pool_dots_kernel,
    segment_pool_scores_kernel,
    segment_pool_spread_kernel,
)
from mmkernels.ops.segment_pool.triton_forward import segment_pool_combine_kernel, segment_pool_fwd_kernel
from mmkernels.ops.segment_pool.triton_pieces import segment_pool_stops_kernel

PIECE = 64
#: Rows and columns that a program works on at a time: 32 elements a thread.
BLOCK_ROWS = 8
WIDEST_BLOCK = 512
#: Segments that a program reads at a time to find one of them.
BLOCK_SEGMENTS = 256


def segment_pool_fwd(
    x: Tensor, ends: Tensor, scores: Tensor | None, counts: Tensor | None, reduce: int, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """``mmkernels::segment_pool_fwd_triton``."""
    inputs = Inputs.checked(x, x.shape[1] if x.dim() == 3 else 0, ends, scores, counts, reduce)
    x = dense_rows(x)
    batch, segments, width = inputs.batch, inputs.segments, inputs.width
    out = x.new_empty((batch, segments, width))
    wide = accumulate_dtype(x.dtype)
    stats = x.new_empty((batch if save and reduce == ATTENTION else 0, segments, 2), dtype=wide)
    index = x.new_empty((batch if save and reduce == MAX else 0, segments, width), dtype=torch.int32)
    if batch * segments == 0 or width == 0:
        return out, stats.zero_(), index
    tiles = triton.cdiv(inputs.frames, PIECE) if inputs.frames > PIECE and reduce != LAST else 0
    places = 2 * batch * tiles
    partial = x.new_empty((places, width), dtype=wide)
    partial_index = x.new_empty((places if reduce == MAX else 0, width), dtype=torch.int32)
    partial_stats = x.new_empty((places if reduce == ATTENTION else 0, 2), dtype=wide)
    given = [stats if stats.numel() > 0 else None, index if index.numel() > 0 else None]
    results = (out, *given, partial, partial_index, partial_stats)
    with on_device(x):
        stops = inputs.stops()
        options = inputs.options(BLOCK_ROWS=BLOCK_ROWS)
        slices = triton.cdiv(width, options["BLOCK_D"])
        segment_pool_fwd_kernel[(batch * (segments + tiles), slices)](
            x,
            stops,
            inputs.scores,
            *results,
            *strides_of(x),
            inputs.frames,
            segments,
            tiles,
            width,
            REDUCE=reduce,
            ALIGNMENT=alignment_of(x),
            **options,
        )
        if tiles > 0:
            segment_pool_combine_kernel[(batch * tiles, slices)](
                stops, *results, segments, tiles, width, REDUCE=reduce, **options
            )
    return out, stats, index


def segment_pool_bwd(
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
    """``mmkernels::segment_pool_bwd_triton``."""
    inputs = Inputs.checked(grad, frames, ends, scores, counts, reduce)
    batch, segments, width = inputs.batch, inputs.segments, inputs.width
    if grad.shape[1] != segments:
        raise ValueError(f"grad: expected {segments} segments, got {grad.shape[1]}")
    wide = accumulate_dtype(grad.dtype)
    if reduce == ATTENTION:
        stats = expect("stats", stats, (batch, segments, 2), wide, grad.device)
    if reduce == MAX:
        index = expect("index", index, (batch, segments, width), torch.int32, grad.device)
    if need_scores and (reduce != ATTENTION or x is None):
        raise ValueError("need_scores: expected attention, and x")
    dx = grad.new_empty((batch if need_x else 0, frames, width))
    d_scores = grad.new_empty((batch if need_scores else 0, frames), dtype=wide)
    if batch * frames == 0 or width == 0:
        return dx, d_scores.zero_()
    grad, units = dense_rows(grad), batch * (segments + triton.cdiv(frames, PIECE))
    sizes = frames, segments, triton.cdiv(frames, PIECE)
    with on_device(grad):
        stops = inputs.stops()
        options = inputs.options(BLOCK_ROWS=BLOCK_ROWS)
        if need_scores and x is not None:
            x = dense_rows(expect_like(x, (batch, frames, width), grad))
            partial_dot = d_scores.new_empty(2 * batch * sizes[2])
            segment_pool_dots_kernel[(units,)](
                grad,
                x,
                stops,
                inputs.scores,
                stats,
                d_scores,
                partial_dot,
                dx if need_x else None,
                *strides_of(grad),
                *strides_of(x),
                *sizes,
                ALIGNMENT=alignment_of(x),
                WIDTH=width,
                **options,
            )
            segment_pool_scores_kernel[(units,)](
                stops,
                inputs.scores,
                stats,
                d_scores,
                partial_dot,
                *sizes,
                PIECE=PIECE,
                BLOCK_SEGMENTS=BLOCK_SEGMENTS,
                num_warps=1,
            )
        elif need_x:
            segment_pool_spread_kernel[(units, triton.cdiv(width, options["BLOCK_D"]))](
                grad,
                stops,
                inputs.scores,
                stats,
                index,
                dx,
                *strides_of(grad),
                *sizes,
                width,
                REDUCE=reduce,
                ACCUMULATE=tl.float64 if wide == torch.float64 else tl.float32,
                **options,
            )
    return dx, d_scores


def strides_of(tensor: Tensor) -> tuple[int, int]:
    """Strides of the first two dimensions. torch lets that of a single element be anything; then it is the
    usual one, so that a batch of one frame compiles nothing again."""
    batch, rows, width = tensor.shape
    return tensor.stride(0) if batch > 1 else rows * width, tensor.stride(1) if rows > 1 else width


def alignment_of(x: Tensor) -> int:
    """Bytes that the address of every row is a multiple of: those of a whole vector, or 1."""
    item = x.dtype.itemsize
    starts = (x.data_ptr(), *(stride * item for stride in strides_of(x)))
    return 16 if all(start % 16 == 0 for start in starts) else 1


def expect_like(x: Tensor, shape: tuple[int, ...], grad: Tensor) -> Tensor:
    if tuple(x.shape) != shape or x.dtype != grad.dtype or x.device != grad.device:
        raise ValueError(f"x: expected shape {shape}, {grad.dtype} on {grad.device}, got {tuple(x.shape)}")
    return x


@dataclass(frozen=True)
class Inputs:
    """The segments of a call, checked and contiguous, and its sizes."""

    batch: int
    frames: int
    width: int
    ends: Tensor
    scores: Tensor | None
    counts: Tensor | None

    @classmethod
    def checked(
        cls,
        like: Tensor,
        frames: int,
        ends: Tensor,
        scores: Tensor | None,
        counts: Tensor | None,
        reduce: int,
    ) -> Inputs:
        """``like`` has the batch, the width and the dtype: the frames, or the gradient of the result."""
        if like.dim() != 3 or ends.dim() != 2:
            raise ValueError("expected frames of three dimensions and ends of two")
        if not 0 <= reduce < len(REDUCTIONS) or (reduce == ATTENTION) != (scores is not None):
            raise ValueError(f"reduce: expected below {len(REDUCTIONS)}, with scores for {ATTENTION} alone")
        if not 0 <= frames < 2**31:
            raise ValueError(f"frames: expected below 2147483648, got {frames}")
        batch, _, width = like.shape
        ends = expect("ends", ends, (batch, ends.shape[1]), torch.int64, like.device)
        wide = accumulate_dtype(like.dtype)
        scores = expect_optional("scores", scores, (batch, frames), wide, like.device)
        counts = expect_optional("counts", counts, (batch,), torch.int64, like.device)
        return cls(batch, frames, width, ends, scores, counts)

    @property
    def segments(self) -> int:
        return self.ends.shape[1]

    def stops(self) -> Tensor:
        stops = torch.empty_like(self.ends)
        if self.segments > 0:
            segment_pool_stops_kernel[(self.batch,)](
                self.ends,
                self.counts,
                stops,
                self.frames,
                self.segments,
                BLOCK_SEGMENTS=BLOCK_SEGMENTS,
                num_warps=1,
            )
        return stops

    def options(self, **more: Any) -> dict[str, Any]:
        """Constants of a launch that the width decides, and those of every launch."""
        block = min(triton.next_power_of_2(self.width), WIDEST_BLOCK)
        warps = max(1, BLOCK_ROWS * block // 1024)
        return {
            "PIECE": PIECE,
            "BLOCK_SEGMENTS": BLOCK_SEGMENTS,
            "BLOCK_D": block,
            "num_warps": warps,
            **more,
        }
