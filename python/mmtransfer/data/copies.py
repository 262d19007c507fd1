"""Files of equal content."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path
from typing import TypeVar

from .audio import StoredAudio, open_bytes

_Item = TypeVar("_Item")
_File = Path | StoredAudio
_TAIL_BYTES = 4096


def copies(items: Iterable[_Item], file: Callable[[_Item], _File]) -> list[list[_Item]]:
    """The groups of `items` whose files hold the same bytes.

    Sizes are compared first, then the last 4 KiB, so that few files are read whole.
    """
    groups = [list(items)]
    for key in (_size, _tail, _content):
        groups = [part for group in groups for part in _equal(group, file, key)]
    return groups


def _equal(
    items: list[_Item], file: Callable[[_Item], _File], key: Callable[[_File], Hashable]
) -> list[list[_Item]]:
    parts: dict[Hashable, list[_Item]] = defaultdict(list)
    for item in items:
        parts[key(file(item))].append(item)
    return [part for part in parts.values() if len(part) > 1]


def _size(file: _File) -> int:
    if isinstance(file, Path):
        return file.stat().st_size
    with open_bytes(file) as stream:
        return stream.seek(0, os.SEEK_END)


def _tail(file: _File) -> bytes:
    with open_bytes(file) as stream:
        stream.seek(-min(_TAIL_BYTES, _size(file)), os.SEEK_END)
        return stream.read()


def _content(file: _File) -> bytes:
    digest = hashlib.sha256()
    with open_bytes(file) as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.digest()
