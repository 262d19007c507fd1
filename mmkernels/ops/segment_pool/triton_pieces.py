"""Segments, and the pieces of them that the Triton kernels of :func:`mmkernels.segment_pool` take.

The units of a row are its segments, then its tiles of ``PIECE`` frames. The unit of a segment takes its first
piece of at most ``PIECE`` frames; the unit of a tile the later piece that starts in it. There is at most one:
pieces of a segment start ``PIECE`` frames apart, and the next segment's second piece as far after its end.
Segments of several pieces leave partial results, which another kernel combines in order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mmkernels.ops._triton import loop_bound


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
