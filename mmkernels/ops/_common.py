"""What every op's ``api.py`` shares: choice of backend, checks, messages."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from mmkernels import _library

BACKENDS = ("auto", "native", "triton", "reference")
#: Index of a name = value of ``mmk::Activation`` in csrc/include/mmkernels/activation.h.
ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu")
#: What each of them is, for the definitions of the ops.
ACTIVATE: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda z: z,
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda z: functional.gelu(z, approximate="tanh"),
    "silu": functional.silu,
}
FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def _triton_installed() -> bool:
    try:
        return importlib.util.find_spec("triton") is not None
    except (ImportError, ValueError):
        return False


# Constants of the process, so that a traced graph need not guard on anything but the device.
TRITON_INSTALLED = _triton_installed()
#: Triton kernels run in Triton's interpreter, which takes CPU tensors.
TRITON_INTERPRETED = TRITON_INSTALLED and os.environ.get("TRITON_INTERPRET") == "1"


def why_not(backend: str, device: str, dtype: torch.dtype) -> str | None:
    """The reason why ``backend`` cannot serve tensors of this device type and dtype, or None if it can."""
    if backend == "reference":
        return None
    if dtype == torch.float64 and device != "cpu":
        return "float64 is offered on the CPU only; cast to float32, or use backend='reference'"
    if backend == "native":
        if device not in ("cpu", "cuda"):
            return f"there are no compiled kernels for device type {device!r}"
        return _library.load_errors.get(device)
    if not TRITON_INSTALLED:
        return "Triton is not installed"
    if device == "cpu" and not TRITON_INTERPRETED:
        return "Triton kernels need a CUDA tensor (or TRITON_INTERPRET=1 set before Python starts)"
    if device not in ("cpu", "cuda"):
        return f"there are no Triton kernels for device type {device!r}"
    return None


def choose_backend(op: str, backend: str, tensor: Tensor) -> str:
    """The backend that serves ``tensor``: the one asked for by name or an error, or the first that can for
    ``"auto"``."""
    # The usual answer first: this runs on every call of every op.
    if tensor.is_cpu and backend in ("auto", "native") and "cpu" not in _library.load_errors:
        return "native"
    if backend == "auto":
        return _choose_automatically(op, tensor)
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    reason = why_not(backend, tensor.device.type, tensor.dtype)
    if reason is not None:
        raise ValueError(f"{op}: backend={backend!r} cannot be used: {reason}")
    return backend


def _choose_automatically(op: str, tensor: Tensor) -> str:
    device, dtype = tensor.device.type, tensor.dtype
    if device == "cuda" and dtype == torch.float64:
        raise ValueError(f"{op}: got a float64 tensor on CUDA; {why_not('native', device, dtype)}")
    for name in ("native", "triton"):
        if why_not(name, device, dtype) is None:
            return name
    return "reference"


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type of weights, statistics and sums that go with elements of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


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
    if tensor.shape not in shapes:
        allowed = " or ".join(str(shape) for shape in shapes)
        raise ValueError(f"{op}: {name} must have shape {allowed}, got {tuple(tensor.shape)}")


def needs_gradient(*tensors: Tensor | None) -> bool:
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False
