"""Whether the compiled CUDA kernels run on a GPU; CUDA is asked once for each device."""

from __future__ import annotations

import ctypes

import torch

from mmkernels import _library

#: Index of a device -> why the compiled kernels do not run there, None if they do.
_reasons: dict[int, str | None] = {}
_capabilities: dict[int, int] = {}


def why_not(index: int | None) -> str | None:
    """Why the compiled kernels do not run on this device (by default the current one), or None if they do.

    Where torch sees no such device, as when tensors are fake, nothing is asked and nothing is in the way.
    """
    if "cuda" in _library.load_errors:
        return _library.load_errors["cuda"]
    if index in _reasons:
        return _reasons[index]
    devices = _device_count()
    if index is None and devices > 0:
        return why_not(torch.cuda.current_device())
    if index is None or index >= devices:
        return None
    _reasons[index] = _reason(index)
    return _reasons[index]


def capability(index: int | None) -> int | None:
    """The compute capability of a device (by default the current one), 90 for 9.0; None where torch sees no
    such device."""
    devices = _device_count()
    if index is None and devices > 0:
        index = torch.cuda.current_device()
    if index is None or index >= devices:
        return None
    if index not in _capabilities:
        major, minor = torch.cuda.get_device_capability(index)
        _capabilities[index] = 10 * major + minor
    return _capabilities[index]


# A traced graph keeps the answers for its device. This is what torch.compiler.assume_constant_result does,
# but that imports all of Dynamo.
why_not._dynamo_marked_constant = True  # type: ignore[attr-defined]
capability._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _device_count() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _reason(index: int) -> str | None:
    error, driver, built_with = _probe(index)
    if error is None:
        return None
    if torch.cuda.is_current_stream_capturing():
        # Perhaps an answer to the capture, not about the kernels.
        raise RuntimeError(f"{_library.first_use_in_capture('mmkernels')} ({error})")
    return (
        f"the compiled kernels (CUDA {_version(built_with)}) do not run on cuda:{index} with a driver for "
        f"CUDA {_version(driver)}: {error}"
    )


def _probe(index: int) -> tuple[str | None, int, int]:
    """The error of CUDA on this device or None, and the versions of driver and kernels."""
    ask = ctypes.CDLL(str(_library.paths["cuda"])).mmkernels_cuda_probe
    ask.restype = ctypes.c_char_p
    driver, built_with = ctypes.c_int(), ctypes.c_int()
    with torch.cuda.device(index):
        error: bytes | None = ask(ctypes.byref(driver), ctypes.byref(built_with))
    return None if error is None else error.decode(), driver.value, built_with.value


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"
