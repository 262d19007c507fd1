"""Precision of weights: the dtypes of a loaded model, and those that may be trained."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

#: The dtypes that a model can be loaded in, by name.
LOADED = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}
_TRAINED = (torch.bfloat16, torch.float32, torch.float64)


def find_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """A dtype of `LOADED`, by itself or by name; ValueError for any other."""
    found = LOADED.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in LOADED.values():
        raise ValueError(f"dtype must be one of {', '.join(LOADED)}, got {dtype!r}")
    return found


def check_trained(named: Iterable[tuple[str, nn.Parameter]]) -> None:
    """ValueError for the first parameter that asks for a gradient and is float16 (or narrower).

    The steps of an optimiser vanish or overflow in it, and the weights become NaN.
    """
    for name, parameter in named:
        if parameter.requires_grad and parameter.dtype not in _TRAINED:
            precision = str(parameter.dtype).removeprefix("torch.")
            raise ValueError(
                f"{name} would be trained in {precision}; load the model with dtype=torch.float32 or "
                "torch.bfloat16"
            )
