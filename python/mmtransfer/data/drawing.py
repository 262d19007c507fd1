"""The draw of train and test: by hashes of names, the same on every machine."""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Sequence, Set
from dataclasses import dataclass, replace

from .errors import DataError, first
from .rows import Row


def draw_split(source: str, rows: Sequence[Row], test_fraction: float, seed: int) -> list[Row]:
    """`rows` with a test part of about `test_fraction`, of each class where there are classes.

    Where speakers are known, all clips of one are in the same part, and the fraction is that of all clips.
    DataError, naming `source`, if a class or all transcribed clips cannot be in both parts.
    """
    if any(row.speaker for row in rows):
        return _by_speaker(source, rows, test_fraction, seed)
    return _by_clip(source, rows, test_fraction, seed)


def _hash(name: str, seed: int) -> str:
    # A hash of the name, not a shuffle of a listing: adding a file moves no other file across the split.
    return hashlib.sha256(os.fsencode(f"{seed}/{name}")).hexdigest()


def _by_clip(source: str, rows: Sequence[Row], test_fraction: float, seed: int) -> list[Row]:
    by_label: dict[str | None, list[Row]] = defaultdict(list)
    for row in rows:
        by_label[row.label].append(row)
    in_test: set[int] = set()
    for label, own in by_label.items():
        if len(own) < 2:
            subject = f"{source} has" if label is None else f"class {label!r} has"
            raise DataError(
                f"{own[0].place}{subject} one clip ({own[0].source}); "
                f"a split needs at least two{'' if label is None else ' per class'}"
            )
        count = min(max(round(test_fraction * len(own)), 1), len(own) - 1)
        in_test.update(map(id, sorted(own, key=lambda row: _hash(row.name, seed))[:count]))
    return _divided(rows, in_test)


def _divided(rows: Sequence[Row], in_test: Set[int]) -> list[Row]:
    """`rows` in their order, with those whose ids are given in test."""
    return [replace(row, split="test" if id(row) in in_test else "train") for row in rows]


@dataclass(frozen=True, eq=False)
class _Voice:
    """The clips of one speaker, or one clip whose speaker is not known; `order` is a hash."""

    order: str
    rows: list[Row]
    labels: frozenset[str | None]


def _by_speaker(source: str, rows: Sequence[Row], test_fraction: float, seed: int) -> list[Row]:
    voices = _voices(rows, seed)
    speakers = Counter(label for voice in voices for label in voice.labels)
    single = sorted(str(label) for label, count in speakers.items() if count < 2 and label is not None)
    if len(voices) < 2 or single:
        whose = f" of {first(single, 'class', 'classes')}" if single else ""
        raise DataError(
            f"{source} has the clips{whose} from one speaker, and a drawn split has no speaker in both "
            "parts; give the split, or remove the column of speakers"
        )
    test = _drawn_voices(voices, speakers, test_fraction * len(rows))
    return _divided(rows, {id(row) for voice in test for row in voice.rows})


def _voices(rows: Sequence[Row], seed: int) -> list[_Voice]:
    """In the order of their hashes."""
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[f"speaker {row.speaker}" if row.speaker else row.name].append(row)
    voices = [
        _Voice(_hash(name, seed), own, frozenset(row.label for row in own)) for name, own in groups.items()
    ]
    return sorted(voices, key=lambda voice: voice.order)


def _drawn_voices(voices: Sequence[_Voice], speakers: Counter[str | None], wanted: float) -> list[_Voice]:
    """Those of the test part: one at least for each class, then as many as there is room for.

    The last speaker of a class stays in train. Classes of few speakers choose first.
    """
    chosen: list[_Voice] = []
    in_train, in_test = Counter(speakers), Counter[str | None]()
    room = wanted

    def choose(voice: _Voice) -> None:
        nonlocal room
        chosen.append(voice)
        in_train.subtract(voice.labels)
        in_test.update(voice.labels)
        room -= len(voice.rows)

    def excess(voice: _Voice) -> float:
        return max(len(voice.rows) - room, 0)

    def can_leave_train(voice: _Voice) -> bool:
        return all(in_train[label] > 1 for label in voice.labels)

    of_label = defaultdict(list)
    for voice in voices:
        for label in voice.labels:
            of_label[label].append(voice)
    for label in sorted(speakers, key=lambda label: (speakers[label], label or "")):
        # Without a voice in test, none of the class is chosen yet.
        candidates = [voice for voice in of_label[label] if can_leave_train(voice)]
        if candidates and not in_test[label]:
            choose(min(candidates, key=lambda voice: (excess(voice), voice.order)))
    taken = {voice.order for voice in chosen}
    for voice in voices:
        if voice.order not in taken and not excess(voice) and can_leave_train(voice):
            choose(voice)
    return chosen
