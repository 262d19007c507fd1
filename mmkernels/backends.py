"""The backends of the ops, and the reason why one cannot serve a tensor."""

from __future__ import annotations

import importlib.util
import os

import torch

from mmkernels import _cuda, _library

#: Values of the argument ``backend`` of every op.
BACKENDS = ("auto", "native", "triton", "reference")


def _triton_installed() -> bool:
    try:
        return importlib.util.find_spec("triton") is not None
    except (ImportError, ValueError):
        return False


# Constants of the process, so that a traced graph needs guards on the device alone.
TRITON_INSTALLED = _triton_installed()
#: Triton kernels run in Triton's interpreter, which takes CPU tensors.
TRITON_INTERPRETED = TRITON_INSTALLED and os.environ.get("TRITON_INTERPRET") == "1"


def why_not(backend: str, device: torch.device | str, dtype: torch.dtype) -> str | None:
    """The reason why ``backend`` cannot serve tensors of this device and dtype, or None if it can.

    ``"cuda"`` is the current device.
    """
    if backend == "reference":
        return None
    device = torch.device(device) if isinstance(device, str) else device
    kind = device.type
    if dtype == torch.float64 and kind != "cpu":
        return "float64 is offered on the CPU only; cast to float32, or use backend='reference'"
    if backend == "native":
        if kind == "cuda":
            return _cuda.why_not(device.index)
        if kind != "cpu":
            return f"there are no compiled kernels for device type {kind!r}"
        return _library.load_errors.get(kind)
    if not TRITON_INSTALLED:
        return "Triton is not installed"
    if kind == "cpu" and not TRITON_INTERPRETED:
        return "Triton kernels need a CUDA tensor (or TRITON_INTERPRET=1 set before Python starts)"
    if kind not in ("cpu", "cuda"):
        return f"there are no Triton kernels for device type {kind!r}"
    return None
