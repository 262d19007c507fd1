"""Speech whose times are known: recordings joined with pauses, and synthesised sentences."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from benches.studies.boundaries import Span
from mmtransfer.data.audio import read_audio, resample
from mmtransfer.data.recordings import Clip, Recordings
from mmtransfer.demo.espeak import Espeak

#: Seconds of a pause between utterances, and the level of its noise, of full scale.
PAUSE = (0.3, 1.0)
PAUSE_LEVEL = 1e-3
_FRAME_SECONDS = 0.01


@dataclass(frozen=True, eq=False)
class Utterance:
    """Samples `(n,)`, float32, their text, and the spans of its words with known times."""

    samples: np.ndarray
    text: str
    spans: list[Span]


def recorded(clips: Iterable[Clip], rate: int, margin: float) -> list[Utterance]:
    """Recordings, each with one span, from its first sound on.

    When the last word ends is not known: the recordings echo, and the echo takes half a second to fade.
    """
    found = []
    for clip in clips:
        assert clip.text is not None
        samples = clip.source if isinstance(clip.source, np.ndarray) else read_audio(clip.source, rate)
        start = speech_start(samples, rate, margin)
        found.append(Utterance(samples, clip.text, [Span(0, len(clip.text.split()) - 1, start, None)]))
    return found


def synthesised(texts: Iterable[str], voice: Espeak, rate: int) -> list[Utterance]:
    """Sentences spoken by espeak-ng, with a span for each word, or for words that it speaks as one."""
    found = []
    for text in texts:
        spoken = voice.speak(text)
        spans, first = [], 0
        for word in spoken.words:
            last = first + len(word.text.split()) - 1
            spans.append(Span(first, last, word.start, word.end))
            first = last + 1
        found.append(Utterance(resample(spoken.samples, spoken.sampling_rate, rate), text, spans))
    return found


def joined(utterances: Sequence[Utterance], rate: int, seed: int = 0) -> Utterance:
    """One recording of all, in their order, with a pause of low noise before, between and behind them."""
    generator = np.random.default_rng(seed)

    def pause() -> np.ndarray:
        noise = generator.standard_normal(round(rate * generator.uniform(*PAUSE)))
        return (PAUSE_LEVEL * noise).astype(np.float32)

    pieces, spans, words = [pause()], [], 0
    for utterance in utterances:
        begins = sum(map(len, pieces)) / rate
        spans += [
            replace(
                span,
                first=span.first + words,
                last=span.last + words,
                start=None if span.start is None else span.start + begins,
                end=None if span.end is None else span.end + begins,
            )
            for span in utterance.spans
        ]
        words += len(utterance.text.split())
        pieces += [utterance.samples, pause()]
    return Utterance(np.concatenate(pieces), " ".join(each.text for each in utterances), spans)


def speech_start(samples: np.ndarray, rate: int, margin: float) -> float:
    """Seconds of the first sound, by energy in frames of 10 ms.

    A sound is `margin` dB above the background, which the quietest twentieth of the frames is, and at most 40
    dB below the loudest frame. All that is less than 20 dB below that is one, also without any background.
    """
    size = round(_FRAME_SECONDS * rate)
    frames = samples[: len(samples) // size * size].reshape(-1, size).astype(np.float64)
    # Exact digital silence has no logarithm.
    levels = 10 * np.log10((frames**2).mean(axis=1) + 1e-12)
    loudest = levels.max()
    threshold = max(loudest - 40, min(np.percentile(levels, 5) + margin, loudest - 20))
    return float(np.flatnonzero(levels >= threshold)[0] * size / rate)


def speech_of(recordings: Recordings, voice: Espeak, rate: int) -> Recordings:
    """The transcripts of recordings, spoken by espeak-ng: data to train on."""
    parts: dict[str, list[Clip]] = {}
    for name, clips in (("train", recordings.train), ("test", recordings.test)):
        spoken = synthesised((clip.text or "" for clip in clips), voice, rate)
        parts[name] = [
            Clip(each.samples, None, len(each.samples) / rate, each.text, "espeak-ng") for each in spoken
        ]
    return Recordings(f"{recordings.name}, synthesised", (), **parts, synthetic=True)
