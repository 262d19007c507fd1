"""Tiny language models with a tokenizer of bytes, in folders as transformers writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from mmtransfer.encoders import Taps

WIDTH = 32
TEXTS = (
    "the cat sat on the mat",
    "the hat of the cat is on the mat",
    "a rat sat on that hat",
    "příliš žluťoučký kůň úpěl ďábelské ódy",
)
SPECIAL = ["<s>", "</s>", "<pad>"]


def tiny_tokenizer(*, bos: bool = True, eos: bool = True) -> PreTrainedTokenizerFast:
    """BPE of bytes, trained on `TEXTS`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=SPECIAL,
        show_progress=False,
    )
    tokenizer.train_from_iterator([*TEXTS[:3]] * 4, trainer)
    named: dict[str, Any] = {"pad_token": "<pad>"}
    if bos:
        named["bos_token"] = "<s>"
    if eos:
        named["eos_token"] = "</s>"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)


def tiny_model(kind: str = "llama", *, tied: bool = False, rows: int = 310, seed: int = 0) -> Any:
    """Two layers, of random weights with a spread that makes predictions differ."""
    torch.manual_seed(seed)
    shared: dict[str, Any] = {"tie_word_embeddings": tied, "bos_token_id": 0, "eos_token_id": 1}
    if kind == "gpt2":
        config: Any = GPT2Config(
            vocab_size=rows, n_embd=WIDTH, n_layer=2, n_head=4, n_positions=64, pad_token_id=2, **shared
        )
        model: Any = GPT2LMHeadModel(config)
    else:
        config = LlamaConfig(
            vocab_size=rows,
            hidden_size=WIDTH,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            rms_norm_eps=1e-6,
            pad_token_id=2,
            **shared,
        )
        model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.3)
    return model.eval()


def tiny_language_model(folder: Path, kind: str = "llama", *, size: str = "5GB", **options: Any) -> Path:
    """A model and its tokenizer in a folder; `size` is the largest of a file of weights."""
    tokenizer = {key: options.pop(key) for key in ("bos", "eos") if key in options}
    tiny_model(kind, **options).save_pretrained(folder, max_shard_size=size)
    tiny_tokenizer(**tokenizer).save_pretrained(folder)
    return folder


def vectors(counts: list[int], *, width: int = WIDTH, seed: int = 0) -> Any:
    """Packed vectors of utterances of so many, and their taps."""
    lengths = torch.tensor(list(counts))
    total = int(lengths.sum())
    frames = torch.randn(total, width, generator=torch.Generator().manual_seed(seed))
    return frames, Taps.pack(torch.zeros(total, 1, 1), lengths)
