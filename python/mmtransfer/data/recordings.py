"""Labelled or transcribed recordings with a train and a test part."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .audio import SAMPLE_RATE, StoredAudio, check_max_seconds, check_samples, read_audio, resample
from .errors import DataError, first

SPLITS = ("train", "test")


@dataclass(frozen=True, eq=False)
class Clip:
    """One recording: a file, on disk or inside a data set, or float32 samples at 16 kHz.

    Attributes:
        source: the file or the samples.
        label: index in `Recordings.classes`; None for a clip that has a transcript instead.
        seconds: the whole duration, before any cropping.
        text: the transcript, if there is one.
        speaker: who speaks, if that is known.
    """

    source: Path | StoredAudio | np.ndarray
    label: int | None
    seconds: float
    text: str | None = None
    speaker: str | None = None


@dataclass(frozen=True, eq=False)
class Recordings:
    """A task on audio: clips with labels, or clips with transcripts (`classes` is empty then).

    `train`, `validation` (may be empty) and `test` are lists, usable as map-style torch data sets. `ignored`
    says what the source holds besides: `("4 .m4a files", "2 hidden")`.
    """

    name: str
    classes: tuple[str, ...]
    train: list[Clip]
    test: list[Clip]
    synthetic: bool = False
    ignored: tuple[str, ...] = ()
    validation: list[Clip] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.transcribed:
            self._check_transcripts()
            return
        if len(self.classes) < 2:
            raise DataError(f"{self.name} has {len(self.classes)} class; at least two are needed")
        for split in SPLITS:
            present = {clip.label for clip in getattr(self, split)}
            missing = [label for index, label in enumerate(self.classes) if index not in present]
            if missing:
                raise DataError(
                    f"{self.name} has no {split} clip of {first(missing, 'class', 'classes')}; "
                    "every class must occur in train and in test"
                )

    @property
    def transcribed(self) -> bool:
        """Whether the clips have transcripts, and no labels."""
        return not self.classes

    def _check_transcripts(self) -> None:
        for split in SPLITS:
            if not getattr(self, split):
                raise DataError(f"{self.name} has no {split} clip")
        for clip in (*self.train, *self.validation, *self.test):
            if clip.text is None:
                raise DataError(f"{self.name} has neither a class nor a transcript for {clip.source}")

    def load(
        self, clip: Clip, sample_rate: int = SAMPLE_RATE, max_seconds: float | None = None
    ) -> np.ndarray:
        """Mono float32 samples `(samples,)` of `clip` at `sample_rate` Hz, at most `max_seconds` of it.

        DataError for a file as in `read_audio`, and for samples that are not one finite channel between -1
        and 1; TypeError for samples that are not floating-point.
        """
        if isinstance(clip.source, (Path, StoredAudio)):
            return read_audio(clip.source, sample_rate, max_seconds)
        check_max_seconds(max_seconds)
        try:
            check_samples(clip.source, f"the source of a clip of {self.name}")
        except ValueError as error:
            raise DataError(str(error)) from None
        samples = clip.source if max_seconds is None else clip.source[: round(max_seconds * SAMPLE_RATE)]
        return resample(samples.astype(np.float32, copy=False), SAMPLE_RATE, sample_rate)

    def describe(self) -> str:
        """One line: name, classes, clips and seconds of audio per part, chance accuracy, what was ignored."""
        splits = [split for split in ("train", "validation", "test") if getattr(self, split)]
        parts = ", ".join(
            f"{split} {len(getattr(self, split))} clips "
            f"({sum(clip.seconds for clip in getattr(self, split)):.0f} s)"
            for split in splits
        )
        kind = " [synthetic]" if self.synthetic else ""
        ignored = f"; ignored: {', '.join(self.ignored)}" if self.ignored else ""
        if self.transcribed:
            return f"{self.name}{kind}: transcribed speech, {parts}{ignored}"
        chance = max(Counter(clip.label for clip in self.test).values()) / len(self.test)
        return f"{self.name}{kind}: {len(self.classes)} classes, {parts}, chance {chance:.1%}{ignored}"
