"""Files by the paths that a manifest gives for them."""

from __future__ import annotations

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
        self._names: dict[Path, dict[str, str]] = {}

    def find(self, text: str) -> Path | None:
        """The file that `text` means, or None."""
        spellings = [text, text.strip(), text.strip().replace("\\", "/")]
        for path in dict.fromkeys(map(os.path.expanduser, spellings)):
            for found in (self._folder / path, self._as_on_disk(path)):
                # Not Path.is_file, which raises for names that are too long.
                if found is not None and os.path.isfile(found):
                    return found
        return None

    def _as_on_disk(self, path: str) -> Path | None:
        found = Path(self._folder, Path(path).anchor)
        for part in Path(path).relative_to(Path(path).anchor).parts:
            if os.path.lexists(found / part):
                found /= part
                continue
            name = self._listed(found).get(composed(part))
            if name is None:
                return None
            found /= name
        return found

    def _listed(self, folder: Path) -> dict[str, str]:
        """The names in `folder`, by their composed form."""
        if folder not in self._names:
            try:
                names = sorted(os.listdir(folder))
            except OSError:
                names = []
            self._names[folder] = {composed(name): name for name in names}
        return self._names[folder]
