"""Shared by both weighted-sum recognisers: when ``layer_mix`` may replace the stacked sum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from mmkernels.ops._common import dtype_served
from mmkernels.ops.layer_mix.schema import MAX_LAYERS
from mmkernels.patch.recogniser import Unsupported


def check_instance(module: nn.Module, method: str, logits: Tensor) -> None:
    """Raise ``Unsupported`` for a wrapped instance, and for weights of a size or dtype without kernels."""
    if method in vars(module):
        raise Unsupported(f"{method} is overridden on the instance, by a hook or a wrapper")
    if logits.dim() != 1 or logits.numel() > MAX_LAYERS:
        raise Unsupported(
            f"layer weights of shape {tuple(logits.shape)}; layer_mix takes one axis of at most {MAX_LAYERS}"
        )
    if not dtype_served(logits):
        raise Unsupported(f"{logits.dtype} on {logits.device.type} has no kernel")


def mixable(layers: Any, logits: Tensor) -> bool:
    """Whether ``layer_mix`` serves these layers. If not, the module's statements run, or raise."""
    if not isinstance(layers, (tuple, list)) or len(layers) != logits.numel():
        return False
    return all(
        isinstance(layer, Tensor)
        and layer.shape == layers[0].shape
        and layer.device == logits.device
        and dtype_served(layer)
        for layer in layers
    )


def mixable_sequences(layers: Sequence[Tensor], logits: Tensor) -> bool:
    """``mixable`` and of shape ``(B, T, D)``: with others ``weights.view(-1, 1, 1)`` means another axis."""
    return mixable(layers, logits) and layers[0].dim() == 3
