"""Triton kernels of the backward pass of :func:`mmkernels.segment_pool`."""

from __future__ import annotations

import triton
import triton.language as tl

from mmkernels.ops._triton import loop_bound
from mmkernels.ops.segment_pool.schema import ATTENTION, LAST, MAX, REDUCTIONS
from mmkernels.ops.segment_pool.triton_pieces import exponentials, extent_of, partial_place, piece_of

MEAN_CODE = tl.constexpr(REDUCTIONS.index("mean"))
MAX_CODE = tl.constexpr(MAX)
LAST_CODE = tl.constexpr(LAST)
ATTENTION_CODE = tl.constexpr(ATTENTION)


@triton.jit
def first_uncovered(stops, unit, row, segments, tiles, PIECE: tl.constexpr):
    """First and end of the frames of a unit's tile that are in no segment; the unit of a segment has none."""
    tile = unit - row * (segments + tiles) - segments
    covered = tl.load(stops + row * segments + segments - 1, mask=segments > 0, other=0)
    return tl.where(tile < 0, (tiles + 1) * PIECE, tl.maximum(covered, tile * PIECE)), (tile + 1) * PIECE


@triton.jit
def attention_weights(scores, stats, row, segment, r, first, rows, frames, segments):
    """Weights of some rows of a piece; 0 past its end."""
    held = stats + 2 * (row * segments + segment)
    present = rows > 0
    largest = tl.load(held, mask=present, other=0.0)
    inverse = tl.load(held + 1, mask=present, other=0.0)
    return exponentials(scores + row * frames + first, r, rows, largest) * inverse


@triton.jit(do_not_specialize=["grad_batch_stride", "frames", "segments", "tiles"])
def segment_pool_spread_kernel(
    grad,
    stops,
    scores,
    stats,
    index,
    dx,
    grad_batch_stride,
    grad_segment_stride,
    frames,
    segments,
    tiles,
    width,
    REDUCE: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK_SEGMENTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """dx of the frames of one unit, for BLOCK_D columns."""
    unit = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    used = column < width
    row, segment, first, rows, _ = piece_of(stops, unit, segments, tiles, PIECE, BLOCK_SEGMENTS)
    start, stop = extent_of(stops + row * segments, segment, segments)
    element: tl.constexpr = dx.dtype.element_ty
    target = dx + row * frames * width + column[None, :]
    bare, end = first_uncovered(stops, unit, row, segments, tiles, PIECE)
    end = tl.minimum(end, frames)
    for block in range(loop_bound((end - bare + BLOCK_ROWS - 1) // BLOCK_ROWS)):
        frame = bare + block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        zeros = tl.zeros((BLOCK_ROWS, BLOCK_D), element)
        tl.store(target + frame[:, None] * width, zeros, mask=(frame < end)[:, None] & used[None, :])
    if rows > 0:
        of_segment = row * grad_batch_stride + segment * grad_segment_stride
        g = tl.load(grad + of_segment + column, mask=used, other=0.0).to(ACCUMULATE)
        if REDUCE == MEAN_CODE:
            g = g / (stop - start).to(ACCUMULATE)
        found = column
        if REDUCE == MAX_CODE:
            found = tl.load(index + (row * segments + segment) * width + column, mask=used, other=-1)
        for block in range(loop_bound((rows + BLOCK_ROWS - 1) // BLOCK_ROWS)):
            r = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
            frame = first + r
            value = g[None, :] + tl.zeros((BLOCK_ROWS, BLOCK_D), ACCUMULATE)
            if REDUCE == MAX_CODE:
                value = tl.where(frame[:, None] == found[None, :], value, 0.0)
            elif REDUCE == LAST_CODE:
                value = tl.where((frame == stop - 1)[:, None], value, 0.0)
            elif REDUCE == ATTENTION_CODE:
                weight = attention_weights(scores, stats, row, segment, r, first, rows, frames, segments)
                value = value * weight[:, None]
            inside = (r < rows)[:, None] & used[None, :]
            tl.store(target + frame[:, None] * width, value.to(element), mask=inside)


@triton.jit(do_not_specialize=["grad_batch_stride", "batch_stride", "frames", "segments", "tiles"])
def segment_pool_dots_kernel(
    grad,
    x,
    stops,
    scores,
    stats,
    d_scores,
    partial_dot,
    dx,
    grad_batch_stride,
    grad_segment_stride,
    batch_stride,
    frame_stride,
    frames,
    segments,
    tiles,
    ALIGNMENT: tl.constexpr,
    WIDTH: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK_SEGMENTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """grad . x of the frames of one unit, their weighted sum, and dx where it is wanted."""
    accumulate: tl.constexpr = d_scores.dtype.element_ty
    unit = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_D).to(tl.int64)
    row, segment, first, rows, place = piece_of(stops, unit, segments, tiles, PIECE, BLOCK_SEGMENTS)
    bare, end = first_uncovered(stops, unit, row, segments, tiles, PIECE)
    end = tl.minimum(end, frames)
    for block in range(loop_bound((end - bare + BLOCK_ROWS - 1) // BLOCK_ROWS)):
        frame = bare + block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        tl.store(d_scores + row * frames + frame, tl.zeros((BLOCK_ROWS,), accumulate), mask=frame < end)
        if dx is not None:
            for start in range(0, WIDTH, BLOCK_D):
                inside = (frame < end)[:, None] & (start + column < WIDTH)[None, :]
                target = dx + (row * frames + frame)[:, None] * WIDTH + (start + column)[None, :]
                tl.store(target, tl.zeros((BLOCK_ROWS, BLOCK_D), dx.dtype.element_ty), mask=inside)
    if rows > 0:
        of_segment = grad + row * grad_batch_stride + segment * grad_segment_stride
        source = x + row * batch_stride + first * frame_stride
        mean = tl.zeros((BLOCK_ROWS,), accumulate)
        for block in range(loop_bound((rows + BLOCK_ROWS - 1) // BLOCK_ROWS)):
            r = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
            weight = attention_weights(scores, stats, row, segment, r, first, rows, frames, segments)
            total = tl.zeros((BLOCK_ROWS, BLOCK_D), accumulate)
            for start in range(0, WIDTH, BLOCK_D):
                used = start + column < WIDTH
                inside = (r < rows)[:, None] & used[None, :]
                g = tl.load(of_segment + start + column, mask=used, other=0.0).to(accumulate)
                at = source + r.to(tl.int64)[:, None] * frame_stride + (start + column)[None, :]
                loaded = tl.load(tl.multiple_of(at, (1, ALIGNMENT)), mask=inside, other=0.0)
                total += g[None, :] * loaded.to(accumulate)
                if dx is not None:
                    target = dx + (row * frames + first + r)[:, None] * WIDTH + (start + column)[None, :]
                    value = weight[:, None] * g[None, :]
                    tl.store(target, value.to(dx.dtype.element_ty), mask=inside)
            dot = tl.sum(total, 1)
            tl.store(d_scores + row * frames + first + r, dot, mask=r < rows)
            mean += weight * tl.where(r < rows, dot, 0.0)
        if place >= 0:
            tl.store(partial_dot + place, tl.sum(mean, 0))


@triton.jit(do_not_specialize=["frames", "segments", "tiles"])
def segment_pool_scores_kernel(
    stops,
    scores,
    stats,
    d_scores,
    partial_dot,
    frames,
    segments,
    tiles,
    PIECE: tl.constexpr,
    BLOCK_SEGMENTS: tl.constexpr,
):
    """d_scores of one unit, where ``segment_pool_dots_kernel`` left the dots."""
    unit = tl.program_id(0).to(tl.int64)
    row, segment, first, rows, place = piece_of(stops, unit, segments, tiles, PIECE, BLOCK_SEGMENTS)
    if rows > 0:
        r = tl.arange(0, PIECE)
        at = d_scores + row * frames + first + r
        dot = tl.load(at, mask=r < rows, other=0.0)
        weight = attention_weights(scores, stats, row, segment, r, first, rows, frames, segments)
        mean = tl.sum(weight * dot, 0)
        if place >= 0:
            start, stop = extent_of(stops + row * segments, segment, segments)
            pieces = (stop - start + PIECE - 1) // PIECE
            sums = tl.zeros((BLOCK_SEGMENTS,), d_scores.dtype.element_ty)
            for block in range(loop_bound((pieces + BLOCK_SEGMENTS - 1) // BLOCK_SEGMENTS)):
                k = block * BLOCK_SEGMENTS + tl.arange(0, BLOCK_SEGMENTS)
                other = partial_dot + partial_place(row, start, k, tiles, PIECE)
                sums += tl.load(other, mask=k < pieces, other=0.0)
            mean = tl.sum(sums, 0)
        tl.store(at, weight * (dot - mean), mask=r < rows)
