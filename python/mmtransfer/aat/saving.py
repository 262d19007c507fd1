"""What training changes in a prepared model, in a folder: `config.json` and `model.safetensors`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

import mmkernels
from mmtransfer.checkpoint import check_fit, read_checkpoint, write_checkpoint
from mmtransfer.models import ModelDescription

from .prepare import _RECORD, OPTIONS, Prepared, get_prepared, prepare

METHOD = "aat"


def save_adapters(model: nn.Module, folder: str | Path) -> None:
    """Write the trainable parameters of a prepared model, and how it was prepared, into `folder`.

    Running statistics of batch norms are written too: they move in training mode even where the rest of the
    model is frozen. How the adapters are computed (backend, rewrite, recompute) is not part of it. An earlier
    checkpoint of this function there is replaced, each file in one step; other files are left alone.

    Raises:
        ValueError: the model is not prepared.
        FileExistsError: the folder has a checkpoint of something else.
    """
    prepared = get_prepared(model)
    config = {
        "method": METHOD,
        "mmkernels_version": mmkernels.__version__,
        "base_model": _describe(model),
        "prepare": prepared.options,
    }
    write_checkpoint(folder, config, _tensors(model, prepared))


def load_adapters(
    model: nn.Module,
    folder: str | Path,
    *,
    rewrite: bool = False,
    recompute: str = "none",
    backend: str = "auto",
    description: ModelDescription | None = None,
) -> Prepared:
    """Load what `save_adapters` wrote into the same model without adapters, or into one prepared in that way.

    Args:
        model: prepared here as the folder says, unless it is prepared already.
        rewrite, recompute, backend, description: as in `prepare`, for a model that is not.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a checkpoint of something else, a model prepared in another way, or weights that do not
            fit, each named. The model is untouched.
    """
    config, tensors = read_checkpoint(folder, METHOD)
    options = _read_options(config, folder)
    prepared: Prepared | None = model.__dict__.get(_RECORD)
    if prepared is not None:
        _check_options(prepared.options, options, folder)
        _load(model, prepared, tensors, folder)
        return prepared
    prepared = prepare(
        model,
        **options,
        rewrite=rewrite,
        recompute=recompute,
        backend=backend,
        description=description,
    )
    try:
        _load(model, prepared, tensors, folder)
    except BaseException:
        prepared.revert()
        raise
    return prepared


def _load(model: nn.Module, prepared: Prepared, tensors: dict[str, torch.Tensor], folder: str | Path) -> None:
    own = _tensors(model, prepared)
    check_fit(own, tensors, folder)
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[name])


def _tensors(model: nn.Module, prepared: Prepared) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {name: model.get_parameter(name) for name in prepared.trainable}
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            tensors |= {f"{name}.{buffer}": value for buffer, value in module.named_buffers()}
    return tensors


def _read_options(config: dict[str, Any], folder: str | Path) -> dict[str, Any]:
    options = config.get("prepare")
    if not isinstance(options, dict) or options.keys() != set(OPTIONS):
        raise ValueError(f'the configuration in {folder} must have "prepare" with {", ".join(OPTIONS)}')
    return options


def _check_options(own: dict[str, Any], saved: dict[str, Any], folder: str | Path) -> None:
    differences = [
        f"{name} {saved[name]!r}, not {value!r}" for name, value in own.items() if saved[name] != value
    ]
    if differences:
        raise ValueError(f"{folder} was saved from a model prepared with {'; '.join(differences)}")


def _describe(model: nn.Module) -> dict[str, Any]:
    config: Any = getattr(model, "config", None)
    return {
        "name_or_path": getattr(config, "_name_or_path", None),
        "model_type": getattr(config, "model_type", None),
    }
