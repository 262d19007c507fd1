"""torch ops behind :func:`mmkernels.layer_project`. Parameters have one dtype, that of ``x`` or its
accumulation type, and so have their gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels import _library
from mmkernels.ops._common import ACTIVATION_CODES, accumulate_dtype

#: Activations whose derivative the output determines; for the others the value before is saved.
OUTPUT_SUFFICES = tuple(ACTIVATION_CODES[name] for name in ("none", "relu"))


def _forward_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    activation: int,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, taps, _ = x.shape
    outputs = weight.shape[1]
    save_value = save and activation not in OUTPUT_SUFFICES
    save_stats = save and norm_weight is not None
    return (
        x.new_empty((rows, taps, outputs)),
        x.new_empty((rows if save_value else 0, taps, outputs)),
        x.new_empty((rows if save_stats else 0, taps, 2), dtype=accumulate_dtype(x.dtype)),
    )


def _backward_fake(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    value: Tensor,
    stats: Tensor,
    activation: int,
    need_x: bool,
    need_weight: bool,
    need_norm: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, taps, inputs = x.shape
    outputs = weight.shape[1]
    need_product = need_weight or (need_norm and norm_weight is not None)
    norm_taps = taps if need_norm else 0
    return (
        x.new_empty((rows if need_x else 0, taps, inputs)),
        weight.new_empty((taps if need_product else 0, outputs, inputs)),
        weight.new_empty((taps, outputs)),
        weight.new_empty((norm_taps, inputs)),
        weight.new_empty((norm_taps, inputs)),
    )


_PARAMETERS = "Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias"

_library.define(
    "layer_project_fwd",
    f"{_PARAMETERS}, float eps, int activation, bool save",
    "(Tensor, Tensor, Tensor)",
    _forward_fake,
    "mmkernels.ops.layer_project.triton",
)
_library.define(
    "layer_project_bwd",
    f"Tensor grad, {_PARAMETERS}, Tensor value, Tensor stats, int activation, "
    "bool need_x, bool need_weight, bool need_norm",
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_fake,
    "mmkernels.ops.layer_project.triton",
)

_ops = torch.ops.mmkernels
#: backend -> (forward op, backward op)
OPS = {
    "native": (_ops.layer_project_fwd.default, _ops.layer_project_bwd.default),
    "triton": (_ops.layer_project_fwd_triton.default, _ops.layer_project_bwd_triton.default),
}
