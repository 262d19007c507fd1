"""Transcripts by a language model, from a vector of speech for each of its tokens."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import jiwer
import torch
from torch import nn

from mmtransfer.data import DataError
from mmtransfer.data.recordings import Clip, Recordings
from mmtransfer.tokens import PADDING, TokenLabels
from mmtransfer.training.settings import check_integer, check_number

from .base import Metric, Task, register_task

if TYPE_CHECKING:
    from .language.tokenizer import TextTokenizer

_SPEECH = "<speech>"
_TUNINGS = ("vanilla", "lora", "multitask")


@register_task
@dataclass(frozen=True, kw_only=True)
class Text(Task):
    """Transcripts by a language model, in the two stages of SSR-Connector (arXiv 2410.00168).

    Stage 1 draws a vector of speech for each token to the token's embedding; the language model itself is
    neither built nor run. Stage 2 trains the language model to continue the vectors with the transcript. The
    loss is the head's, so the task needs a method that compresses speech into vectors.

    Attributes:
        language_model: a causal language model of transformers with a fast tokenizer, folder or hub name.
        stage: 1 or 2.
        template: of stage 2: the text around the speech, with `<speech>` once.
        tuning: of stage 2: "vanilla" trains all weights, "lora" low-rank updates of the attention's
            projections, "multitask" all weights, on plain text too.
        lora_rank, lora_alpha: of the updates.
        text: for "multitask": a file of plain text, a passage a line.
        text_share: weight of the loss on plain text, between 0 and 1.
        cosine_weight: of stage 1: of the cosine against the squared distance.
        max_tokens: of a prediction of stage 2, and of a passage of text.
        alphabet: the characters of the training transcripts, in the order of their code points.

    ValueError, with the field's name, for a value that does not fit.
    """

    name: ClassVar[str] = "text"
    metric: ClassVar[Metric] = Metric("wer", "Word error", higher_is_better=False)
    further: ClassVar[tuple[Metric, ...]] = (
        Metric("cer", "Character error", higher_is_better=False),
        Metric("ter", "Token error", higher_is_better=False),
    )
    by_length: ClassVar[bool] = True
    kind: ClassVar[Literal["label", "text"]] = "text"
    whole_clips: ClassVar[bool] = True
    reads_language_model: ClassVar[bool] = True

    language_model: str
    stage: int = 1
    template: str = _SPEECH
    tuning: str = "vanilla"
    lora_rank: int = 8
    lora_alpha: float = 16.0
    text: str | None = None
    text_share: float = 0.5
    cosine_weight: float = 5.0
    max_tokens: int = 256
    alphabet: str = ""

    def __post_init__(self) -> None:
        for name in ("language_model", "text"):
            if isinstance(getattr(self, name), Path):
                object.__setattr__(self, name, str(getattr(self, name)))
        if not isinstance(self.language_model, str) or not self.language_model:
            raise ValueError(f"language_model must be a folder or a hub name, got {self.language_model!r}")
        check_integer("stage", self.stage, least=1, most=2)
        if not isinstance(self.template, str) or self.template.count(_SPEECH) != 1:
            raise ValueError(f"template must be a text with {_SPEECH} once, got {self.template!r}")
        for name, least in (("lora_rank", 1), ("max_tokens", 1)):
            check_integer(name, getattr(self, name), least=least)
        for name in ("lora_alpha", "text_share", "cosine_weight"):
            check_number(name, getattr(self, name))
        if self.lora_alpha == 0:
            raise ValueError("lora_alpha must be positive, got 0")
        if not 0 < self.text_share < 1:
            raise ValueError(f"text_share must lie between 0 and 1, got {self.text_share}")
        if not isinstance(self.alphabet, str) or list(self.alphabet) != sorted(set(self.alphabet)):
            raise ValueError(f"alphabet must be sorted characters, each once, got {self.alphabet!r}")
        self._check_tuning()

    def _check_tuning(self) -> None:
        if self.tuning not in _TUNINGS:
            raise ValueError(f"tuning must be one of {', '.join(_TUNINGS)}, got {self.tuning!r}")
        if self.stage == 1 and self.tuning != "vanilla":
            raise ValueError(
                f"tuning is for stage 2, where the language model is trained, got {self.tuning!r}"
            )
        if self.text is not None and (not isinstance(self.text, str) or not self.text):
            raise ValueError(f"text must be a file of plain text, got {self.text!r}")
        if self.tuning == "multitask" and self.text is None:
            raise ValueError(
                "text must be given for tuning multitask: a file of plain text, a passage a line"
            )
        if self.tuning != "multitask" and self.text is not None:
            raise ValueError(f"text is for tuning multitask, got tuning {self.tuning!r}")

    @classmethod
    def of(cls, recordings: Recordings, **options: Any) -> Text:
        """The task on these recordings.

        Args:
            recordings: with transcripts, whose characters are the `alphabet`.
            options: the other fields.

        Raises:
            ValueError: recordings without transcripts, no `language_model`, an unknown or a wrong option.
            DataError: `text` is no file.
        """
        if not recordings.transcribed:
            raise ValueError(
                f"{recordings.name} has labels; the task text needs transcripts, in a column called text"
            )
        if not options.get("language_model"):
            raise ValueError("the task text needs a language model; give --language-model FOLDER or NAME")
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := [name for name in options if name not in known]:
            raise ValueError(f"the task text has the options {', '.join(known)}, got {', '.join(unknown)}")
        characters = set().union(*(clip.text or "" for clip in recordings.train))
        task = cls(**{"alphabet": "".join(sorted(characters)), **options})
        if task.text is not None and not Path(task.text).expanduser().is_file():
            raise DataError(f"text {task.text} is no file; give plain text, a passage a line")
        return task

    @property
    def token_each(self) -> bool:
        """Whether a vector of speech belongs to each token of the transcript."""
        return self.stage == 1

    @property
    def keeps_best(self) -> bool:
        """Not in stage 1: while vectors come nearer to their embeddings, the errors of the texts that they
        are nearest to may grow."""
        return self.stage != 1

    @property
    def shape(self) -> dict[str, Any]:
        """The sizes of a layer of the language model, from its configuration: width (of its embeddings),
        heads, key_heads, hidden (of the feed-forward network) and eps (of its norms).
        """
        from .language.source import read_outline

        return read_outline(self.language_model).shape

    def head(self, dim: int) -> nn.Module:
        """An `EmbeddingHead` or a `LanguageModelHead`; its `loss` and `forward` take vectors of speech."""
        if self.stage == 1:
            from .language.embedding_head import EmbeddingHead
            from .language.table import read_embedding_table

            table = read_embedding_table(self.language_model)
            return EmbeddingHead(dim, table, cosine_weight=self.cosine_weight)
        from .language.model_head import LanguageModelHead
        from .language.passages import Passages

        return LanguageModelHead(
            dim,
            self.language_model,
            template=self.template,
            tuning=self.tuning,
            lora_rank=self.lora_rank,
            lora_alpha=self.lora_alpha,
            passages=None if self.text is None else Passages(self.text),
            text_share=self.text_share,
            max_tokens=self.max_tokens,
        )

    def target(self, clip: Clip) -> str:
        return clip.text or ""

    def frames_needed(self, target: str) -> int:
        return len(self._tokenizer.encode(target))

    def unknown(self, target: str) -> list[str]:
        return self._tokenizer.unknown(target)

    def is_empty(self, target: str) -> bool:
        return self._tokenizer.is_empty(target)

    def collate(self, targets: Sequence[str]) -> torch.Tensor:
        """`TokenLabels` of the texts, packed: `(B, 3, L)`."""
        pairs = [self._tokenizer.encode_with_ends(target) for target in targets]
        return TokenLabels.of([ids for ids, _ in pairs], [ends for _, ends in pairs], targets).pack()

    def loss(self, logits: torch.Tensor, labels: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """The head has the loss: predicted tokens have no gradient."""
        raise ValueError(
            "the loss of the task text is that of its head, on vectors of speech; choose a method that "
            "compresses speech into vectors of tokens"
        )

    def decode(self, logits: torch.Tensor, lengths: torch.Tensor) -> list[str]:
        """The texts of the tokens `(B, G)` that the head gives."""
        return [
            self._tokenizer.decode([index for index in row if index > PADDING]) for row in logits.tolist()
        ]

    def sound(self, logits: torch.Tensor, lengths: torch.Tensor) -> list[bool]:
        """Whether the head could predict each utterance; it marks those with values that are not finite."""
        return (logits >= PADDING).all(dim=1).tolist()

    def score(self, predictions: Sequence[str], targets: Sequence[str]) -> dict[str, float]:
        """Word, character and token error rate: edits in all transcripts / length of all references.

        Tokens are the language model's.
        """
        pairs = [(target, text) for target, text in zip(targets, predictions, strict=True) if target.strip()]
        if not pairs:
            raise ValueError("all references are empty; there is no error rate")
        references, texts = map(list, zip(*pairs, strict=True))
        return {
            "wer": jiwer.wer(references, texts),
            "cer": jiwer.cer(references, texts),
            "ter": jiwer.wer(self._tokens(references), self._tokens(texts)),
        }

    def _tokens(self, texts: Sequence[str]) -> list[str]:
        """The ids of each text, as words for jiwer."""
        return [" ".join(map(str, self._tokenizer.encode(text))) for text in texts]

    @functools.cached_property
    def _tokenizer(self) -> TextTokenizer:
        from .language.tokenizer import read_tokenizer

        return read_tokenizer(self.language_model)
