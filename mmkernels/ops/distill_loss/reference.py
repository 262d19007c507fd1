"""The definition of :func:`mmkernels.distill_loss` in plain torch, written for reading."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.ops._common import accumulate_dtype
from mmkernels.ops._inference import widened


def distill_loss(
    pred: Tensor, table: Tensor, ids: Tensor, *, counts: Tensor | None = None, cosine_weight: float = 5.0
) -> Tensor:
    """``mean(|z - h|^2) + cosine_weight * mean(1 - cos(z, h))`` with ``z = pred[b, j]``,
    ``h = table[ids[b, j]]``, over the tokens ``j < counts[b]``.

    ``pred (B, M, H)``, ``table (V, H)``, ``ids (B, M)``, ``counts (B,)`` -> a scalar; or ``pred (M, H)`` and
    ``ids (M,)``.

    The arguments are those of :func:`mmkernels.distill_loss`, unchecked. In float32 (float64 for a float64
    ``pred``). Differentiable any number of times, in ``table`` too.
    """
    accumulate = accumulate_dtype(pred.dtype)
    if pred.dim() == 2:
        pred, ids = pred[None], ids[None]
    token = torch.arange(pred.shape[1], device=pred.device)
    valid = (token < pred.shape[1]).expand(pred.shape[:2])
    if counts is not None:
        valid = token < counts[:, None]

    # What is not read may hold NaN, so it is replaced and not multiplied by zero.
    inside = valid & (ids >= 0) & (ids < table.shape[0])
    rows = table[torch.where(inside, ids, 0)] if table.shape[0] > 0 else pred.new_zeros(pred.shape)
    h = torch.where(inside[..., None], widened(rows, accumulate), torch.nan)
    h = torch.where(valid[..., None], h, 0.0)
    z = torch.where(valid[..., None], widened(pred, accumulate), 0.0)

    least = torch.finfo(accumulate).tiny
    squares = [z.square().sum(-1), h.square().sum(-1)]
    no_direction = (squares[0] < least) | (squares[1] < least)
    z_norm, h_norm = (torch.where(no_direction, 1.0, square).sqrt() for square in squares)
    cosine = torch.where(no_direction, 0.0, (z * h).sum(-1) / z_norm / h_norm)
    terms = (z - h).square().sum(-1) + cosine_weight * (1 - cosine)
    return torch.where(valid, terms, 0.0).sum() / valid.sum().clamp(min=1)
