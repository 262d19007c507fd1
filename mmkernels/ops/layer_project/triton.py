"""The functions behind the ``_triton`` ops of :func:`mmkernels.layer_project`; the kernels are those of
``ops/_norm_product.py``."""

from __future__ import annotations

from torch import Tensor

from mmkernels.ops import _norm_product
from mmkernels.ops._norm_product import Inputs
from mmkernels.ops._triton import batched_product, expect, on_device, row_stats
from mmkernels.ops.layer_project.schema import OUTPUT_SUFFICES


def layer_project_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    activation: int,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``mmkernels::layer_project_fwd_triton``."""
    args = Inputs.checked(x, weight, bias, norm_weight, norm_bias)
    rows, taps, inputs = x.shape
    outputs = weight.shape[1]
    save_value = save and activation not in OUTPUT_SUFFICES
    y = x.new_empty((rows, taps, outputs))
    preactivation = x.new_empty((rows if save_value else 0, taps, outputs))
    stats = args.new_sums(0 if norm_weight is None else rows, taps, 2)
    returned = stats if save else stats.new_empty((0, taps, 2))
    if y.numel() == 0 or inputs == 0:
        returned.zero_()
    if y.numel() == 0:
        return y, preactivation, returned

    with on_device(x):
        if args.norm:
            row_stats(args.x, None, stats.view(rows * taps, 2), eps)
        _norm_product.write_output(args, stats, activation, y, preactivation if save_value else None)
    return y, preactivation, returned


def layer_project_bwd(
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
    """``mmkernels::layer_project_bwd_triton``."""
    args = Inputs.checked(x, weight, bias, norm_weight, norm_bias)
    rows, taps, inputs = x.shape
    outputs = weight.shape[1]
    grad = expect("grad", grad, (rows, taps, outputs), x.dtype, x.device)
    value = expect("value", value, (rows, taps, outputs), x.dtype, x.device)
    if norm_weight is not None:
        stats = expect("stats", stats, (rows, taps, 2), args.accumulate, x.device)
    # The gain's gradient comes out of the product's, so the product is needed for either.
    need_product = need_weight or (need_norm and norm_weight is not None)
    new = args.weight.new_empty
    dx = x.new_empty((rows if need_x else 0, taps, inputs))
    d_weight = new((taps if need_product else 0, outputs, inputs))
    d_norm_weight = new((taps if need_norm else 0, inputs))
    d_norm_bias = new((taps if need_norm else 0, inputs))
    if grad.numel() == 0:
        d_bias = new((taps, outputs))
        return dx.zero_(), d_weight.zero_(), d_bias.zero_(), d_norm_weight.zero_(), d_norm_bias.zero_()

    need_x, need_product = dx.numel() > 0, d_weight.numel() > 0
    scaled_grad = x.new_empty(grad.shape)
    pull = args.new_sums(rows, taps) if need_x and args.norm else None
    with on_device(x):
        folded_weight, folded_bias, _ = args.fold() if need_x else (None, None, None)
        wanted = scaled_grad if need_x or need_product else None
        d_bias = _norm_product.write_scaled_gradient(
            args, grad, value, stats, folded_bias, activation, wanted, pull
        )
        if need_x:
            _norm_product.write_input_gradient(args, scaled_grad, folded_weight, stats, pull, dx)
        if need_product:
            # dVc, from which a mean is taken, is not rounded before.
            dtype = args.accumulate if args.norm else d_weight.dtype
            product = batched_product(scaled_grad.permute(1, 2, 0), args.x.transpose(0, 1), dtype)
            if args.norm:
                _norm_product.unfold(args, product, d_bias, d_weight, d_norm_weight, d_norm_bias)
            else:
                d_weight = product
    return dx, d_weight, d_bias.to(weight.dtype), d_norm_weight, d_norm_bias
