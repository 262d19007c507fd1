"""The backends of the ops, and the reason why one cannot serve a tensor."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass

import torch

from mmkernels import _cuda, _library

#: Values of the argument ``backend`` of every op.
BACKENDS = ("auto", "native", "triton", "reference")

HALF_PRECISION = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Preference:
    """A GPU and dtypes for which ``"auto"`` takes another backend than the first that can serve.

    Attributes:
        capability: of the GPU, 90 for 9.0.
        reason: the prediction or the measurement behind it.
    """

    op: str
    dtypes: tuple[torch.dtype, ...]
    capability: int
    backend: str
    reason: str


#: Elsewhere ``"auto"`` takes the first of native, Triton and reference that can serve.
PREFERENCES = (
    Preference(
        "layer_project",
        HALF_PRECISION,
        90,
        "triton",
        "its product (wgmma) reads shared memory once for four warps; reads for each warp bound the compiled "
        "one (mma.sync): predicted 0.32 of 0.42 ms for 12,000 rows of 12 taps, 1,024 -> 512",
    ),
)


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


def automatic(op: str, device: torch.device | str, dtype: torch.dtype) -> tuple[str, str | None]:
    """The backend that ``"auto"`` takes for an op, and the reason if it is not the first that can serve."""
    device = torch.device(device) if isinstance(device, str) else device
    if device.type == "cuda":
        for each in PREFERENCES:
            if (
                each.op == op
                and dtype in each.dtypes
                and each.capability == _cuda.capability(device.index)
                and why_not(each.backend, device, dtype) is None
            ):
                return each.backend, each.reason
    for name in ("native", "triton"):
        if why_not(name, device, dtype) is None:
            return name, None
    return "reference", None
