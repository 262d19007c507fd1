"""A generated classification task with speaker-like nuisance: no file, no network, labelled synthetic."""

from __future__ import annotations

import numpy as np

from .audio import SAMPLE_RATE
from .recordings import Clip, Recordings

_EVENTS_PER_CLASS = 3
_BASE_PITCH_HZ = 140.0


def synthetic(
    *, classes: int = 8, train_clips: int = 12, test_clips: int = 6, seconds: float = 1.0, seed: int = 0
) -> Recordings:
    """Generate `classes` "words" spoken by "voices", `train_clips` and `test_clips` of each.

    A word is a fixed sequence of three events (harmonic tone, rising or falling chirp, noise burst) with
    fixed relative pitches and bands. A voice changes pitch, formant, tempo, loudness and background noise;
    test voices are higher than any train voice, so that the label cannot be read from absolute pitch. Clips
    last `seconds` +- 15 %, float32 at 16 kHz with peak below 1, and depend on the arguments alone.
    """
    _check(classes=(classes, 2), train_clips=(train_clips, 1), test_clips=(test_clips, 1))
    if seconds < 0.1:
        raise ValueError(f"seconds must be at least 0.1, got {seconds}")
    words = [np.random.default_rng((seed, 0, label)) for label in range(classes)]
    events = [_word(rng) for rng in words]
    parts: list[list[Clip]] = []
    for part, (count, pitch_range) in enumerate(
        ((train_clips, (0.8, 1.1)), (test_clips, (1.2, 1.5))), start=1
    ):
        clips = []
        for label in range(classes):
            for take in range(count):
                rng = np.random.default_rng((seed, part, label, take))
                samples = _render(events[label], seconds, pitch_range, rng)
                clips.append(Clip(samples, label, len(samples) / SAMPLE_RATE))
        parts.append(clips)
    names = tuple(f"word{label:02d}" for label in range(classes))
    return Recordings("synthetic words", names, parts[0], parts[1], synthetic=True)


def synthetic_speech(
    *, train_clips: int = 48, test_clips: int = 16, letters: str = "abcde", seed: int = 0
) -> Recordings:
    """Generated transcribed recordings: words of `letters`, each a tone of its pitch, spaces as silence.

    A voice changes pitch, tempo, loudness and background noise; test voices are others. Clips last 1 to 3
    seconds, float32 at 16 kHz with peak below 1, and depend on the arguments alone.
    """
    _check(train_clips=(train_clips, 1), test_clips=(test_clips, 1), letters=(len(letters), 2))
    parts = []
    for part, count in enumerate((train_clips, test_clips)):
        rngs = [np.random.default_rng((seed, 3 + part, index)) for index in range(count)]
        parts.append(
            [_utterance(letters, f"voice {part}-{index % 4}", rng) for index, rng in enumerate(rngs)]
        )
    return Recordings("synthetic speech", (), parts[0], parts[1], synthetic=True)


def _utterance(letters: str, speaker: str, rng: np.random.Generator) -> Clip:
    words = ["".join(rng.choice(list(letters), size=rng.integers(1, 4))) for _ in range(rng.integers(2, 5))]
    text = " ".join(words)
    pitch, tempo = rng.uniform(0.9, 1.1), rng.uniform(0.8, 1.2)
    sounds = []
    for letter in text:
        time = np.arange(round(0.16 * tempo * SAMPLE_RATE)) / SAMPLE_RATE
        hertz = pitch * _BASE_PITCH_HZ * 2 ** (1 + letters.find(letter) / 2)
        envelope = np.sqrt(np.abs(np.sin(np.pi * time / time[-1])))
        sounds.append(envelope * np.sin(2 * np.pi * hertz * time) * (letter != " "))
    samples = rng.uniform(0.2, 0.6) * np.concatenate(sounds)
    samples = (samples + 0.01 * rng.standard_normal(len(samples))).astype(np.float32)
    return Clip(samples, None, len(samples) / SAMPLE_RATE, text=text, speaker=speaker)


def _check(**arguments: tuple[int, int]) -> None:
    for name, (value, least) in arguments.items():
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def _word(rng: np.random.Generator) -> list[tuple[str, float, float]]:
    """Events of one class: (kind, pitch ratio, share of the duration)."""
    kinds = rng.choice(["tone", "rise", "fall", "noise"], size=_EVENTS_PER_CLASS)
    ratios = 2.0 ** rng.uniform(-0.5, 2.0, size=_EVENTS_PER_CLASS)
    shares = rng.dirichlet(np.full(_EVENTS_PER_CLASS, 8.0))
    return [
        (str(kind), float(ratio), float(share))
        for kind, ratio, share in zip(kinds, ratios, shares, strict=True)
    ]


def _render(
    events: list[tuple[str, float, float]],
    seconds: float,
    pitch_range: tuple[float, float],
    rng: np.random.Generator,
) -> np.ndarray:
    total = round(seconds * rng.uniform(0.85, 1.15) * SAMPLE_RATE)
    voice = rng.uniform(*pitch_range)
    formant = 900.0 * voice**0.5 * rng.uniform(0.9, 1.1)
    pieces = [
        _event(kind, ratio * voice * _BASE_PITCH_HZ, formant, max(round(share * total), 32), rng)
        for kind, ratio, share in events
    ]
    samples = np.concatenate(pieces)
    samples = samples / np.abs(samples).max() * rng.uniform(0.2, 0.8)
    samples += rng.normal(0.0, rng.uniform(0.002, 0.01), size=samples.shape)
    return samples.astype(np.float32)


def _event(kind: str, pitch: float, formant: float, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` samples of one event under a smooth envelope, unit RMS before it."""
    if kind == "noise":
        spectrum = np.fft.rfft(rng.normal(size=count))
        frequency = np.fft.rfftfreq(count, 1 / SAMPLE_RATE)
        centre = 8.0 * pitch
        signal = np.fft.irfft(spectrum * np.exp(-(((frequency - centre) / (0.25 * centre)) ** 2)), count)
    else:
        slope = {"tone": 0.0, "rise": 0.8, "fall": -0.4}[kind]
        phase = 2 * np.pi * pitch * np.cumsum(1 + slope * np.linspace(0, 1, count)) / SAMPLE_RATE
        harmonics = np.arange(1, 1 + int(3500 // (2 * pitch)))
        gains = np.exp(-(((harmonics * pitch - formant) / 600.0) ** 2)) + 0.3 / harmonics
        signal = (gains[:, None] * np.sin(harmonics[:, None] * phase)).sum(axis=0)
    return signal / np.sqrt(np.mean(signal**2)) * np.hanning(count)
