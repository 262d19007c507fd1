"""Files by the paths that a manifest gives for them."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from .names import composed


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
        for path in dict.fromkeys(map(os.path.expanduser, spellings)):
            anchor = Path(path).anchor
            for found in (
                self._folder / path,
                self._as_on_disk(self._folder / anchor, Path(path).relative_to(anchor).parts),
            ):
                # Not Path.is_file, which raises for names that are too long.
                if found is not None and os.path.isfile(found):
                    return found
        return None

    def _as_on_disk(self, folder: Path, parts: tuple[str, ...]) -> Path | None:
        """The file or folder whose path below `folder` is composed of the same characters."""
        if not parts:
            return folder
        names = [parts[0]] if parts[0] == ".." else self._listed(folder).get(composed(parts[0]), [])
        found = (self._as_on_disk(folder / name, parts[1:]) for name in names)
        return next((path for path in found if path is not None), None)

    def _listed(self, folder: Path) -> dict[str, list[str]]:
        """The names in `folder`, by their composed form."""
        if folder not in self._names:
            self._names[folder] = {}
            with contextlib.suppress(OSError):
                for name in sorted(os.listdir(folder)):
                    self._names[folder].setdefault(composed(name), []).append(name)
        return self._names[folder]
