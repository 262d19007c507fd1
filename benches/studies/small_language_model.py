"""A small Llama and its sub-word tokenizer, trained on the transcripts of a task in minutes of two cores.

It stands for the language model in studies of connectors, which need one whose embeddings belong to the
language that is spoken. Behind `<repeat>` it learns to repeat random tokens too, as large models can repeat a
text. Its folder is read by `AutoModelForCausalLM` and `AutoTokenizer`.
``python -m benches.studies.small_language_model FOLDER`` trains the one of the Czech recordings.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS, PAD, REPEAT = "<s>", "</s>", "<pad>", "<repeat>"
#: Of a target that is padding; cross_entropy's own default.
_IGNORED = -100
#: Where classes of tokens begin, by how often training texts have them; a fifth of the Czech test's are rare.
_FREQUENCIES = (30, 100)
_FACTS = "small_language_model.json"


@dataclass(frozen=True, kw_only=True)
class SmallLanguageModelSettings:
    """Sizes and training.

    Attributes:
        vocabulary: tokens, of which 256 are the bytes, so that any text has tokens, and three are special.
        width, layers, heads, key_heads, hidden: of the Llama; a head has `width / heads` channels.
        epochs: at most; training stops after `patience` epochs without a lower loss of held-out lines.
        batch_lines, learning_rate, weight_decay: of AdamW; the rate rises linearly in the first epoch and
            falls as a cosine to a tenth.
        embedding_dropout: share of the inputs' embeddings that is zeroed in training, the one regularisation
            that costs no change of the model.
        repeats: texts of random tokens in each step, which are to be repeated.
        held_out: share of the distinct lines that decide when to stop and are not trained on.
    """

    vocabulary: int = 800
    width: int = 256
    layers: int = 4
    heads: int = 4
    key_heads: int = 2
    hidden: int = 704
    epochs: int = 12
    patience: int = 2
    batch_lines: int = 16
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    embedding_dropout: float = 0.2
    repeats: int = 32
    held_out: float = 0.05


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts texts, each of which ends with `</s>`.

    Attributes:
        token: of a token, `</s>` among them; models with other tokens cannot be compared by it.
        character: of a character, with the end of a text as one; this they can be compared by.
    """

    token: float
    character: float


def small_language_model(
    texts: Sequence[str],
    folder: str | Path,
    *,
    test: Sequence[str] = (),
    seed: int = 0,
    settings: SmallLanguageModelSettings | None = None,
) -> dict[str, Any]:
    """Train tokenizer and model on `texts` and save both; a folder that is complete is read, not trained.

    Repeatable: the same texts, seed and settings give the same weights on one machine. The state of torch's
    generators is left as it was.

    Args:
        texts: lines; equal ones are all trained on, or all held out.
        folder: written at once when training has ended, so that one that is there is complete.
        test: lines that are judged alone, such as those of rooms that no training sees.
        seed: of the weights, the order of lines and the choice of held-out lines.

    Returns:
        `parameters`; `vocabulary` (rows of the table); `tokens` and `characters` of `texts`;
        `unused_tokens` (rows that `texts` never read); `embedding_squared_norm`, the mean of the rows that
        they do; `seconds`, `epochs` run and the `best_epoch`, whose weights are kept; and for
        `training`, `held_out` and, where there is one, `test`: `perplexity` and `character_perplexity`, with
        these words behind the name but for the test's (`perplexity`, `training_perplexity`,
        `held_out_perplexity`). `unigram_perplexity` is the test's, by counts of tokens in `texts` alone.

    Raises:
        ValueError: there are too few texts, or `folder` has a model of other texts, seed or settings.
    """
    settings = settings or SmallLanguageModelSettings()
    folder = Path(folder)
    given = {"texts": _digest(texts), "test": _digest(test), "seed": seed, **asdict(settings)}
    if (folder / _FACTS).is_file():
        return _read(folder, given)
    if len(set(texts)) < 2:
        raise ValueError("texts must have at least two different lines, one of which is held out")
    if folder.exists():
        raise ValueError(f"{folder} is there and holds no small language model; remove it or name another")

    began = time.perf_counter()
    tokenizer = train_tokenizer(texts, settings.vocabulary)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(_config(tokenizer, settings))
        kept, held = _split(texts, settings.held_out)
        repeat: Any = tokenizer.convert_tokens_to_ids(REPEAT)
        history = _train(model, repeat, _encode(tokenizer, kept), _encode(tokenizer, held), settings)
    facts = {
        **_facts(model, tokenizer, {"training": kept, "held_out": held, "test": test}),
        "epochs": len(history),
        "best_epoch": 1 + history.index(min(history)),
        "seconds": time.perf_counter() - began,
    }
    _save(folder, model, tokenizer, {"given": given, "facts": facts})
    return facts


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE. A word's tokens are the same wherever it is: the first begins with its space, which
    the beginning of a text is given, and decoding takes away. A text begins with `<s>` and lacks `</s>`, as
    Llama's do."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOS, EOS, PAD, REPEAT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(
                single=f"{BOS} $A",
                pair=f"{BOS} $A {BOS} $B",
                special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
            ),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        extra_special_tokens=[REPEAT],
        clean_up_tokenization_spaces=False,
    )


@torch.no_grad()
def text_perplexity(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], batch_lines: int = 64
) -> Perplexity:
    """Of texts that follow `<s>`, each by itself; `model` is any causal language model of transformers."""
    training, device = model.training, next(model.parameters()).device
    lines = sorted(_encode(tokenizer, texts), key=len)
    model.eval()
    total = 0.0
    for start in range(0, len(lines), batch_lines):
        ids, targets = (each.to(device) for each in _batch(lines[start : start + batch_lines]))
        logits = model(input_ids=ids).logits
        loss = F.cross_entropy(logits.flatten(0, 1).double(), targets.flatten(), reduction="sum")
        total += loss.item()
    model.train(training)
    tokens = sum(len(line) - 1 for line in lines)
    characters = sum(len(text) + 1 for text in texts)
    return Perplexity(math.exp(total / tokens), math.exp(total / characters))


def token_counts(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> Counter[int]:
    """How often texts have each token."""
    return Counter(token for line in _encode(tokenizer, texts) for token in line[1:-1])


def frequency(count: int) -> str:
    """The class of a token that training texts have `count` times: "<30", "30-99" or ">=100"."""
    rare, common = _FREQUENCIES
    if count < rare:
        return f"<{rare}"
    return f"{rare}-{common - 1}" if count < common else f">={common}"


def _config(tokenizer: PreTrainedTokenizerFast, settings: SmallLanguageModelSettings) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.width,
        intermediate_size=settings.hidden,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.key_heads,
        head_dim=settings.width // settings.heads,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _split(texts: Sequence[str], share: float) -> tuple[list[str], list[str]]:
    """Lines to train on, and the distinct lines that are held out."""
    distinct = list(dict.fromkeys(texts))
    count = min(max(1, round(share * len(distinct))), len(distinct) - 1)
    held = {distinct[index] for index in torch.randperm(len(distinct))[:count].tolist()}
    return [text for text in texts if text not in held], sorted(held)


def _encode(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    """Tokens of each text between `<s>` and `</s>`."""
    if not texts:
        return []
    encoded = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return [[tokenizer.bos_token_id, *ids, tokenizer.eos_token_id] for ids in encoded]


def _batch(lines: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets `(B, L)`. Padding is behind each line, where causal attention needs no mask."""
    rows = [torch.tensor(line) for line in lines]
    ids = pad_sequence([row[:-1] for row in rows], batch_first=True)
    return ids, pad_sequence([row[1:] for row in rows], batch_first=True, padding_value=_IGNORED)


#: Tokens of a random text: the least, and one more than the most.
_REPEATED = (4, 16)


def _random_texts(model: LlamaForCausalLM, repeat: int, count: int) -> list[list[int]]:
    """Texts of one length; special tokens come first in the vocabulary and are left out."""
    length = int(torch.randint(*_REPEATED, (1,)))
    vocabulary = int(model.config.vocab_size or 0)
    texts: list[list[int]] = torch.randint(repeat + 1, vocabulary, (count, length)).tolist()
    return texts


def _repeating_loss(model: LlamaForCausalLM, repeat: int, texts: Sequence[Sequence[int]]) -> torch.Tensor:
    """Of the tokens behind `<repeat>`, and of the end."""
    config: Any = model.config
    bos, eos = config.bos_token_id, config.eos_token_id
    ids, targets = _batch([[bos, *text, repeat, *text, eos] for text in texts])
    for row, text in enumerate(texts):
        targets[row, : len(text) + 1] = _IGNORED
    logits = model(input_ids=ids).logits
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def _train(
    model: LlamaForCausalLM,
    repeat: int,
    kept: list[list[int]],
    held: list[list[int]],
    settings: SmallLanguageModelSettings,
) -> list[float]:
    """Held-out loss after each epoch; the model ends with the weights of the least."""
    decayed = [each for each in model.parameters() if each.dim() > 1]
    plain = [each for each in model.parameters() if each.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=settings.learning_rate,
        betas=(0.9, 0.95),
    )
    steps = math.ceil(len(kept) / settings.batch_lines)
    rates = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: _rate(step, steps, settings.epochs * steps)
    )
    history: list[float] = []
    best: dict[str, torch.Tensor] = {}
    for _ in range(settings.epochs):
        model.train()
        for lines in _drawn(kept, settings.batch_lines):
            ids, targets = _batch(lines)
            embedded = F.dropout(model.get_input_embeddings()(ids), settings.embedding_dropout)
            logits = model(inputs_embeds=embedded).logits
            F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
            if settings.repeats:
                _repeating_loss(model, repeat, _random_texts(model, repeat, settings.repeats)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            rates.step()
        history.append(_loss(model, held))
        if history[-1] == min(history):
            best = copy.deepcopy(model.state_dict())
        if len(history) - history.index(min(history)) > settings.patience:
            break
    model.load_state_dict(best)
    model.eval()
    return history


def _rate(step: int, warm: int, total: int) -> float:
    if step < warm:
        return (step + 1) / warm
    done = min((step - warm) / max(total - warm, 1), 1.0)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * done))


def _drawn(lines: list[list[int]], size: int) -> Iterator[list[list[int]]]:
    """All lines once, in batches of similar lengths, both in random order."""
    order = torch.randperm(len(lines)).tolist()
    pools = (order[start : start + 8 * size] for start in range(0, len(order), 8 * size))
    sorted_order = [index for pool in pools for index in sorted(pool, key=lambda each: len(lines[each]))]
    batches = [sorted_order[start : start + size] for start in range(0, len(order), size)]
    for index in torch.randperm(len(batches)).tolist():
        yield [lines[each] for each in batches[index]]


@torch.no_grad()
def _loss(model: LlamaForCausalLM, lines: list[list[int]]) -> float:
    """Mean over tokens, in one batch: these lines are few."""
    model.eval()
    ids, targets = _batch(lines)
    return F.cross_entropy(model(input_ids=ids).logits.flatten(0, 1), targets.flatten()).item()


def _facts(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, parts: dict[str, Sequence[str]]
) -> dict[str, Any]:
    lines = [*parts["training"], *parts["held_out"]]
    counts = token_counts(tokenizer, lines)
    table = model.state_dict()["model.embed_tokens.weight"]
    facts: dict[str, Any] = {
        "parameters": sum(each.numel() for each in model.parameters()),
        "vocabulary": len(table),
        "tokens": sum(counts.values()),
        "characters": sum(map(len, lines)),
        "unused_tokens": len(table) - len(counts),
        "embedding_squared_norm": table[sorted(counts)].square().sum(1).mean().item(),
    }
    for name, texts in parts.items():
        if texts:
            found = text_perplexity(model, tokenizer, texts)
            prefix = "" if name == "test" else f"{name}_"
            facts[f"{prefix}perplexity"] = found.token
            facts[f"{prefix}character_perplexity"] = found.character
    if parts["test"]:
        counts[tokenizer.eos_token_id] = len(lines)
        facts["unigram_perplexity"] = _unigram(counts, _encode(tokenizer, parts["test"]), len(table))
    return facts


def _unigram(counts: Counter[int], lines: list[list[int]], vocabulary: int) -> float:
    """Perplexity of a token by counts alone, one added to each; `</s>` is a token, `<s>` is not."""
    total = sum(counts.values()) + vocabulary
    losses = [-math.log((counts[token] + 1) / total) for line in lines for token in line[1:]]
    return math.exp(sum(losses) / len(losses))


def _digest(texts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def _read(folder: Path, given: dict[str, Any]) -> dict[str, Any]:
    found = json.loads((folder / _FACTS).read_text())
    others = [name for name, value in given.items() if found["given"].get(name) != value]
    if others:
        raise ValueError(
            f"{folder} has a language model with other {', '.join(others)}; remove it or name another"
        )
    return found["facts"]


def _save(
    folder: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, record: dict[str, Any]
) -> None:
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    (partial / _FACTS).write_text(json.dumps(record, indent=1) + "\n")
    partial.rename(folder)


def main() -> None:
    from mmtransfer.demo.czech import czech_dialogues

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    clips = czech_dialogues()
    train, test = ([clip.text or "" for clip in part] for part in (clips.train, clips.test))
    print(json.dumps(small_language_model(train, given.folder, test=test, seed=given.seed), indent=1))


if __name__ == "__main__":
    main()
