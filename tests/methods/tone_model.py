"""Speech of tones, a letter each, and a model that hears them: alignments with times that are known."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import Wav2Vec2FeatureExtractor

from mmtransfer.data.inputs import AudioInput
from mmtransfer.tasks.ctc import CTC

RATE, HOP = 16_000, 320
LETTERS = "abcdefgh"
#: Frames of a letter and of a silence.
LETTER, SILENCE = 3, 2


def hertz(letter: str) -> float:
    """A whole number of periods per frame: the spectrum has a bin for each letter."""
    return 400.0 + 200.0 * LETTERS.index(letter)


def speak(text: str, frames: int = LETTER) -> np.ndarray:
    """The tones of a text; "_" and a space are silences."""
    parts = []
    for character in text:
        count = SILENCE if character in " _" else frames
        time = np.arange(count * HOP) / RATE
        loud = character not in " _"
        parts.append(0.5 * loud * np.sin(2 * np.pi * (hertz(character) if loud else 0) * time))
    return np.concatenate(parts).astype(np.float32)


def true_times(text: str, frames: int = LETTER) -> list[tuple[float, float]]:
    """Start and end of each word of a text that `speak` speaks, in seconds."""
    times, place = [], 0
    for word in text.split(" "):
        silences = word.count("_")
        begin = place + SILENCE * (len(word) - len(word.lstrip("_")))
        place += SILENCE * silences + frames * (len(word) - silences)
        times.append(
            (begin * HOP / RATE, (place - SILENCE * (len(word) - len(word.rstrip("_")))) * HOP / RATE)
        )
        place += SILENCE
    return times


class ToneModel(nn.Module):
    """Logits of each frame from its own samples alone: blank or a space in silence, the letter of its tone.

    It has what an `Aligner` reads of an `AdaptedModel`.
    """

    def __init__(self, task: CTC | None = None) -> None:
        super().__init__()
        self.task = CTC(vocabulary=("", " ", *LETTERS)) if task is None else task
        self.audio = AudioInput(Wav2Vec2FeatureExtractor(do_normalize=False))
        parts = SimpleNamespace(frame_lengths=lambda lengths: lengths // HOP, minimum_length=HOP)
        self.encoder: Any = SimpleNamespace(
            description=SimpleNamespace(main_input="input_values"), parts=parts
        )
        self.scale = nn.Parameter(torch.tensor(30.0))
        #: Seconds of each window that was seen.
        self.seen: list[float] = []

    def forward(self, input_values: torch.Tensor, lengths: torch.Tensor) -> SimpleNamespace:
        self.seen += [length / RATE for length in lengths.tolist()]
        frames = [
            row[: length // HOP * HOP].view(-1, HOP)
            for row, length in zip(input_values, lengths.tolist(), strict=True)
        ]
        spectrum = torch.fft.rfft(torch.cat(frames)).abs() / HOP * 4
        logits = torch.zeros(len(spectrum), len(self.task.vocabulary))
        for index, symbol in enumerate(self.task.vocabulary):
            if symbol and symbol in LETTERS:
                logits[:, index] = self.scale * (spectrum[:, round(hertz(symbol) * HOP / RATE)] - 0.5)
            elif symbol.isspace() or index == self.task.blank:
                logits[:, index] = 0.0
            else:
                logits[:, index] = -30.0
        return SimpleNamespace(logits=logits, lengths=torch.tensor([len(each) for each in frames]))
