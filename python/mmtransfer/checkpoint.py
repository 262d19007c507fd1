"""A folder with `config.json` and `model.safetensors`, written atomically and read strictly."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

CONFIG = "config.json"
WEIGHTS = "model.safetensors"


def write_checkpoint(
    folder: str | Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Write a configuration, which names its "method", and tensors into `folder`, made if need be.

    Each file is replaced in one step. Files of an earlier checkpoint of the same method are replaced;
    anything else in the folder is left alone.

    Raises:
        FileExistsError: one of the two files is there, and not from this method.
    """
    folder = Path(folder)
    _refuse_foreign_files(folder, config["method"])
    folder.mkdir(parents=True, exist_ok=True)
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(config, indent=2) + "\n"
    _replace(folder / WEIGHTS, lambda path: save_file(ready, path, metadata={"format": "pt"}))
    _replace(folder / CONFIG, lambda path: path.write_text(text, encoding="utf-8"))


def read_checkpoint(folder: str | Path, method: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The configuration and the tensors of a folder that `write_checkpoint` wrote.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: the configuration is not one of this method.
    """
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} has no {name}; a saved {method} model has {CONFIG} and {WEIGHTS}"
            )
    config = _read_config(folder / CONFIG)
    if config is None or config.get("method") != method:
        found = None if config is None else config.get("method")
        raise ValueError(f'{folder / CONFIG} must have "method": {method!r}, got {found!r}')
    return config, load_file(folder / WEIGHTS)


def load_strictly(module: nn.Module, tensors: Mapping[str, torch.Tensor], source: str | Path) -> None:
    """Copy tensors into a module that has exactly these, of these shapes; ValueError lists what differs."""
    check_fit(module.state_dict(), tensors, source)
    module.load_state_dict(dict(tensors))


def check_fit(
    own: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor], source: str | Path
) -> None:
    """Raise a ValueError that lists what differs, unless `tensors` have the names and shapes of `own`."""
    differences = [f"{name} is missing" for name in sorted(own.keys() - tensors.keys())]
    differences += [f"{name} is unknown" for name in sorted(tensors.keys() - own.keys())]
    differences += [
        f"{name} has shape {tuple(tensors[name].shape)}, not {tuple(own[name].shape)}"
        for name in sorted(own.keys() & tensors.keys())
        if own[name].shape != tensors[name].shape
    ]
    if differences:
        raise ValueError(f"the weights in {source} do not fit: {'; '.join(differences)}")


def _refuse_foreign_files(folder: Path, method: str) -> None:
    present = [name for name in (CONFIG, WEIGHTS) if (folder / name).exists()]
    if not present:
        return
    config = _read_config(folder / CONFIG) if CONFIG in present else None
    if config is None or config.get("method") != method:
        raise FileExistsError(
            f"{folder} holds a {present[0]} that is not from method {method!r}; save into another folder"
        )


def _read_config(path: Path) -> dict[str, Any] | None:
    """The configuration, or None if the file does not hold a JSON object."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        return None
    return config if isinstance(config, dict) else None


def _replace(target: Path, write: Callable[[Path], object]) -> None:
    """Write beside the target, then put it in place in one step."""
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        # mkstemp makes files private; the result gets the rights that a plain open would have given.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
