"""Shared by both weighted-sum recognisers: when ``layer_mix`` may replace the stacked sum."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from mmkernels.ops._common import dtype_served
from mmkernels.ops.layer_mix.schema import MAX_LAYERS
from mmkernels.patch.recogniser import Unsupported


def check_instance(module: nn.Module, method: str, logits: Tensor) -> None:
    """Raise ``Unsupported`` for a wrapped instance, and for weights of a size or dtype without kernels."""
    if method in vars(module):
        raise Unsupported(f"{method} is overridden on the instance, by a hook or a wrapper")
    if is_parametrized(module):
        raise Unsupported("it is parametrised (torch.nn.utils.parametrize)")
    if not _is_plain(logits):
        raise Unsupported(f"layer weights of type {type(logits).__name__}, not a plain tensor")
    if logits.dim() != 1 or not 1 <= logits.numel() <= MAX_LAYERS:
        raise Unsupported(
            f"layer weights of shape {tuple(logits.shape)}; layer_mix takes one axis of at most {MAX_LAYERS}"
        )
    if not dtype_served(logits):
        raise Unsupported(f"{logits.dtype} on {logits.device.type} has no kernel")


def mixable(layers: Any, logits: Any) -> bool:
    """Whether ``layer_mix`` serves these layers. If not, the module's statements run, or raise.

    They also run for tensor subclasses (sharded, quantised), for weights that were exchanged since, and for
    weights in float64 with narrower layers, whose sum is float64.
    """
    if not isinstance(layers, (tuple, list)) or not _is_plain(logits) or logits.dim() != 1:
        return False
    if not 1 <= len(layers) <= MAX_LAYERS or len(layers) != logits.numel() or not dtype_served(logits):
        return False
    return all(
        _is_plain(layer)
        and layer.dim() > 0
        and layer.shape == layers[0].shape
        and layer.device == logits.device
        and layer.layout == torch.strided
        and dtype_served(layer)
        and (logits.dtype != torch.float64 or layer.dtype == torch.float64)
        for layer in layers
    )


def mixable_sequences(layers: Any, logits: Any) -> bool:
    """``mixable`` and of shape ``(B, T, D)``: with others ``weights.view(-1, 1, 1)`` means another axis."""
    return mixable(layers, logits) and layers[0].dim() == 3


def _is_plain(tensor: object) -> bool:
    return type(tensor) in (Tensor, nn.Parameter)
