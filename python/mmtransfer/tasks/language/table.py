"""The embedding table of a language model: one tensor of its files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import cached_file

from mmtransfer.data import DataError

from .source import Outline, check_table_finite, find_embedding, find_place, load_language_model, read_outline
from .tokenizer import read_tokenizer

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def read_embedding_table(source: str) -> torch.Tensor:
    """The input embeddings `(V, H)` of a causal language model, in the dtype that they are stored in.

    One tensor is read and no other weight, where the files are safetensors; else the model is loaded.

    Args:
        source: a folder, or a name on the hub.

    Raises:
        DataError: files that cannot be read.
        ValueError: no causal language model, no such table, or one that does not fit: fewer rows than the
            tokenizer has ids, another width than the configuration says, values that are not finite.
    """
    outline = read_outline(source)
    expected = outline.embedding
    files = _find_files(source)
    if files is None:
        table = find_embedding(load_language_model(source, dtype="auto"), source).detach().clone()
    else:
        table = _read(_locate(files, outline, source), source)
    _check(table, expected.shape[1], source)
    return table


def _find_files(source: str) -> Mapping[str, str] | None:
    """The file of each tensor; None where there are no safetensors."""
    place = find_place(source)
    if (path := _file(place, _WEIGHTS)) is not None:
        try:
            with safe_open(path, "pt") as file:
                return dict.fromkeys(file.keys(), _WEIGHTS)
        except SafetensorError as error:
            raise DataError(f"{_WEIGHTS} of {source} cannot be read ({error})") from error
    if (path := _file(place, _INDEX)) is not None:
        try:
            found: Any = json.loads(Path(path).read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{_INDEX} of {source} has no weight_map") from error
        return found
    return None


def _file(place: str, name: str) -> str | None:
    """A file of a folder or of a repository on the hub; None if it has none of this name."""
    try:
        return cached_file(place, name)
    except OSError:
        return None


def _locate(files: Mapping[str, str], outline: Outline, source: str) -> tuple[str, str]:
    """The file and the name of the tensor."""
    names = list(_names(outline))
    name = next((name for name in names if name in files), None)
    if name is None:
        # Models of several parts name these in their files in another way than in the model.
        leaf = "." + ".".join(names[0].split(".")[-2:])
        ending = [each for each in files if each.endswith(leaf)]
        if len(ending) != 1:
            raise ValueError(f"{source} has no embedding table: its files have no tensor {names[0]}")
        (name,) = ending
    return files[name], name


def _names(outline: Outline) -> Iterable[str]:
    """The names that files may have for the table, the likely ones first."""
    model, table = outline.model, outline.embedding
    # The output's name too, where the two are tied: files have the tensor once.
    own = [name for name, each in model.named_parameters(remove_duplicate=False) if each is table]
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    yield from own
    # Files of the model without its language-model head, and the reverse.
    yield from (name.removeprefix(prefix) for name in own)
    yield from (prefix + name for name in own)


def _read(located: tuple[str, str], source: str) -> torch.Tensor:
    file, name = located
    path = _file(find_place(source), file)
    if path is None:
        raise DataError(f"{source} lacks {file}, which has its embedding table")
    try:
        with safe_open(path, "pt") as opened:
            return opened.get_tensor(name)
    except SafetensorError as error:
        raise DataError(f"{file} of {source} cannot be read ({error})") from error


def _check(table: torch.Tensor, width: int, source: str) -> None:
    if table.dim() != 2 or table.shape[1] != width or table.dtype not in _DTYPES:
        raise ValueError(
            f"the embedding table of {source} must be (V, {width}) in float32, bfloat16, float16 or float64, "
            f"got {tuple(table.shape)} {table.dtype}"
        )
    read_tokenizer(source).check_table(len(table))
    check_table_finite(table, source)
