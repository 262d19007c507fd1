"""A clip as a folder, a manifest or a data set lists it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from .audio import StoredAudio
from .names import composed


@dataclass(frozen=True)
class Row:
    """A file with its label or its transcript.

    Attributes:
        source: the file.
        name: the same on every machine, for the draw of the split and for messages.
        split: "train", "validation", "test" or, to be drawn, empty.
        label: the name of the class; None for a transcribed clip.
        text: the transcript; None for a labelled clip.
        speaker: None if unknown.
        place: where it is listed, for the beginning of messages.
    """

    source: Path | StoredAudio
    name: str
    split: str
    label: str | None = None
    text: str | None = None
    speaker: str | None = None
    place: str = ""


def relative_name(file: Path, root: Path) -> str:
    """The same for relative and absolute paths, and on file systems that decompose accents."""
    return composed(Path(os.path.relpath(file, root)).as_posix())


def identity(file: Path) -> tuple[int, int]:
    """The same for every path and link to one file."""
    status = os.stat(file)
    return status.st_dev, status.st_ino
