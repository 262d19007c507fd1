"""Triton kernel of :func:`mmkernels.monotonic_align`, and the function behind its ``_triton`` op.

A program takes one utterance. Its tokens pass in panels of ``PANEL``, so that no number of tokens compiles a
kernel again; a panel finds the scores of the token before it in memory, one for each frame.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops._common import accumulate_dtype
from mmkernels.ops._triton import dense_rows, expect_optional, loop_bound, on_device

PANEL = 256
WARPS = 4
#: Back-pointers are bits: bit ``t % 32`` of word ``(t // 32, u)`` says that the best path to u comes from the
#: token before.
BITS = 32


@triton.jit
def search_panel(
    log_probs,
    words,
    edge_in,
    edge_out,
    first,
    frames,
    tokens,
    columns,
    stride,
    PANEL: tl.constexpr,
    BITS: tl.constexpr,
):
    """Back-pointers of the tokens from ``first`` on; nonzero where a log-probability is NaN."""
    accumulate: tl.constexpr = edge_in.dtype.element_ty
    impossible = float("-inf")
    lane = tl.arange(0, PANEL)
    token = first + lane
    score = tl.full((PANEL,), impossible, accumulate)
    starts = tl.zeros((PANEL,), tl.int32)
    not_numbers = tl.zeros((PANEL,), tl.int32)
    for t in range(loop_bound(frames)):
        x = tl.load(log_probs + t * stride + token, mask=token < tokens, other=0.0).to(accumulate)
        not_numbers |= (x != x).to(tl.int32)
        # Before the first frame the path is before the first token.
        edge = tl.load(edge_in + t - 1, mask=(first > 0) & (t > 0), other=impossible)
        edge = tl.where((first == 0) & (t == 0), 0.0, edge).to(accumulate)
        come = tl.where(lane == 0, edge, tl.gather(score, tl.maximum(lane - 1, 0), 0))
        comes = come >= score
        score = x + tl.where(comes, come, score)
        tl.store(edge_out + t + lane * 0, score, mask=lane == PANEL - 1)
        starts |= comes.to(tl.int32) << (t % BITS)
        if (t % BITS == BITS - 1) | (t == frames - 1):
            tl.store(words + tl.cast(t // BITS, tl.int64) * columns + token, starts, mask=token < tokens)
            starts = tl.zeros((PANEL,), tl.int32)
    return tl.max(not_numbers, 0)


@triton.jit
def trace(words, durations, frames, tokens, columns, BITS: tl.constexpr):
    """Follows the back-pointers from the end."""
    token = tokens - 1
    end = frames
    for step in range(loop_bound(frames - 1)):
        t = frames - 1 - step
        word = tl.load(words + tl.cast(t // BITS, tl.int64) * columns + token)
        # Frame u is the earliest that token u can have.
        starts = (token > 0) & ((((word >> (t % BITS)) & 1) == 1) | (token == t))
        tl.store(durations + token, (end - t).to(tl.int64), mask=starts)
        end = tl.where(starts, t, end)
        token = tl.where(starts, token - 1, token)
    tl.store(durations, end.to(tl.int64))


@triton.jit(do_not_specialize=["frames", "tokens", "batch_stride", "frame_stride"])
def monotonic_align_fwd_kernel(
    log_probs,
    frame_lengths,
    token_lengths,
    words,
    edges,
    durations,
    frames,
    tokens,
    batch_stride,
    frame_stride,
    PANEL: tl.constexpr,
    BITS: tl.constexpr,
):
    """The durations of one utterance, zero before. Lengths are clamped: the host does not read them."""
    row = tl.program_id(0).to(tl.int64)
    log_probs += row * batch_stride
    words += row * ((frames + BITS - 1) // BITS) * tokens
    edges += row * 2 * frames
    durations += row * tokens
    columns = tokens
    stride = tl.cast(frame_stride, tl.int64)
    most_frames = frames
    if frame_lengths is not None:
        frames = tl.minimum(tl.maximum(tl.load(frame_lengths + row), 0), frames).to(tl.int32)
    if token_lengths is not None:
        tokens = tl.minimum(tl.maximum(tl.load(token_lengths + row), 0), tokens).to(tl.int32)
    if (tokens > 0) & (frames >= tokens):
        not_a_number = 0
        for panel in range(loop_bound((tokens + PANEL - 1) // PANEL)):
            edge_out = edges + (panel % 2) * most_frames
            edge_in = edges + (1 - panel % 2) * most_frames
            not_a_number |= search_panel(
                log_probs,
                words,
                edge_in,
                edge_out,
                panel * PANEL,
                frames,
                tokens,
                columns,
                stride,
                PANEL,
                BITS,
            )
            # Other threads read what this panel wrote.
            tl.debug_barrier()
        if not_a_number == 0:
            trace(words, durations, frames, tokens, columns, BITS)


def monotonic_align_fwd(
    log_probs: Tensor, frame_lengths: Tensor | None, token_lengths: Tensor | None
) -> Tensor:
    """``mmkernels::monotonic_align_fwd_triton``."""
    batch, frames, tokens = log_probs.shape
    lengths = (
        expect_optional(name, given, (batch,), torch.int64, log_probs.device)
        for name, given in (("frame_lengths", frame_lengths), ("token_lengths", token_lengths))
    )
    log_probs = dense_rows(log_probs)
    durations = log_probs.new_zeros((batch, tokens), dtype=torch.int64)
    if durations.numel() == 0 or frames == 0:
        return durations
    words = log_probs.new_empty((batch, triton.cdiv(frames, BITS), tokens), dtype=torch.int32)
    edges = log_probs.new_empty((batch, 2, frames), dtype=accumulate_dtype(log_probs.dtype))
    with on_device(log_probs):
        monotonic_align_fwd_kernel[(batch,)](
            log_probs,
            *lengths,
            words,
            edges,
            durations,
            frames,
            tokens,
            log_probs.stride(0),
            log_probs.stride(1),
            PANEL=PANEL,
            BITS=BITS,
            num_warps=WARPS,
        )
    return durations
