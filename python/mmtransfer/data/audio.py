"""Audio files to mono float32 arrays at a given rate."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import soundfile
import soxr

from .errors import DataError

SAMPLE_RATE = 16_000
SUFFIXES = (".wav", ".flac", ".ogg", ".mp3")
# One analysis window of every supported front end; nothing shorter gives a frame.
MIN_SECONDS = 0.025
# 11 days; what a header says that does not know its length is far more.
_MAX_SECONDS = 1e6
# An MP3 without a table of contents has an estimated length, wrong by two of its frames at most.
_SLACK_SECONDS = 0.15
# 40 dB above full scale: no recording is that loud, 16-bit values that were never divided are.
_LOUDEST = 100.0
# A false length in a header then costs no memory.
_BLOCK_FRAMES = 1 << 18


def duration(path: Path) -> float:
    """Seconds of audio in `path`, from its header; DataError if unreadable, empty or under 25 ms."""
    with _open(path) as file:
        return _seconds(path, file)


def read_audio(
    path: str | Path, sample_rate: int = SAMPLE_RATE, max_seconds: float | None = None
) -> np.ndarray:
    """Decode `path`, average its channels and resample.

    Any format and codec that libsndfile reads, whatever the suffix. Returns a float32 array `(samples,)` at
    `sample_rate` Hz, at most `max_seconds` long. DataError, naming the file, if it cannot be decoded, is
    empty or under 25 ms, breaks off before the length in its header, or holds samples that are NaN, infinite
    or beyond +-100. ValueError for a `sample_rate` or `max_seconds` that leaves nothing.
    """
    if not sample_rate > 0:
        raise ValueError(f"sample_rate must be positive, got {sample_rate}")
    check_max_seconds(max_seconds)
    path = Path(path)
    with _open(path) as file:
        _seconds(path, file)
        rate = file.samplerate
        wanted = file.frames if max_seconds is None else min(file.frames, round(max_seconds * rate))
        samples = _decode(path, file, wanted)
    if (wanted - len(samples)) / rate > _SLACK_SECONDS or not len(samples):
        raise DataError(
            f"{path} breaks off after {len(samples) / rate:.1f} of {wanted / rate:.1f} s; "
            "re-export the file or leave it out"
        )
    wrong = _wrong_values(samples)
    if wrong:
        raise DataError(f"{path} {wrong}; re-export the file or leave it out")
    return resample(samples, rate, sample_rate)


def resample(samples: np.ndarray, rate: int, new_rate: int) -> np.ndarray:
    """Band-limited resampling (soxr, high quality) of float32 `(samples,)` from `rate` to `new_rate` Hz."""
    if rate == new_rate:
        return samples
    return soxr.resample(samples, rate, new_rate, quality="HQ").astype(np.float32, copy=False)


def check_samples(samples: np.ndarray, name: str) -> None:
    """TypeError or ValueError, with `name`, unless `samples` are one finite channel between -1 and 1."""
    samples = np.asarray(samples)
    if not np.issubdtype(samples.dtype, np.floating):
        raise TypeError(
            f"{name} must be floating-point samples between -1 and 1, got {samples.dtype}; "
            "divide int16 by 32768"
        )
    if samples.ndim != 1 or not samples.size:
        raise ValueError(f"{name} must have the shape (samples,), one channel, got {samples.shape}")
    wrong = _wrong_values(samples)
    if wrong:
        raise ValueError(f"{name} {wrong}")


def check_max_seconds(max_seconds: float | None) -> None:
    """ValueError unless clips cropped to `max_seconds` can have a frame."""
    if max_seconds is None:
        return
    if not max_seconds > 0:
        raise ValueError(f"max_seconds must be positive or None, got {max_seconds}")
    if max_seconds < MIN_SECONDS:
        raise ValueError(f"max_seconds must be at least {MIN_SECONDS} or None, got {max_seconds}")


@contextmanager
def _open(path: Path) -> Iterator[soundfile.SoundFile]:
    try:
        # Bytes, for names that are not UTF-8; the TypeError is soundfile's for a name that ends in .raw.
        file = soundfile.SoundFile(os.fsencode(path))
    except (soundfile.SoundFileError, OSError, TypeError) as error:
        raise _unreadable(path, error) from error
    with file:
        yield file


def _seconds(path: Path, file: soundfile.SoundFile) -> float:
    """The length in the header of `file`; DataError if it is none that can be used."""
    seconds = file.frames / file.samplerate
    if seconds == 0:
        raise DataError(f"{path} is empty (0 samples); remove it from the data set")
    if seconds < MIN_SECONDS:
        raise DataError(
            f"{path} lasts {seconds * 1e3:.1f} ms; clips must last at least {MIN_SECONDS * 1e3:.0f} ms"
        )
    if seconds > _MAX_SECONDS:
        raise DataError(f"{path} does not say how long it is; re-export the file or leave it out")
    return seconds


def _decode(path: Path, file: soundfile.SoundFile, frames: int) -> np.ndarray:
    """Up to `frames` samples, the mean of the channels, float32 (samples,)."""
    blocks = []
    while frames > 0:
        # With its number of frames, as files that cannot be sought in (GSM 6.10, G.721) need it.
        count = min(frames, _BLOCK_FRAMES)
        try:
            block = file.read(count, dtype="float32", always_2d=True)
        except soundfile.SoundFileError as error:
            reason = _one_line(error)
            raise DataError(f"{path} is damaged ({reason}); re-export the file or leave it out") from error
        with np.errstate(invalid="ignore"):  # infinities of both signs are refused later
            blocks.append(block.mean(axis=1, dtype=np.float32))
        frames = frames - count if len(block) == count else 0
    return np.concatenate(blocks)


def _wrong_values(samples: np.ndarray) -> str | None:
    """The fault of samples that no recording has; NaN and infinity carry over into the largest."""
    largest = float(np.abs(samples).max())
    if not np.isfinite(largest):
        return "holds NaN or infinite samples"
    if largest > _LOUDEST:
        return f"reaches {largest:.0f}, and samples are between -1 and 1: divide 16-bit values by 32768"
    return None


def _unreadable(path: Path, error: Exception) -> DataError:
    if not path.exists():
        return DataError(f"{path} does not exist; correct the path or remove its entry")
    return DataError(f"{path} cannot be read as audio ({_one_line(error)}); use {', '.join(SUFFIXES)} files")


def _one_line(error: Exception) -> str:
    return str(error).replace("\n", " ").removesuffix(".")
