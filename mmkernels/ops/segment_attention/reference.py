"""The definition of :func:`mmkernels.segment_attention` in plain torch, written for reading."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.ops._common import accumulate_dtype, without_autocast
from mmkernels.ops._inference import widened
from mmkernels.ops._segments import segment_stops


def segment_attention(
    q: Tensor, k: Tensor, v: Tensor, ends: Tensor, *, lookback: int = 1, scale: float | None = None
) -> Tensor:
    """Causal attention inside each segment and ``lookback`` frames before it; 0 for frames in no segment.

    ``q (B, H, T, d)``, ``k`` and ``v (B, H_kv, T, d)``, ``ends (B, M)`` -> ``(B, H, T, d)``:
    ``softmax(scale * q_t K^T) V`` over the keys from the segment's first minus ``lookback`` to t.

    The arguments are those of :func:`mmkernels.segment_attention`, unchecked; ends are clamped to ``[0, T]``
    and to their running maximum. The result is computed in float32 (float64 for float64) and rounded once, to
    the dtype of ``q``. It holds a mask and scores of size T x T. Differentiable any number of times.
    """
    wide = accumulate_dtype(q.dtype)
    heads, key_heads, frames, size = q.shape[-3], k.shape[-3], q.shape[-2], q.shape[-1]
    start = key_starts(ends, frames, lookback)
    covered = (start < frames)[:, None, :, None]
    frame = torch.arange(frames, device=ends.device)
    sees = (frame >= start[:, None, :, None]) & (frame <= frame[:, None])  # (B, 1, T, T)
    # Frames in no segment, and gradients there, may hold NaN: they are replaced and not multiplied by zero.
    query, key, value = (torch.where(covered, widened(x, wide), 0.0) for x in (q, k, v))
    if heads != key_heads:
        key, value = (x.repeat_interleave(heads // key_heads, dim=-3) for x in (key, value))
    with without_autocast(q):
        scores = query @ key.mT * (max(size, 1) ** -0.5 if scale is None else scale)
        # A query that sees nothing gets scores of 0, whose softmax is finite, before its weights of 0.
        scores = scores.masked_fill(~sees & covered, -torch.inf).masked_fill(~covered, 0.0)
        weights = scores.softmax(-1).masked_fill(~sees, 0.0)
        return torch.where(covered, weights @ value, 0.0).to(q.dtype)


def key_starts(ends: Tensor, frames: int, lookback: int) -> Tensor:
    """The first key that each query of ``(B, T)`` sees; T for frames in no segment."""
    if ends.shape[1] == 0 or frames == 0:
        return ends.new_full((ends.shape[0], frames), frames, dtype=torch.int64)
    stops = segment_stops(ends, None, frames)
    frame = torch.arange(frames, device=ends.device).repeat(ends.shape[0], 1)
    segment = torch.searchsorted(stops, frame, right=True)
    before = torch.cat([torch.zeros_like(stops[:, :1]), stops], 1).gather(1, segment)
    return torch.where(segment < ends.shape[1], (before - lookback).clamp(min=0), frames)
