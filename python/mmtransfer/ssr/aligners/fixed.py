"""Segments of equal length."""

from __future__ import annotations

import math
from typing import ClassVar

import torch

from mmtransfer.encoders.taps import Taps
from mmtransfer.tokens import TokenLabels

from .segments import Aligner, Segments, Tokenize, drop_empty


class FixedRate(Aligner):
    """A segment for so many frames; with a text, its tokens share the frames evenly.

    Args:
        frames_per_token: without a text, the length of a segment; the last one may be shorter.
    """

    aligns_text: ClassVar[bool] = False

    def __init__(self, frames_per_token: float) -> None:
        super().__init__()
        if not frames_per_token >= 1:
            raise ValueError(f"frames_per_token must be at least 1, got {frames_per_token}")
        self.frames_per_token = frames_per_token

    def forward(self, taps: Taps, labels: TokenLabels | None, tokenize: Tokenize | None) -> Segments:
        frames = taps.lengths
        if labels is not None:
            counts = labels.counts
            numbers = torch.arange(1, labels.ids.shape[1] + 1, device=frames.device)
            ends = numbers * frames.unsqueeze(1) // counts.clamp(min=1).unsqueeze(1)
            return drop_empty(ends, counts, labels)
        counts = (frames / self.frames_per_token).ceil().long()
        # Of the padded length, which is known without waiting for the device.
        most = math.ceil(taps.steps / self.frames_per_token)
        numbers = torch.arange(1, most + 1, device=frames.device)
        ends = (numbers * self.frames_per_token).round().long()
        return drop_empty(torch.minimum(ends, frames.unsqueeze(1)), counts)

    def extra_repr(self) -> str:
        return f"frames_per_token={self.frames_per_token}"
