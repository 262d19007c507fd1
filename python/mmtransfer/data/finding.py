"""Files by the paths that a manifest gives for them."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from .errors import DataError
from .names import composed


def check_no_address(path: str, place: str) -> None:
    """DataError, with the `place` that has it, if `path` is an address on a network."""
    if re.match(r"[A-Za-z][\w+.-]+://", path.strip()):
        raise DataError(f"{place} has the address {path.strip()}; download the file and give its path")


class Finder:
    """Files below `folder`, or anywhere by absolute paths.

    A path is tried as it is, then without outer spaces, then with Windows' separators turned; each also with
    accents composed or decomposed as they are on disk.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._names: dict[Path, dict[str, list[str]]] = {}

    def find(self, text: str) -> Path | None:
        """The file that `text` means, or None."""
        spellings = [text, text.strip(), text.strip().replace("\\", "/")]
        # Not Path.is_file, which raises for names that are too long.
        return next((found for found in self._candidates(spellings) if os.path.isfile(found)), None)

    def _candidates(self, spellings: Iterable[str]) -> Iterator[Path]:
        for path in dict.fromkeys(map(os.path.expanduser, spellings)):
            yield self._folder / path
            anchor = Path(path).anchor
            yield from self._as_on_disk(self._folder / anchor, Path(path).relative_to(anchor).parts)

    def _as_on_disk(self, folder: Path, parts: tuple[str, ...]) -> Iterator[Path]:
        """The files and folders whose paths below `folder` are composed of the same characters."""
        if not parts:
            yield folder
            return
        names = [parts[0]] if parts[0] == ".." else self._listed(folder).get(composed(parts[0]), [])
        for name in names:
            yield from self._as_on_disk(folder / name, parts[1:])

    def _listed(self, folder: Path) -> dict[str, list[str]]:
        """The names in `folder`, by their composed form."""
        if folder not in self._names:
            self._names[folder] = {}
            with contextlib.suppress(OSError):
                for name in sorted(os.listdir(folder)):
                    self._names[folder].setdefault(composed(name), []).append(name)
        return self._names[folder]
