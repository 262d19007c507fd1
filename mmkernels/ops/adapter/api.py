"""The public function :func:`adapter`: checks, choice of backend, gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mmkernels.activations import ACTIVATIONS
from mmkernels.ops import _common, _derivatives, _inference
from mmkernels.ops.adapter import reference
from mmkernels.ops.adapter.schema import OPS


class _Adapter(torch.autograd.Function):
    """Arguments: the backend, the one asked for, and those of the op, in the order of its schema."""

    @staticmethod
    def forward(ctx: Any, backend: str, asked: str, *arguments: Any) -> Tensor:
        out, hidden, stats = OPS[backend][0](*arguments, True)
        x, down_weight, down_bias, up_weight, _, _, norm_weight, norm_bias, *constants = arguments
        ctx.save_for_backward(x, down_weight, down_bias, up_weight, norm_weight, norm_bias, hidden, stats)
        ctx.options = backend, asked, constants
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = _common.saved_tensors("adapter", ctx)
        needed = ctx.needs_input_grad[2:10]
        need_x, need_down, need_down_bias, need_up, need_up_bias, _, need_gain, need_shift = needed
        wanted = (need_x, need_down or need_down_bias, need_up or need_up_bias, need_gain or need_shift)
        backend, _, (scale, _, activation, add_input) = ctx.options
        own: Sequence[Tensor | None] = (None,) * 7
        if any(wanted) and _derivatives.beyond_kernels(grad):
            own = _reference_gradients(ctx, grad, saved, (*needed[:5], *needed[6:]))
        elif any(wanted):
            own = OPS[backend][1](grad.to(saved[0].dtype), *saved, scale, activation, add_input, *wanted)
        gradients = (*own[:5], grad, *own[5:])
        chosen = (d if need else None for d, need in zip(gradients, needed, strict=True))
        return (None, None, *chosen, *(None, None, None, None))


def _reference_gradients(
    ctx: Any, grad: Tensor, saved: Sequence[Tensor], needed: Sequence[bool]
) -> Sequence[Tensor | None]:
    """The gradients of the tensors but the residual by the reference."""
    x, down, down_shift, up, gain, shift, *_ = saved
    _, asked, (scale, eps, code, add_input) = ctx.options
    # Not saved, because no gradient depends on their values.
    up_shift = up.new_zeros(up.shape[0])
    other = x.new_zeros((), dtype=grad.dtype).expand(x.shape)

    def adapt(x: Tensor, down: Tensor, down_shift: Any, up: Tensor, up_shift: Any, *norm: Any) -> Tensor:
        return reference.adapter(
            x,
            down,
            down_shift,
            up,
            up_shift,
            residual=x if add_input else other,
            scale=scale,
            activation=tuple(ACTIVATIONS)[code],
            norm_weight=norm[0],
            norm_bias=norm[1],
            eps=eps,
        )

    tensors = (x, down, down_shift, up, up_shift, gain, shift)
    return _derivatives.reference_gradients("adapter", asked, adapt, tensors, needed, grad)


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
        down_weight: ``(d, D)``, as in ``torch.nn.Linear``. Parameters may have any floating dtype, and the
            products run in the dtype of ``x``. The kernels read parameters in float32 (float64 for float64),
            or all in the dtype of ``x``; any others are cast to float32 before.
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
    the value before the activation (rows x d), and 8 bytes of statistics per row with LayerNorm. ``x`` is
    kept, not copied: overwriting it before the backward pass is an error there. The gradients of float32
    parameters beside ``x`` in half precision are float32 sums of products in half precision, as under
    autocast; ``x.float()`` makes them exact. Those of parameters in half precision are such sums, rounded
    once; where a product of the BLAS is a gradient, as that of ``up_weight``, its rounding is that of
    ``torch.nn.Linear``. On CUDA the compiled kernels sum these over tiles of rows that
    follow the GPU's multiprocessors and shared memory: between GPUs of different size, the gradients of
    ``down_bias``, ``up_bias``, ``norm_bias`` and, with ``norm_bias``, ``down_weight`` may differ by the
    rounding of float32 sums. Nothing else does, and one GPU repeats all bits. Forward mode, ``torch.func``
    and gradients of gradients are the reference's: ``"auto"`` takes it by itself, a kernel asked for by name
    raises.

    Raises:
        TypeError: A value of the wrong type or dtype.
        ValueError: Shapes or devices that do not match, an unknown activation, or a backend that cannot
            serve.
        RuntimeError: In the backward pass: an input was overwritten since the forward pass.

    Source: Houlsby et al., Parameter-Efficient Transfer Learning for NLP (arXiv 1902.00751, section 2.1);
    the adapters of AAT (arXiv 2401.10544) and of HFF (arXiv 2211.02712).
    """
    _check(x, down_weight, down_bias, up_weight, up_bias, norm_weight, norm_bias)
    _common.check_activation("adapter", activation)
    if isinstance(scale, Tensor) and scale.requires_grad:
        raise TypeError(
            "adapter: scale must be a number, got a tensor that requires a gradient; multiply the result"
        )
    source = x
    x = _common.as_autocast(x)
    if residual is not None:
        _check_residual(residual, x)
    asked = backend
    if forward_ad._current_level >= 0 or _derivatives.transforms_active():
        given = (x, down_weight, down_bias, up_weight, up_bias, residual, norm_weight, norm_bias)
        backend = _derivatives.backend_in_transforms("adapter", backend, given)
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
    *first, gain, shift = _common.as_ops_take_them(
        rows, down_weight, down_bias, up_weight, up_bias, norm_weight, norm_bias
    )
    tensors = (rows, *first, others, gain, shift)
    constants = (float(scale), eps, _common.ACTIVATION_CODES[activation], add_input)
    if _common.needs_gradient(*tensors):
        out = _inference.apply(_Adapter, rows, backend, asked, *tensors, *constants)
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
