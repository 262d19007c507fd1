"""Audio files, on disk or inside something else, to mono float32 arrays at a given rate."""

from __future__ import annotations

import abc
import io
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

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


class StoredAudio(abc.ABC):
    """An audio file that is kept inside something else, such as a row of a table; `str()` names it."""

    @abc.abstractmethod
    def open(self) -> BinaryIO:
        """The encoded bytes, as a file that can be sought in."""


class _Bytes(StoredAudio):
    def __init__(self, content: bytes) -> None:
        self._content = content

    def __str__(self) -> str:
        return "the audio in the given bytes"

    def open(self) -> BinaryIO:
        return io.BytesIO(self._content)


def open_bytes(source: Path | StoredAudio) -> BinaryIO:
    """The encoded bytes of a file."""
    return source.open() if isinstance(source, StoredAudio) else source.open("rb")


def duration(source: Path | StoredAudio) -> float:
    """Seconds of audio in `source`, from its header; DataError if unreadable, empty or under 25 ms."""
    with _open(source) as file:
        return _seconds(source, file)


def read_audio(
    source: str | Path | bytes | StoredAudio,
    sample_rate: int = SAMPLE_RATE,
    max_seconds: float | None = None,
) -> np.ndarray:
    """Decode a file, given by its path or as its encoded bytes, average its channels and resample.

    Any format and codec that libsndfile reads, whatever the suffix. Returns a float32 array `(samples,)` at
    `sample_rate` Hz, at most `max_seconds` long. DataError, naming the file, if it cannot be decoded, is
    empty or under 25 ms, breaks off before the length in its header, or holds samples that are NaN, infinite
    or beyond +-100. ValueError for a `sample_rate` or `max_seconds` that leaves nothing.
    """
    if not sample_rate > 0:
        raise ValueError(f"sample_rate must be positive, got {sample_rate}")
    check_max_seconds(max_seconds)
    if isinstance(source, bytes):
        source = _Bytes(source)
    elif not isinstance(source, StoredAudio):
        source = Path(source)
    with _open(source) as file:
        _seconds(source, file)
        rate = file.samplerate
        wanted = file.frames if max_seconds is None else min(file.frames, round(max_seconds * rate))
        samples = np.concatenate([np.empty(0, np.float32), *_decode(source, file, wanted)])
    return resample(samples, rate, sample_rate)


def stream_audio(source: str | Path, sample_rate: int = SAMPLE_RATE) -> Iterator[np.ndarray]:
    """The samples of `read_audio` in blocks of some seconds, so that hours of audio need little memory.

    Blocks are float32 `(samples,)`; a resampler that looks at a block at a time rounds in other places.
    Errors as in `read_audio`, those of a place in the file when it is reached.
    """
    if not sample_rate > 0:
        raise ValueError(f"sample_rate must be positive, got {sample_rate}")
    source = Path(source)
    with _open(source) as file:
        _seconds(source, file)
        blocks = _decode(source, file, file.frames)
        if file.samplerate == sample_rate:
            yield from blocks
            return
        stream = soxr.ResampleStream(file.samplerate, sample_rate, 1, dtype="float32", quality="HQ")
        for block in blocks:
            yield stream.resample_chunk(block)
        yield stream.resample_chunk(np.empty(0, np.float32), last=True)


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
def _open(source: Path | StoredAudio) -> Iterator[soundfile.SoundFile]:
    with ExitStack() as stack:
        try:
            if isinstance(source, StoredAudio):
                stream = stack.enter_context(source.open())
                file = stack.enter_context(soundfile.SoundFile(stream))
            else:
                # Bytes, for names that are not UTF-8.
                file = stack.enter_context(soundfile.SoundFile(os.fsencode(source)))
        # The TypeError is soundfile's for a name that ends in .raw.
        except (soundfile.SoundFileError, OSError, TypeError) as error:
            raise _unreadable(source, error) from error
        yield file


def _seconds(source: Path | StoredAudio, file: soundfile.SoundFile) -> float:
    """The length in the header of `file`; DataError if it is none that can be used."""
    seconds = file.frames / file.samplerate
    if seconds == 0:
        raise DataError(f"{source} is empty (0 samples); remove it from the data set")
    if seconds < MIN_SECONDS:
        raise DataError(
            f"{source} lasts {seconds * 1e3:.1f} ms; clips must last at least {MIN_SECONDS * 1e3:.0f} ms"
        )
    if seconds > _MAX_SECONDS:
        raise DataError(f"{source} does not say how long it is; re-export the file or leave it out")
    return seconds


def _decode(source: Path | StoredAudio, file: soundfile.SoundFile, wanted: int) -> Iterator[np.ndarray]:
    """Up to `wanted` samples in blocks, the mean of the channels, float32 (samples,); DataError as for
    `read_audio`."""
    frames, found, rate = wanted, 0, file.samplerate
    while frames > 0:
        # With its number of frames, as files that cannot be sought in (GSM 6.10, G.721) need it.
        count = min(frames, _BLOCK_FRAMES)
        try:
            block = file.read(count, dtype="float32", always_2d=True)
        except soundfile.SoundFileError as error:
            reason = _one_line(error)
            raise DataError(f"{source} is damaged ({reason}); re-export the file or leave it out") from error
        with np.errstate(invalid="ignore"):  # infinities of both signs are refused later
            samples = block.mean(axis=1, dtype=np.float32)
        if len(samples) and (wrong := _wrong_values(samples)):
            raise DataError(f"{source} {wrong}; re-export the file or leave it out")
        if len(samples):
            yield samples
        found += len(samples)
        frames = frames - count if len(block) == count else 0
    if (wanted - found) / rate > _SLACK_SECONDS or not found:
        raise DataError(
            f"{source} breaks off after {found / rate:.1f} of {wanted / rate:.1f} s; "
            "re-export the file or leave it out"
        )


def _wrong_values(samples: np.ndarray) -> str | None:
    """The fault of samples that no recording has; NaN and infinity carry over into the largest."""
    largest = float(np.abs(samples).max())
    if not np.isfinite(largest):
        return "holds NaN or infinite samples"
    if largest > _LOUDEST:
        return f"reaches {largest:.0f}, and samples are between -1 and 1: divide 16-bit values by 32768"
    return None


def _unreadable(source: Path | StoredAudio, error: Exception) -> DataError:
    if isinstance(source, Path) and not source.exists():
        return DataError(f"{source} does not exist; correct the path or remove its entry")
    return DataError(
        f"{source} cannot be read as audio ({_one_line(error)}); use {', '.join(SUFFIXES)} files"
    )


def _one_line(error: Exception) -> str:
    return str(error).replace("\n", " ").removesuffix(".")
