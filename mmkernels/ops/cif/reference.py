"""The definition of :func:`mmkernels.cif` in plain torch, written for reading."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.ops._common import accumulate_dtype
from mmkernels.ops._inference import widened
from mmkernels.ops.cif.result import CIF


def cif(
    x: Tensor,
    alpha: Tensor,
    *,
    beta: float = 1.0,
    lengths: Tensor | None = None,
    target_lengths: Tensor | None = None,
    tail_threshold: float = 0.5,
    max_length: int | None = None,
) -> CIF:
    """``out[j] = sum_t w[t, j] x[t]``, w the overlap of frame t's part of ``cumsum(alpha)`` with token j's.

    ``x (B, T, D)``, ``alpha (B, T)``, lengths ``(B,)`` -> features ``(B, M, D)``, lengths ``(B,)``, ends
    ``(B, M)``. Token j's part is ``[j * beta, (j + 1) * beta)``.

    The arguments are those of :func:`mmkernels.cif`, unchecked. Cumulative sums are in float64, products in
    float32 (float64 for float64). Differentiable any number of times.
    """
    accumulate = accumulate_dtype(x.dtype)
    frames = x.shape[1]
    frame = torch.arange(frames, device=x.device)
    length = _lengths(lengths, x, frames)[:, None]
    valid = frame < length
    weight = torch.where(valid, widened(alpha, accumulate).double(), 0.0)
    total = weight.sum(1)
    end = weight.cumsum(1)
    tail_token = tail_factor = None
    if target_lengths is None:
        whole = (total / beta).floor()
        rest = total - whole * beta
        tail = (rest >= tail_threshold * beta) & (rest > 0)
        tail_token, tail_factor = whole, torch.where(tail, beta / torch.where(tail, rest, 1.0), 1.0)
        count = (whole + tail).to(torch.int64)
    else:
        count = target_lengths.to(torch.int64).clamp(min=0)
        sounds = total > 0
        scale = torch.where(sounds, beta * count.double() / torch.where(sounds, total, 1.0), 0.0)
        end = end * scale[:, None]
    start = torch.cat([end.new_zeros((end.shape[0], 1)), end[:, :-1]], dim=1) if frames > 0 else end
    if max_length is None:
        max_length = int(count.max()) if count.numel() > 0 else 0

    wide = x.to(accumulate)
    features, ends = [], []
    for j in range(max_length):
        low = j * beta
        high = torch.full_like(total, (j + 1) * beta)
        if target_lengths is not None:
            # The last token ends with the last frame.
            high = high.masked_fill(count - 1 == j, torch.inf)
        high = high[:, None]
        # Not minimum and maximum, which halve the gradient of equal numbers: here it is that of more weight.
        upper = torch.where(end < high, end, high)
        lower = torch.where(start >= low, start, low)
        overlap = (upper - lower).clamp(min=0)
        if tail_token is not None and tail_factor is not None:
            overlap = overlap * torch.where(tail_token == j, tail_factor, 1.0)[:, None]
        # Frames elsewhere may hold NaN, so they are replaced and not multiplied by zero.
        part = valid & (start < high) & (end >= low) & (j < count)[:, None]
        overlap = torch.where(part, overlap, 0.0).to(accumulate)
        features.append((overlap[:, :, None] * torch.where(part[:, :, None], wide, 0.0)).sum(1))
        before = (end / beta).floor() <= j
        if target_lengths is not None:
            before = before | (j >= count - 1)[:, None]
        ends.append(((before & valid).sum(1) + 1).minimum(length[:, 0]))
    counts = count.clamp(max=max_length)
    if not features:
        nothing = (weight[:, :0, None] * wide[:, :0]).to(x.dtype)
        return CIF(nothing, counts, length[:, :0])
    return CIF(torch.stack(features, dim=1).to(x.dtype), counts, torch.stack(ends, dim=1))


def _lengths(lengths: Tensor | None, x: Tensor, most: int) -> Tensor:
    if lengths is None:
        return torch.full((x.shape[0],), most, device=x.device)
    return lengths.to(torch.int64).clamp(0, most)
