"""Small generated audio files for the tests of the data package."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np
import soundfile

from mmtransfer.data import SAMPLE_RATE


def tone(frequency: float, seconds: float = 0.5, rate: int = SAMPLE_RATE) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def write_clip(path: Path, frequency: float = 300.0, seconds: float = 0.1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, tone(frequency, seconds), SAMPLE_RATE)
    return path


def write_tiny_clip(path: Path, number: int) -> Path:
    """30 ms of 8 kHz noise, other bytes for every number; without soundfile, as random trees hold many."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8_000)
        file.writeframes(np.random.default_rng(number).integers(-9_000, 9_000, 240, np.int16).tobytes())
    return path
