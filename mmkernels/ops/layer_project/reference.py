"""The definition of :func:`mmkernels.layer_project` in plain torch, for any floating dtype. Optimised for
reading."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from mmkernels.activations import ACTIVATIONS
from mmkernels.ops._common import accumulate_dtype


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
    h = x.to(accumulate)
    if norm_weight is not None:
        h = functional.layer_norm(h, h.shape[-1:], eps=eps) * norm_weight.to(accumulate)
        if norm_bias is not None:
            h = h + norm_bias.to(accumulate)
    z = torch.einsum("nlc,loc->nlo", h, weight.to(accumulate))
    if bias is not None:
        z = z + bias.to(accumulate)
    # einsum lays its result out as it computed it; callers view pairs of taps as one.
    return ACTIVATIONS[activation](z).to(x.dtype).contiguous()
