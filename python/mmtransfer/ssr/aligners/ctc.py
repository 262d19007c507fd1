"""Alignment by a CTC model that reads the same encoder, frozen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from mmkernels import ctc_align
from mmtransfer.encoders.taps import Taps
from mmtransfer.tokens import PADDING, TokenLabels

from .segments import Aligner, Segments, Tokenize, check_fits, drop_empty, token_ends

if TYPE_CHECKING:
    from mmtransfer.tasks.ctc import CTC


class CTCAligner(Aligner):
    """The best path of a CTC model through the characters, or sub-words, of the text.

    A symbol's segment begins where the path enters it; blanks belong to the symbol before them, and those in
    front of the first symbol to that one. The tokens of the language model take the segments of the symbols
    up to their last character. Without a text the model's own, by greedy decoding, is aligned.

    Args:
        readout: of the CTC model, of `(N, L, C)` features.
        head: of the CTC model.
        task: with its alphabet.

    The model stays frozen and in eval mode.
    """

    finds_text: ClassVar[bool] = True

    table: torch.Tensor | None

    def __init__(self, readout: nn.Module, head: nn.Module, task: CTC) -> None:
        super().__init__()
        self.readout, self.head, self.task = readout, head, task
        self.requires_grad_(False)
        self.eval()
        self.register_buffer("table", None if task.tokenizer else _table(task), persistent=False)

    def train(self, mode: bool = True) -> CTCAligner:
        """Stays in eval mode."""
        return super().train(False)

    def frames_needed(self, text: str) -> int:
        return self.task.frames_needed(text)

    def knows(self, text: str) -> bool:
        return not self.task.is_empty(text)

    @torch.no_grad()
    def forward(self, taps: Taps, labels: TokenLabels | None, tokenize: Tokenize | None) -> Segments:
        logits = self.logits(taps)
        log_probs = taps.scatter(F.log_softmax(logits, -1))
        finite = log_probs.isfinite().all(2).all(1)
        if labels is None:
            texts: Sequence[str] = self.task.decode(logits, taps.lengths)
            packed = (tokenize or self.symbols_as_tokens)(texts)
            labels = TokenLabels.unpack(packed.to(logits.device))
        symbols, places, counts = self.symbols(labels)
        found = ctc_align(log_probs, symbols, taps.lengths, counts, blank=self.task.blank)
        check_fits(found.feasible | (counts == 0) | ~finite, counts, taps.lengths)
        ends = token_ends(found.ends, places, counts, labels)
        return _with_unsound(drop_empty(ends, labels.counts, labels), finite, taps.lengths)

    def logits(self, taps: Taps) -> torch.Tensor:
        """`(N, symbols)` of all frames, float32."""
        weight = next(self.head.parameters())
        with torch.autocast(taps.features.device.type, enabled=False):
            frames = self.readout(taps.features.to(weight.dtype))
            return self.head(frames, taps).float()

    def symbols(self, labels: TokenLabels) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Symbols `(B, S)`, characters of the text before each one's end `(B, S)`, and their counts `(B,)`.

        Characters that the model does not know are left out.
        """
        characters = labels.characters
        if self.table is None:
            return self._sub_words(characters)
        found = self.table[characters.clamp(0, len(self.table) - 1)]
        found = torch.where((characters >= 0) & (characters < len(self.table)), found, PADDING)
        known = found != PADDING
        order = (~known).to(torch.int8).sort(dim=1, stable=True).indices
        counts = known.sum(1)
        behind = torch.arange(found.shape[1], device=found.device) >= counts.unsqueeze(1)
        # Padding must be a class too.
        filler = int(self.task.blank == 0)
        return found.gather(1, order).masked_fill(behind, filler), order + 1, counts

    def symbols_as_tokens(self, texts: Sequence[str]) -> torch.Tensor:
        """Labels in which each symbol is a token."""
        rows = [self.task.encode_with_places(text) for text in texts]
        return TokenLabels.of(
            [[index for index, _ in row] for row in rows],
            [[end for _, (_, end) in row] for row in rows],
            texts,
        ).pack()

    def _sub_words(self, characters: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        texts = ["".join(map(chr, row)) for row in _rows(characters)]
        rows = [self.task.encode_with_places(text) for text in texts]
        symbols, places = (
            pad_sequence(
                [torch.tensor(row, dtype=torch.int64) for row in part],
                batch_first=True,
                padding_value=int(self.task.blank == 0),
            ).to(characters.device)
            for part in (
                [[index for index, _ in row] for row in rows],
                [[end for _, (_, end) in row] for row in rows],
            )
        )
        return symbols, places, torch.tensor([len(row) for row in rows], device=characters.device)


def _with_unsound(found: Segments, finite: torch.Tensor, lengths: torch.Tensor) -> Segments:
    """With one segment of all frames for an utterance without finite logits, so that its NaN are seen."""
    ends = found.ends if found.ends.shape[1] else F.pad(found.ends, (0, 1))
    ends = torch.where(finite.unsqueeze(1), ends, lengths.unsqueeze(1))
    return replace(found, ends=ends, counts=torch.where(finite, found.counts, 1))


def _rows(characters: torch.Tensor) -> list[list[int]]:
    return [[code for code in row if code != PADDING] for row in characters.tolist()]


def _table(task: Any) -> torch.Tensor:
    """The symbol of each code point, and `PADDING` for those that there is none for."""
    symbols: dict[int, int] = {}
    for symbol in task.vocabulary:
        if len(symbol) == 1:
            for form in {symbol, symbol.lower(), symbol.upper()}:
                if len(form) == 1 and len(ids := task.encode(form)) == 1:
                    symbols[ord(form)] = ids[0]
    table = torch.full((max(symbols) + 1,), PADDING)
    table[list(symbols)] = torch.tensor(list(symbols.values()))
    return table
