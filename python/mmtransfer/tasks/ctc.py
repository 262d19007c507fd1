"""Transcripts: a label for each frame, by connectionist temporal classification."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import jiwer
import torch
from tokenizers import Tokenizer
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from mmtransfer.data.recordings import Clip, Recordings
from mmtransfer.encoders.taps import Taps
from mmtransfer.training.settings import check_integer

from .base import Metric, Task, register_task

#: Of labels behind the end of a transcript.
PADDING = -1


class CTCHead(nn.Module):
    """LayerNorm, then a linear layer, of each frame."""

    def __init__(self, dim: int, num_symbols: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.classifier = nn.Linear(dim, num_symbols)

    def forward(self, frames: torch.Tensor, taps: Taps) -> torch.Tensor:
        """Logits `(N, num_symbols)` from the frames `(N, dim)`."""
        return self.classifier(self.norm(frames))


@register_task
@dataclass(frozen=True, kw_only=True)
class CTC(Task):
    """Transcripts by connectionist temporal classification: LayerNorm and a linear layer on each frame.

    Decoding is greedy: the best symbol of each frame, repetitions merged, blanks dropped.

    Attributes:
        vocabulary: the symbols in the order of the logits, without `tokenizer` the characters; the entry of
            the blank is never written.
        blank: index of the blank.
        tokenizer: JSON of a tokenizer of the library `tokenizers`, whose ids index `vocabulary`; None for
            characters.
        case: "keep", or "upper" or "lower" for a vocabulary that has characters of one case alone.
        plain_head: the head has no LayerNorm, as the heads of transformers' models.

    ValueError for a vocabulary with an entry twice, or a blank outside it.
    """

    name: ClassVar[str] = "ctc"
    metric: ClassVar[Metric] = Metric("cer", "Character error", higher_is_better=False)
    further: ClassVar[tuple[Metric, ...]] = (Metric("wer", "Word error", higher_is_better=False),)
    by_length: ClassVar[bool] = True
    kind: ClassVar[Literal["label", "text"]] = "text"
    whole_clips: ClassVar[bool] = True

    vocabulary: tuple[str, ...]
    blank: int = 0
    tokenizer: str | None = None
    case: str = "keep"
    plain_head: bool = False

    def __post_init__(self) -> None:
        # A checkpoint has a list.
        object.__setattr__(self, "vocabulary", tuple(self.vocabulary))
        if len(self.vocabulary) < 2:
            raise ValueError("vocabulary must have the blank and at least one symbol")
        if twice := [symbol for symbol, count in Counter(self.vocabulary).items() if count > 1]:
            raise ValueError(f"vocabulary has {twice[0]!r} twice")
        check_integer("blank", self.blank, least=0, most=len(self.vocabulary) - 1)
        if self.case not in _CASES:
            raise ValueError(f"case must be one of {', '.join(_CASES)}, got {self.case!r}")
        if self.tokenizer is None and not self._ids:
            raise ValueError("vocabulary has no characters; give the tokenizer that its symbols belong to")

    @classmethod
    def of(cls, recordings: Recordings) -> CTC:
        """The characters of the training transcripts; ValueError for recordings without transcripts."""
        if not recordings.transcribed:
            raise ValueError(
                f"{recordings.name} has labels; the task ctc needs transcripts, in a column called text"
            )
        return cls.of_texts(clip.text or "" for clip in recordings.train)

    @classmethod
    def of_texts(cls, texts: Iterable[str]) -> CTC:
        """The characters that occur, in the order of their code points, behind the blank."""
        characters = sorted(set().union(*map(set, texts)))
        if not characters:
            raise ValueError("the transcripts are empty; a vocabulary needs at least one character")
        return cls(vocabulary=("", *characters))

    @classmethod
    def of_tokenizer(cls, tokenizer: Tokenizer) -> CTC:
        """The tokens of a tokenizer of the library `tokenizers`, behind them the blank."""
        ids = tokenizer.get_vocab(with_added_tokens=True)
        size = max(ids.values()) + 1
        symbols = [f"<unused {index}>" for index in range(size)]
        for symbol, index in ids.items():
            symbols[index] = symbol
        return cls(vocabulary=(*symbols, ""), blank=size, tokenizer=tokenizer.to_str())

    def head(self, dim: int) -> nn.Module:
        size = len(self.vocabulary)
        return PlainHead(dim, size) if self.plain_head else CTCHead(dim, size)

    @classmethod
    def of_tokenizer_file(cls, path: Path) -> CTC:
        """A JSON file of the library `tokenizers`, or a folder with a tokenizer of transformers."""
        from .vocabulary import read_tokenizer

        found = read_tokenizer(path)
        if isinstance(found, Tokenizer):
            return cls.of_tokenizer(found)
        return cls(vocabulary=found.symbols, blank=found.blank, case=found.case)

    @classmethod
    def of_own_head(cls, model: nn.Module, source: str) -> tuple[CTC, Mapping[str, torch.Tensor]]:
        """The head of Wav2Vec2ForCTC and its relatives."""
        from .own_head import find_own_head

        found = find_own_head(model, source)
        task = cls(
            vocabulary=found.alphabet.symbols,
            blank=found.alphabet.blank,
            case=found.alphabet.case,
            plain_head=not found.normed,
        )
        return task, found.tensors

    def target(self, clip: Clip) -> str:
        """The transcript in the case of the vocabulary."""
        return _CASES[self.case](clip.text or "")

    def encode(self, text: str) -> list[int]:
        """The indices of a transcript; characters outside the vocabulary are dropped."""
        text = _CASES[self.case](text)
        if self.tokenizer is not None:
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        return [self._ids[character] for character in text if character in self._ids]

    def encode_with_places(self, text: str) -> list[tuple[int, tuple[int, int]]]:
        """The indices that `encode` gives, each with the start and end of its characters in `text`."""
        if self.tokenizer is None:
            return [
                (index, (place, place + 1)) for place, each in enumerate(text) for index in self.encode(each)
            ]
        found = self._tokenizer.encode(_CASES[self.case](text), add_special_tokens=False)
        return list(zip(found.ids, found.offsets, strict=True))

    def unknown(self, text: str) -> list[str]:
        """The characters of a transcript that `encode` drops."""
        if self.tokenizer is not None:
            return []
        return [character for character in _CASES[self.case](text) if character not in self._ids]

    def is_empty(self, target: str) -> bool:
        # Spaces alone are what is left of words in another alphabet.
        return all(self.vocabulary[index].isspace() for index in self.encode(target))

    def frames_needed(self, target: str) -> int:
        ids = self.encode(target)
        return len(ids) + sum(a == b for a, b in itertools.pairwise(ids))

    def collate(self, targets: Sequence[str]) -> torch.Tensor:
        """Indices `(B, U)`, padded with `PADDING`."""
        ids = [torch.tensor(self.encode(target), dtype=torch.int64) for target in targets]
        return pad_sequence(ids, batch_first=True, padding_value=PADDING)

    def loss(self, logits: torch.Tensor, labels: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Mean over utterances of loss / symbols; one with too few frames for its text counts 0."""
        valid = labels != PADDING
        counts = valid.sum(dim=1)
        log_probs = F.log_softmax(logits.float(), dim=-1)
        # zero_infinity: no alignment exists for a text that is longer than its frames.
        losses = F.ctc_loss(
            pad_sequence(log_probs.split(lengths.tolist())),
            labels[valid],
            lengths,
            counts,
            blank=self.blank,
            reduction="none",
            zero_infinity=True,
        )
        return (losses / counts.clamp(min=1)).mean()

    def decode(self, logits: torch.Tensor, lengths: torch.Tensor) -> list[str]:
        best = logits.argmax(dim=-1).cpu()
        return [self._text(indices.tolist()) for indices in best.split(lengths.tolist())]

    def score(self, predictions: Sequence[str], targets: Sequence[str]) -> dict[str, float]:
        """Character and word error rate: edits in all transcripts / length of all references."""
        pairs = [(target, text) for target, text in zip(targets, predictions, strict=True) if target.strip()]
        if not pairs:
            raise ValueError("all references are empty; there is no error rate")
        references, texts = map(list, zip(*pairs, strict=True))
        return {"cer": jiwer.cer(references, texts), "wer": jiwer.wer(references, texts)}

    def _text(self, indices: Sequence[int]) -> str:
        merged = [index for index, _ in itertools.groupby(indices) if index != self.blank]
        if self.tokenizer is not None:
            return self._tokenizer.decode(merged)
        return "".join(self.vocabulary[index] for index in merged if not _is_special(self.vocabulary[index]))

    @functools.cached_property
    def _ids(self) -> dict[str, int]:
        return {
            symbol: index
            for index, symbol in enumerate(self.vocabulary)
            if len(symbol) == 1 and index != self.blank
        }

    @functools.cached_property
    def _tokenizer(self) -> Tokenizer:
        assert self.tokenizer is not None
        tokenizer = Tokenizer.from_str(self.tokenizer)
        # Files of text models may have both; a transcript is of the whole clip.
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return tokenizer


class PlainHead(nn.Module):
    """A linear layer of each frame."""

    def __init__(self, dim: int, num_symbols: int) -> None:
        super().__init__()
        self.classifier = nn.Linear(dim, num_symbols)

    def forward(self, frames: torch.Tensor, taps: Taps) -> torch.Tensor:
        """Logits `(N, num_symbols)` from the frames `(N, dim)`."""
        return self.classifier(frames)


_CASES: dict[str, Callable[[str], str]] = {"keep": str, "upper": str.upper, "lower": str.lower}


def _is_special(symbol: str) -> bool:
    """Whether a symbol of a vocabulary of characters stands for none: <s>, <unk>, [UNK]."""
    return len(symbol) > 1 and (symbol[0], symbol[-1]) in (("<", ">"), ("[", "]"))
