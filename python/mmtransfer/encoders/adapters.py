"""Bottleneck adapters in series with a module of a layer, for every method that has them."""

from __future__ import annotations

from typing import Any

from torch import nn

from mmkernels.nn import Adapter

from .edit import Edit, Forward


class Serial:
    """Called in place of a module's `forward`: `adapter(A)` for its (first) output A."""

    def __init__(self, inner: Forward, adapter: Adapter) -> None:
        self.inner, self.adapter = inner, adapter

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self.inner(*args, **kwargs)
        if isinstance(output, tuple):
            return self.adapter(output[0]), *output[1:]
        return self.adapter(output)


def add_adapter(edit: Edit, layer: nn.Module, name: str, adapter: Adapter) -> Adapter:
    """Make an adapter a trained child of a layer, on its device, in float32 (float64 in float64)."""
    adapter.to(**edit.place(layer)).train(layer.training)
    return edit.add(layer, name, adapter)


def append_adapter(edit: Edit, layer: nn.Module, name: str, module: nn.Module, adapter: Adapter) -> None:
    """The same, after `module`, a part of the layer or the layer itself."""
    edit.override(module, Serial(module.forward, add_adapter(edit, layer, name, adapter)))
