"""Facts about this installation, and which backend serves each op on this machine.

:func:`mmkernels.info` returns them, ``python -m mmkernels`` prints them.
"""

from __future__ import annotations

import importlib.metadata
import pkgutil
import platform
from typing import Any

import torch

import mmkernels
from mmkernels import _library, backends, ops


def op_names() -> list[str]:
    """Ops of this package: the folders of :mod:`mmkernels.ops`."""
    return sorted(module.name for module in pkgutil.iter_modules(ops.__path__) if module.ispkg)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _serving(op: str, device: str) -> dict[str, Any]:
    names = (name for name in backends.BACKENDS if name != "auto")
    reasons = {name: backends.why_not(name, device, torch.float32) for name in names}
    chosen, _ = backends.automatic(op, device, torch.float32)
    state: dict[str, Any] = {
        "serves": "reference" if device == "cpu" and chosen == "triton" else chosen,
        "cannot": {name: reason for name, reason in reasons.items() if reason is not None},
    }
    half, reason = backends.automatic(op, device, torch.bfloat16)
    if reason is not None:
        state["half_precision"] = {"serves": half, "reason": reason}
    return state


def collect() -> dict[str, Any]:
    """Versions, build facts, devices, and for each op and device the backend that ``"auto"`` chooses and the
    reasons against the others.

    This starts CUDA where there is a GPU, to read its name; importing the package does not.
    """
    module = _library.compiled_module()
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return {
        "mmkernels": mmkernels.__version__,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu_kernels": module.cpu_capability() if module else "unknown (no mmkernels._C)",
        "build": module.build_info() if module else None,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if "cuda" in devices else None,
        "not_loaded": dict(_library.load_errors),
        "ops": {op: {device: _serving(op, device) for device in devices} for op in op_names()},
    }


def render(facts: dict[str, Any]) -> str:
    """The facts as text."""
    lines = [
        f"{key:13}{facts[key]}"
        for key in ("mmkernels", "torch", "triton", "transformers", "python", "machine")
    ]
    lines += [f"{'cpu kernels':13}{facts['cpu_kernels']}, {facts['threads']} threads"]
    lines += [f"{'gpu':13}{facts['gpu'] or 'none'}"]
    if facts["build"]:
        lines.append(f"{'built with':13}{facts['build']['compiler']}; CUDA kernels {facts['build']['cuda']}")
    lines += [f"{'not loaded':13}{device}: {reason}" for device, reason in facts["not_loaded"].items()]
    for op, by_device in facts["ops"].items():
        for device, state in by_device.items():
            lines.append(f"{op} on {device}: {state['serves']}")
            lines += [f"    not {name}: {reason}" for name, reason in state["cannot"].items()]
            if half := state.get("half_precision"):
                lines.append(f"    {half['serves']} in half precision: {half['reason']}")
    return "\n".join(lines)
