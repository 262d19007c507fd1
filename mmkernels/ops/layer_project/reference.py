"""The definition of :func:`mmkernels.layer_project` in plain torch, written for reading."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from mmkernels.activations import ACTIVATIONS
from mmkernels.ops._common import accumulate_dtype, without_autocast
from mmkernels.ops._inference import widened


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
    """``y[n, l] = act(LN_l(x[n, l]) @ weight[l]^T + bias[l])``.

    ``x (N, L, C)``, ``weight (L, C_out, C)``, ``bias (L, C_out)``, ``norm_weight`` and ``norm_bias (L, C)``
    -> ``(N, L, C_out)``.

    The arguments are those of :func:`mmkernels.layer_project`, unchecked. The result is computed in float32
    (float64 for float64) and rounded once, to the dtype of ``x``. Differentiable any number of times.
    """
    accumulate = accumulate_dtype(x.dtype)
    h = widened(x, accumulate)
    if norm_weight is not None:
        h = functional.layer_norm(h, h.shape[-1:], eps=eps) * widened(norm_weight, accumulate)
        if norm_bias is not None:
            h = h + norm_bias.to(accumulate)
    with without_autocast(x):
        z = torch.einsum("nlc,loc->nlo", h, widened(weight, accumulate))
    if bias is not None:
        z = z + bias.to(accumulate)
    # The strides of einsum's result are not fixed, and callers view pairs of taps as one.
    return ACTIVATIONS[activation](z).to(x.dtype).contiguous()
