"""Audio files to mono float32 arrays at a given rate."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import soundfile
import soxr

from .errors import DataError

SAMPLE_RATE = 16_000
SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")
# One analysis window of every supported front end; nothing shorter gives a frame.
MIN_SECONDS = 0.025


def duration(path: Path) -> float:
    """Seconds of audio in `path`, from its header; DataError if unreadable, empty or under 25 ms."""
    try:
        info = soundfile.info(str(path))
    except (soundfile.SoundFileError, OSError) as error:
        raise _unreadable(path, error) from error
    seconds = info.frames / info.samplerate
    _check_duration(path, seconds)
    return seconds


def read_audio(
    path: str | Path, sample_rate: int = SAMPLE_RATE, max_seconds: float | None = None
) -> np.ndarray:
    """Decode `path`, average its channels and resample.

    Returns a float32 array `(samples,)` at `sample_rate` Hz, at most `max_seconds` long. DataError, naming
    the file, if it cannot be decoded, is empty or under 25 ms, or holds NaN or infinite samples.
    """
    path = Path(path)
    try:
        with soundfile.SoundFile(str(path)) as file:
            rate = file.samplerate
            frames = -1 if max_seconds is None else round(max_seconds * rate)
            samples = file.read(frames, dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, OSError) as error:
        raise _unreadable(path, error) from error
    _check_duration(path, len(samples) / rate)
    if not np.isfinite(samples).all():
        raise DataError(f"{path} holds NaN or infinite samples; re-export the file or leave it out")
    return resample(samples.mean(axis=1, dtype=np.float32), rate, sample_rate)


def resample(samples: np.ndarray, rate: int, new_rate: int) -> np.ndarray:
    """Band-limited resampling (soxr, high quality) of float32 `(samples,)` from `rate` to `new_rate` Hz."""
    if rate == new_rate:
        return samples
    return soxr.resample(samples, rate, new_rate, quality="HQ").astype(np.float32, copy=False)


def _check_duration(path: Path, seconds: float) -> None:
    if seconds == 0:
        raise DataError(f"{path} is empty (0 samples); remove it from the data set")
    if seconds < MIN_SECONDS:
        raise DataError(
            f"{path} lasts {seconds * 1e3:.1f} ms; clips must last at least {MIN_SECONDS * 1e3:.0f} ms"
        )


def _unreadable(path: Path, error: Exception) -> DataError:
    if not path.exists():
        return DataError(f"{path} does not exist; correct the path or remove its entry")
    reason = str(error).replace("\n", " ").removesuffix(".")
    return DataError(f"{path} cannot be read as audio ({reason}); use {', '.join(SUFFIXES)} files")
