"""Contiguous segments of frames, given by their ends: what the ops on segments share."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.ops import _common, _lengths


def check_ends(op: str, ends: Tensor, like_name: str, like: Tensor) -> None:
    """``ends`` is an integer tensor with a row for each of ``like``, where ``like`` is."""
    _common.check_tensor(op, "ends", ends)
    if ends.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: ends must be int32 or int64, got {ends.dtype}")
    if ends.dim() != 2 or ends.shape[0] != like.shape[0]:
        raise ValueError(f"{op}: ends must have shape ({like.shape[0]}, M), got {tuple(ends.shape)}")
    if ends.device != like.device:
        raise ValueError(f"{op}: ends is on {ends.device}, {like_name} is on {like.device}")


def check_values(op: str, ends: Tensor, of_name: str, frames: int, valid: Tensor | None = None) -> None:
    """The ends, those that are ``valid``, lie in ``[0, frames]`` and do not decrease."""
    if valid is None:
        valid = torch.ones_like(ends, dtype=torch.bool)
    if (place := _lengths.first_place(valid & ((ends < 0) | (ends > frames)))) is not None:
        raise ValueError(
            f"{op}: ends must lie in [0, {frames}], the frames of {of_name}; row {place[0]} has "
            f"{ends[place].item()} at segment {place[1]}"
        )
    if (place := _lengths.first_place(valid[:, 1:] & (ends[:, 1:] < ends[:, :-1]))) is not None:
        row, before = place
        raise ValueError(
            f"{op}: ends must not decrease; row {row} has {ends[row, before + 1].item()} at segment "
            f"{before + 1}, after {ends[row, before].item()}"
        )


def segment_stops(ends: Tensor, counts: Tensor | None, frames: int) -> Tensor:
    """``ends`` in ``[0, frames]``, non-decreasing; segments past ``counts`` have no frames."""
    stops = ends.to(torch.int64).clamp(0, frames)
    if counts is not None:
        valid = torch.arange(ends.shape[1], device=ends.device) < counts.unsqueeze(-1)
        stops = torch.where(valid, stops, 0)
    return stops.cummax(dim=1).values
