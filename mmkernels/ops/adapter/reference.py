"""The definition of :func:`mmkernels.adapter` in plain torch, written for reading."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from mmkernels.activations import ACTIVATIONS
from mmkernels.ops._common import accumulate_dtype, without_autocast
from mmkernels.ops._inference import widened


def adapter(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    *,
    residual: Tensor | None = None,
    scale: float = 1.0,
    activation: str = "relu",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """``residual + scale * (act(LN(x) @ down^T + down_bias) @ up^T + up_bias)``.

    ``x (..., D)``, ``down_weight (d, D)``, ``up_weight (D, d)``, biases ``(d,)`` and ``(D,)``, ``residual``
    like ``x``, ``norm_weight`` and ``norm_bias (D,)`` -> ``(..., D)``.

    The arguments are those of :func:`mmkernels.adapter`, unchecked. The result is computed in float32
    (float64 for float64) and rounded once, to the dtype of ``residual``, or of ``x`` without one.
    Differentiable any number of times.
    """
    accumulate = accumulate_dtype(x.dtype)

    def wide(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else widened(tensor, accumulate)

    h = widened(x, accumulate)
    with without_autocast(x):
        if norm_weight is not None:
            h = functional.layer_norm(h, h.shape[-1:], wide(norm_weight), wide(norm_bias), eps)
        h = functional.linear(h, widened(down_weight, accumulate), wide(down_bias))
        h = functional.linear(ACTIVATIONS[activation](h), widened(up_weight, accumulate), wide(up_bias))
    y = scale * h
    if residual is None:
        return y.to(x.dtype)
    return (residual.to(accumulate) + y).to(residual.dtype)
