"""The public function :func:`layer_project`: checks, choice of backend, gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mmkernels.activations import ACTIVATIONS
from mmkernels.ops import _common, _derivatives, _inference
from mmkernels.ops.layer_project import reference
from mmkernels.ops.layer_project.schema import OPS, OUTPUT_SUFFICES


class _LayerProject(torch.autograd.Function):
    """Arguments: the backend, the one asked for, and those of the op, in the order of its schema."""

    @staticmethod
    def forward(ctx: Any, backend: str, asked: str, *arguments: Any) -> Tensor:
        y, preactivation, stats = OPS[backend][0](*arguments, True)
        *tensors, eps, activation = arguments
        value = y if activation in OUTPUT_SUFFICES else preactivation
        ctx.save_for_backward(*tensors, value, stats)
        ctx.options = backend, asked, eps, activation
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = _common.saved_tensors("layer_project", ctx)
        needed = ctx.needs_input_grad[2:7]
        if _derivatives.beyond_kernels(grad):
            gradients = _reference_gradients(ctx, grad, saved[:5], needed)
        else:
            backend, _, _, activation = ctx.options
            need_x, need_weight, _, need_gain, need_shift = needed
            gradients = OPS[backend][1](
                grad, *saved, activation, need_x, need_weight, need_gain or need_shift
            )
        chosen = (d if need else None for d, need in zip(gradients, needed, strict=True))
        return (None, None, *chosen, None, None)


def _reference_gradients(
    ctx: Any, grad: Tensor, tensors: Sequence[Tensor | None], needed: Sequence[bool]
) -> Sequence[Tensor | None]:
    """The gradients of the five ``tensors`` by the reference."""
    _, asked, eps, code = ctx.options
    activation = tuple(ACTIVATIONS)[code]

    def project(x: Tensor, weight: Tensor, bias: Any, gain: Any, shift: Any) -> Tensor:
        return reference.layer_project(
            x, weight, bias, norm_weight=gain, norm_bias=shift, eps=eps, activation=activation
        )

    return _derivatives.reference_gradients("layer_project", asked, project, tensors, needed, grad)


def layer_project(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    activation: str = "relu",
    backend: str = "auto",
) -> Tensor:
    """One projection per tap: ``y[n, l] = act(LN_l(x[n, l]) @ weight[l]^T + bias[l])``.

    One batched product over the taps. The LayerNorm is folded into the weights before it, so that no
    normalised copy of ``x`` is made; bias and activation are applied to its result. The result is contiguous:
    ``y.view(N, L // 2, 2 * C_out)`` is the concatenation of neighbouring taps that HFF builds its tree from.

    Equivalent to (``F`` is ``torch.nn.functional``)::

        h = x if norm_weight is None else F.layer_norm(x, x.shape[-1:], eps=eps) * norm_weight + norm_bias
        z = torch.einsum("nlc,loc->nlo", h, weight) + bias
        out = ACTIVATIONS[activation](z)  # of mmkernels.activations

    Args:
        x: ``(N, L, C)``: N frames of L taps. float32, float16, bfloat16; on the CPU float64 too. Any strides;
            copied once where the last dimension is not dense.
        weight: ``(L, C_out, C)``, one matrix for each tap, laid out as in ``torch.nn.Linear``. Parameters may
            have any floating dtype, and the product runs in the dtype of ``x``. The kernels read parameters
            in float32 (float64 for float64), or all in the dtype of ``x``; any others are cast to float32
            before.
        bias: ``(L, C_out)``.
        norm_weight: ``(L, C)``: gain of a LayerNorm over C before the product. Without it there is no
            LayerNorm.
        norm_bias: ``(L, C)``: its shift. Needs ``norm_weight``.
        eps: Added to the variance.
        activation: ``"relu"``, ``"gelu"`` (exact), ``"gelu_tanh"``, ``"silu"`` or ``"none"``.
        backend: ``"auto"``, ``"native"`` (compiled), ``"triton"`` or ``"reference"``.

    Returns:
        A dense tensor ``(N, L, C_out)`` of ``x``'s dtype; under autocast, of the autocast dtype, which ``x``
        is cast to as for ``torch.nn.functional.linear``.

    Gradients flow to every tensor that requires them; where ``x`` does not (frozen taps), no product for it
    is computed, also with a trainable LayerNorm. Saved for backward: ``x``, the result (the value before the
    activation for gelu and silu), and 8 bytes of statistics per frame and tap. ``x`` is kept, not copied:
    overwriting it before the backward pass is an error there. The gradients of float32 parameters beside
    ``x`` in half precision are float32 sums of products in half precision, as under autocast; ``x.float()``
    makes them exact. Those of parameters in half precision are such sums, rounded once; without a LayerNorm
    that of ``weight`` is a product of the BLAS, whose rounding is that of ``torch.nn.Linear``. Forward mode,
    ``torch.func`` and gradients of gradients are the reference's: ``"auto"`` takes it by itself, a kernel
    asked for by name raises.

    Raises:
        TypeError: A value of the wrong type or dtype.
        ValueError: Shapes or devices that do not match, an unknown activation, or a backend that cannot
            serve.
        RuntimeError: In the backward pass: an input was overwritten since the forward pass.

    Source: the feature projectors of HFF (arXiv 2211.02712, section 3.2).
    """
    _check(x, weight, bias, norm_weight, norm_bias)
    _common.check_activation("layer_project", activation)
    x = _common.as_autocast(x)
    asked = backend
    if forward_ad._current_level >= 0 or _derivatives.transforms_active():
        tensors = (x, weight, bias, norm_weight, norm_bias)
        backend = _derivatives.backend_in_transforms("layer_project", backend, tensors)
    backend = _common.choose_backend("layer_project", backend, x)
    if backend == "reference":
        return reference.layer_project(
            x, weight, bias, norm_weight=norm_weight, norm_bias=norm_bias, eps=eps, activation=activation
        )

    arguments = (x, *_common.as_ops_take_them(x, weight, bias, norm_weight, norm_bias))
    constants = (eps, _common.ACTIVATION_CODES[activation])
    if _common.needs_gradient(*arguments):
        return _inference.apply(_LayerProject, x, backend, asked, *arguments, *constants)
    y, _, _ = OPS[backend][0](*arguments, *constants, False)
    return y


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None
) -> None:
    op = "layer_project"
    _common.check_tensor(op, "x", x)
    _common.check_floating(op, "x", x)
    if x.dim() != 3:
        raise ValueError(f"{op}: x must have shape (N, L, C), got {tuple(x.shape)}")
    _common.check_tensor(op, "weight", weight)
    _, taps, inputs = x.shape
    outputs = weight.shape[1] if weight.dim() == 3 else 0
    if weight.dim() != 3 or weight.shape[0] != taps or weight.shape[2] != inputs:
        raise ValueError(
            f"{op}: weight must have shape (L, C_out, C) = ({taps}, C_out, {inputs}) "
            f"for x of shape {tuple(x.shape)}, "
            f"got {tuple(weight.shape)}"
        )
    _common.check_parameter(op, "weight", weight, [(taps, outputs, inputs)], x.device)
    _common.check_parameter(op, "bias", bias, [(taps, outputs)], x.device)
    _common.check_parameter(op, "norm_weight", norm_weight, [(taps, inputs)], x.device)
    _common.check_parameter(op, "norm_bias", norm_bias, [(taps, inputs)], x.device)
    if norm_bias is not None and norm_weight is None:
        raise ValueError(f"{op}: norm_bias needs norm_weight")
