"""The public function :func:`layer_mix`: checks, choice of backend, gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mmkernels.ops import _common, _derivatives, _inference, _lengths
from mmkernels.ops.layer_mix import reference
from mmkernels.ops.layer_mix.schema import MAX_LAYERS, OPS


class _LayerMix(torch.autograd.Function):
    """Arguments: the backend, and the one asked for; then those of the op in the order of its schema, but the
    layers, whose number varies, last."""

    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        asked: str,
        weights: Tensor,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        lengths: Tensor | None,
        norm: bool,
        eps: float,
        *layers: Tensor,
    ) -> Tensor:
        parameters = (weights, norm_weight, norm_bias, lengths)
        out, stats = OPS[backend][0](list(layers), *parameters, norm, eps, True)
        ctx.save_for_backward(*parameters, stats, *layers)
        ctx.options = backend, asked, norm, eps
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weights, norm_weight, norm_bias, lengths, stats, *layers = _common.saved_tensors("layer_mix", ctx)
        _, _, need_weights, need_gain, need_shift, _, _, _, *need_layers = ctx.needs_input_grad
        if _derivatives.beyond_kernels(grad):
            return _reference_gradients(ctx, grad, weights, norm_weight, norm_bias, lengths, layers)
        backend, _, norm, _ = ctx.options
        wanted = [index for index, needed in enumerate(need_layers) if needed]
        d_weights, d_gain, d_shift, d_layers = OPS[backend][1](
            grad,
            layers,
            weights,
            norm_weight,
            norm_bias,
            lengths,
            stats,
            norm,
            need_weights,
            need_gain or need_shift,
            wanted,
        )
        by_layer: dict[int, Tensor] = dict(zip(wanted, d_layers, strict=True))
        return (
            *(None, None),
            d_weights if need_weights else None,
            d_gain if need_gain else None,
            d_shift if need_shift else None,
            *(None, None, None),
            *(by_layer.get(index) for index in range(len(layers))),
        )


def _reference_gradients(
    ctx: Any,
    grad: Tensor,
    weights: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    lengths: Tensor | None,
    layers: Sequence[Tensor],
) -> tuple[Tensor | None, ...]:
    """What ``_LayerMix.backward`` returns, computed by the reference."""
    _, asked, norm, eps = ctx.options

    def mix(weights: Tensor, gain: Tensor | None, shift: Tensor | None, *layers: Tensor) -> Tensor:
        return reference.layer_mix(
            layers, weights, norm=norm, eps=eps, norm_weight=gain, norm_bias=shift, lengths=lengths
        )

    needed = (*ctx.needs_input_grad[2:5], *ctx.needs_input_grad[8:])
    gradients = _derivatives.reference_gradients(
        "layer_mix", asked, mix, (weights, norm_weight, norm_bias, *layers), needed, grad
    )
    return (*(None, None), *gradients[:3], *(None, None, None), *gradients[3:])


def layer_mix(
    layers: Sequence[Tensor] | Tensor,
    weights: Tensor,
    *,
    norm: bool = False,
    eps: float = 1e-5,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    lengths: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Weighted sum of layers, each normalised first if asked: ``sum_l weights[l] * N_l(layers[l])``.

    The L layers are read in place and never stacked; with ``norm`` one read of a row gives its statistics and
    its part of the sum. The extra memory is the output; ``norm`` with gradients adds 8 bytes of statistics
    per row and layer.

    Equivalent to (``F`` is ``torch.nn.functional``; norm_weight and norm_bias of shape ``(D,)`` here)::

        h = torch.stack(layers)  # (L, ..., D)
        h = F.layer_norm(h, h.shape[-1:], norm_weight, norm_bias, eps) if norm else h
        out = torch.tensordot(weights, h, dims=1)

    Args:
        layers: 1 to 64 tensors of one shape ``(..., D)``, dtype (float32, float16, bfloat16; on the CPU
            float64 too) and device, or one tensor whose first dimension counts layers. Any strides: a layer
            whose last dimension is not dense, or whose leading dimensions cannot be viewed as one, is copied
            once.
        weights: ``(L,)``, used as given (apply a softmax before, if you want one). Any floating dtype; the
            sum is in float32 (float64 for float64), so float32 weights with bfloat16 layers, as autocast
            produces them, lose no digits.
        norm: LayerNorm over D of every layer, with statistics in float32 (float64).
        eps: Added to the variance.
        norm_weight: ``(L, D)``, or ``(D,)`` for all layers: gain of the LayerNorm. Needs ``norm=True``.
        norm_bias: Its shift, of the same shapes.
        lengths: Integer tensor of shape ``layers[0].shape[:-2]``: valid frames of each ``(T, D)`` slice.
            Later frames are not read, get no gradient, and are zero in the result. Values outside ``[0, T]``
            are an error on the CPU; on CUDA, where reading them would wait for the device, under
            ``torch.compile`` and in ``torch.func``, they are clamped.
        backend: ``"auto"``, ``"native"`` (compiled), ``"triton"`` or ``"reference"``.

    Returns:
        A dense tensor ``(..., D)`` of the layers' dtype.

    Gradients flow to ``weights``, ``norm_weight``, ``norm_bias`` and those ``layers`` that require them, in
    one pass over the layers; for frozen layers only the small ones are computed. Sums over frames have a
    fixed order. The gradients of float32 parameters are float32 sums, exact for the incoming gradient, which
    has the layers' dtype. Layers are kept for the backward pass, not copied: overwriting one in between is
    an error there. Forward mode, ``torch.func`` and gradients of gradients are the reference's: ``"auto"``
    takes it by itself, a kernel asked for by name raises.

    Raises:
        TypeError: A value of the wrong type or dtype.
        ValueError: Shapes, devices or dtypes that do not match, or a backend that cannot serve.
        RuntimeError: In the backward pass: an input was overwritten since the forward pass.

    Source: Eq. 1 of Yang et al., SUPERB (arXiv 2105.01051), and the linear fusion of frozen layers that HFF
    (arXiv 2211.02712) is compared with.
    """
    if isinstance(layers, Tensor):
        if layers.dim() < 2:
            raise ValueError(f"layer_mix: layers must be (L, ..., D), got shape {tuple(layers.shape)}")
        layers = layers.unbind(0)
    first = _check_first(layers)
    shape = first.shape
    asked = backend
    if forward_ad._current_level >= 0 or _derivatives.transforms_active():
        tensors = (weights, norm_weight, norm_bias, lengths, *layers)
        backend = _derivatives.backend_in_transforms("layer_mix", backend, tensors)
    backend = _common.choose_backend("layer_mix", backend, first)
    # The checks of 13 layers take a quarter of a small call's time. The compiled op compares the tensors too,
    # so in the usual call on the CPU they run only for their message, after the op has refused.
    op_checks = (
        backend == "native"
        and first.is_cpu
        and len(shape) == 3
        and norm_weight is None
        and norm_bias is None
        and getattr(weights, "dtype", None) == first.dtype
        and not torch.compiler.is_compiling()
    )
    if not op_checks:
        _check_tensors(layers, weights, norm, norm_weight, norm_bias)
    if lengths is not None:
        lengths = _check_lengths(lengths, first)
    if backend == "reference":
        return reference.layer_mix(
            layers, weights, norm=norm, eps=eps, norm_weight=norm_weight, norm_bias=norm_bias, lengths=lengths
        )

    accumulate = _common.accumulate_dtype(first.dtype)
    if weights.dtype != accumulate:
        weights = weights.to(accumulate)
    if norm_weight is not None:
        norm_weight = _per_layer(norm_weight, len(layers), accumulate)
    if norm_bias is not None:
        norm_bias = _per_layer(norm_bias, len(layers), accumulate)
    if len(shape) != 3:
        as_batch = (shape[:-2].numel(), shape[-2] if len(shape) > 1 else 1, shape[-1])
        layers = [layer.reshape(as_batch) for layer in layers]
    if lengths is not None:
        lengths = lengths.reshape(-1)
    try:
        if _common.needs_gradient(weights, norm_weight, norm_bias, *layers):
            out = _inference.apply(
                _LayerMix, first, backend, asked, weights, norm_weight, norm_bias, lengths, norm, eps, *layers
            )
        else:
            out, _ = OPS[backend][0](layers, weights, norm_weight, norm_bias, lengths, norm, eps, False)
    except (RuntimeError, AttributeError):
        if op_checks:
            _check_tensors(layers, weights, norm, norm_weight, norm_bias)
        raise
    return out if len(shape) == 3 else out.reshape(shape)


def _check_first(layers: Sequence[Tensor]) -> Tensor:
    if not isinstance(layers, (list, tuple)):
        raise TypeError(f"layer_mix: layers must be a list or tuple of tensors, got {type(layers).__name__}")
    if not 1 <= len(layers) <= MAX_LAYERS:
        raise ValueError(f"layer_mix: layers must hold 1 to {MAX_LAYERS} tensors, got {len(layers)}")
    first = layers[0]
    _common.check_tensor("layer_mix", "layers[0]", first)
    _common.check_floating("layer_mix", "layers[0]", first)
    if first.dim() < 1:
        raise ValueError("layer_mix: layers must have at least one dimension, got scalars")
    return first


def _check_tensors(
    layers: Sequence[Tensor],
    weights: Tensor,
    norm: bool,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
) -> None:
    op, count, first = "layer_mix", len(layers), layers[0]
    shape, dtype, device = first.shape, first.dtype, first.device
    for index, layer in enumerate(layers):
        _common.check_tensor(op, f"layers[{index}]", layer)
        if layer.shape != shape or layer.dtype != dtype or layer.device != device:
            raise ValueError(
                f"{op}: layers must share one shape, dtype and device; "
                f"layers[0] is {tuple(shape)} {dtype} on {device}, "
                f"layers[{index}] is {tuple(layer.shape)} {layer.dtype} on {layer.device}"
            )
    _common.check_parameter(op, "weights", weights, [(count,)], device)
    if norm_weight is None and norm_bias is None:
        return
    if not norm:
        raise ValueError(f"{op}: norm_weight and norm_bias need norm=True")
    shapes = [(count, shape[-1]), (shape[-1],)]
    _common.check_parameter(op, "norm_weight", norm_weight, shapes, device)
    _common.check_parameter(op, "norm_bias", norm_bias, shapes, device)


def _check_lengths(lengths: Tensor, first: Tensor) -> Tensor:
    _common.check_tensor("layer_mix", "lengths", lengths)
    if lengths.dtype not in _lengths.INTEGERS:
        raise TypeError(f"layer_mix: lengths must be an integer tensor, got {lengths.dtype}")
    if first.dim() < 2 or lengths.shape != first.shape[:-2]:
        raise ValueError(
            f"layer_mix: lengths must have shape {tuple(first.shape[:-2])}, "
            "one entry for each (T, D) slice of the layers, "
            f"got {tuple(lengths.shape)}"
        )
    if lengths.device != first.device:
        raise ValueError(f"layer_mix: lengths is on {lengths.device}, the layers are on {first.device}")
    frames = first.shape[-2]
    # Reading values back is free on the CPU only; while tracing and under vmap there is no number to read.
    readable = not torch.compiler.is_compiling() and not _derivatives.transforms_active()
    if first.device.type == "cpu" and readable and lengths.numel() > 0:
        low, high = (int(v) for v in torch.aminmax(lengths))
        if low < 0 or high > frames:
            raise ValueError(f"layer_mix: lengths must lie in [0, {frames}], got values from {low} to {high}")
    return lengths.to(torch.int64)


def _per_layer(parameter: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    if parameter.dim() == 1:
        parameter = parameter.expand(count, -1)
    return parameter.to(dtype)
