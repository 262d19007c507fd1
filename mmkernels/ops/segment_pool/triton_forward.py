"""Triton kernels of the forward pass of :func:`mmkernels.segment_pool`."""

from __future__ import annotations

import triton
import triton.language as tl

from mmkernels.ops._triton import loop_bound
from mmkernels.ops.segment_pool.schema import ATTENTION, LAST, MAX, REDUCTIONS
from mmkernels.ops.segment_pool.triton_pieces import (
    exponentials,
    extent_of,
    find_segment,
    partial_place,
    piece_of,
)

MEAN_CODE = tl.constexpr(REDUCTIONS.index("mean"))
MAX_CODE = tl.constexpr(MAX)
LAST_CODE = tl.constexpr(LAST)
ATTENTION_CODE = tl.constexpr(ATTENTION)
#: The frame of a maximum that has none yet.
NO_FRAME = tl.constexpr(2**31 - 1)


@triton.jit
def largest_of(value, frame):
    """Of each column of a tile: NaN if there is one, else the largest value, and its first frame."""
    nan = value != value
    any_nan = tl.max(nan.to(tl.int32), 0) > 0
    best = tl.max(tl.where(nan, float("-inf"), value), 0)
    match = tl.where(any_nan[None, :], nan, value == best[None, :])
    first = tl.min(tl.where(match, frame, NO_FRAME), 0)
    return tl.where(any_nan, float("nan"), best), first


@triton.jit
def add_to_largest(value, frame, x, at, inside):
    """The larger of each element; the first of equal ones, and of NaN, stays."""
    replaces = (frame == NO_FRAME) | (~(x <= value) & (value == value))
    take = inside & replaces
    return tl.where(take, x, value), tl.where(take, at, frame)


@triton.jit(do_not_specialize=["batch_stride", "frames", "segments", "tiles"])
def segment_pool_fwd_kernel(
    x,
    stops,
    scores,
    out,
    stats,
    index,
    partial,
    partial_index,
    partial_stats,
    batch_stride,
    frame_stride,
    frames,
    segments,
    tiles,
    width,
    REDUCE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK_SEGMENTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The piece of one unit, for BLOCK_D columns: the result of its segment, or a partial result."""
    accumulate: tl.constexpr = partial.dtype.element_ty
    unit = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    used = column < width
    row, segment, first, rows, place = piece_of(stops, unit, segments, tiles, PIECE, BLOCK_SEGMENTS)
    is_segment = unit - row * (segments + tiles) < segments
    if REDUCE == LAST_CODE:  # no segment has a second piece
        start, stop = extent_of(stops + row * segments, segment, segments)
        rows = tl.minimum(stop - start, 1)
        first, place = stop - rows, tl.full((), -1, tl.int64)
    if is_segment | (rows > 0):
        source = x + row * batch_stride + first * frame_stride
        largest = tl.zeros((), accumulate)
        divisor = tl.full((), 1.0, accumulate)
        if REDUCE == MEAN_CODE:
            divisor = tl.maximum(rows, 1).to(accumulate)
        of_piece = scores
        if REDUCE == ATTENTION_CODE:
            of_piece = scores + row * frames + first
            all_rows = tl.arange(0, PIECE)
            score = tl.load(of_piece + all_rows, mask=all_rows < rows, other=float("-inf"))
            largest = tl.max(tl.where(score != score, float("-inf"), score), 0)
            largest = tl.where(largest == float("-inf"), 0.0, largest)
            total = tl.sum(exponentials(of_piece, all_rows, rows, largest), 0)
            divisor = tl.where(total == 0.0, 1.0, total)
            if tl.program_id(1) == 0:
                if place >= 0:
                    tl.store(partial_stats + 2 * place, largest)
                    tl.store(partial_stats + 2 * place + 1, total)
                elif stats is not None:
                    tl.store(stats + 2 * (row * segments + segment), largest)
                    tl.store(stats + 2 * (row * segments + segment) + 1, 1.0 / divisor)
        value = tl.zeros((BLOCK_ROWS, BLOCK_D), accumulate)
        frame = tl.full((BLOCK_ROWS, BLOCK_D), NO_FRAME, tl.int32)
        if REDUCE == MAX_CODE:
            value = tl.full((BLOCK_ROWS, BLOCK_D), float("-inf"), accumulate)
        for block in range(loop_bound((rows + BLOCK_ROWS - 1) // BLOCK_ROWS)):
            r = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
            inside = (r < rows)[:, None] & used[None, :]
            at = source + r.to(tl.int64)[:, None] * frame_stride + column[None, :]
            loaded = tl.load(tl.multiple_of(at, (1, ALIGNMENT)), mask=inside, other=0.0).to(accumulate)
            if REDUCE == MAX_CODE:
                number = (first + r).to(tl.int32)[:, None]
                value, frame = add_to_largest(value, frame, loaded, number, inside)
            elif REDUCE == ATTENTION_CODE:
                value += exponentials(of_piece, r, rows, largest)[:, None] * loaded
            else:
                value += loaded
        if REDUCE == MAX_CODE:
            result, found = largest_of(value, frame)
            # The frame of a result without one is -1, its value 0.
            result = tl.where(found == NO_FRAME, 0.0, result)
            found = tl.where(found == NO_FRAME, -1, found)
        else:
            result, found = tl.sum(value, 0), column
        if place >= 0:
            tl.store(partial + place * width + column, result, mask=used)
            if REDUCE == MAX_CODE:
                tl.store(partial_index + place * width + column, found, mask=used)
        else:
            target = (row * segments + segment) * width + column
            tl.store(out + target, (result / divisor).to(out.dtype.element_ty), mask=used)
            if index is not None:
                tl.store(index + target, found, mask=used)


@triton.jit
def partial_softmax(partial_stats, row, start, pieces, tiles, PIECE: tl.constexpr, BLOCK: tl.constexpr):
    """Largest score and sum of exponentials of a segment, from those of its pieces."""
    best = tl.full((BLOCK,), float("-inf"), partial_stats.dtype.element_ty)
    for block in range(loop_bound((pieces + BLOCK - 1) // BLOCK)):
        k = block * BLOCK + tl.arange(0, BLOCK)
        at = partial_stats + 2 * partial_place(row, start, k, tiles, PIECE)
        total = tl.load(at + 1, mask=k < pieces, other=0.0)
        best = tl.where(total != 0.0, tl.maximum(best, tl.load(at, mask=k < pieces, other=0.0)), best)
    largest = tl.max(best, 0)
    largest = tl.where(largest == float("-inf"), 0.0, largest)
    sums = tl.zeros((BLOCK,), partial_stats.dtype.element_ty)
    for block in range(loop_bound((pieces + BLOCK - 1) // BLOCK)):
        k = block * BLOCK + tl.arange(0, BLOCK)
        at = partial_stats + 2 * partial_place(row, start, k, tiles, PIECE)
        total = tl.load(at + 1, mask=k < pieces, other=0.0)
        score = tl.load(at, mask=k < pieces, other=0.0)
        sums += tl.where(total != 0.0, tl.exp(score - largest) * total, 0.0)
    return largest, tl.sum(sums, 0)


@triton.jit(do_not_specialize=["segments", "tiles"])
def segment_pool_combine_kernel(
    stops,
    out,
    stats,
    index,
    partial,
    partial_index,
    partial_stats,
    segments,
    tiles,
    width,
    REDUCE: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK_SEGMENTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The segment of several pieces that starts in one tile, if there is one, for BLOCK_D columns."""
    accumulate: tl.constexpr = partial.dtype.element_ty
    unit = tl.program_id(0).to(tl.int64)
    row = unit // tiles
    tile = unit - row * tiles
    column = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    used = column < width
    # Such a segment has the first frame of the next tile.
    segment = find_segment(stops + row * segments, segments, (tile + 1) * PIECE, BLOCK_SEGMENTS)
    start, stop = extent_of(stops + row * segments, segment, segments)
    if (start // PIECE == tile) & (stop - start > PIECE):
        pieces = (stop - start + PIECE - 1) // PIECE
        largest = tl.zeros((), accumulate)
        divisor = tl.full((), 1.0, accumulate)
        if REDUCE == MEAN_CODE:
            divisor = (stop - start).to(accumulate)
        if REDUCE == ATTENTION_CODE:
            largest, total = partial_softmax(partial_stats, row, start, pieces, tiles, PIECE, BLOCK_SEGMENTS)
            divisor = tl.where(total == 0.0, 1.0, total)
            if stats is not None:
                saved = stats + 2 * (row * segments + segment)
                tl.store(saved, largest, mask=tl.program_id(1) == 0)
                tl.store(saved + 1, 1.0 / divisor, mask=tl.program_id(1) == 0)
        value = tl.zeros((BLOCK_ROWS, BLOCK_D), accumulate)
        frame = tl.full((BLOCK_ROWS, BLOCK_D), NO_FRAME, tl.int32)
        for block in range(loop_bound((pieces + BLOCK_ROWS - 1) // BLOCK_ROWS)):
            k = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
            inside = (k < pieces)[:, None] & used[None, :]
            place = partial_place(row, start, k, tiles, PIECE)
            at = place[:, None] * width + column[None, :]
            loaded = tl.load(partial + at, mask=inside, other=0.0)
            if REDUCE == MAX_CODE:
                number = tl.load(partial_index + at, mask=inside, other=0)
                value, frame = add_to_largest(value, frame, loaded, number, inside)
            elif REDUCE == ATTENTION_CODE:
                score = tl.load(partial_stats + 2 * place, mask=k < pieces, other=0.0)
                of_piece = tl.load(partial_stats + 2 * place + 1, mask=k < pieces, other=0.0)
                value += tl.where(of_piece == 0.0, 0.0, tl.exp(score - largest))[:, None] * loaded
            else:
                value += loaded
        target = (row * segments + segment) * width + column
        if REDUCE == MAX_CODE:
            value = tl.where(frame == NO_FRAME, float("-inf"), value)
            result, found = largest_of(value, frame)
            if index is not None:
                tl.store(index + target, found, mask=used)
        else:
            result = tl.sum(value, 0)
        tl.store(out + target, (result / divisor).to(out.dtype.element_ty), mask=used)
