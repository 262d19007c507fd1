"""Alignment by learnt embeddings of frames and characters, and monotonic alignment search."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from mmkernels import monotonic_align
from mmtransfer.encoders.taps import Taps
from mmtransfer.tokens import PADDING, TokenLabels

from .segments import Aligner, Segments, Tokenize, check_fits, drop_empty, token_ends

#: Log-probability of the blank before normalisation: lower than that of a fair match.
_BLANK = -1.0
#: Of characters that a text does not have.
_LEAST = -1e4


class UnitY2Aligner(Aligner):
    """Frames and characters are embedded by convolutions; minus their distance is the score, and the
    monotonic path of the best scores gives the segments. It needs the text.

    Trained with the connector by the forward-sum loss, which asks that the characters occur in their order.

    Args:
        dim: width of the frames.
        alphabet: the characters that have an embedding; all others share one.
        width: of the embeddings.
        dropout: behind the activations, in training.

    Source: the aligner of UnitY2 in Seamless (arXiv 2312.05187), which embeds discrete units in place of
    features; the loss is that of RAD-TTS (Shih et al., 2021).
    """

    needs_text: ClassVar[bool] = True
    table: torch.Tensor

    def __init__(self, dim: int, alphabet: str, width: int = 256, dropout: float = 0.1) -> None:
        super().__init__()
        self.alphabet, self.dropout = alphabet, dropout
        self.embedding = nn.Embedding(len(alphabet) + 1, width)
        self.text_layers = nn.ModuleList([nn.Conv1d(width, width, 3, padding=1), nn.Conv1d(width, width, 1)])
        self.frame_layers = nn.ModuleList(
            [
                nn.Conv1d(dim, width, 3, padding=1),
                nn.Conv1d(width, width, 3, padding=1),
                nn.Conv1d(width, width, 1),
            ]
        )
        table = torch.zeros(max(map(ord, alphabet), default=0) + 1, dtype=torch.int64)
        table[[ord(each) for each in alphabet]] = torch.arange(1, len(alphabet) + 1)
        self.register_buffer("table", table, persistent=False)

    def frames_needed(self, text: str) -> int:
        return len(text)

    def forward(self, taps: Taps, labels: TokenLabels | None, tokenize: Tokenize | None) -> Segments:
        if labels is None:
            raise ValueError("the aligner unity2 needs the text of an utterance; without one use ctc or cif")
        lengths, counts = taps.lengths, labels.lengths
        fits = counts <= lengths
        if self.training:
            check_fits(fits, counts, lengths)
        else:
            # Of a clip that is scored: it has no segment then.
            labels = labels.keep((labels.ids != PADDING) & fits.unsqueeze(1))
            counts = counts * fits
        if not labels.characters.shape[1]:
            # Convolutions take no sequence of length 0.
            labels = replace(labels, characters=F.pad(labels.characters, (0, 1), value=PADDING))
        # All scores of an empty text are -inf, of which log-probabilities would be NaN.
        scores = self.scores(taps, labels).masked_fill((counts == 0).view(-1, 1, 1), 0.0)
        log_probs = F.log_softmax(scores, -1)
        durations = monotonic_align(log_probs.detach(), lengths * (counts > 0), counts)
        places = torch.arange(1, labels.characters.shape[1] + 1, device=counts.device).expand(len(counts), -1)
        ends = token_ends(durations.cumsum(1), places.contiguous(), counts, labels)
        found = drop_empty(ends, labels.counts, labels)
        loss = _forward_sum(log_probs, lengths, counts) if self.training else None
        return Segments(found.ends, found.counts, found.labels, loss)

    def scores(self, taps: Taps, labels: TokenLabels) -> torch.Tensor:
        """`(B, T, U)`: minus the distance of each frame from each character, -inf behind the last one."""
        device = labels.characters.device
        is_frame = torch.arange(taps.steps, device=device) < taps.lengths.unsqueeze(1)
        is_character = labels.characters != PADDING
        frames = self._embed(taps.scatter(taps.features.flatten(1)), is_frame, self.frame_layers)
        known = labels.characters.clamp(0, len(self.table) - 1)
        codes = torch.where(labels.characters == known, self.table[known], 0)
        characters = self._embed(self.embedding(codes), is_character, self.text_layers)
        # One product in place of a tensor of all differences.
        squares = frames.square().sum(-1, keepdim=True) + characters.square().sum(-1).unsqueeze(1)
        distances = (squares - 2 * frames @ characters.transpose(1, 2)).clamp(min=1e-6).sqrt()
        return (-distances.float()).masked_fill(~is_character.unsqueeze(1), -torch.inf)

    def _embed(self, x: torch.Tensor, valid: torch.Tensor, layers: nn.ModuleList) -> torch.Tensor:
        """Convolutions that see zeros past each row's end, so that a row does not depend on its batch."""
        for index, layer in enumerate(layers):
            x = layer(x.masked_fill(~valid.unsqueeze(2), 0.0).transpose(1, 2)).transpose(1, 2)
            if index < len(layers) - 1:
                x = F.dropout(x.relu(), self.dropout, self.training)
        return x


def _forward_sum(log_probs: torch.Tensor, lengths: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Mean over utterances of -log P(characters in their order), for each character; 0 for an empty text."""
    # An infinite one makes its gradient NaN.
    padded = F.pad(log_probs.clamp(min=_LEAST), (1, 0), value=_BLANK)
    numbers = torch.arange(1, log_probs.shape[2] + 1, device=counts.device).expand(len(counts), -1)
    losses = F.ctc_loss(
        F.log_softmax(padded, -1).transpose(0, 1),
        numbers,
        lengths,
        counts,
        reduction="none",
        zero_infinity=True,
    )
    return (losses * (counts > 0) / counts.clamp(min=1)).mean()
