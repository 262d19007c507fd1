"""The clips that a run trains on: a validation part, and clips and characters that cannot be used."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from mmtransfer.data import DataError, Recordings
from mmtransfer.data.drawing import draw_split
from mmtransfer.data.errors import counted, first
from mmtransfer.data.recordings import Clip
from mmtransfer.data.rows import Row, relative_name
from mmtransfer.tasks.base import Task

from .caching import clip_name

_SHOWN = 10


class Findings:
    """Sentences on what cannot be used, for the user.

    Args:
        strict: whether each is an error.
        tell: called with each sentence.
    """

    def __init__(self, *, strict: bool, tell: Callable[[str], None]) -> None:
        self.notes: list[str] = []
        self.strict, self._tell = strict, tell

    def add(self, sentence: str, *, fault: bool = True) -> None:
        """Take note; DataError for a `fault` of the data if these are strict."""
        if fault and self.strict:
            raise DataError(sentence)
        self.notes.append(sentence)
        self._tell(sentence)


def digest(recordings: Recordings) -> str:
    """A short hash of all clips, by file name, length and target; the same wherever the files lie."""
    content = hashlib.sha256()
    for part in (recordings.train, recordings.validation, recordings.test):
        rows = [
            (
                os.path.basename(clip_name(clip)),
                round(clip.seconds, 3),
                clip.text if clip.label is None else recordings.classes[clip.label],
            )
            for clip in part
        ]
        content.update(json.dumps(rows).encode())
    return content.hexdigest()[:16]


def hold_out(recordings: Recordings, fraction: float, seed: int, findings: Findings) -> Recordings:
    """The recordings with a validation part: their own, or one drawn from the training clips.

    The draw is by hashes of names, of each class with two clips or more, and by speaker where these are
    known. There is none where that leaves nothing to train on, which is noted.
    """
    if recordings.validation or not fraction:
        return recordings
    clips = recordings.train
    of_class = Counter(clip.label for clip in clips)
    rows = [row for row, clip in zip(_rows(clips), clips, strict=True) if of_class[clip.label] > 1]
    try:
        if not rows:
            each = "" if recordings.transcribed else " of each class"
            raise DataError(f"{recordings.name} has one training clip{each}")
        drawn = draw_split(recordings.name, rows, fraction, seed)
    except DataError as error:
        findings.add(f"no validation part can be drawn ({error}): the last weights are kept", fault=False)
        return recordings
    chosen = {row.name for row in drawn if row.split == "test"}
    names = [row.name for row in _rows(clips)]
    return replace(
        recordings,
        train=[clip for clip, name in zip(clips, names, strict=True) if name not in chosen],
        validation=[clip for clip, name in zip(clips, names, strict=True) if name in chosen],
    )


def _rows(clips: Sequence[Clip]) -> list[Row]:
    """The clips with names that are the same on every machine."""
    files = [clip.source for clip in clips if isinstance(clip.source, Path)]
    root = Path(os.path.commonpath([file.absolute().parent for file in files])) if files else Path()
    rows = []
    for index, clip in enumerate(clips):
        name = clip_name(clip, index)
        if isinstance(clip.source, Path):
            name = relative_name(clip.source.absolute(), root)
        label = None if clip.label is None else str(clip.label)
        rows.append(Row(Path(name), name, split="", label=label, text=clip.text, speaker=clip.speaker))
    return rows


def select(
    recordings: Recordings,
    task: Task,
    *,
    max_seconds: float | None,
    window: float | None = None,
    findings: Findings,
) -> Recordings:
    """The recordings without training clips that are too long or have no target for the task.

    Characters that the task has no symbol for are counted, and clips of other parts that are longer than
    `window`, the seconds that the model takes (None: any).
    """
    kept = list(recordings.train)
    if task.whole_clips:
        limits = ((window, "all that the model takes"), (max_seconds, "as max_seconds says"))
        for limit, reason in limits:
            if limit is not None:
                kept = _leave_out(kept, _longer_than(limit), f"longer than {limit:g} s, {reason}", findings)
        if sentence := describe_cut((*recordings.validation, *recordings.test), window):
            findings.add(sentence)
    _count_unknown(recordings, task, findings)
    kept = _leave_out(
        kept, lambda clip: task.is_empty(task.target(clip)), "without a known character", findings
    )
    if not kept:
        raise DataError(f"{recordings.name} has no training clip that can be used")
    return replace(recordings, train=kept)


def describe_cut(clips: Sequence[Clip], window: float | None) -> str | None:
    """A sentence on clips that are scored by their beginning, as the model takes no more; None without."""
    names = [clip_name(clip) for clip in clips if window is not None and clip.seconds > window]
    if not names:
        return None
    verb = "is" if len(names) == 1 else "are"
    return (
        f"{first(names, 'clip', 'clips')} {verb} longer than {window:g} s, all that the model takes: what is "
        "said later counts as errors in scores"
    )


def _longer_than(seconds: float) -> Callable[[Clip], bool]:
    return lambda clip: clip.seconds > seconds


def _leave_out(
    clips: Sequence[Clip], wrong: Callable[[Clip], bool], reason: str, findings: Findings
) -> list[Clip]:
    names = [clip_name(clip) for clip in clips if wrong(clip)]
    if names:
        verb = "is" if len(names) == 1 else "are"
        findings.add(f"{first(names, 'training clip', 'training clips')} {verb} {reason}, and left out")
    return [clip for clip in clips if not wrong(clip)]


def _count_unknown(recordings: Recordings, task: Task, findings: Findings) -> None:
    counts: Counter[str] = Counter()
    clips = 0
    for clip in (*recordings.train, *recordings.validation, *recordings.test):
        unknown = task.unknown(task.target(clip))
        counts.update(unknown)
        clips += bool(unknown)
    if counts:
        listed = ", ".join(f"{character!r} {count}" for character, count in counts.most_common(_SHOWN))
        more = f" and {len(counts) - _SHOWN} more" if len(counts) > _SHOWN else ""
        findings.add(
            f"{counted(clips, 'transcript')} of {recordings.name} {'has' if clips == 1 else 'have'} "
            f"characters outside the alphabet ({listed}{more}), which are left out in training and count as "
            "errors in scores"
        )
