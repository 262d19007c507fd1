"""Triton kernel of ``ctc_align``: a program aligns one utterance, forwards and back.

The scores of all states stay in registers, a pair of states (blank and token) to an element. The sizes of
blocks are powers of two from 256 on, so a batch compiles at most six kernels, however its lengths vary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops._common import accumulate_dtype
from mmkernels.ops._triton import dense_rows, expect, expect_optional, loop_bound, on_device
from mmkernels.ops.ctc_align.schema import MOST_TRITON_TOKENS, RESCALE

LEAST_BLOCK = 256
#: Pairs of states of a warp: with more, the scores of a program no longer fit its registers.
PAIRS_OF_A_WARP = 256
NEVER = tl.constexpr(float("-inf"))
INTEGERS = ("frames", "tokens", "classes", "blank", "batch_stride", "frame_stride")


@triton.jit
def usable(value):
    """NaN and +inf are no log-probabilities."""
    return tl.where(value < float("inf"), value, NEVER)


@triton.jit
def length_of(lengths, program, most):
    """Clamped, because the host does not read lengths."""
    length = most.to(tl.int64)
    if lengths is not None:
        length = tl.minimum(tl.maximum(tl.load(lengths + program), 0), length)
    return length


@triton.jit
def step(even, odd, left, skips, blank_score, token_scores):
    """Scores after a frame, and a code of where they come from: bit 0 for the blank, others for the token."""
    two = tl.where(skips, left, NEVER)
    advance = tl.where((two > even) & (two > odd), 2, tl.where(even > odd, 1, 0))
    best = tl.where(advance == 2, two, tl.where(advance == 1, even, odd))
    code = tl.where(left > even, 1, 0) + 2 * advance
    return tl.where(left > even, left, even) + blank_score, best + token_scores, code


@triton.jit(do_not_specialize=INTEGERS)
def ctc_align_fwd_kernel(
    log_probs,
    targets,
    input_lengths,
    target_lengths,
    codes,
    paths,
    ends,
    totals,
    frames,
    tokens,
    classes,
    blank,
    batch_stride,
    frame_stride,
    RESCALE_FRAMES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    length = length_of(input_lengths, program, frames)
    count = length_of(target_lengths, program, tokens)
    log_probs += program * batch_stride
    targets += program * tokens
    codes += program * frames * (tokens + 1)
    paths += program * frames
    ends += program * tokens
    score: tl.constexpr = totals.dtype.element_ty

    pair = tl.arange(0, BLOCK).to(tl.int64)
    inside = pair < count
    token = tl.load(targets + pair, mask=inside, other=-1)
    previous = tl.load(targets + pair - 1, mask=inside & (pair > 0), other=-1)
    valid = inside & (token >= 0) & (token < classes) & (token != blank)
    skips = inside & (pair > 0) & (token != previous)
    neighbour = tl.maximum(tl.arange(0, BLOCK) - 1, 0)
    even = tl.where(pair == 0, 0.0, NEVER).to(score)
    odd = tl.full((BLOCK,), NEVER, score)

    for t in range(0, loop_bound(length)):
        row = log_probs + t * frame_stride
        blank_score = usable(tl.load(row + blank).to(score))
        token_scores = usable(tl.load(row + token, mask=valid, other=NEVER).to(score))
        left = tl.where(pair == 0, NEVER, tl.gather(odd, neighbour, 0))
        even, odd, code = step(even, odd, left, skips, blank_score, token_scores)
        tl.store(codes + t * (tokens + 1) + pair, code.to(tl.int8), mask=pair <= count)
        if (t + 1) % RESCALE_FRAMES == 0:
            passed = (pair <= t) & (pair >= count - length + t)
            largest = tl.max(tl.where(passed, tl.maximum(even, odd), NEVER), 0)
            shift = tl.where(largest > NEVER, largest, 0.0)
            even -= shift
            odd -= shift

    in_blank = tl.max(tl.where(pair == count, even, NEVER), 0)
    in_token = tl.max(tl.where(pair == count - 1, odd, NEVER), 0)
    feasible = tl.maximum(in_blank, in_token) > NEVER
    for start in range(0, loop_bound(tokens), BLOCK):
        tl.store(ends + start + pair, tl.where(feasible, length, 0), mask=start + pair < tokens)
    for start in range(0, loop_bound(frames), BLOCK):
        padding = (start + pair < frames) & ((start + pair >= length) | (feasible == 0))
        tl.store(paths + start + pair, tl.full((BLOCK,), -1, tl.int64), mask=padding)
    tl.debug_barrier()  # codes and ends are read and written by other threads now

    at_token = (count > 0) & (in_blank <= in_token)
    place = tl.where(at_token, count - 1, count)
    total = tl.zeros((), tl.float64)
    for back in range(0, loop_bound(tl.where(feasible, length, 0))):
        t = length - 1 - back
        label = tl.where(at_token, tl.load(targets + place, mask=at_token, other=0), blank)
        tl.store(paths + t, label)
        total += usable(tl.load(log_probs + t * frame_stride + label).to(tl.float64))
        code = tl.load(codes + t * (tokens + 1) + place).to(tl.int32)
        moved = tl.where(at_token, code >> 1, code & 1)
        tl.store(ends + place - 1, t, mask=at_token & (moved > 0) & (place > 0))
        place -= tl.where((moved == 2) | ((moved == 1) & (at_token == 0)), 1, 0)
        at_token = at_token ^ (moved == 1)
    tl.store(totals + program, tl.where(feasible, total, NEVER).to(score))


def ctc_align_fwd(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Tensor | None,
    target_lengths: Tensor | None,
    blank: int,
) -> tuple[Tensor, Tensor, Tensor]:
    if log_probs.dim() != 3 or targets.dim() != 2:
        raise ValueError("expected log_probs (batch, frames, classes) and targets (batch, tokens)")
    batch, frames, classes = log_probs.shape
    tokens, device = targets.shape[1], log_probs.device
    if not 0 <= blank < classes:
        raise ValueError(f"blank: expected a class below {classes}, got {blank}")
    if tokens > MOST_TRITON_TOKENS:
        raise ValueError(f"targets: expected at most {MOST_TRITON_TOKENS} tokens, got {tokens}")
    targets = expect("targets", targets, (batch, tokens), torch.int64, device)
    input_lengths = expect_optional("input_lengths", input_lengths, (batch,), torch.int64, device)
    target_lengths = expect_optional("target_lengths", target_lengths, (batch,), torch.int64, device)
    log_probs = dense_rows(log_probs)
    paths = log_probs.new_empty((batch, frames), dtype=torch.int64)
    ends = log_probs.new_empty((batch, tokens), dtype=torch.int64)
    totals = log_probs.new_empty((batch,), dtype=accumulate_dtype(log_probs.dtype))
    codes = log_probs.new_empty((batch, frames, tokens + 1), dtype=torch.int8)
    block = block_for(tokens)
    if batch > 0:
        with on_device(log_probs):
            ctc_align_fwd_kernel[(batch,)](
                log_probs,
                targets,
                input_lengths,
                target_lengths,
                codes,
                paths,
                ends,
                totals,
                frames,
                tokens,
                classes,
                blank,
                log_probs.stride(0),
                log_probs.stride(1),
                RESCALE_FRAMES=RESCALE,
                BLOCK=block,
                num_warps=warps_for(block),
            )
    return paths, ends, totals


def block_for(tokens: int) -> int:
    """Pairs of states, a power of two."""
    block: int = max(LEAST_BLOCK, triton.next_power_of_2(tokens + 1))
    return block


def warps_for(block: int) -> int:
    return max(4, block // PAIRS_OF_A_WARP)
