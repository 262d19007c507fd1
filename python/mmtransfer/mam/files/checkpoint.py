"""A checkpoint on disk: where each tensor is in its safetensors files, checked before anything is read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from mmtransfer.data.errors import DataError, first
from mmtransfer.model_files import find_fault, read_header, read_json, weight_files

#: Files besides weights: configuration, tokenizer and the like.
SETTINGS = ("*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.tiktoken", "LICENSE*")
_CONVERT = (
    "convert it first: python -c \"from transformers import AutoModel; AutoModel.from_pretrained('{0}')"
    ".save_pretrained('{0}-safetensors')\" (or the Auto class of its head)"
)


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: `size` bytes from `start` on; `dtype` as safetensors writes it, such as BF16."""

    name: str
    path: Path
    start: int
    size: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Checkpoint:
    """A folder of transformers with safetensors, one file or several with an index.

    Attributes:
        place: as it was given: a folder, or a name on the hub.
        folder: where its files are.
        config: of `config.json`.
        tensors: by name, in the order of their files.
    """

    place: str
    folder: Path
    config: dict[str, Any]
    tensors: dict[str, Stored]


def open_checkpoint(place: str) -> Checkpoint:
    """Read the headers of a checkpoint.

    Raises:
        DataError: no such folder, weights that are not safetensors, files that are missing, cut off or
            damaged, or an index that does not agree with the files; each named.
    """
    folder = _find_folder(place)
    index_path = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists() or not index_path.exists():
        weight_map = None
    else:
        weight_map = _read_index(place, index_path)
    if (fault := find_fault(folder)) is not None:
        raise DataError(f"{place} cannot be merged: {fault}")
    files = list(weight_files(folder))
    if not files or files[0].suffix != ".safetensors":
        found = f"{files[0].name} alone" if files else "no weights"
        raise DataError(f"{place} has {found}, and merging reads safetensors; {_CONVERT.format(place)}")
    tensors: dict[str, Stored] = {}
    for path in files:
        for stored in _read_file(place, path):
            if stored.name in tensors:
                other = tensors[stored.name].path.name
                raise DataError(f"{place} has the tensor {stored.name} twice, in {other} and {path.name}")
            tensors[stored.name] = stored
    if weight_map is not None:
        _check_index(place, weight_map, tensors)
    if not tensors:
        raise DataError(f"{place} has no tensors in {files[0].name}")
    return Checkpoint(place, folder, read_json(folder / "config.json") or {}, tensors)


def _find_folder(place: str) -> Path:
    folder = Path(place).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise DataError(f"{place} is a file; give the folder of the model, which has its config.json")
    if folder.is_absolute() or place.startswith((".", "~")) or place.count("/") > 1:
        raise DataError(f"{place} does not exist; give the folder or the hub name of a model")
    # Imported here: folders need no client of the hub.
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(place, allow_patterns=["*.safetensors", *SETTINGS]))
    except Exception as error:
        # Its errors are those of several HTTP libraries.
        reason = " ".join(str(error).split())[:200].removesuffix(".")
        raise DataError(
            f"{place} is no folder, and no model can be fetched from the hub by that name ({reason})"
        ) from error


def _read_index(place: str, path: Path) -> dict[str, str]:
    """The file of each tensor, as the index says."""
    weight_map = (read_json(path) or {}).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise DataError(f"{place} has an index without a weight_map, {path.name}; download it again")
    wrong = [name for name in weight_map.values() if not isinstance(name, str) or Path(name).name != name]
    if wrong:
        raise DataError(f"{place} has an index, {path.name}, with {wrong[0]!r} for a file in its folder")
    if missing := sorted({name for name in weight_map.values() if not (path.parent / name).exists()}):
        lost = sum(name == missing[0] for name in weight_map.values())
        raise DataError(
            f"{place} lacks {missing[0]}, which {path.name} names for {lost} tensors; download it again"
        )
    return weight_map


def _read_file(place: str, path: Path) -> Iterable[Stored]:
    try:
        # The library checks all of the header: sizes, overlaps and holes.
        with safe_open(path, "pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise DataError(f"{place} cannot be merged: {path.name} cannot be read ({error})") from error
    offset, header = read_header(path)
    found = []
    for name, each in header.items():
        begin, end = each["data_offsets"]
        found.append(Stored(name, path, offset + begin, end - begin, each["dtype"], tuple(each["shape"])))
    return sorted(found, key=lambda stored: (stored.start, stored.name))


def _check_index(place: str, weight_map: dict[str, str], tensors: dict[str, Stored]) -> None:
    """DataError for tensors of the index that its files do not have."""
    if missing := [name for name, file in weight_map.items()
                   if name not in tensors or tensors[name].path.name != file]:  # fmt: skip
        raise DataError(
            f"{place} has an index with {first(missing, 'tensor', 'tensors')} that "
            f"{weight_map[missing[0]]} does not have; download both again"
        )
