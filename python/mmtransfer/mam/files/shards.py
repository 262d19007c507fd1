"""The safetensors files of a result: which tensors each has, and where; headers come before tensors."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .plan import Entry

NAME = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Shard:
    """A file of the result: its header, and where each of its tensors begins."""

    name: str
    header: bytes
    starts: dict[str, int]
    size: int


def lay_out(entries: Sequence[Entry], limit: int) -> list[Shard]:
    """Files of at most `limit` bytes of tensors each, where no tensor alone is larger; one, if all fit."""
    groups: list[list[Entry]] = [[]]
    filled = 0
    for entry in entries:
        if groups[-1] and filled + entry.size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(entry)
        filled += entry.size
    if len(groups) == 1:
        return [_make_shard(NAME, groups[0])]
    stem = NAME.removesuffix(".safetensors")
    return [
        _make_shard(f"{stem}-{number:05d}-of-{len(groups):05d}.safetensors", group)
        for number, group in enumerate(groups, 1)
    ]


def _make_shard(name: str, entries: Sequence[Entry]) -> Shard:
    # The widest elements first: each tensor is aligned to its own.
    ordered = sorted(entries, key=lambda entry: -entry.size // max(entry.elements, 1))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begins, place = {}, 0
    for entry in ordered:
        begins[entry.name] = place
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [place, place + entry.size],
        }
        place += entry.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    starts = {name: start + begin for name, begin in begins.items()}
    return Shard(name, len(text).to_bytes(8, "little") + text, starts, start + place)


def create(folder: Path, shard: Shard) -> int:
    """The file of a shard at its full size, with its header; the descriptor of the open file."""
    file = os.open(folder / shard.name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    os.ftruncate(file, shard.size)
    os.pwrite(file, shard.header, 0)
    return file


def write_index(folder: Path, shards: Sequence[Shard], entries: Sequence[Entry]) -> None:
    """The index of several files; none for one file."""
    if len(shards) == 1:
        return
    files = {name: shard.name for shard in shards for name in shard.starts}
    index = {
        "metadata": {
            "total_parameters": sum(entry.elements for entry in entries),
            "total_size": sum(entry.size for entry in entries),
        },
        "weight_map": {name: files[name] for name in sorted(files)},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
