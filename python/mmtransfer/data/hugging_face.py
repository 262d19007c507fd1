"""`from_dataset`: data sets of the `datasets` library, whose audio is read here and not by it."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, BinaryIO

from .audio import StoredAudio
from .building import build
from .columns import Kind, check_kind, find_column
from .errors import DataError, counted, first, shortened
from .finding import check_no_address
from .names import normal, part_of, transcript
from .recordings import SPLITS, Recordings
from .rows import Row, identity
from .table import column_name
from .unusable import Unusable

_MISSING = "data sets of Hugging Face need the package datasets; install with: pip install 'datasets>=3'"
# Rows whose audio is in memory at once while the headers are read, if the data set is shuffled or filtered.
_BATCH = 64


def from_dataset(
    source: Any,
    *,
    config: str | None = None,
    kind: Kind | None = None,
    audio: str | None = None,
    label: str | None = None,
    text: str | None = None,
    speaker: str | None = None,
    test_fraction: float = 0.2,
    seed: int = 0,
    strict: bool = False,
) -> Recordings:
    """Read a data set of the `datasets` library: a column of audio, and one of labels or of transcripts.

    Audio is not decoded, nor kept in memory, before a clip is loaded. The splits are `train` and `test` and,
    next to both, validation; a `Dataset`, or a single split, has its test part drawn as in `from_folder`.
    Further splits and other columns are left out; the splits are counted in `Recordings.ignored` and logged.
    docs/data.md has all rules.

    Args:
        source: a `Dataset`, a `DatasetDict`, a folder that `save_to_disk` wrote or `load_dataset` reads, or a
            name on the hub, which is downloaded.
        config: the configuration, where a name or a folder has several.
        kind: "label" or "text", where it has both; None takes the one that is there.
        audio: the column of audio; by default the only one of that type.
        label: the column of classes, `ClassLabel`, text or whole numbers; by default `label`, or the only
            `ClassLabel`.
        text: the column of transcripts; by default `text`, `sentence`, `transcript` or `transcription`.
        speaker: the column of speakers; by default `speaker`, `speaker_id` or `client_id`.
        test_fraction: share of the test part, where the split is drawn.
        seed: of the draw.
        strict: whether audio that cannot be read and empty transcripts are errors, not left out and counted.

    DataError if it cannot be loaded, lacks a column or a split, a row has no label, a file is missing or
    listed twice, and as in `from_manifest`; ImportError without the library; TypeError for another object;
    ValueError for arguments that contradict each other or are out of range.
    """
    check_kind(kind)
    if label is not None and (text is not None or kind == "text"):
        raise ValueError("label must be None where transcripts are asked for")
    if text is not None and kind == "label":
        raise ValueError("text must be None where labels are asked for")
    kind = "label" if label is not None else "text" if text is not None else kind
    name, splits = _splits(source, config)
    parts, ignored = _parts(name, splits)
    unusable = Unusable(strict)
    rows: list[Row] = []
    for split, part in parts.items():
        dataset = splits[split]
        place = f"{name} {split}".strip()
        columns = _columns(place, dataset.features, kind, audio, label, text, speaker)
        rows += _rows(place, dataset, columns, part, unusable)
    _check_files(name, rows)
    total = sum(len(splits[split]) for split in parts)
    return build(
        name, rows, ignored=ignored, unusable=unusable, total=total, test_fraction=test_fraction, seed=seed
    )


def is_saved_dataset(folder: Path) -> bool:
    """Whether `save_to_disk` of the library wrote `folder`."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _splits(source: Any, config: str | None) -> tuple[str, Mapping[str, Any]]:
    """A name, and the data set of each split; "" for one without splits."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError(_MISSING) from error
    name = None
    if isinstance(source, (str, os.PathLike)):
        name, source = _load(datasets, os.fspath(source), config)
    if isinstance(source, datasets.Dataset):
        source = {"": source}
    whole = isinstance(source, dict) and all(isinstance(each, datasets.Dataset) for each in source.values())
    if not whole:
        raise TypeError(
            "source must be a Dataset, a DatasetDict, or the folder or name of one, not streamed, got "
            f"{type(source).__name__}"
        )
    if not source:
        raise DataError(f"{name or 'the data set'} has no splits")
    info = next(iter(source.values())).info
    return name or info.dataset_name or info.builder_name or "data set", source


def _load(datasets: Any, path: str, config: str | None) -> tuple[str, Any]:
    folder = Path(os.path.expanduser(path))
    problem = "cannot be loaded as a data set"
    try:
        if folder.is_dir():
            name = folder.resolve().name
            if is_saved_dataset(folder):
                return name, datasets.load_from_disk(str(folder))
            return name, datasets.load_dataset(str(folder), config)
        problem = "is no folder, and cannot be loaded from the hub"
        return path, datasets.load_dataset(path, config)
    # The library raises these, and subclasses of them, for names, configurations and files that it lacks.
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split()).removesuffix(".")
        raise DataError(
            f"{path} {problem} ({reason}); give a folder that save_to_disk wrote, or a name on the hub"
        ) from error


def _parts(name: str, splits: Mapping[str, Any]) -> tuple[dict[str, str], list[str]]:
    """The part of each split that is used, empty if it is to be drawn, and what is left out."""
    parts = {split: part_of(split) for split in splits}
    if len(splits) == 1 and next(iter(parts.values())) in (None, "train"):
        return dict.fromkeys(splits, ""), []
    counts = Counter(parts.values())
    if not set(SPLITS) <= set(counts) or any(counts[split] > 1 for split in SPLITS):
        raise DataError(
            f"{name} has the splits {shortened(splits, 8)}; give a DatasetDict of one called train, one "
            "called test and, if wanted, one called validation, or a single Dataset to have its test drawn"
        )
    used = {split: part for split, part in parts.items() if part is not None}
    others = [split for split in splits if split not in used]
    return used, [f"{counted(len(splits[split]), 'clip')} in {split}" for split in others]


@dataclass(frozen=True)
class _Columns:
    """The names of the columns; `value` holds labels or transcripts."""

    audio: str
    kind: Kind
    value: str
    speaker: str | None

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(filter(None, (self.audio, self.value, self.speaker))))


def _columns(
    name: str,
    features: Mapping[str, Any],
    kind: Kind | None,
    audio: str | None,
    label: str | None,
    text: str | None,
    speaker: str | None,
) -> _Columns:
    chosen = {"audio": audio, "label": label, "text": text, "speaker": speaker}
    for argument, column in chosen.items():
        if column is not None and column not in features:
            raise DataError(f"{name} has no column {column!r} for {argument}; {_listed(features)}")
    audio = audio or _only(features, "Audio", "audio")
    if audio is None or type(features[audio]).__name__ != "Audio":
        raise DataError(
            f"{name} lacks a column of audio, or has several; {_listed(features)}; say which, or make it one "
            "with cast_column(name, datasets.Audio())"
        )
    kind, value = _value(name, features, kind, label or text)
    speaker = speaker or _named(name, features, "speaker")
    for column in filter(None, (value, speaker)):
        if not _is_readable(features[column], whole_numbers=column != value or kind == "label"):
            raise DataError(f"{name} has the column {column!r} of another type; {_listed(features)}")
    return _Columns(audio, kind, value, speaker)


def _value(name: str, features: Mapping[str, Any], kind: Kind | None, column: str | None) -> tuple[Kind, str]:
    """The kind, and the column of labels or transcripts, by its name or else its type."""
    if kind is not None and column is not None:
        return kind, column
    kinds: tuple[Kind, ...] = ("label", "text") if kind is None else (kind,)
    found = {each: column for each in kinds if (column := _named(name, features, each))}
    if not found and "label" in kinds and (column := _only(features, "ClassLabel", "")):
        found["label"] = column
    if len(found) != 1:
        problem = f"has both {' and '.join(found.values())}" if found else f"lacks {' or '.join(kinds)}"
        raise DataError(f"{name} {problem}; {_listed(features)}; say label=... or text=...")
    return next(iter(found.items()))


def _named(name: str, features: Mapping[str, Any], meaning: str) -> str | None:
    index = find_column(name, meaning, [column_name(column) for column in features])
    return None if index is None else list(features)[index]


def _only(features: Mapping[str, Any], kind: str, preferred: str) -> str | None:
    """The column of a type, if it is the only one or has the preferred name."""
    found = [column for column, feature in features.items() if type(feature).__name__ == kind]
    return found[0] if len(found) == 1 else preferred if preferred in found else None


def _is_readable(feature: Any, whole_numbers: bool) -> bool:
    if type(feature).__name__ == "ClassLabel":
        return whole_numbers
    dtype = str(getattr(feature, "dtype", ""))
    return "string" in dtype or (whole_numbers and (dtype == "bool" or dtype.startswith(("int", "uint"))))


def _listed(features: Mapping[str, Any]) -> str:
    types = {name: type(feature).__name__ for name, feature in features.items()}
    columns = [
        f"{name} ({features[name].dtype if kind == 'Value' else kind})" for name, kind in types.items()
    ]
    return f"its columns are {shortened(columns, 12)}"


class DatasetAudio(StoredAudio):
    """The audio of one row; `datasets` maps its files into memory, so that the bytes needed are read alone.

    Args:
        column: a `Dataset` of the column of audio alone, in the format "arrow", which decodes nothing.
        index: of the row.
        name: for messages.
    """

    def __init__(self, column: Any, index: int, name: str) -> None:
        self._column, self._index, self._name = column, index, name

    def __str__(self) -> str:
        return self._name

    def open(self) -> BinaryIO:
        import pyarrow

        audio = self._column[self._index].column(0)[0]
        return pyarrow.BufferReader(audio["bytes"].as_buffer())


@dataclass(frozen=True)
class _Cells:
    """A row; `path` is the file's own name where the audio is `embedded`, and empty if there is none."""

    path: str
    embedded: bool
    value: str | None
    speaker: str | None


def _cells(dataset: Any, columns: _Columns) -> Iterator[_Cells]:
    texts = [name for name in (columns.value, columns.speaker) if name]
    words = {name: getattr(dataset.features[name], "names", None) for name in texts}
    for batch in dataset.select_columns(columns.names).with_format("arrow").iter(_BATCH):
        table = {name: batch.column(name).to_pylist() for name in texts}
        for index, audio in enumerate(batch.column(columns.audio)):
            value, speaker = (
                _words(table[name][index], words[name]) if name else None
                for name in (columns.value, columns.speaker)
            )
            there = audio.is_valid
            path = audio["path"].as_py() if there else None
            yield _Cells(path or "", there and audio["bytes"].is_valid, value, speaker)


def _words(value: Any, names: Sequence[str] | None) -> str | None:
    """A cell as text; None if it is empty, as classes that are not known are."""
    if value is None or names is None:
        return None if value is None else str(value)
    return names[value] if 0 <= value < len(names) else None


def _rows(name: str, dataset: Any, columns: _Columns, part: str, unusable: Unusable) -> list[Row]:
    found = list(_cells(dataset, columns))
    audio = dataset.select_columns([columns.audio]).with_format("arrow")
    # A file's own name stays with it in a shuffled data set, and the number of its row does not.
    names = [PurePath(cells.path.replace("\\", "/")).name for cells in found]
    distinct = "" not in names and len(set(names)) == len(names)
    rows = []
    for index, cells in enumerate(found):
        own = names[index] if distinct else f"row {index}"
        place = f"{name} row {index}"
        source = _source(place, audio, index, cells)
        text = transcript(cells.value or "") if columns.kind == "text" else None
        label = normal(cells.value or "") if columns.kind == "label" else None
        if label == "":
            raise DataError(f"{place} has no label; every row needs audio and a label")
        row_name = f"{part} {own}".strip()
        if source is None:
            unusable.add(row_name, f"{place} has no audio; remove it")
        elif text == "":
            unusable.add(row_name, f"{place} has no text; write its transcript or remove it")
        else:
            speaker = normal(cells.speaker or "") or None
            where = f"{place}: " if isinstance(source, Path) else ""
            rows.append(Row(source, row_name, part, label, text, speaker, where))
    return rows


def _source(place: str, audio: Any, index: int, cells: _Cells) -> Path | DatasetAudio | None:
    if cells.embedded:
        return DatasetAudio(audio, index, f"{place} ({cells.path})" if cells.path else place)
    check_no_address(cells.path, place)
    return Path(os.path.expanduser(cells.path)) if cells.path else None


def _check_files(name: str, rows: Sequence[Row]) -> None:
    """DataError for files outside the data set that are missing or listed twice."""
    files = [(row, row.source) for row in rows if isinstance(row.source, Path)]
    missing = [f"{row.place}{file}" for row, file in files if not os.path.isfile(file)]
    if missing:
        raise DataError(f"{name} lists {first(missing, 'missing file', 'missing files')}; correct the paths")
    listed: dict[tuple[int, int], Row] = {}
    for row, file in files:
        earlier = listed.setdefault(identity(file), row)
        if earlier is not row:
            raise DataError(
                f"{row.place}{file} is also that of {earlier.place.removesuffix(': ')}; list it once"
            )
