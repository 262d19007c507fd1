"""Labelled recordings with a train and a test part, from a folder tree or a CSV manifest."""

from __future__ import annotations

import csv
import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .audio import SAMPLE_RATE, SUFFIXES, duration, read_audio, resample
from .errors import DataError

SPLITS = ("train", "test")


@dataclass(frozen=True, eq=False)
class Clip:
    """One recording: a file, or float32 samples at 16 kHz.

    `label` indexes `Recordings.classes`; `seconds` is the whole duration, before any cropping.
    """

    source: Path | np.ndarray
    label: int
    seconds: float


@dataclass(frozen=True, eq=False)
class Recordings:
    """A classification task on audio; `train` and `test` are lists, usable as map-style torch data sets."""

    name: str
    classes: tuple[str, ...]
    train: list[Clip]
    test: list[Clip]
    synthetic: bool = False

    def __post_init__(self) -> None:
        if len(self.classes) < 2:
            raise DataError(f"{self.name} has {len(self.classes)} class; at least two are needed")
        for split in SPLITS:
            present = {clip.label for clip in getattr(self, split)}
            missing = [label for index, label in enumerate(self.classes) if index not in present]
            if missing:
                raise DataError(
                    f"{self.name} has no {split} clip of {_first(missing, 'class', 'classes')}; "
                    "every class must occur in train and in test"
                )

    def load(
        self, clip: Clip, sample_rate: int = SAMPLE_RATE, max_seconds: float | None = None
    ) -> np.ndarray:
        """Mono float32 samples `(samples,)` of `clip` at `sample_rate` Hz, at most `max_seconds` of it."""
        if isinstance(clip.source, Path):
            return read_audio(clip.source, sample_rate, max_seconds)
        samples = clip.source if max_seconds is None else clip.source[: round(max_seconds * SAMPLE_RATE)]
        return resample(samples, SAMPLE_RATE, sample_rate)

    def describe(self) -> str:
        """One line: name, classes, clips and seconds of audio per part, chance accuracy."""
        parts = ", ".join(
            f"{split} {len(clips)} clips ({sum(clip.seconds for clip in clips):.0f} s)"
            for split, clips in zip(SPLITS, (self.train, self.test), strict=True)
        )
        kind = " [synthetic]" if self.synthetic else ""
        chance = max(Counter(clip.label for clip in self.test).values()) / len(self.test)
        return f"{self.name}{kind}: {len(self.classes)} classes, {parts}, chance {chance:.1%}"


def from_folder(path: str | Path, *, test_fraction: float = 0.2, seed: int = 0) -> Recordings:
    """Read a tree of class folders, `<path>/<class>/**/*.{wav,flac,ogg,mp3}`.

    `<path>/train/<class>` and `<path>/test/<class>` give the split; otherwise it is drawn per class, the same
    on every machine for the same file names and `seed`. DataError if the folder is missing or empty, a file
    cannot be read, there are fewer than two classes, or a class is missing from train or test.
    """
    root = Path(path).expanduser()
    if not root.is_dir():
        raise DataError(f"{root} is not a folder; give a folder of class folders, or a CSV manifest")
    if {folder.name for folder in _subfolders(root)} == set(SPLITS):
        rows = [(file, label, split) for split in SPLITS for file, label in _class_files(root / split)]
    else:
        rows = [(file, label, "") for file, label in _class_files(root)]
    if not rows:
        raise DataError(f"{root} holds no audio; expected <class>/<name> with {', '.join(SUFFIXES)} files")
    return _build(root.name, root, rows, test_fraction, seed)


def from_manifest(path: str | Path, *, test_fraction: float = 0.2, seed: int = 0) -> Recordings:
    """Read a CSV with a header and the columns `path`, `label` and, optionally, `split` (train or test).

    Relative paths are resolved against the folder of the CSV. Without a `split` column the split is drawn as
    in `from_folder`. DataError, naming the line or the files, for missing columns, values or files, and as
    there.
    """
    manifest = Path(path).expanduser()
    rows = [
        (manifest.parent / Path(row["path"]).expanduser(), row["label"], row.get("split", ""))
        for row in _manifest_rows(manifest)
    ]
    missing = [str(file) for file, _, _ in rows if not file.is_file()]
    if missing:
        raise DataError(
            f"{manifest} lists {_first(missing, 'missing file', 'missing files')}; correct the paths"
        )
    return _build(manifest.stem, manifest.parent, rows, test_fraction, seed)


def _build(
    name: str, root: Path, rows: Sequence[tuple[Path, str, str]], test_fraction: float, seed: int
) -> Recordings:
    if not 0 < test_fraction < 1:
        raise ValueError(f"test_fraction must be between 0 and 1, got {test_fraction}")
    classes = tuple(sorted({label for _, label, _ in rows}))
    if not any(split for _, _, split in rows):
        rows = _stratified_split(root, rows, test_fraction, seed)
    index = {label: i for i, label in enumerate(classes)}
    parts: dict[str, list[Clip]] = {split: [] for split in SPLITS}
    for file, label, split in rows:
        parts[split].append(Clip(file, index[label], duration(file)))
    return Recordings(name, classes, parts["train"], parts["test"])


def _stratified_split(
    root: Path, rows: Iterable[tuple[Path, str, str]], test_fraction: float, seed: int
) -> list[tuple[Path, str, str]]:
    by_label: dict[str, list[Path]] = {}
    for file, label, _ in rows:
        by_label.setdefault(label, []).append(file)

    def draw(file: Path) -> str:
        # A hash of the name, not a shuffle of a listing: adding a file moves no other file across the split.
        name = file.relative_to(root).as_posix() if file.is_relative_to(root) else file.as_posix()
        return hashlib.sha256(f"{seed}/{name}".encode()).hexdigest()

    split_rows = []
    for label, files in by_label.items():
        if len(files) < 2:
            raise DataError(
                f"class {label!r} has one clip ({files[0]}); a split needs at least two per class"
            )
        count = min(max(round(test_fraction * len(files)), 1), len(files) - 1)
        for rank, file in enumerate(sorted(files, key=draw)):
            split_rows.append((file, label, "test" if rank < count else "train"))
    return split_rows


def _subfolders(root: Path) -> list[Path]:
    return sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _class_files(root: Path) -> list[tuple[Path, str]]:
    return [
        (file, folder.name)
        for folder in _subfolders(root)
        for file in sorted(folder.rglob("*"))
        if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")
    ]


def _manifest_rows(manifest: Path) -> list[dict[str, str]]:
    try:
        with manifest.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            rows = [{key: (value or "").strip() for key, value in row.items() if key} for row in reader]
            columns = reader.fieldnames or ()
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{manifest} cannot be read as a CSV manifest ({error})") from error
    absent = [column for column in ("path", "label") if column not in columns]
    if absent:
        raise DataError(
            f"{manifest} lacks the column {absent[0]!r}; expected path,label and optionally split"
        )
    if not rows:
        raise DataError(f"{manifest} lists no clip; expected one path,label line per clip")
    for line, row in enumerate(rows, start=2):
        empty = [column for column in ("path", "label") if not row[column]]
        if empty:
            raise DataError(f"{manifest} line {line} has no {empty[0]}; every line needs path and label")
        if "split" in columns and row["split"] not in SPLITS:
            raise DataError(f"{manifest} line {line} has split {row['split']!r}; allowed are train and test")
    return rows


def _first(items: Sequence[str], singular: str, plural: str, count: int = 3) -> str:
    shown = ", ".join(items[:count]) + (", ..." if len(items) > count else "")
    return f"{len(items)} {singular if len(items) == 1 else plural} ({shown})"
