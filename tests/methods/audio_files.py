"""Small generated audio files for the tests of the data package."""

from __future__ import annotations

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
