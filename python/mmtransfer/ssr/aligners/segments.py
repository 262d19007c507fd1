"""The result of an aligner, and the rule that makes segments of tokens of those of symbols."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from mmtransfer.encoders.taps import Taps
from mmtransfer.tokens import TokenLabels, UtteranceError

#: Makes labels of texts, as the task does.
Tokenize = Callable[[Sequence[str]], torch.Tensor]


@dataclass(frozen=True)
class Segments:
    """The segments of B utterances.

    Attributes:
        ends: `(B, M)` int64 exclusive ends in frames, increasing; behind the last one it is repeated.
        counts: `(B,)` segments of each utterance.
        labels: the tokens of the segments; None where they are not those of a text.
        loss: the aligner's own, of one that is trained.
    """

    ends: torch.Tensor
    counts: torch.Tensor
    labels: TokenLabels | None = None
    loss: torch.Tensor | None = None


class Aligner(nn.Module, abc.ABC):
    """Finds segments in tapped features, with the text or without it.

    Attributes:
        aligns_text: whether a text changes what the segments are, not only which token each of them has.
        needs_text: whether there are no segments without one.
        finds_text: whether without a text the segments have tokens, those of one that the aligner finds.
    """

    aligns_text: ClassVar[bool] = True
    needs_text: ClassVar[bool] = False
    finds_text: ClassVar[bool] = False

    def frames_needed(self, text: str) -> int:
        """The frames without which a text has no alignment."""
        return 0

    def knows(self, text: str) -> bool:
        """Whether a text has a symbol of the aligner; without one it has no segment."""
        return True

    @abc.abstractmethod
    def forward(self, taps: Taps, labels: TokenLabels | None, tokenize: Tokenize | None) -> Segments:
        """The segments of each utterance.

        Args:
            taps: the features of its own layers.
            labels: the tokens of the text; None: textless, as in prediction.
            tokenize: makes tokens of a text that the aligner finds itself; None: its symbols are segments.

        Raises:
            ValueError: a text that does not fit in its frames, naming the row, or an aligner that needs one.
        """


def drop_empty(ends: torch.Tensor, counts: torch.Tensor, labels: TokenLabels | None = None) -> Segments:
    """Segments without those that have no frame; their tokens are dropped from the labels too.

    Args:
        ends: `(B, M)` exclusive ends, non-decreasing in the first `counts` of a row.
        counts: `(B,)`.
        labels: of the M tokens.
    """
    valid = torch.arange(ends.shape[1], device=ends.device) < counts.unsqueeze(1)
    ends = torch.where(valid, ends, 0).cummax(1).values if ends.shape[1] else ends
    kept = valid & (ends > F.pad(ends, (1, 0))[:, :-1])
    order = (~kept).to(torch.int8).sort(dim=1, stable=True).indices
    # Behind the last segment its end is the largest.
    compact = torch.where(kept, ends, 0).gather(1, order)
    compact = compact.cummax(1).values if compact.shape[1] else compact
    return Segments(compact, kept.sum(1), None if labels is None else labels.keep(kept))


def token_ends(
    symbol_ends: torch.Tensor, places: torch.Tensor, counts: torch.Tensor, labels: TokenLabels
) -> torch.Tensor:
    """The end in frames of each token, from those of symbols, by how many of these it comes after.

    Args:
        symbol_ends: `(B, S)` exclusive ends of the symbols in frames.
        places: `(B, S)`: characters of the text before the end of each symbol.
        counts: `(B,)` symbols.
        labels: of which `ends` say how many characters there are before the end of each token.

    Returns:
        `(B, M)`; a token without a symbol ends where the one before it does.
    """
    size = symbol_ends.shape[1]
    behind = torch.arange(size, device=places.device) >= counts.unsqueeze(1)
    through = torch.searchsorted(
        places.masked_fill(behind, torch.iinfo(torch.int64).max), labels.ends.contiguous(), right=True
    )
    return F.pad(symbol_ends, (1, 0)).gather(1, through) if size else through


def check_fits(fits: torch.Tensor, symbols: torch.Tensor, frames: torch.Tensor) -> None:
    """UtteranceError, naming the first row, unless all texts fit in their frames. Waits for the device."""
    if not bool(fits.all()):
        row = int((~fits).nonzero()[0])
        raise UtteranceError(
            row,
            f"has {int(symbols[row])} symbols of text in {int(frames[row])} frames, which no alignment has; "
            "leave such clips out",
        )
