"""Tiny models and recordings on disk for `mmtransfer finetune`, and the commands around it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import soundfile
from audio_files import write_clip
from command_line import Result, run
from tiny_encoders import TINY
from torch import nn
from transformers import Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor

from mmtransfer.data import SAMPLE_RATE, Recordings, synthetic_speech

#: 50 frames a second, as the pretrained models have.
FRAMES = {"conv_dim": (8, 8, 8), "conv_stride": (10, 8, 4), "conv_kernel": (10, 8, 4)}
PLAIN = {"num_feat_extract_layers": 3, "layerdrop": 0.0, "mask_time_prob": 0.0}
SYMBOLS = ("<pad>", "<s>", "</s>", "<unk>", "|", "A", "B", "C", "D", "E")


def write_model(folder: Path, head: bool = False, name: str = "wav2vec2", **changes: Any) -> Path:
    """A tiny random model with its feature extractor; with `head`, one for CTC with its tokenizer."""
    options = {**FRAMES, **PLAIN, "vocab_size": len(SYMBOLS), "pad_token_id": 0, **changes}
    model: Any = TINY[name].build(head=head, **options)
    model.save_pretrained(folder)
    Wav2Vec2FeatureExtractor(return_attention_mask=True).save_pretrained(folder)
    if head:
        write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({symbol: i for i, symbol in enumerate(SYMBOLS)}))
    Wav2Vec2CTCTokenizer(folder / "vocab.json").save_pretrained(folder)
    return folder


def speech(train: int = 16, validation: int = 4, test: int = 4, letters: str = "abcde") -> Recordings:
    """Generated transcribed recordings with all three parts."""
    found = synthetic_speech(train_clips=train + validation, test_clips=test, letters=letters)
    return replace(found, train=found.train[:train], validation=found.train[train:])


def write_speech(folder: Path, recordings: Recordings | None = None) -> Path:
    """A manifest of transcribed wav files, JSON lines."""
    recordings = speech() if recordings is None else recordings
    lines = []
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("train", "validation", "test"):
        for index, clip in enumerate(getattr(recordings, part)):
            name = f"{part}{index}.wav"
            soundfile.write(folder / name, clip.source, SAMPLE_RATE)
            record = {"path": name, "text": clip.text, "speaker": clip.speaker, "split": part}
            lines.append(json.dumps(record))
    (folder / "speech.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "speech.jsonl"


def write_tones(folder: Path) -> Path:
    """A manifest of two classes of tones, CSV."""
    lines = ["path,label,split"]
    for shift, (part, takes) in enumerate((("train", 6), ("validation", 2), ("test", 2))):
        for label, base in (("high", 3000.0), ("low", 200.0)):
            for take in range(takes):
                name = f"{label}-{part}{take}.wav"
                write_clip(folder / name, base + 7 * take + 2 * shift, 0.2 + 0.01 * take)
                lines.append(f"{name},{label},{part}")
    (folder / "tones.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "tones.csv"


def finetune(output: Path, *arguments: str | Path) -> Result:
    """The command, quick, without processes that decode clips: their number is that of the cores."""
    quick = {"--epochs": "2", "--start-epochs": "2", "--workers": "0"}
    added = [word for pair in quick.items() if pair[0] not in arguments for word in pair]
    return run("finetune", "--output", output, "--batch-size", "4", "--cpu", *added, *arguments)


def results(output: Path) -> dict[str, Any]:
    return json.loads((output / "results.json").read_text(encoding="utf-8"))


def json_lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def parameters(model: nn.Module) -> dict[str, Any]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}
