"""Adapters as the papers write them, on the parameters of `mmkernels.nn.Adapter`."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F


def bottleneck(adapter: Any, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """The term that an adapter adds."""
    hidden = F.gelu(F.linear(x, adapter.down_weight, adapter.down_bias))
    return scale * F.linear(hidden, adapter.up_weight, adapter.up_bias)


def serial(adapter: Any, x: torch.Tensor) -> torch.Tensor:
    return x + bottleneck(adapter, x)


def first(output: Any) -> torch.Tensor:
    """The result of a layer, or the first of several."""
    return output[0] if isinstance(output, tuple) else output
