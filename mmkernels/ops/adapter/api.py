"""The public function :func:`adapter`: checks, choice of backend, gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mmkernels.ops import _common
from mmkernels.ops.adapter import reference
from mmkernels.ops.adapter.schema import OPS


class _Adapter(torch.autograd.Function):
    """Arguments: the backend, then those of the op, in the order of its schema."""

    @staticmethod
    def forward(ctx: Any, backend: str, *arguments: Any) -> Tensor:
        out, hidden, stats = OPS[backend][0](*arguments, True)
        x, down_weight, down_bias, up_weight, _, _, norm_weight, norm_bias, *constants = arguments
        ctx.save_for_backward(x, down_weight, down_bias, up_weight, norm_weight, norm_bias, hidden, stats)
        scale, _, activation, add_input = constants
        ctx.backend, ctx.constants = backend, (scale, activation, add_input)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # Read once: checkpointing recomputes the tensors for the first access only.
        saved = ctx.saved_tensors
        needed = ctx.needs_input_grad[1:9]
        need_x, need_down, need_down_bias, need_up, need_up_bias, _, need_gain, need_shift = needed
        wanted = (need_x, need_down or need_down_bias, need_up or need_up_bias, need_gain or need_shift)
        own: tuple[Tensor | None, ...] = (None,) * 7
        if any(wanted):
            own = OPS[ctx.backend][1](grad.to(saved[0].dtype), *saved, *ctx.constants, *wanted)
        gradients = (*own[:5], grad, *own[5:])
        chosen = (d if need else None for d, need in zip(gradients, needed, strict=True))
        return (None, *chosen, *(None, None, None, None))


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
    backend: str = "auto",
) -> Tensor:
    """A bottleneck adapter: ``residual + scale * (act(LN(x) @ down^T + down_bias) @ up^T + up_bias)``.

    One pass over ``x`` computes both products, the activation and the residual: the hidden activation stays
    on the chip, and LayerNorm is folded into the down-projection, so that no normalised copy of ``x`` is
    made.

    Equivalent to (``F`` is ``torch.nn.functional``)::

        h = x if norm_weight is None else F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)
        h = ACTIVATIONS[activation](F.linear(h, down_weight, down_bias))  # of mmkernels.activations
        out = residual + scale * F.linear(h, up_weight, up_bias)  # without a residual: the second term

    Args:
        x: ``(..., D)``. float32, float16, bfloat16; on the CPU float64 too. Any strides; copied once where
            the last dimension is not dense or the leading ones cannot be viewed as one.
        down_weight: ``(d, D)``, as in ``torch.nn.Linear``. Parameters may have any floating dtype: they are
            read in float32 (float64 for float64), and the products run in the dtype of ``x``.
        down_bias: ``(d,)`` or None.
        up_weight: ``(D, d)``.
        up_bias: ``(D,)`` or None.
        residual: A tensor of the shape of ``x`` that is added to the result, or None. ``x`` itself is read
            once only. Its dtype is that of ``x``, or float32 with ``x`` in half precision, as autocast
            produces it; the result is float32 then.
        scale: Constant factor of the adapter's output.
        activation: ``"relu"``, ``"gelu"``, ``"gelu_tanh"``, ``"silu"`` or ``"none"``.
        norm_weight: ``(D,)``: gain of a LayerNorm over D before the down-projection. None: no LayerNorm.
        norm_bias: ``(D,)``: its shift; needs ``norm_weight``.
        eps: Added to the variance.
        backend: ``"auto"``, ``"native"`` (compiled), ``"triton"`` or ``"reference"``.

    Returns:
        A dense tensor of the shape of ``x`` and the dtype of ``residual`` (of ``x`` without one). Under
        autocast ``x`` is cast to the autocast dtype, as for ``torch.nn.functional.linear``; ``residual`` is
        not.

    Gradients flow to every tensor that requires them, and only those are computed. Saved for backward: ``x``,
    the value before the activation (rows x d), and 8 bytes of statistics per row with LayerNorm. Gradients of
    gradients need ``backend="reference"``.

    Raises:
        TypeError: A value of the wrong type or dtype.
        ValueError: Shapes or devices that do not match, an unknown activation, or a backend that cannot
            serve.

    Source: Houlsby et al., Parameter-Efficient Transfer Learning for NLP (arXiv 1902.00751, section 2.1);
    the adapters of AAT (arXiv 2401.10544) and of HFF (arXiv 2211.02712).
    """
    _check(x, down_weight, down_bias, up_weight, up_bias, norm_weight, norm_bias)
    _common.check_activation("adapter", activation)
    device = x.device.type
    source = x
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(device))
    if residual is not None:
        _check_residual(residual, x)
    backend = _common.choose_backend("adapter", backend, x)
    if backend == "reference":
        return reference.adapter(
            x,
            down_weight,
            down_bias,
            up_weight,
            up_bias,
            residual=residual,
            scale=scale,
            activation=activation,
            norm_weight=norm_weight,
            norm_bias=norm_bias,
            eps=eps,
        )

    add_input = residual is source and x is source
    rows = x.reshape(-1, x.shape[-1]) if x.numel() else x.reshape(x.shape[:-1].numel(), x.shape[-1])
    others = None if residual is None or add_input else residual.reshape(rows.shape)
    dtype = _common.accumulate_dtype(x.dtype)
    down, down_shift, up, up_shift, gain, shift = (
        p if p is None or p.dtype == dtype else p.to(dtype)
        for p in (down_weight, down_bias, up_weight, up_bias, norm_weight, norm_bias)
    )
    tensors = (rows, down, down_shift, up, up_shift, others, gain, shift)
    constants = (float(scale), eps, _common.ACTIVATION_CODES[activation], add_input)
    if _common.needs_gradient(*tensors):
        out = _Adapter.apply(backend, *tensors, *constants)
    else:
        out, _, _ = OPS[backend][0](*tensors, *constants, False)
    return out.reshape(x.shape)


def _check(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
) -> None:
    op = "adapter"
    _common.check_tensor(op, "x", x)
    _common.check_floating(op, "x", x)
    if x.dim() < 1:
        raise ValueError(f"{op}: x must have shape (..., D), got a scalar")
    _common.check_tensor(op, "down_weight", down_weight)
    width = x.shape[-1]
    if down_weight.dim() != 2 or down_weight.shape[1] != width:
        raise ValueError(
            f"{op}: down_weight must have shape (d, D) = (d, {width}) for x of shape {tuple(x.shape)}, "
            f"got {tuple(down_weight.shape)}"
        )
    bottleneck = down_weight.shape[0]
    for name, parameter, shape in (
        ("down_weight", down_weight, (bottleneck, width)),
        ("down_bias", down_bias, (bottleneck,)),
        ("up_weight", up_weight, (width, bottleneck)),
        ("up_bias", up_bias, (width,)),
        ("norm_weight", norm_weight, (width,)),
        ("norm_bias", norm_bias, (width,)),
    ):
        if parameter is None and name == "up_weight":
            raise TypeError(f"{op}: up_weight must be a tensor, got None")
        _common.check_parameter(op, name, parameter, [shape], x.device)
    if norm_bias is not None and norm_weight is None:
        raise ValueError(f"{op}: norm_bias needs norm_weight")


def _check_residual(residual: Tensor, x: Tensor) -> None:
    op = "adapter"
    _common.check_tensor(op, "residual", residual)
    if residual.shape != x.shape:
        raise ValueError(
            f"{op}: residual must have the shape of x, {tuple(x.shape)}, got {tuple(residual.shape)}"
        )
    if residual.device != x.device:
        raise ValueError(f"{op}: residual is on {residual.device}, x is on {x.device}")
    if residual.dtype not in (x.dtype, _common.accumulate_dtype(x.dtype)):
        raise TypeError(
            f"{op}: residual must be {x.dtype} like x, or {_common.accumulate_dtype(x.dtype)}, "
            f"got {residual.dtype}"
        )
