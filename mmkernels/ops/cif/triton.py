"""Triton kernels of :func:`mmkernels.cif`, and the functions behind its ``_triton`` ops.

The plan of an utterance is one program's; then a program takes a block of columns of one token, or in the
backward pass one frame. ``beta`` and the threshold are constants of a compilation: an argument would be
float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops._common import accumulate_dtype
from mmkernels.ops._triton import dense_rows, expect, expect_optional, loop_bound, on_device, row_block

#: Frames that the programs of a whole utterance take at a time.
BLOCK_T = 256
#: Frames that a token adds up at a time.
BLOCK_FRAMES = 8
BLOCK_D = 256
WARPS = 4
#: Token numbers are int32.
MOST_TOKENS = tl.constexpr(2000000000.0)


@triton.jit
def length_of(lengths, row, frames):
    length = tl.cast(frames, tl.int64)
    if lengths is not None:
        length = tl.minimum(tl.maximum(tl.load(lengths + row), 0), length)
    return length


@triton.jit
def weight_of(alpha):
    """Negative weights and those that are not finite count as zero."""
    return tl.where((alpha > 0) & (alpha < float("inf")), alpha.to(tl.float64), 0.0)


@triton.jit
def maximum(a, b):
    return tl.maximum(a, b)


@triton.jit
def ascending_sums(alpha, sums, length, BLOCK_T: tl.constexpr):
    """Cumulative sums of the weights. Sums in another order may differ in the last bit: they are made to
    ascend. Returns the last one."""
    highest = tl.full((), 0.0, tl.float64)
    total = tl.full((), 0.0, tl.float64)
    for step in range(loop_bound((length + BLOCK_T - 1) // BLOCK_T)):
        t = step * BLOCK_T + tl.arange(0, BLOCK_T)
        weight = weight_of(tl.load(alpha + t, mask=t < length, other=0.0))
        ascending = tl.associative_scan(tl.maximum(total + tl.cumsum(weight, 0), highest), 0, maximum)
        tl.store(sums + t, ascending, mask=t < length)
        total += tl.sum(weight, 0)
        highest = tl.max(ascending, 0)
    return highest


@triton.jit
def token_at(sums, t, length, scale, last, most, BETA: tl.constexpr):
    """The token in which frame t ends; that before the first frame is 0."""
    inside = (t >= 0) & (t < length)
    sum = tl.load(sums + t, mask=inside, other=0.0) * scale
    token = tl.minimum(tl.minimum(tl.floor(sum / BETA), MOST_TOKENS).to(tl.int64), most)
    return sum, tl.where(t < 0, 0, tl.where(t + 1 >= length, last, token))


@triton.jit(do_not_specialize=["frames", "tokens"])
def cif_plan_kernel(
    alpha,
    lengths,
    target_lengths,
    sums,
    counts,
    ends,
    token,
    weights,
    facts,
    frames,
    tokens,
    BETA: tl.constexpr,
    THRESHOLD: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Tokens and weights of the frames of one utterance, and the ends of its tokens."""
    row = tl.program_id(0).to(tl.int64)
    length = length_of(lengths, row, frames)
    sums += row * frames
    ends += row * tokens
    token += row * (frames + 1)
    weights += row * frames * 2
    total = ascending_sums(alpha + row * frames, sums, length, BLOCK_T)
    # Other threads read the sums.
    tl.debug_barrier()
    if target_lengths is not None:
        count = tl.maximum(tl.load(target_lengths + row), 0)
        count = tl.minimum(count, 2000000000)
        fact = tl.where(total > 0, 1.0 / tl.where(total > 0, total, 1.0), 0.0)
        scale = BETA * count.to(tl.float64) * fact
        last = tl.where(total > 0, count, 0)
        most = tl.maximum(count - 1, 0)
        tail = tl.full((), -1, tl.int64)
        factor = tl.full((), 1.0, tl.float64)
        tl.store(facts + 2 * row, scale)
    else:
        whole = tl.minimum(tl.floor(total / BETA), MOST_TOKENS)
        rest = total - whole * BETA
        fires = (rest >= THRESHOLD * BETA) & (rest > 0)
        last = whole.to(tl.int64)
        most = last
        count = last + fires.to(tl.int64)
        tail = tl.where(fires, last, -1)
        factor = tl.where(fires, BETA / tl.where(fires, rest, 1.0), 1.0)
        fact = fires.to(tl.float64)
        scale = tl.full((), 1.0, tl.float64)
        tl.store(facts + 2 * row, factor)
    last = tl.where(length > 0, last, 0)
    tl.store(facts + 2 * row + 1, fact)
    tl.store(counts + row, tl.minimum(count, tokens))
    tl.store(token, 0)
    for step in range(loop_bound((frames + BLOCK_T - 1) // BLOCK_T)):
        t = step * BLOCK_T + tl.arange(0, BLOCK_T).to(tl.int64)
        start, first = token_at(sums, t - 1, length, scale, last, most, BETA)
        end, after = token_at(sums, t, length, scale, last, most, BETA)
        valid = t < length
        inside = after == first
        into_first = tl.where(inside, end - start, (first + 1).to(tl.float64) * BETA - start)
        into_last = tl.where(inside, end - start, end - after.to(tl.float64) * BETA)
        into_first = tl.maximum(into_first, 0.0) * tl.where(first == tail, factor, 1.0)
        into_last = tl.maximum(into_last, 0.0) * tl.where(after == tail, factor, 1.0)
        element: tl.constexpr = weights.dtype.element_ty
        tl.store(weights + 2 * t, tl.where(valid, into_first, 0.0).to(element), mask=t < frames)
        tl.store(weights + 2 * t + 1, tl.where(valid, into_last, 0.0).to(element), mask=t < frames)
        tl.store(token + t + 1, after.to(tl.int32), mask=t < frames)
        fired = tl.where(valid, tl.minimum(after, tokens) - first, 0)
        for k in range(loop_bound(tl.maximum(tl.max(fired, 0), 0))):
            tl.store(ends + first + k, t + 1, mask=k < fired)
    for step in range(loop_bound((tokens + BLOCK_T - 1) // BLOCK_T)):
        j = step * BLOCK_T + tl.arange(0, BLOCK_T)
        tl.store(ends + j, tl.zeros((BLOCK_T,), tl.int64) + length, mask=(j >= last) & (j < tokens))


@triton.jit(do_not_specialize=["frames", "tokens", "batch_stride", "frame_stride"])
def cif_tokens_kernel(
    x,
    counts,
    ends,
    token,
    weights,
    features,
    frames,
    tokens,
    batch_stride,
    frame_stride,
    BETA: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_FRAMES: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """BLOCK_D columns of one token: the weighted sum of its frames."""
    place = tl.program_id(0).to(tl.int64)
    row = place // tokens
    j = place - row * tokens
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    x += row * batch_stride
    token += row * (frames + 1)
    weights += row * frames * 2
    accumulate: tl.constexpr = weights.dtype.element_ty
    # The frame in which the token before fires is also the first of this one.
    before = tl.load(ends + place - 1, mask=j > 0, other=0)
    begin = tl.maximum(before - 1, 0)
    end = tl.where(j < tl.load(counts + row), tl.load(ends + place), begin)
    total = tl.zeros((BLOCK_D,), accumulate)
    for step in range(loop_bound((end - begin + BLOCK_FRAMES - 1) // BLOCK_FRAMES)):
        t = begin + step * BLOCK_FRAMES + tl.arange(0, BLOCK_FRAMES)
        valid = t < end
        first = tl.load(token + t, mask=valid, other=0)
        last = tl.load(token + t + 1, mask=valid, other=0)
        weight = tl.where((j > first) & (j < last), BETA, 0.0).to(accumulate)
        weight = tl.where(j == first, tl.load(weights + 2 * t, mask=valid, other=0.0), weight)
        weight = tl.where(j == last, tl.load(weights + 2 * t + 1, mask=valid, other=0.0), weight)
        # A frame without weight need not be finite.
        read = (valid & (weight != 0))[:, None] & (column < WIDTH)[None, :]
        frame = tl.load(x + t[:, None] * frame_stride + column[None, :], mask=read, other=0.0)
        total += tl.sum(weight[:, None] * frame.to(accumulate), 0)
    tl.store(features + place * WIDTH + column, total.to(features.dtype.element_ty), mask=column < WIDTH)


@triton.jit(
    do_not_specialize=["frames", "batch_stride", "frame_stride", "grad_batch_stride", "grad_token_stride"]
)
def cif_frames_kernel(
    grad,
    x,
    lengths,
    counts,
    token,
    weights,
    dx,
    dots,
    frames,
    batch_stride,
    frame_stride,
    grad_batch_stride,
    grad_token_stride,
    BETA: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The gradient of one frame, and its dots with those of the tokens in which it begins and ends."""
    place = tl.program_id(0).to(tl.int64)
    row = place // frames
    t = place - row * frames
    count = tl.where(t < length_of(lengths, row, frames), tl.load(counts + row), 0)
    first = tl.load(token + row * (frames + 1) + t).to(tl.int64)
    last = tl.load(token + row * (frames + 1) + t + 1).to(tl.int64)
    accumulate: tl.constexpr = weights.dtype.element_ty
    of_last = tl.load(weights + 2 * place + 1)
    of_first = tl.where(last == first, of_last, tl.load(weights + 2 * place))
    x += row * batch_stride + t * frame_stride
    grad += row * grad_batch_stride
    column = tl.arange(0, BLOCK_D)
    begins = tl.zeros((BLOCK_D,), accumulate)
    finishes = tl.zeros((BLOCK_D,), accumulate)
    for start in range(0, WIDTH, BLOCK_D):
        inside = start + column < WIDTH
        at_first = inside & (first < count)
        at_last = inside & (last < count) & (last > first)
        g = tl.load(grad + first * grad_token_stride + start + column, mask=at_first, other=0.0).to(
            accumulate
        )
        h = tl.load(grad + last * grad_token_stride + start + column, mask=at_last, other=0.0).to(accumulate)
        if dots is not None:
            frame = tl.load(x + start + column, mask=at_first, other=0.0).to(accumulate)
            begins += frame * g
            finishes += frame * h
        if dx is not None:
            total = of_first * g
            for j in range(loop_bound(first + 1), loop_bound(tl.minimum(last, count))):
                other = grad + j * grad_token_stride + start + column
                total += tl.load(other, mask=inside, other=0.0).to(accumulate) * BETA
            total += of_last * h
            tl.store(dx + place * WIDTH + start + column, total.to(dx.dtype.element_ty), mask=inside)
    if dots is not None:
        dot = tl.sum(begins, 0)
        tl.store(dots + 2 * place, dot)
        tl.store(dots + 2 * place + 1, tl.where(last == first, dot, tl.sum(finishes, 0)))


@triton.jit
def tail_gradient(dots, token, weights, length, factor, BLOCK_T: tl.constexpr):
    """What more weight on the last frame does to the tail, a mean of frames: it moves towards that frame."""
    tail = tl.load(token + length)
    end = tl.load(dots + 2 * length - 1).to(tl.float64)
    apart = tl.zeros((BLOCK_T,), tl.float64)
    total = tl.zeros((BLOCK_T,), tl.float64)
    for step in range(loop_bound((length + BLOCK_T - 1) // BLOCK_T)):
        t = step * BLOCK_T + tl.arange(0, BLOCK_T)
        inside = (t < length) & (tl.load(token + t + 1, mask=t < length, other=-1) == tail)
        weight = tl.load(weights + 2 * t + 1, mask=inside, other=0.0).to(tl.float64)
        total += weight
        apart += weight * (end - tl.load(dots + 2 * t + 1, mask=inside, other=0.0).to(tl.float64))
    return factor * tl.sum(apart, 0) / tl.sum(total, 0)


@triton.jit(do_not_specialize=["frames"])
def cif_alpha_kernel(
    alpha,
    lengths,
    token,
    weights,
    facts,
    dots,
    sums,
    d_alpha,
    frames,
    SCALED: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """The gradient of the weights of one utterance, summed from its last frame on; then follows the quotient
    rule of the scaling."""
    row = tl.program_id(0).to(tl.int64)
    length = length_of(lengths, row, frames)
    alpha += row * frames
    token += row * (frames + 1)
    weights += row * frames * 2
    dots += row * frames * 2
    sums += row * frames
    d_alpha += row * frames
    scale = tl.load(facts + 2 * row)
    fact = tl.load(facts + 2 * row + 1)
    element: tl.constexpr = d_alpha.dtype.element_ty
    after = tl.full((), 0.0, tl.float64)
    tail = tl.full((), -1, tl.int32)
    if not SCALED:  # noqa: SIM102 (the compiler decides the first, the device the second)
        if (fact > 0) & (length > 0):
            after = tail_gradient(dots, token, weights, length, scale, BLOCK_T)
            tail = tl.load(token + length)
    product = tl.full((), 0.0, tl.float64)
    steps = (length + BLOCK_T - 1) // BLOCK_T
    for step in range(loop_bound(steps)):
        t = length - 1 - step * BLOCK_T - tl.arange(0, BLOCK_T)
        moves = (t >= 0) & (t + 1 < length)
        moved = tl.load(dots + 2 * t + 1, mask=moves, other=0.0).to(tl.float64)
        moved -= tl.load(dots + 2 * t + 2, mask=moves, other=0.0).to(tl.float64)
        moved *= tl.where(tl.load(token + t + 1, mask=moves, other=-2) == tail, scale, 1.0)
        total = after + tl.cumsum(moved, 0)
        after += tl.sum(moved, 0)
        if SCALED:
            tl.store(sums + t, total, mask=t >= 0)
            product += tl.sum(weight_of(tl.load(alpha + t, mask=t >= 0, other=0.0)) * total, 0)
        else:
            tl.store(d_alpha + t, total.to(element), mask=t >= 0)
    if SCALED:
        tl.debug_barrier()
        for step in range(loop_bound(steps)):
            t = length - 1 - step * BLOCK_T - tl.arange(0, BLOCK_T)
            total = tl.load(sums + t, mask=t >= 0, other=0.0)
            tl.store(d_alpha + t, (scale * (total - fact * product)).to(element), mask=t >= 0)


def cif_fwd(
    x: Tensor,
    alpha: Tensor,
    lengths: Tensor | None,
    target_lengths: Tensor | None,
    beta: float,
    tail_threshold: float,
    max_length: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``mmkernels::cif_fwd_triton``."""
    batch, frames, width = x.shape
    device, accumulate = x.device, accumulate_dtype(x.dtype)
    if not 0 < beta < float("inf") or max_length < 0:
        raise ValueError(f"expected a positive beta and a max_length of at least 0, got {beta}, {max_length}")
    alpha = expect("alpha", alpha, (batch, frames), accumulate, device)
    lengths = expect_optional("lengths", lengths, (batch,), torch.int64, device)
    targets = expect_optional("target_lengths", target_lengths, (batch,), torch.int64, device)
    x = dense_rows(x)
    features = x.new_empty((batch, max_length, width))
    counts = x.new_empty((batch,), dtype=torch.int64)
    ends = x.new_empty((batch, max_length), dtype=torch.int64)
    token = x.new_empty((batch, frames + 1), dtype=torch.int32)
    weights = x.new_empty((batch, frames, 2), dtype=accumulate)
    facts = x.new_empty((batch, 2), dtype=torch.float64)
    sums = x.new_empty((batch, frames), dtype=torch.float64)
    plan = (counts, ends, token, weights)
    if batch > 0:
        with on_device(x):
            cif_plan_kernel[(batch,)](
                alpha,
                lengths,
                targets,
                sums,
                *plan,
                facts,
                frames,
                max_length,
                BETA=beta,
                THRESHOLD=tail_threshold,
                BLOCK_T=BLOCK_T,
                num_warps=WARPS,
            )
            if features.numel() > 0:
                cif_tokens_kernel[(batch * max_length, triton.cdiv(width, BLOCK_D))](
                    x,
                    *plan,
                    features,
                    frames,
                    max_length,
                    x.stride(0),
                    x.stride(1),
                    BETA=beta,
                    WIDTH=width,
                    BLOCK_FRAMES=BLOCK_FRAMES,
                    BLOCK_D=BLOCK_D,
                    num_warps=WARPS,
                )
    return features, counts, ends, token, weights, facts


def cif_bwd(
    grad: Tensor,
    x: Tensor,
    alpha: Tensor,
    lengths: Tensor | None,
    counts: Tensor,
    token: Tensor,
    weights: Tensor,
    facts: Tensor,
    beta: float,
    scaled: bool,
    need_x: bool,
    need_alpha: bool,
) -> tuple[Tensor, Tensor]:
    """``mmkernels::cif_bwd_triton``."""
    batch, frames, width = x.shape
    device, accumulate = x.device, accumulate_dtype(x.dtype)
    if grad.dim() != 3 or grad.shape[0] != batch or grad.shape[2] != width or grad.dtype != x.dtype:
        raise ValueError(
            f"grad: expected shape ({batch}, tokens, {width}), {x.dtype}, got {tuple(grad.shape)}"
        )
    alpha = expect("alpha", alpha, (batch, frames), accumulate, device)
    lengths = expect_optional("lengths", lengths, (batch,), torch.int64, device)
    counts = expect("counts", counts, (batch,), torch.int64, device)
    token = expect("token", token, (batch, frames + 1), torch.int32, device)
    weights = expect("weights", weights, (batch, frames, 2), accumulate, device)
    facts = expect("facts", facts, (batch, 2), torch.float64, device)
    grad, x = dense_rows(grad), dense_rows(x)
    dx = x.new_empty((batch, frames, width) if need_x else (0, frames, width))
    d_alpha = alpha.new_zeros((batch, frames) if need_alpha else (0, frames))
    if batch * frames == 0 or not (need_x or need_alpha):
        return dx, d_alpha
    dots = alpha.new_empty((batch, frames, 2)) if need_alpha else None
    block, warps = row_block(width)
    with on_device(x):
        cif_frames_kernel[(batch * frames,)](
            grad,
            x,
            lengths,
            counts,
            token,
            weights,
            dx if need_x else None,
            dots,
            frames,
            x.stride(0),
            x.stride(1),
            grad.stride(0),
            grad.stride(1),
            BETA=beta,
            WIDTH=width,
            BLOCK_D=block,
            num_warps=warps,
        )
        if need_alpha:
            sums = x.new_empty((batch, frames) if scaled else (1,), dtype=torch.float64)
            cif_alpha_kernel[(batch,)](
                alpha,
                lengths,
                token,
                weights,
                facts,
                dots,
                sums,
                d_alpha,
                frames,
                SCALED=scaled,
                BLOCK_T=BLOCK_T,
                num_warps=WARPS,
            )
    return dx, d_alpha
