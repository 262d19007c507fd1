"""Triton kernels of :func:`mmkernels.segment_pool`, and the functions behind its ``_triton`` ops.

The units of a row are its segments, then its tiles of ``PIECE`` frames. The unit of a segment takes its first
piece of at most ``PIECE`` frames; the unit of a tile the later piece that starts in it. There is at most one:
pieces of a segment start ``PIECE`` frames apart, and the next segment's second piece as far after its end.
Segments of several pieces leave partial results, which another kernel combines in order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops._common import accumulate_dtype
from mmkernels.ops._triton import dense_rows, expect, expect_optional, loop_bound, on_device
from mmkernels.ops.segment_pool.schema import ATTENTION, LAST, MAX, REDUCTIONS

PIECE = 64
#: Rows and columns that a program works on at a time: 32 elements a thread.
BLOCK_ROWS = 8
WIDEST_BLOCK = 512
#: Segments that a program reads at a time to find one of them.
BLOCK_SEGMENTS = 256
MEAN_CODE = tl.constexpr(REDUCTIONS.index("mean"))
MAX_CODE = tl.constexpr(MAX)
LAST_CODE = tl.constexpr(LAST)
ATTENTION_CODE = tl.constexpr(ATTENTION)
#: The frame of a maximum that has none yet.
NO_FRAME = tl.constexpr(2**31 - 1)


@triton.jit
def larger(a, b):
    return tl.maximum(a, b)


@triton.jit(do_not_specialize=["frames", "segments"])
def segment_pool_stops_kernel(ends, counts, stops, frames, segments, BLOCK_SEGMENTS: tl.constexpr):
    """Ends of one row, clamped to the frames and to their running maximum; 0 past the count."""
    row = tl.program_id(0).to(tl.int64)
    count = segments.to(tl.int64)
    if counts is not None:
        count = tl.load(counts + row)
    before = count * 0
    for block in range(loop_bound((segments + BLOCK_SEGMENTS - 1) // BLOCK_SEGMENTS)):
        segment = block * BLOCK_SEGMENTS + tl.arange(0, BLOCK_SEGMENTS)
        end = tl.load(ends + row * segments + segment, mask=(segment < segments) & (segment < count), other=0)
        end = tl.minimum(tl.maximum(end, before), frames.to(tl.int64))
        stop = tl.associative_scan(end, 0, larger)
        tl.store(stops + row * segments + segment, stop, mask=segment < segments)
        before = tl.max(stop, 0)


@triton.jit
def find_segment(stops, segments, frame, BLOCK_SEGMENTS: tl.constexpr):
    """The first segment of a row that ends after the frame, or the number of segments."""
    found = frame * 0
    for block in range(loop_bound((segments + BLOCK_SEGMENTS - 1) // BLOCK_SEGMENTS)):
        segment = block * BLOCK_SEGMENTS + tl.arange(0, BLOCK_SEGMENTS)
        inside = segment < segments
        before = inside & (tl.load(stops + segment, mask=inside, other=0) <= frame)
        found += tl.sum(before.to(tl.int64), 0)
    return found


@triton.jit
def extent_of(stops, segment, segments):
    """First frame and stop of a segment of a row; 0 and 0 past the last."""
    present = segment < segments
    stop = tl.load(stops + segment, mask=present, other=0)
    start = tl.load(stops + segment - 1, mask=present & (segment > 0), other=0)
    return start, stop


@triton.jit
def partial_place(row, start, k, tiles, PIECE: tl.constexpr):
    """The place of piece k of a segment that starts at ``start`` among the partial results."""
    return 2 * (row * tiles + start // PIECE + k) + (k > 0).to(tl.int64)


@triton.jit
def piece_of(stops, unit, segments, tiles, PIECE: tl.constexpr, BLOCK_SEGMENTS: tl.constexpr):
    """Row, segment, first frame, number of frames and place of the piece of a unit. Without a piece it has no
    frames; the place of a piece that is its whole segment is -1."""
    row = unit // (segments + tiles)
    segment = unit - row * (segments + tiles)
    tile = segment - segments
    of_row = stops + row * segments
    if tile >= 0:
        segment = find_segment(of_row, segments, tile * PIECE, BLOCK_SEGMENTS)
    start, stop = extent_of(of_row, segment, segments)
    k = tl.where(tile >= 0, (tile * PIECE - start + PIECE - 1) // PIECE, 0)
    first = start + k * PIECE
    rows = tl.maximum(tl.minimum(stop - first, PIECE), 0)
    rows = tl.where((tile >= 0) & (k < 1), 0, rows)
    place = tl.where(stop - start > PIECE, partial_place(row, start, k, tiles, PIECE), -1)
    return row, segment, first, rows, place


@triton.jit
def exponentials(scores, row, rows, largest):
    """exp(score - largest) of some rows of a piece; 0 past its end."""
    inside = row < rows
    score = tl.load(scores + row, mask=inside, other=0.0)
    return tl.where(inside, tl.exp(score - largest), 0.0)


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
