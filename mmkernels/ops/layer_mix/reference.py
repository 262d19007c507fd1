"""The definition of :func:`mmkernels.layer_mix` in plain torch, written for reading."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmkernels.ops._common import accumulate_dtype
from mmkernels.ops._inference import widened


def layer_mix(
    layers: Sequence[Tensor],
    weights: Tensor,
    *,
    norm: bool = False,
    eps: float = 1e-5,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """``sum_l weights[l] * N_l(layers[l])``, zero past ``lengths``.

    L layers ``(B, T, D)``, ``weights (L,)``, ``norm_weight`` and ``norm_bias (L, D)`` or ``(D,)``, ``lengths
    (B,)`` -> ``(B, T, D)``. ``N_l`` is the identity, or with ``norm`` the LayerNorm of a layer.

    The arguments are those of :func:`mmkernels.layer_mix`, unchecked. The result is computed in float32
    (float64 for float64) and rounded once, to the layers' dtype. Differentiable any number of times.
    """
    first = layers[0]
    accumulate = accumulate_dtype(first.dtype)
    weights = widened(weights, accumulate)
    if lengths is None:
        valid = torch.ones((), dtype=torch.bool, device=first.device)
    else:
        frame = torch.arange(first.shape[-2], device=first.device)
        valid = (frame < lengths.unsqueeze(-1)).unsqueeze(-1)
    total = torch.zeros(first.shape, dtype=accumulate, device=first.device)
    for index, layer in enumerate(layers):
        # Padding may hold NaN, so it is replaced and not multiplied by zero.
        x = torch.where(valid, layer.to(accumulate), 0.0)
        if norm:
            x = torch.nn.functional.layer_norm(x, x.shape[-1:], eps=eps)
            if norm_weight is not None:
                x = x * widened(norm_weight[index] if norm_weight.dim() == 2 else norm_weight, accumulate)
            if norm_bias is not None:
                x = x + (norm_bias[index] if norm_bias.dim() == 2 else norm_bias).to(accumulate)
        total = total + weights[index] * x
    return torch.where(valid, total, 0.0).to(first.dtype)
