"""The definition of :func:`mmkernels.monotonic_align` in plain torch, written for reading."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.ops._common import accumulate_dtype


def monotonic_align(
    log_probs: Tensor, frame_lengths: Tensor | None = None, token_lengths: Tensor | None = None
) -> Tensor:
    """Frames of each token on the best path, ``(B, U)`` int64; zeros in rows without a path.

    ``log_probs (B, T, U)``, lengths ``(B,)``. The path maximises ``sum_t log_probs[t, u_t]`` over u from the
    first token to the last, by steps of 0 or 1.

    The arguments are those of :func:`mmkernels.monotonic_align`, unchecked.
    """
    batch, frames, tokens = log_probs.shape
    if frames == 0 or tokens == 0:
        return log_probs.new_zeros((batch, tokens), dtype=torch.int64)
    x = log_probs.to(accumulate_dtype(log_probs.dtype))
    frame, token = (torch.arange(size, device=x.device) for size in (frames, tokens))
    last_frame = _lengths(frame_lengths, x, frames) - 1
    last_token = _lengths(token_lengths, x, tokens) - 1

    # Scores of the best paths to each token; entry 0 is the start, before the first token.
    impossible = torch.full_like(x[:, 0], -torch.inf)
    score = torch.cat([torch.zeros_like(x[:, 0, :1]), impossible], dim=1)
    comes_from_before = []
    for t in range(frames):
        before, same = score[:, :-1], score[:, 1:]
        comes_from_before.append(before >= same)
        score = torch.cat([impossible[:, :1], x[:, t] + torch.where(before >= same, before, same)], dim=1)

    # A row's path begins at its last frame and token, and follows the comparisons back.
    current = last_token
    on_path = []
    for t in reversed(range(frames)):
        inside = t <= last_frame
        on_path.append(inside[:, None] & (token == current[:, None]))
        before = comes_from_before[t].gather(1, current.clamp(min=0)[:, None])[:, 0]
        # Frame u is the earliest that token u can have.
        advances = (before | (current == t)) & (current > 0) & inside
        current = torch.where(advances, current - 1, current)
    durations = torch.stack(on_path).sum(0)

    valid = (frame <= last_frame[:, None])[:, :, None] & (token <= last_token[:, None])[:, None]
    has_path = (last_frame >= last_token) & ~(x.isnan() & valid).flatten(1).any(1)
    return torch.where(has_path[:, None], durations, 0)


def _lengths(lengths: Tensor | None, x: Tensor, most: int) -> Tensor:
    if lengths is None:
        return torch.full((x.shape[0],), most, device=x.device)
    return lengths.to(torch.int64).clamp(0, most)
