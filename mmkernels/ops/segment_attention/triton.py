"""Triton kernels of :func:`mmkernels.segment_attention`, and the functions behind its ``_triton`` ops.

A program takes ``BLOCK_ROWS`` frames of one head and streams tiles of ``BLOCK_STEP`` frames of the other side
past them: for the result and for dq it has queries and streams the keys that they see, for dk and dv it has
keys and streams the queries that see them, of every head that shares the keys. Both are contiguous frames.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops._common import accumulate_dtype
from mmkernels.ops._triton import INTERPRETED, dense_rows, expect, loop_bound, on_device

BLOCK_ROWS = 64
#: Frames of a window of extents, and segments that a program reads at a time.
WINDOW = 128
BLOCK_SEGMENTS = 16
NO_STOP = tl.constexpr(2**31 - 1)
#: A kernel is compiled once for all values of these.
ANY_SIZES = ["frames", *(f"{name}_{of}_stride" for name in "qkv" for of in ("batch", "head"))]


@triton.jit
def larger(a, b):
    return tl.maximum(a, b)


@triton.jit(do_not_specialize=["segments", "frames", "lookback"])
def attention_extents_kernel(
    ends, extents, segments, frames, lookback, WINDOW: tl.constexpr, BLOCK_SEGMENTS: tl.constexpr
):
    """For a window of frames of one row: the first key that each query sees, and the end of the queries that
    see each key. Ends are clamped to the frames and to their running maximum."""
    windows = (frames + WINDOW - 1) // WINDOW
    program = tl.program_id(0).to(tl.int64)
    row = program // windows
    frame = (program - row * windows) * WINDOW + tl.arange(0, WINDOW)
    before = row * 0
    start = tl.zeros((WINDOW,), tl.int64)
    stop = tl.full((WINDOW,), NO_STOP, tl.int64)
    for block in range(loop_bound((segments + BLOCK_SEGMENTS - 1) // BLOCK_SEGMENTS)):
        segment = block * BLOCK_SEGMENTS + tl.arange(0, BLOCK_SEGMENTS)
        end = tl.load(ends + row * segments + segment, mask=segment < segments, other=0)
        end = tl.minimum(tl.maximum(end, before), frames.to(tl.int64))
        end = tl.associative_scan(end, 0, larger)
        begun = end[None, :] <= frame[:, None]
        start = tl.maximum(start, tl.max(tl.where(begun, end[None, :], 0), 1))
        later = end[None, :] > frame[:, None] + lookback
        stop = tl.minimum(stop, tl.min(tl.where(later, end[None, :], NO_STOP), 1))
        before = tl.max(end, 0)
    covered = frame < before
    start = tl.where(covered, tl.maximum(start - lookback, 0), frames)
    stop = tl.where(covered, tl.minimum(stop, before), 0)
    target = extents + row * 2 * frames + frame
    tl.store(target, start.to(tl.int32), mask=frame < frames)
    tl.store(target + frames, stop.to(tl.int32), mask=frame < frames)


@triton.jit
def add_attention_product(a, b, total):
    """Factors of float32 are not rounded to tf32."""
    if INTERPRETED:
        # Triton 3.6's interpreter multiplies the bit patterns of bfloat16; widening is exact.
        a, b = a.to(total.dtype), b.to(total.dtype)
    return tl.dot(a, b, total, input_precision="ieee", out_dtype=total.dtype)


@triton.jit
def attention_rows(data, frame, frame_stride, column, inside, SIZE: tl.constexpr, ALIGNMENT: tl.constexpr):
    """Rows of a head; 0 for frames that are not inside."""
    at = data + frame.to(tl.int64)[:, None] * frame_stride + column[None, :]
    at = tl.multiple_of(at, (1, ALIGNMENT))
    return tl.load(at, mask=inside[:, None] & (column < SIZE)[None, :], other=0.0)


@triton.jit
def attention_block(extents, heads, frames, BLOCK_ROWS: tl.constexpr):
    """Row, head and first frame of a program, its frames, those of them in segments, and their count."""
    blocks = (frames + BLOCK_ROWS - 1) // BLOCK_ROWS
    program = tl.program_id(0).to(tl.int64)
    row = program // (blocks * heads)
    rest = program - row * blocks * heads
    # Programs of the same frames follow each other: heads of queries share keys.
    first = rest // heads * BLOCK_ROWS
    head = rest % heads
    frame = first + tl.arange(0, BLOCK_ROWS)
    inside = frame < frames
    start = tl.load(extents + row * 2 * frames + frame, mask=inside, other=NO_STOP)
    covered = inside & (start < frames)
    return row, head, first, frame, covered, tl.sum(covered.to(tl.int64), 0)


@triton.jit(do_not_specialize=ANY_SIZES)
def segment_attention_fwd_kernel(
    q,
    k,
    v,
    extents,
    out,
    lse,
    q_batch_stride,
    q_head_stride,
    q_frame_stride,
    k_batch_stride,
    k_head_stride,
    k_frame_stride,
    v_batch_stride,
    v_head_stride,
    v_frame_stride,
    frames,
    HEADS: tl.constexpr,
    SHARING: tl.constexpr,
    SIZE: tl.constexpr,
    SCALE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_STEP: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Queries of one head, by an online softmax."""
    accumulate: tl.constexpr = tl.float64 if out.dtype.element_ty == tl.float64 else tl.float32
    row, head, first, query, covered, count = attention_block(extents, HEADS, frames, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_D)
    start = tl.load(extents + row * 2 * frames + query, mask=covered, other=0)
    begin = tl.maximum(tl.minimum(tl.load(extents + row * 2 * frames + first).to(tl.int64), first), 0)
    end = first + count
    queries = attention_rows(
        q + row * q_batch_stride + head * q_head_stride,
        query,
        q_frame_stride,
        column,
        covered,
        SIZE,
        ALIGNMENT,
    )
    keys_at = k + row * k_batch_stride + head // SHARING * k_head_stride
    values_at = v + row * v_batch_stride + head // SHARING * v_head_stride
    largest = tl.full((BLOCK_ROWS,), float("-inf"), accumulate)
    total = tl.zeros((BLOCK_ROWS,), accumulate)
    sums = tl.zeros((BLOCK_ROWS, BLOCK_D), accumulate)
    steps = tl.where(count > 0, (end - begin + BLOCK_STEP - 1) // BLOCK_STEP, 0)
    for step in range(loop_bound(steps)):
        key = begin + step * BLOCK_STEP + tl.arange(0, BLOCK_STEP)
        keys = attention_rows(keys_at, key, k_frame_stride, column, key < end, SIZE, ALIGNMENT)
        values = attention_rows(values_at, key, v_frame_stride, column, key < end, SIZE, ALIGNMENT)
        scores = tl.zeros((BLOCK_ROWS, BLOCK_STEP), accumulate)
        scores = add_attention_product(queries, tl.trans(keys), scores) * SCALE
        sees = covered[:, None] & (key[None, :] >= start[:, None]) & (key[None, :] <= query[:, None])
        scores = tl.where(sees, scores, float("-inf"))
        most = tl.maximum(largest, tl.max(scores, 1))
        # Where all scores so far are -inf, their exponentials are 0.
        shift = tl.where(most == float("-inf"), 0.0, most)
        factor = tl.exp(largest - shift)
        weights = tl.exp(scores - shift[:, None])
        total = total * factor + tl.sum(weights, 1)
        sums = add_attention_product(weights.to(values.dtype), values, sums * factor[:, None])
        largest = most
    result = tl.where(covered[:, None], sums / tl.where(covered, total, 1.0)[:, None], 0.0)
    target = ((row * frames + query) * HEADS + head) * SIZE
    written = (query < frames)[:, None] & (column < SIZE)[None, :]
    tl.store(out + target[:, None] + column[None, :], result.to(out.dtype.element_ty), mask=written)
    if lse is not None:
        logarithm = tl.where(covered, largest + tl.log(tl.where(covered, total, 1.0)), 0.0)
        tl.store(lse + (row * HEADS + head) * frames + query, logarithm, mask=query < frames)


@triton.jit(do_not_specialize=["g_batch_stride", "g_frame_stride", "g_head_stride", "frames"])
def segment_attention_dots_kernel(
    grad,
    out,
    dots,
    g_batch_stride,
    g_head_stride,
    g_frame_stride,
    frames,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """grad . out of some frames of one head; ``out`` is dense in the order (batch, frame, head)."""
    blocks = (frames + BLOCK_ROWS - 1) // BLOCK_ROWS
    program = tl.program_id(0).to(tl.int64)
    head = program % HEADS
    row = program // HEADS // blocks
    frame = (program // HEADS - row * blocks) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_D)
    inside = frame < frames
    of_head = out + (row * frames * HEADS + head) * SIZE
    results = attention_rows(of_head, frame, HEADS * SIZE, column, inside, SIZE, ALIGNMENT)
    grads = attention_rows(
        grad + row * g_batch_stride + head * g_head_stride,
        frame,
        g_frame_stride,
        column,
        inside,
        SIZE,
        ALIGNMENT,
    )
    accumulate: tl.constexpr = dots.dtype.element_ty
    dot = tl.sum(results.to(accumulate) * grads.to(accumulate), 1)
    tl.store(dots + (row * HEADS + head) * frames + frame, dot, mask=inside)


@triton.jit(do_not_specialize=[*ANY_SIZES, "g_batch_stride", "g_head_stride"])
def segment_attention_dq_kernel(
    q,
    k,
    v,
    grad,
    extents,
    lse,
    dots,
    dq,
    q_batch_stride,
    q_head_stride,
    q_frame_stride,
    k_batch_stride,
    k_head_stride,
    k_frame_stride,
    v_batch_stride,
    v_head_stride,
    v_frame_stride,
    g_batch_stride,
    g_head_stride,
    g_frame_stride,
    frames,
    HEADS: tl.constexpr,
    SHARING: tl.constexpr,
    SIZE: tl.constexpr,
    SCALE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_STEP: tl.constexpr,
    BLOCK_D: tl.constexpr,
    OWN_DOTS: tl.constexpr,
):
    """The gradient of some queries of one head.

    OWN_DOTS: dots are sums of the products that they are subtracted from, and are written here; the result,
    which is rounded, would leave an error where few keys are seen.
    """
    accumulate: tl.constexpr = lse.dtype.element_ty
    row, head, first, query, covered, count = attention_block(extents, HEADS, frames, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_D)
    start = tl.load(extents + row * 2 * frames + query, mask=covered, other=0)
    begin = tl.maximum(tl.minimum(tl.load(extents + row * 2 * frames + first).to(tl.int64), first), 0)
    end = first + count
    queries = attention_rows(
        q + row * q_batch_stride + head * q_head_stride,
        query,
        q_frame_stride,
        column,
        covered,
        SIZE,
        ALIGNMENT,
    )
    grads = attention_rows(
        grad + row * g_batch_stride + head * g_head_stride,
        query,
        g_frame_stride,
        column,
        covered,
        SIZE,
        ALIGNMENT,
    )
    keys_at = k + row * k_batch_stride + head // SHARING * k_head_stride
    values_at = v + row * v_batch_stride + head // SHARING * v_head_stride
    place = (row * HEADS + head) * frames + query
    logarithm = tl.load(lse + place, mask=covered, other=0.0)
    steps = tl.where(count > 0, (end - begin + BLOCK_STEP - 1) // BLOCK_STEP, 0)
    if OWN_DOTS:
        dot = tl.zeros((BLOCK_ROWS,), accumulate)
        # The weights add up to 1 but for the rounding of lse.
        total = tl.zeros((BLOCK_ROWS,), accumulate)
        for step in range(loop_bound(steps)):
            key = begin + step * BLOCK_STEP + tl.arange(0, BLOCK_STEP)
            keys = attention_rows(keys_at, key, k_frame_stride, column, key < end, SIZE, ALIGNMENT)
            values = attention_rows(values_at, key, v_frame_stride, column, key < end, SIZE, ALIGNMENT)
            zeros = tl.zeros((BLOCK_ROWS, BLOCK_STEP), accumulate)
            scores = add_attention_product(queries, tl.trans(keys), zeros) * SCALE
            products = add_attention_product(grads, tl.trans(values), zeros)
            sees = covered[:, None] & (key[None, :] >= start[:, None]) & (key[None, :] <= query[:, None])
            weights = tl.where(sees, tl.exp(scores - logarithm[:, None]), 0.0)
            total += tl.sum(weights, 1)
            dot += tl.sum(tl.where(sees, weights * products, 0.0), 1)
        dot = dot / tl.where(covered, total, 1.0)
        tl.store(dots + place, dot, mask=covered)
    else:
        dot = tl.load(dots + place, mask=covered, other=0.0)
    if dq is not None:
        sums = tl.zeros((BLOCK_ROWS, BLOCK_D), accumulate)
        for step in range(loop_bound(steps)):
            key = begin + step * BLOCK_STEP + tl.arange(0, BLOCK_STEP)
            keys = attention_rows(keys_at, key, k_frame_stride, column, key < end, SIZE, ALIGNMENT)
            values = attention_rows(values_at, key, v_frame_stride, column, key < end, SIZE, ALIGNMENT)
            zeros = tl.zeros((BLOCK_ROWS, BLOCK_STEP), accumulate)
            scores = add_attention_product(queries, tl.trans(keys), zeros) * SCALE
            products = add_attention_product(grads, tl.trans(values), zeros)
            sees = covered[:, None] & (key[None, :] >= start[:, None]) & (key[None, :] <= query[:, None])
            weights = tl.exp(scores - logarithm[:, None])
            slopes = tl.where(sees, weights * (products - dot[:, None]), 0.0)
            sums = add_attention_product(slopes.to(keys.dtype), keys, sums)
        result = tl.where(covered[:, None], sums * SCALE, 0.0).to(dq.dtype.element_ty)
        target = ((row * frames + query) * HEADS + head) * SIZE
        written = (query < frames)[:, None] & (column < SIZE)[None, :]
        tl.store(dq + target[:, None] + column[None, :], result, mask=written)


@triton.jit(do_not_specialize=[*ANY_SIZES, "g_batch_stride", "g_head_stride"])
def segment_attention_dkv_kernel(
    q,
    k,
    v,
    grad,
    extents,
    lse,
    dots,
    dk,
    dv,
    q_batch_stride,
    q_head_stride,
    q_frame_stride,
    k_batch_stride,
    k_head_stride,
    k_frame_stride,
    v_batch_stride,
    v_head_stride,
    v_frame_stride,
    g_batch_stride,
    g_head_stride,
    g_frame_stride,
    frames,
    HEADS: tl.constexpr,
    SHARING: tl.constexpr,
    SIZE: tl.constexpr,
    SCALE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_STEP: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The gradients of some keys and values, from all heads of queries that share them. HEADS: of keys."""
    accumulate: tl.constexpr = lse.dtype.element_ty
    row, key_head, first, key, covered, count = attention_block(extents, HEADS, frames, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_D)
    stops = extents + (row * 2 + 1) * frames
    stop = tl.load(stops + key, mask=covered, other=0)
    last = first + count
    end = tl.load(stops + tl.maximum(last - 1, 0)).to(tl.int64)
    end = tl.minimum(tl.maximum(end, last), frames.to(tl.int64))
    keys = attention_rows(
        k + row * k_batch_stride + key_head * k_head_stride,
        key,
        k_frame_stride,
        column,
        covered,
        SIZE,
        ALIGNMENT,
    )
    values = attention_rows(
        v + row * v_batch_stride + key_head * v_head_stride,
        key,
        v_frame_stride,
        column,
        covered,
        SIZE,
        ALIGNMENT,
    )
    key_sums = tl.zeros((BLOCK_ROWS, BLOCK_D), accumulate)
    value_sums = tl.zeros((BLOCK_ROWS, BLOCK_D), accumulate)
    steps = tl.where(count > 0, (end - first + BLOCK_STEP - 1) // BLOCK_STEP, 0)
    for shared in range(SHARING):
        head = key_head * SHARING + shared
        queries_at = q + row * q_batch_stride + head * q_head_stride
        grads_at = grad + row * g_batch_stride + head * g_head_stride
        place = (row * HEADS * SHARING + head) * frames
        for step in range(loop_bound(steps)):
            query = first + step * BLOCK_STEP + tl.arange(0, BLOCK_STEP)
            inside = query < end
            queries = attention_rows(queries_at, query, q_frame_stride, column, inside, SIZE, ALIGNMENT)
            grads = attention_rows(grads_at, query, g_frame_stride, column, inside, SIZE, ALIGNMENT)
            logarithm = tl.load(lse + place + query, mask=inside, other=0.0)
            dot = tl.load(dots + place + query, mask=inside, other=0.0)
            zeros = tl.zeros((BLOCK_ROWS, BLOCK_STEP), accumulate)
            scores = add_attention_product(keys, tl.trans(queries), zeros) * SCALE
            sees = covered[:, None] & inside[None, :]
            sees = sees & (query[None, :] >= key[:, None]) & (query[None, :] < stop[:, None])
            weights = tl.where(sees, tl.exp(scores - logarithm[None, :]), 0.0)
            if dv is not None:
                value_sums = add_attention_product(weights.to(grads.dtype), grads, value_sums)
            if dk is not None:
                products = add_attention_product(values, tl.trans(grads), zeros)
                slopes = tl.where(sees, weights * (products - dot[None, :]), 0.0)
                key_sums = add_attention_product(slopes.to(queries.dtype), queries, key_sums)
    target = ((row * frames + key) * HEADS + key_head) * SIZE
    at = target[:, None] + column[None, :]
    written = (key < frames)[:, None] & (column < SIZE)[None, :]
    if dk is not None:
        result = tl.where(covered[:, None], key_sums * SCALE, 0.0)
        tl.store(dk + at, result.to(dk.dtype.element_ty), mask=written)
    if dv is not None:
        result = tl.where(covered[:, None], value_sums, 0.0)
        tl.store(dv + at, result.to(dv.dtype.element_ty), mask=written)


def segment_attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, ends: Tensor, lookback: int, scale: float | None, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """``mmkernels::segment_attention_fwd_triton``."""
    q, k, v = checked_inputs(q, k, v)
    batch, heads, frames, size = q.shape
    ends = expect("ends", ends, (batch, ends.shape[-1]), torch.int64, q.device)
    if lookback < 0:
        raise ValueError(f"lookback: expected at least 0, got {lookback}")
    out = q.new_empty((batch, frames, heads, size))
    lse = q.new_empty((batch if save else 0, heads, frames), dtype=accumulate_dtype(q.dtype))
    extents = q.new_empty((batch, 2, frames), dtype=torch.int32)
    if batch * frames == 0:
        return out, lse, extents
    with on_device(q):
        attention_extents_kernel[(batch * triton.cdiv(frames, WINDOW),)](
            ends,
            extents,
            ends.shape[1],
            frames,
            min(lookback, frames),
            WINDOW=WINDOW,
            BLOCK_SEGMENTS=BLOCK_SEGMENTS,
        )
        if heads * size > 0:
            constants = options(size, q.dtype)
            blocks = triton.cdiv(frames, constants["BLOCK_ROWS"])
            segment_attention_fwd_kernel[(batch * heads * blocks,)](
                *(q, k, v, extents, out, lse if save else None),
                *(*strides_of(q), *strides_of(k), *strides_of(v)),
                frames,
                HEADS=heads,
                SHARING=heads // k.shape[1],
                SCALE=scale_of(scale, size),
                ALIGNMENT=alignment_of(q, k, v),
                **constants,
            )
    return out, lse, extents


def segment_attention_bwd(
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
    """``mmkernels::segment_attention_bwd_triton``."""
    q, k, v = checked_inputs(q, k, v)
    batch, heads, frames, size = q.shape
    key_heads = k.shape[1]
    wide = accumulate_dtype(q.dtype)
    if tuple(grad.shape) != (batch, frames, heads, size) or grad.dtype != q.dtype or grad.device != q.device:
        raise ValueError(f"grad: expected {(batch, frames, heads, size)}, {q.dtype}, got {tuple(grad.shape)}")
    out = expect("out", out, (batch, frames, heads, size), q.dtype, q.device)
    lse = expect("lse", lse, (batch, heads, frames), wide, q.device)
    extents = expect("extents", extents, (batch, 2, frames), torch.int32, q.device)
    dq = q.new_empty((batch if need_q else 0, frames, heads, size))
    dk = q.new_empty((batch if need_k else 0, frames, key_heads, size))
    dv = q.new_empty((batch if need_v else 0, frames, key_heads, size))
    if batch * key_heads * frames * size == 0:
        return dq, dk, dv
    if heads == 0:
        return dq, dk.zero_(), dv.zero_()
    grad = dense_rows(grad).transpose(1, 2)
    dots = torch.empty_like(lse)
    constants = options(size, q.dtype, "queries")
    blocks = triton.cdiv(frames, constants["BLOCK_ROWS"])
    given = (q, k, v, grad, extents, lse, dots)
    strides = [stride for tensor in (q, k, v, grad) for stride in strides_of(tensor)]
    common = {"ALIGNMENT": alignment_of(q, k, v, grad)}
    shared = {**common, "SHARING": heads // key_heads, "SCALE": scale_of(scale, size)}
    of_dots = {name: value for name, value in constants.items() if name != "BLOCK_STEP"}
    own_dots = q.dtype == wide
    with on_device(q):
        if not own_dots:
            segment_attention_dots_kernel[(batch * heads * blocks,)](
                grad, out, dots, *strides_of(grad), frames, HEADS=heads, **common, **of_dots
            )
        if need_q or own_dots:
            results = (*given, dq if need_q else None)
            segment_attention_dq_kernel[(batch * heads * blocks,)](
                *results, *strides, frames, HEADS=heads, OWN_DOTS=own_dots, **shared, **constants
            )
        if need_k or need_v:
            wanted = dk if need_k else None, dv if need_v else None
            segment_attention_dkv_kernel[(batch * key_heads * blocks,)](
                *given, *wanted, *strides, frames, HEADS=key_heads, **shared, **options(size, q.dtype, "keys")
            )
    return dq, dk, dv


def checked_inputs(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Checked for memory safety; the public function has better messages."""
    if q.dim() != 4 or k.dim() != 4:
        raise ValueError("q, k: expected four dimensions")
    batch, heads, frames, size = q.shape
    key_heads = k.shape[1]
    for name, tensor in (("k", k), ("v", v)):
        if tuple(tensor.shape) != (batch, key_heads, frames, size):
            expected = (batch, key_heads, frames, size)
            raise ValueError(f"{name}: expected shape {expected}, got {tuple(tensor.shape)}")
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise ValueError(
                f"{name}: expected {q.dtype} on {q.device}, got {tensor.dtype} on {tensor.device}"
            )
    if size % 8 != 0 or (heads % key_heads if key_heads else heads) != 0:
        raise ValueError(
            f"expected sizes that are multiples of 8 and heads of {key_heads}, got {size}, {heads}"
        )
    if frames >= 2**31 - 1:
        raise ValueError(f"expected less than 2147483647 frames, got {frames}")
    return dense_rows(q), dense_rows(k), dense_rows(v)


def strides_of(tensor: Tensor) -> tuple[int, int, int]:
    """Strides of batch, head and frame. torch lets that of a single element be anything; then it is that of a
    dense tensor, so that a batch of one frame compiles nothing again."""
    _, heads, frames, size = tensor.shape
    dense = (heads * frames * size, size, heads * size)
    pairs = zip(tensor.shape[:3], tensor.stride()[:3], dense, strict=True)
    batch, head, frame = (stride if count > 1 else usual for count, stride, usual in pairs)
    return batch, head, frame


def alignment_of(*tensors: Tensor) -> int:
    """Bytes that the address of every row is a multiple of: those of a whole vector, or 1."""
    item = tensors[0].dtype.itemsize
    starts = (x for t in tensors for x in (t.data_ptr(), *(stride * item for stride in strides_of(t))))
    return 16 if all(start % 16 == 0 for start in starts) else 1


def scale_of(scale: float | None, size: int) -> float:
    return max(size, 1) ** -0.5 if scale is None else scale


def options(size: int, dtype: torch.dtype, kind: str = "forward") -> dict[str, Any]:
    """Constants of a launch, which the size of a head decides: tiles that fit shared memory and registers.
    ``kind``: "forward", "queries" or "keys", whose programs hold the sums of two gradients."""
    block = max(16, triton.next_power_of_2(size))
    wide = block * dtype.itemsize
    if dtype.itemsize > 2:  # no tensor cores: whole factors are in registers
        rows, step = 32 if block <= 64 else 16, 16
    else:
        rows = BLOCK_ROWS if wide <= 256 else 32 if wide <= 512 else 16
        step = 64 if wide <= 128 and kind == "forward" else 32 if wide <= 256 else 16
    return {
        "SIZE": size,
        "BLOCK_ROWS": rows,
        "BLOCK_STEP": step,
        "BLOCK_D": block,
        "num_warps": 8 if kind == "keys" or wide > 512 else 4,
        "num_stages": 2 if wide <= 512 else 1,
    }
