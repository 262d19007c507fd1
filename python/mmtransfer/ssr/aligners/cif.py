"""Weights of continuous integrate-and-fire: how much of a token each frame holds."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from mmkernels import cif
from mmtransfer.encoders.taps import Taps
from mmtransfer.tokens import TokenLabels

#: Frames of a token, by the initial weights.
_INITIAL_FRAMES = 8.0


class CIFWeights(nn.Module):
    """A convolution, ReLU, and a sigmoid for each frame's weight; frames are summed by them to tokens.

    With a text, the weights are scaled to its number of tokens, and the loss is the distance of their sum
    from it.

    Args:
        dim: width of the frames.

    Source: Dong & Xu, CIF (arXiv 1905.11235).
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(dim, dim, 3, padding=1)
        self.weight = nn.Linear(dim, 1)
        nn.init.constant_(self.weight.bias, -math.log(_INITIAL_FRAMES - 1))

    def forward(
        self, taps: Taps, labels: TokenLabels | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The tokens' features `(B, M, C)`, their counts `(B,)`, and the loss of the count per token."""
        x = taps.scatter(taps.features.flatten(1))
        hidden = self.conv(x.transpose(1, 2)).relu().transpose(1, 2)
        alpha = self.weight(hidden).squeeze(2).float().sigmoid()
        # Frames that are not finite go into tokens, whose vectors tell which utterance it is.
        alpha = alpha.masked_fill(alpha.isnan(), 1 / _INITIAL_FRAMES)
        if labels is None:
            found = cif(x, alpha, lengths=taps.lengths)
            return found.features, found.lengths, None
        counts = labels.counts
        found = cif(x, alpha, lengths=taps.lengths, target_lengths=counts, max_length=labels.ids.shape[1])
        valid = torch.arange(alpha.shape[1], device=alpha.device) < taps.lengths.unsqueeze(1)
        total = (alpha * valid).sum(1)
        return (
            found.features,
            counts,
            F.l1_loss(total, counts.to(total.dtype)) / counts.float().mean().clamp(min=1),
        )
