"""The machine and the software, for the header of a record."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import pathlib
import platform
import re
from typing import Any

import torch

from benches.measure.devices import Cpu
from mmkernels import _library


def facts(device: str) -> dict[str, Any]:
    """Names, versions and the load so far; nothing that identifies the host."""
    compiled = _library.compiled_module()
    load = os.getloadavg()[0]
    found = {
        "device": device,
        "name": torch.cuda.get_device_name(0) if device == "cuda" else cpu_name(),
        "cpu": cpu_name(),
        "instructions": compiled.cpu_capability() if compiled else torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "mmkernels": importlib.metadata.version("mmkernels"),
        "load_average": round(load, 2),
        "busy": load > 0.25 * (os.cpu_count() or 1),
        "compiler": compiled.build_info()["compiler"] if compiled else None,
        "timing": "interleaved in shuffled order; medians, 20 % and 80 % quantiles; ratios round by round",
    }
    if device == "cuda":
        memory = "torch's caching allocator; L2 flushed before each call"
        found |= {"cuda": torch.version.cuda, "driver": _driver(), "memory": memory}
    else:
        found["memory"] = Cpu.memory_note
    return found


def slug(device: str) -> str:
    """A file name for this machine's results."""
    on_cpu = f"{cpu_name()} {torch.get_num_threads()} threads"
    name = torch.cuda.get_device_name(0) if device == "cuda" else on_cpu
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


@functools.cache
def cpu_name() -> str:
    import cpuinfo  # comes with pytest-benchmark

    return cpuinfo.get_cpu_info().get("brand_raw") or platform.machine()


def _driver() -> str | None:
    try:
        text = pathlib.Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    found = re.search(r"Kernel Module\s+(?:for \S+\s+)?([\d.]+)", text)
    return found.group(1) if found else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
