"""The definition of :func:`mmkernels.segment_pool` in plain torch, written for reading."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.ops._common import accumulate_dtype
from mmkernels.ops._inference import widened
from mmkernels.ops._segments import segment_stops


def segment_pool(
    x: Tensor,
    ends: Tensor,
    *,
    reduce: str = "mean",
    scores: Tensor | None = None,
    counts: Tensor | None = None,
) -> Tensor:
    """One vector for each segment of each row; 0 for segments without frames.

    ``x (B, T, D)``, ``ends (B, M)``, ``scores (B, T)``, ``counts (B,)`` -> ``(B, M, D)``: the mean, sum,
    largest or last of ``x[ends[j-1]:ends[j]]``, or its sum weighted by the softmax of the scores there.

    The arguments are those of :func:`mmkernels.segment_pool`, unchecked; ends are clamped to ``[0, T]`` and
    to their running maximum. The result is computed in float32 (float64 for float64) and rounded once, to
    the dtype of ``x``. Differentiable any number of times.
    """
    stops = segment_stops(ends, counts, x.shape[1])
    starts = torch.cat([torch.zeros_like(stops[:, :1]), stops[:, :-1]], dim=1)
    # The segment of each frame, or M for frames in none.
    frame = torch.arange(x.shape[1], device=x.device)
    segment = (frame[None, :, None] >= stops[:, None, :]).sum(-1)
    covered = segment < ends.shape[1]
    # Frames in no segment may hold NaN, so they are replaced and not multiplied by zero.
    values = torch.where(covered.unsqueeze(-1), x.to(accumulate_dtype(x.dtype)), 0.0)
    if reduce == "last":
        pooled = take_frames(values, torch.where(stops > starts, stops - 1, -1).unsqueeze(-1))
    elif reduce == "max":
        pooled = take_frames(values, _first_largest(values.detach(), segment, ends.shape[1]))
    elif reduce == "attention":
        assert scores is not None
        weights = _softmax_in_segments(widened(scores, values.dtype), segment, ends.shape[1])
        pooled = _sums(values * weights.unsqueeze(-1), segment, ends.shape[1])
    else:
        pooled = _sums(values, segment, ends.shape[1])
        if reduce == "mean":
            pooled = pooled / (stops - starts).clamp(min=1).unsqueeze(-1)
    return pooled.to(x.dtype)


def take_frames(x: Tensor, index: Tensor) -> Tensor:
    """The frames of ``x (B, T, D)`` that ``index (B, M, D)`` or ``(B, M, 1)`` names; 0 where it is -1."""
    with_zero = torch.cat(
        [x, torch.zeros_like(x[:, :1]) if x.shape[1] else x.new_zeros(x.shape[0], 1, x.shape[2])], 1
    )
    index = torch.where(index < 0, x.shape[1], index)
    return with_zero.gather(1, index.expand(index.shape[0], index.shape[1], x.shape[2]))


def _sums(values: Tensor, segment: Tensor, segments: int) -> Tensor:
    """Sums of ``values (B, T, D)`` over the frames of each segment."""
    zeros = values.new_zeros(values.shape[0], segments + 1, values.shape[2])
    return zeros.scatter_add(1, segment.unsqueeze(-1).expand(values.shape), values)[:, :segments]


def _largest(values: Tensor, segment: Tensor, segments: int) -> Tensor:
    """The largest value of each segment, handed to each of its frames; NaN where there is one."""
    where = segment.unsqueeze(-1).expand(values.shape)
    lowest = values.new_full((values.shape[0], segments + 1, values.shape[2]), -torch.inf)
    return lowest.scatter_reduce(1, where, values, "amax").gather(1, where)


def _first_largest(values: Tensor, segment: Tensor, segments: int) -> Tensor:
    """The first frame with the largest value of each segment and column, or with a NaN; -1 for no frames."""
    frames = values.shape[1]
    frame = torch.arange(frames, device=values.device).unsqueeze(-1)
    found = (values == _largest(values, segment, segments)) | values.isnan()
    frame = torch.where(found, frame, frames)
    where = segment.unsqueeze(-1).expand(values.shape)
    none = frame.new_full((values.shape[0], segments + 1, values.shape[2]), frames)
    first = none.scatter_reduce(1, where, frame, "amin")[:, :segments]
    return torch.where(first < frames, first, -1)


def _softmax_in_segments(scores: Tensor, segment: Tensor, segments: int) -> Tensor:
    """Weights of the frames, which add up to 1 in each segment; 0 where all its scores are -inf."""
    covered = segment < segments
    scores = torch.where(covered, scores, 0.0)
    largest = _largest(scores.detach().unsqueeze(-1), segment, segments).squeeze(-1)
    exponentials = torch.exp(scores - torch.where(largest == -torch.inf, 0.0, largest))
    totals = _sums(exponentials.unsqueeze(-1), segment, segments + 1).gather(1, segment.unsqueeze(-1))
    totals = totals.squeeze(-1)
    return torch.where(covered, exponentials / torch.where(totals == 0, 1.0, totals), 0.0)
