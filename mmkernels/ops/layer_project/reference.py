"""The definition of :func:`mmkernels.layer_project` in plain torch, for any floating dtype. Optimised for reading."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from mmkernels.ops._common import accumulate_dtype

ACTIVATE = {
    "none": lambda z: z,
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda z: functional.gelu(z, approximate="tanh"),
    "silu": functional.silu,
}


def layer_project(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "relu",
) -> Tensor:
    accumulate = accumulate_dtype(x.dtype)
    taps = []
    for tap in range(x.shape[1]):
        h = x[:, tap].to(accumulate)
        if norm_weight is not None:
            shift = None if norm_bias is None else norm_bias[tap].to(accumulate)
            h = functional.layer_norm(h, h.shape[-1:], norm_weight[tap].to(accumulate), shift, eps)
        z = functional.linear(h, weight[tap].to(accumulate), None if bias is None else bias[tap].to(accumulate))
        taps.append(ACTIVATE[activation](z))
    if not taps:
        return x.new_empty((x.shape[0], 0, weight.shape[1]))
    return torch.stack(taps, dim=1).to(x.dtype)
