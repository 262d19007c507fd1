"""torch ops behind :func:`mmkernels.layer_mix`. Layers are ``(batch, frames, width)``; parameters are of the
accumulation type."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels import _library
from mmkernels.ops._common import accumulate_dtype

MAX_LAYERS = 64


def _forward_fake(
    layers: list[Tensor],
    weights: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    lengths: Tensor | None,
    norm: bool,
    eps: float,
    save_stats: bool,
) -> tuple[Tensor, Tensor]:
    first = layers[0]
    if any(layer.shape != first.shape for layer in layers):
        raise RuntimeError("layers: expected one shape for all")
    if any(tensor.device != first.device for tensor in (weights, *layers)):
        raise RuntimeError("expected one device for all")
    rows = first.shape[0] * first.shape[1] if norm and save_stats else 0
    stats = first.new_empty((rows, len(layers), 2), dtype=accumulate_dtype(first.dtype))
    return first.new_empty(first.shape), stats


def _backward_fake(
    grad: Tensor,
    layers: list[Tensor],
    weights: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    lengths: Tensor | None,
    stats: Tensor,
    norm: bool,
    need_weights: bool,
    need_affine: bool,
    wanted: list[int],
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    first = layers[0]
    accumulate = accumulate_dtype(first.dtype)
    affine_layers = len(layers) if need_affine else 0
    return (
        first.new_empty((len(layers) if need_weights else 0,), dtype=accumulate),
        first.new_empty((affine_layers, first.shape[2]), dtype=accumulate),
        first.new_empty((affine_layers, first.shape[2]), dtype=accumulate),
        [first.new_empty(first.shape) for _ in wanted],
    )


_PARAMETERS = "Tensor[] layers, Tensor weights, Tensor? norm_weight, Tensor? norm_bias, Tensor? lengths"

_library.define(
    "layer_mix_fwd",
    f"{_PARAMETERS}, bool norm, float eps, bool save_stats",
    "(Tensor, Tensor)",
    _forward_fake,
    "mmkernels.ops.layer_mix.triton",
)
_library.define(
    "layer_mix_bwd",
    f"Tensor grad, {_PARAMETERS}, Tensor stats, bool norm, bool need_weights, bool need_affine, int[] wanted",
    "(Tensor, Tensor, Tensor, Tensor[])",
    _backward_fake,
    "mmkernels.ops.layer_mix.triton",
)

_ops = torch.ops.mmkernels
#: backend -> (forward op, backward op)
OPS = {
    "native": (_ops.layer_mix_fwd.default, _ops.layer_mix_bwd.default),
    "triton": (_ops.layer_mix_fwd_triton.default, _ops.layer_mix_bwd_triton.default),
}
