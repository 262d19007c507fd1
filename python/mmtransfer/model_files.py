"""Files of a model's folder: which hold its weights, and the first fault of them, in one sentence."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_TEXTS = ("config.json", "preprocessor_config.json", *(f"{name}.index.json" for name in _WEIGHTS))


def find_fault(folder: Path) -> str | None:
    """A sentence on the first fault of a local folder, or None: another kind of folder, incomplete files."""
    return _find_other_kind(folder) or next(
        (fault for path in _files(folder) if (fault := _find_fault_of_file(path)) is not None), None
    )


def _find_other_kind(folder: Path) -> str | None:
    config = read_json(folder / "config.json")
    adapter = read_json(folder / "adapter_config.json")
    if adapter is not None and not any(True for _ in weight_files(folder)):
        base = adapter.get("base_model_name_or_path") or "its base model"
        return (
            f"it is an adapter of peft ({adapter.get('peft_type', 'LoRA')}) and no whole model; give {base}, "
            "or merge the two first (merge_and_unload, save_pretrained)"
        )
    if config is not None and config.get("format") == "mmtransfer":
        return "it is a checkpoint of mmtransfer, the trained part alone; load it by mmtransfer.load"
    if not (folder / "config.json").is_file():
        return f"it has no config.json{_nearby(folder)}"
    return None


def _nearby(folder: Path) -> str:
    """What a folder without a configuration has instead."""
    inner = sorted(path.parent.name for path in folder.glob("*/config.json"))
    if inner:
        return f", but its folder {inner[-1]} does"
    foreign = sorted(path.name for pattern in ("*.pt", "*.ckpt", "*.nemo") for path in folder.glob(pattern))
    return f", but {foreign[0]}, which is no model of transformers" if foreign else ""


def weight_files(folder: Path) -> Iterable[Path]:
    """The files of weights that transformers would read; they need not exist."""
    for name in _WEIGHTS:
        if (folder / name).exists():
            return [folder / name]
        index = read_json(folder / f"{name}.index.json")
        if index is not None and isinstance(index.get("weight_map"), dict):
            return [folder / shard for shard in sorted(set(index["weight_map"].values()))]
    return []


def _files(folder: Path) -> list[Path]:
    return [*(path for name in _TEXTS if (path := folder / name).exists()), *weight_files(folder)]


def _find_fault_of_file(path: Path) -> str | None:
    if not path.is_file():
        return f"its file {path.name} is missing; download it again"
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        return f"{path.name} is a pointer of git-lfs and not the file itself; run git lfs pull in the folder"
    if not size:
        return f"{path.name} is empty; download it again"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return f"{path.name} is a web page; download the file itself"
    if path.suffix == ".safetensors":
        return _find_fault_of_safetensors(path, size)
    if path.suffix == ".bin" and start.startswith(b"PK") and not zipfile.is_zipfile(path):
        return f"{path.name} is cut off after {size:,} bytes; download it again"
    return None


def _find_fault_of_safetensors(path: Path, size: int) -> str | None:
    """A file is 8 bytes, the length of the header; the header, with where each tensor ends; the tensors."""
    cut = f"{path.name} is cut off after {size:,} bytes"
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > 100_000_000:
        return f"{path.name} is no safetensors file; download it again"
    if size < 8 + length:
        return f"{cut}; download it again"
    try:
        start, header = read_header(path)
        ends = [each["data_offsets"][1] for each in header.values()]
    except (ValueError, TypeError, KeyError, AttributeError):
        return f"{path.name} is no safetensors file; download it again"
    whole = start + max(ends, default=0)
    return f"{cut} of {whole:,}; download it again" if size < whole else None


def read_header(path: Path) -> tuple[int, dict[str, Any]]:
    """Where the tensors of a safetensors file begin, and its header without the metadata."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return 8 + length, header


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file, or None if there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
