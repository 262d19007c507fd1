"""Shared by the public functions of all ops: choice of backend, checks, messages."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from mmkernels import _library
from mmkernels.activations import ACTIVATIONS
from mmkernels.backends import BACKENDS, automatic, why_not

#: Name of an activation -> the number that stands for it in the torch ops.
ACTIVATION_CODES = {name: code for code, name in enumerate(ACTIVATIONS)}
FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_activation(op: str, activation: str) -> None:
    if activation not in ACTIVATION_CODES:
        raise ValueError(f"{op}: activation must be one of {', '.join(ACTIVATION_CODES)}, got {activation!r}")


def choose_backend(op: str, backend: str, tensor: Tensor) -> str:
    """The backend for ``tensor``: for ``"auto"`` the first that can serve, else the named one or an error."""
    # The most frequent answer first: this runs on every call of every op.
    if tensor.is_cpu and backend in ("auto", "native") and "cpu" not in _library.load_errors:
        return "native"
    if backend == "auto":
        return _choose_automatically(op, tensor)
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    reason = why_not(backend, tensor.device, tensor.dtype)
    if reason is not None:
        raise ValueError(f"{op}: backend={backend!r} cannot be used: {reason}")
    return backend


def _choose_automatically(op: str, tensor: Tensor) -> str:
    device, dtype = tensor.device, tensor.dtype
    if tensor.is_cuda and dtype == torch.float64:
        raise ValueError(f"{op}: got a float64 tensor on CUDA; {why_not('native', device, dtype)}")
    return automatic(op, device, dtype)[0]


def autocasts(tensor: Tensor) -> bool:
    """Whether autocast is on where ``tensor`` is. Some devices, as meta, have none, and torch's question
    raises for them."""
    asked = tensor.is_cpu or tensor.is_cuda or torch.amp.is_autocast_available(tensor.device.type)
    return asked and torch.is_autocast_enabled(tensor.device.type)


def as_autocast(tensor: Tensor) -> Tensor:
    """``tensor`` in the dtype that autocast gives to the operands of a product."""
    if not autocasts(tensor) or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """For statements whose dtypes are chosen already, as those of a reference."""
    return torch.autocast(tensor.device.type, enabled=False) if autocasts(tensor) else nullcontext()


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type of weights, statistics and sums for elements of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def as_ops_take_them(x: Tensor, *parameters: Tensor | None) -> tuple[Tensor | None, ...]:
    """Parameters as they are where all have the dtype of ``x``, as in a model of half precision; else in its
    accumulation type."""
    dtype = x.dtype
    for parameter in parameters:
        if parameter is not None and parameter.dtype != dtype:
            break
    else:
        return parameters
    wide = accumulate_dtype(dtype)
    return tuple([p if p is None or p.dtype == wide else p.to(wide) for p in parameters])


def dtype_served(tensor: Tensor) -> bool:
    """Whether the kernels take tensors of this dtype on this device."""
    return tensor.dtype in FLOATING and (tensor.dtype != torch.float64 or tensor.device.type == "cpu")


def check_tensor(op: str, name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")


def check_floating(op: str, name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{op}: {name} must be float32, float16, bfloat16 or float64, got {tensor.dtype}")


def check_parameter(
    op: str, name: str, tensor: Tensor | None, shapes: Sequence[tuple[int, ...]], device: torch.device
) -> None:
    """A floating tensor on ``device`` with one of ``shapes``; its dtype may differ from the activations'."""
    if tensor is None:
        return
    check_tensor(op, name, tensor)
    check_floating(op, name, tensor)
    if tensor.device != device:
        raise ValueError(f"{op}: {name} is on {tensor.device}, the other tensors are on {device}")
    # Not "in", which torch.compile answers wrongly for sizes that it treats as dynamic.
    if all(tensor.shape != shape for shape in shapes):
        allowed = " or ".join(str(shape) for shape in shapes)
        raise ValueError(f"{op}: {name} must have shape {allowed}, got {tuple(tensor.shape)}")


def needs_gradient(*tensors: Tensor | None) -> bool:
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def saved_tensors(op: str, ctx: Any) -> Sequence[Any]:
    """The tensors saved for the backward pass. Call it once: checkpointing recomputes them for the first
    reading.

    Raises:
        RuntimeError: one was overwritten since the forward pass.
    """
    try:
        return ctx.saved_tensors
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        raise RuntimeError(
            f"{op}: an input was overwritten between the forward and the backward pass, which reads it and "
            f"keeps no copy; give the op a clone, or overwrite it after the backward pass. {error}"
        ) from error
