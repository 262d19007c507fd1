"""torch ops behind :func:`mmkernels.adapter`. ``x`` is ``(rows, width)``; parameters have one dtype, that of
``x`` or its accumulation type, and so have their gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels import _library
from mmkernels.ops._common import accumulate_dtype


def _forward_fake(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    scale: float,
    eps: float,
    activation: int,
    add_input: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, width = x.shape
    stats_rows = rows if save and norm_weight is not None else 0
    return (
        x.new_empty((rows, width), dtype=x.dtype if residual is None else residual.dtype),
        x.new_empty((rows if save else 0, down_weight.shape[0])),
        x.new_empty((stats_rows, 2), dtype=accumulate_dtype(x.dtype)),
    )


def _backward_fake(
    grad: Tensor,
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    hidden: Tensor,
    stats: Tensor,
    scale: float,
    activation: int,
    add_input: bool,
    need_x: bool,
    need_down: bool,
    need_up: bool,
    need_norm: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows, width = x.shape
    bottleneck = down_weight.shape[0]
    # The gain's gradient comes out of the down-projection's.
    need_product = need_down or need_norm
    return (
        x.new_empty((rows if need_x else 0, width)),
        down_weight.new_empty((bottleneck if need_product else 0, width)),
        down_weight.new_empty((bottleneck if need_product else 0,)),
        down_weight.new_empty((width if need_up else 0, bottleneck)),
        down_weight.new_empty((width if need_up else 0,)),
        down_weight.new_empty((width if need_norm else 0,)),
        down_weight.new_empty((width if need_norm else 0,)),
    )


_library.define(
    "adapter_fwd",
    "Tensor x, Tensor down_weight, Tensor? down_bias, Tensor up_weight, Tensor? up_bias, Tensor? residual, "
    "Tensor? norm_weight, Tensor? norm_bias, float scale, float eps, int activation, bool add_input, "
    "bool save",
    "(Tensor, Tensor, Tensor)",
    _forward_fake,
    "mmkernels.ops.adapter.triton",
)
_library.define(
    "adapter_bwd",
    "Tensor grad, Tensor x, Tensor down_weight, Tensor? down_bias, Tensor up_weight, Tensor? norm_weight, "
    "Tensor? norm_bias, Tensor hidden, Tensor stats, float scale, int activation, bool add_input, "
    "bool need_x, bool need_down, bool need_up, bool need_norm",
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward_fake,
    "mmkernels.ops.adapter.triton",
)

_ops = torch.ops.mmkernels
#: backend -> (forward op, backward op)
OPS = {
    "native": (_ops.adapter_fwd.default, _ops.adapter_bwd.default),
    "triton": (_ops.adapter_fwd_triton.default, _ops.adapter_bwd_triton.default),
}
