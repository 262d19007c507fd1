"""`load_data`: recordings from a folder, a manifest or a data set, by the reader that each needs."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from .audio import SUFFIXES
from .columns import Kind, check_kind
from .errors import DataError
from .folders import from_folder
from .hugging_face import from_dataset, is_saved_dataset
from .json_lines import JSON_SUFFIXES
from .manifests import from_manifest
from .recordings import Recordings
from .transcripts import from_transcripts

_MANIFESTS = (".csv", ".tsv", ".txt", *JSON_SUFFIXES)
_FOLDERS = {
    "label": "a folder of class folders",
    "text": "a folder of recordings with text files next to them",
}
# As the hub has them: "librispeech_asr", "google/fleurs".
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)


def load_data(
    source: Any,
    *,
    kind: Kind,
    config: str | None = None,
    test_fraction: float = 0.2,
    seed: int = 0,
    strict: bool = False,
) -> Recordings:
    """Read labelled or transcribed recordings from any source that this package reads.

    Args:
        source: a folder of class folders, or of recordings with text files next to them (`from_folder`,
            `from_transcripts`); a manifest, CSV or JSON lines (`from_manifest`); a `Dataset` or
            `DatasetDict`, a folder of one, or its name on the hub (`from_dataset`).
        kind: "label" or "text": what the clips must have.
        config: the configuration of a data set by name.
        test_fraction: share of the test part, where the split is drawn.
        seed: of the draw.
        strict: whether clips that cannot be used are errors, not left out and counted.

    DataError and ValueError as from these functions; DataError, with what is expected, for another source.
    """
    check_kind(kind)
    if kind is None:
        raise ValueError("kind must be 'label' or 'text', got None")
    options: dict[str, Any] = {"test_fraction": test_fraction, "seed": seed, "strict": strict}
    if not isinstance(source, (str, os.PathLike)):
        return from_dataset(source, kind=kind, config=config, **options)
    path = Path(os.path.expanduser(source))
    if path.is_dir() and (is_saved_dataset(path) or _has_tables(path)):
        return from_dataset(path, kind=kind, config=config, **options)
    if config is not None and path.exists():
        raise ValueError(f"config is for a data set by name, and {path} is none; got {config!r}")
    if path.is_dir():
        return (from_folder if kind == "label" else from_transcripts)(path, **options)
    if path.exists():
        return _from_file(path, kind, options)
    if isinstance(source, str) and _NAME.fullmatch(source) and path.suffix.lower() not in _MANIFESTS:
        return _from_name(source, kind, config, options)
    raise DataError(f"{path} does not exist; {_expected(kind)}")


def _expected(kind: Kind) -> str:
    return (
        f"expected {_FOLDERS[kind]}, a manifest ({', '.join(_MANIFESTS)}), or a data set of Hugging Face: a "
        "folder or a name"
    )


def _has_tables(folder: Path) -> bool:
    """Whether a folder is a data set as the hub has it: Parquet files, on top or one level below."""
    return any(next(folder.glob(pattern), None) for pattern in ("*.parquet", "*/*.parquet"))


def _from_file(path: Path, kind: Kind, options: dict[str, Any]) -> Recordings:
    if path.suffix.lower() in SUFFIXES:
        raise DataError(f"{path} is one recording; {_expected(kind)}")
    return from_manifest(path, kind=kind, **options)


def _from_name(name: str, kind: Kind, config: str | None, options: dict[str, Any]) -> Recordings:
    try:
        return from_dataset(name, kind=kind, config=config, **options)
    except ImportError as error:
        raise DataError(f"there is no file or folder {name}; {_expected(kind)}; {error}") from error
