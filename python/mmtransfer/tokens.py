"""Tokens of transcripts and the places of their characters: labels of a task of texts, and errors of rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

#: Behind the last token, and behind the last character.
PADDING = -1


class UtteranceError(ValueError):
    """An utterance of a batch that a model cannot take.

    Attributes:
        row: of the batch, for who knows its name.
        reason: the rest of the sentence behind the name: "has 3 symbols ...".
    """

    def __init__(self, row: int, reason: str) -> None:
        super().__init__(f"row {row} of the batch {reason}")
        self.row, self.reason = row, reason

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.row, self.reason)


@dataclass(frozen=True)
class TokenLabels:
    """The tokens of B texts, as one tensor, which data sets, collation and the Trainer take.

    Attributes:
        ids: `(B, M)` int64 tokens of a language model, then `PADDING`.
        ends: `(B, M)` int64: how many characters of the text lie before the end of each token; the white
            space behind a word belongs to it. Never decreases.
        characters: `(B, U)` int64 code points of the text, then `PADDING`.
    """

    ids: torch.Tensor
    ends: torch.Tensor
    characters: torch.Tensor

    @classmethod
    def of(
        cls, ids: Sequence[Sequence[int]], ends: Sequence[Sequence[int]], texts: Sequence[str]
    ) -> TokenLabels:
        """Of tokens, ends and text of each utterance."""
        rows = [
            [list(each) for each in ids],
            [list(each) for each in ends],
            [list(map(ord, text)) for text in texts],
        ]
        return cls(*(_padded(row) for row in rows))

    @classmethod
    def unpack(cls, labels: torch.Tensor) -> TokenLabels:
        """Of the tensor that `pack` made, without common padding. ValueError for another.

        Waits for the device: all that follows is as large as the longest row of tokens.
        """
        if labels.dim() != 3 or labels.shape[1] != 3 or labels.is_floating_point():
            raise ValueError(
                f"labels of a text must be integers (B, 3, L), from the task's collate, got shape "
                f"{tuple(labels.shape)}"
            )
        ids, ends, characters = labels.unbind(1)
        tokens, length = ((row != PADDING).sum(1).amax() if len(row) else 0 for row in (ids, characters))
        return cls(ids[:, : int(tokens)], ends[:, : int(tokens)], characters[:, : int(length)])

    def pack(self) -> torch.Tensor:
        """`(B, 3, L)`: ids, ends and characters, padded to the longest."""
        rows = (self.ids, self.ends, self.characters)
        longest = max(row.shape[1] for row in rows)
        return torch.stack([F.pad(row, (0, longest - row.shape[1]), value=PADDING) for row in rows], 1)

    @property
    def counts(self) -> torch.Tensor:
        """`(B,)` tokens of each text."""
        return (self.ids != PADDING).sum(1)

    @property
    def lengths(self) -> torch.Tensor:
        """`(B,)` characters of each text."""
        return (self.characters != PADDING).sum(1)

    def keep(self, kept: torch.Tensor) -> TokenLabels:
        """Without the tokens where `kept` `(B, M)` is False; the characters stay."""
        order = (~kept).to(torch.int8).sort(dim=1, stable=True).indices
        counts = (kept & (self.ids != PADDING)).sum(1, keepdim=True)
        behind = torch.arange(kept.shape[1], device=kept.device) >= counts
        return replace(
            self,
            ids=self.ids.gather(1, order).masked_fill(behind, PADDING),
            ends=self.ends.gather(1, order).masked_fill(behind, PADDING),
        )


def _padded(rows: list[list[int]]) -> torch.Tensor:
    return pad_sequence(
        [torch.tensor(row, dtype=torch.int64) for row in rows], batch_first=True, padding_value=PADDING
    )
