"""The second stage: a language model that continues vectors of speech with the transcript."""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from mmtransfer.encoders.taps import Taps
from mmtransfer.tokens import PADDING, TokenLabels, UtteranceError

from .passages import Passages
from .source import check_table_finite, find_embedding, load_language_model
from .tokenizer import read_tokenizer
from .vectors import NOT_FINITE, check_finite, check_width, find_sound

#: In a template: where the vectors of speech go.
SPEECH = "<speech>"
#: A position whose next token is not trained.
_NO_TARGET = -100
#: Texts in a batch of `perplexity`.
_TEXTS = 8


class LanguageModelHead(nn.Module):
    """A language model on `[BOS] template <speech> template transcript EOS`, trained on transcript and EOS.

    BOS is left out where the tokenizer has none, or the template begins with it. The model is in float32,
    with the dropout of its configuration.

    Args:
        dim: of the vectors, the width of the model's embeddings.
        source: the language model, a folder or a hub name.
        template: text with `<speech>` once.
        tuning: "vanilla" trains all weights, "lora" low-rank updates of the projections that peft chooses
            for the model, "multitask" all weights, on text alone too.
        lora_rank, lora_alpha: of the updates, which are scaled by alpha / rank.
        passages: text alone, for "multitask".
        text_share: weight of the loss on text alone; that of the loss on speech is 1 - text_share.
        max_tokens: of a prediction, and of a passage.

    Raises:
        DataError: a model that cannot be loaded whole.
        ValueError: another width, a tokenizer that does not fit or has no EOS, or a type of model for which
            peft knows no projections.
        ImportError: "lora" without peft.
    """

    def __init__(
        self,
        dim: int,
        source: str,
        *,
        template: str = SPEECH,
        tuning: str = "vanilla",
        lora_rank: int = 8,
        lora_alpha: float = 16,
        passages: Passages | None = None,
        text_share: float = 0.5,
        max_tokens: int = 256,
    ) -> None:
        super().__init__()
        if tuning == "lora":
            _check_peft()
        if tuning == "multitask" and passages is None:
            raise ValueError("tuning multitask needs passages of text")
        self.source, self.max_tokens = source, max_tokens
        self.passages, self.text_share = passages if tuning == "multitask" else None, text_share
        self.tokenizer = read_tokenizer(source)
        model = load_language_model(source)
        table = find_embedding(model, source)
        check_width(dim, table.shape[1])
        self.tokenizer.check_table(len(table))
        check_table_finite(table, source)
        if self.tokenizer.eos is None:
            raise ValueError(f"the tokenizer of {source} has no token for the end of a text (EOS)")
        self.eos = self.tokenizer.eos
        self._bos = [] if self.tokenizer.bos is None else [self.tokenizer.bos]
        before, after = template.split(SPEECH)
        start = self.tokenizer.encode_template(before)
        self._before = start if self._bos and start[:1] == self._bos else self._bos + start
        self._after = self.tokenizer.encode_template(after)
        _decode_greedily(model, self.eos)
        self.model = model
        self.lora = tuning == "lora"
        if self.lora:
            _add_lora(model, source, lora_rank, lora_alpha)

    def loss(self, frames: torch.Tensor, taps: Taps, labels: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy of the transcripts' tokens and EOS; in training, mixed with that of passages.

        Args:
            frames: `(N, H)` vectors of all utterances, which get a gradient.
            taps: whose lengths are the vectors of each utterance.
            labels: of `Text.collate`.

        Raises:
            NotFiniteError: on the CPU, for NaN or infinity in a vector.
            UtteranceError: one that is longer than the model's positions.
        """
        check_finite(frames, taps)
        tokens = TokenLabels.unpack(labels)
        pairs = zip(tokens.ids, tokens.counts.tolist(), strict=True)
        tails = [[*ids[:count].tolist(), self.eos] for ids, count in pairs]
        rows = self._sequences(frames, taps, tails)
        targets = [
            torch.tensor([_NO_TARGET] * (len(row) - len(tail)) + tail)
            for row, tail in zip(rows, tails, strict=True)
        ]
        speech = _mean(self._next_tokens(targets, rows=rows))
        if self.passages is None or not self.training:
            return speech
        text = _mean(self._text(self.passages.draw(len(rows))))
        return (1 - self.text_share) * speech + self.text_share * text

    @torch.no_grad()
    def forward(self, frames: torch.Tensor, taps: Taps) -> torch.Tensor:
        """The tokens `(B, G)` of greedy decoding up to EOS, or `max_tokens`, behind them `PADDING`.

        An utterance with a vector or a logit that is not finite has `NOT_FINITE` alone. UtteranceError for
        one whose positions leave no room for a text.
        """
        sound = find_sound(frames, taps)
        rows = self._sequences(frames.nan_to_num(0.0, 0.0, 0.0), taps, [[] for _ in taps.lengths], room=1)
        # Rows of the same room together, so that none is cut short by a longer one.
        groups: dict[int, list[int]] = {}
        for index, row in enumerate(rows):
            # A vector, BOS or a template is needed to predict the first token from.
            if len(row):
                room = min(self.max_tokens, self._positions - len(row))
                groups.setdefault(room, []).append(index)
        found = torch.full((len(rows), 1), PADDING, device=frames.device)
        for room, group in groups.items():
            ids, finite = self._generate([rows[index] for index in group], room)
            found = F.pad(found, (0, max(ids.shape[1] - found.shape[1], 0)), value=PADDING)
            found[group, : ids.shape[1]] = ids
            sound[group] &= finite
        found[~sound] = PADDING
        found[~sound, :1] = NOT_FINITE
        return found

    @torch.no_grad()
    def perplexity(self, texts: Sequence[str]) -> float:
        """exp of the mean cross-entropy of the tokens of plain texts, EOS left out; in eval mode.

        Texts are cut to the model's positions. ValueError where no token is left to be predicted.
        """
        training = self.training
        self.eval()
        losses = []
        try:
            for start in range(0, len(texts), _TEXTS):
                part = texts[start : start + _TEXTS]
                losses.append(self._text(part, most=self._positions, end=False).double())
        finally:
            self.train(training)
        total = torch.cat(losses) if losses else torch.zeros(0)
        if not len(total):
            raise ValueError("texts have no token that is predicted; there is no perplexity")
        return math.exp(float(total.mean()))

    def trained_tensors(self) -> dict[str, torch.Tensor]:
        """The low-rank updates, or all weights of the model, tied ones once."""
        named = self.named_parameters() if self.lora else self.state_dict(keep_vars=True).items()
        found: dict[int, tuple[str, torch.Tensor]] = {}
        for name, tensor in named:
            if tensor.requires_grad or not self.lora:
                found.setdefault(id(tensor), (name, tensor))
        return dict(found.values())

    @property
    def _positions(self) -> int:
        """The most positions of a sequence."""
        config = self.model.config.get_text_config(decoder=True)
        return getattr(config, "max_position_embeddings", None) or 1 << 31

    def _embed(self, ids: Sequence[int]) -> torch.Tensor:
        table = self.model.get_input_embeddings()
        return table(torch.tensor(list(ids), dtype=torch.int64, device=table.weight.device))

    def _sequences(
        self, frames: torch.Tensor, taps: Taps, tails: Sequence[Sequence[int]], *, room: int = 0
    ) -> list[torch.Tensor]:
        """The embeddings of each utterance: BOS, template and speech, then the tokens of its tail.

        UtteranceError where they leave fewer than `room` of the model's positions.
        """
        table = self.model.get_input_embeddings()
        vectors = frames.to(table.weight.dtype)
        # The speech has the scale of the table's rows, which some models multiply in the embedding.
        if (scale := getattr(table, "embed_scale", None)) is not None:
            vectors = vectors * scale
        before = self._embed(self._before)
        rows = [
            torch.cat([before, speech, self._embed([*self._after, *tail])])
            for speech, tail in zip(vectors.split(taps.lengths.tolist()), tails, strict=True)
        ]
        for index, row in enumerate(rows):
            if len(row) + room > self._positions:
                text = "its text" if room else "its transcript and EOS"
                raise UtteranceError(
                    index,
                    f"has {int(taps.lengths[index])} vectors of speech, which leave {text} no room in the "
                    f"{self._positions} positions of {self.source}",
                )
        return rows

    def _next_tokens(
        self,
        targets: Sequence[torch.Tensor],
        *,
        rows: Sequence[torch.Tensor] = (),
        ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The cross-entropy of each target, of embeddings or of ids.

        Padded on the right, so that the positions of what is valid are those of an utterance alone.
        """
        device = find_embedding(self.model, self.source).device
        wanted = pad_sequence(list(targets), batch_first=True, padding_value=_NO_TARGET).to(device)
        mask = _mask([len(each) for each in targets], wanted.shape[1], device)
        given: dict[str, Any] = {"input_ids": ids}
        if ids is None:
            given = {"inputs_embeds": pad_sequence(list(rows), batch_first=True)}
        logits = self.model(**given, attention_mask=mask, use_cache=False).logits
        wanted = wanted[:, 1:]
        valid = wanted != _NO_TARGET
        chosen = logits[:, :-1][valid]
        wide = torch.promote_types(chosen.dtype, torch.float32)
        return F.cross_entropy(chosen.to(wide), wanted[valid], reduction="none")

    def _text(self, texts: Sequence[str], *, most: int | None = None, end: bool = True) -> torch.Tensor:
        """The cross-entropy of each token of texts, and of EOS behind those that are not cut."""
        most = min(self.max_tokens, self._positions) if most is None else most
        tail = [self.eos] if end else []
        rows = [torch.tensor([*self._bos, *self.tokenizer.encode(text), *tail][:most]) for text in texts]
        rows = [row.to(torch.int64) for row in rows]
        device = find_embedding(self.model, self.source).device
        if not any(map(len, rows)):
            return torch.zeros(0, device=device)
        ids = pad_sequence(rows, batch_first=True, padding_value=self.eos).to(device)
        return self._next_tokens(rows, ids=ids)

    def _generate(self, rows: Sequence[torch.Tensor], room: int) -> tuple[torch.Tensor, torch.Tensor]:
        """At most `room` tokens `(B, G)` behind embeddings, and whether logits of each row were finite."""
        lengths = [len(row) for row in rows]
        inputs = pad_sequence(list(rows), batch_first=True, padding_side="left")
        mask = _mask(lengths, inputs.shape[1], inputs.device).flip(1)
        watch = _Watch(len(rows), inputs.device)
        ids = self.model.generate(
            inputs_embeds=inputs,
            attention_mask=mask,
            max_new_tokens=room,
            logits_processor=LogitsProcessorList([watch]),
        )
        stops = torch.tensor(self.model.generation_config.eos_token_id, device=ids.device)
        over = torch.isin(ids, stops).cumsum(1) > 0
        return ids.masked_fill(over, PADDING), watch.finite


class _Watch(LogitsProcessor):
    """Notes rows whose logits are not finite. -inf excludes a token and is sound."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self.finite = torch.ones(rows, dtype=torch.bool, device=device)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.finite &= scores.amax(-1).isfinite()
        return scores


def _mean(losses: torch.Tensor) -> torch.Tensor:
    """Of nothing it is 0, with a graph."""
    return losses.sum() / max(len(losses), 1)


def _mask(lengths: Sequence[int], steps: int, device: torch.device) -> torch.Tensor:
    """`(B, steps)` int64: 1 for the first positions of each row."""
    return (torch.arange(steps) < torch.tensor(lengths)[:, None]).to(device, torch.int64)


def _decode_greedily(model: Any, eos: int) -> None:
    """Replace the model's own settings, which may ask for sampling or punish repetitions."""
    own = model.generation_config.eos_token_id
    stops = {eos, *(own if isinstance(own, list) else [own])} - {None}
    model.generation_config = GenerationConfig(
        do_sample=False, num_beams=1, use_cache=True, eos_token_id=sorted(stops), pad_token_id=eos
    )


def _check_peft() -> None:
    if importlib.util.find_spec("peft") is None:
        raise ImportError("tuning lora needs peft; install it with: pip install peft")


def _add_lora(model: Any, source: str, rank: int, alpha: float) -> None:
    """Freeze the model and add low-rank updates to the projections that are peft's default for it."""
    from peft import LoraConfig, inject_adapter_in_model

    model.requires_grad_(False)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # a factor, which may be any number
        lora_dropout=0.0,
    )
    try:
        with warnings.catch_warnings():
            # peft says where it stores a weight transposed.
            warnings.simplefilter("ignore")
            inject_adapter_in_model(config, model, adapter_name="lora")
    except ValueError as error:
        raise ValueError(
            f"tuning lora knows no projections for a model of type {model.config.model_type} ({source}); "
            "choose vanilla or multitask"
        ) from error
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
