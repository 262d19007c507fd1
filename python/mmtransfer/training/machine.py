"""The processes of a run, and a description of the machine for records."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
from typing import Any

import cpuinfo
import torch

import mmkernels


def is_main_process() -> bool:
    """Whether this process prints and writes, under `torchrun` and `accelerate launch` too."""
    return int(os.environ.get("RANK", "0")) == 0


def process_count() -> int:
    """How many processes `torchrun` or `accelerate launch` started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@functools.cache
def _processor() -> str:
    """Asked for once: the answer takes several programs."""
    return str(cpuinfo.get_cpu_info().get("brand_raw") or platform.machine())


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Processor, threads and versions; nothing that names the host."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "accelerate")}
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
        "processes": process_count(),
        "python": platform.python_version(),
        "mmkernels": mmkernels.__version__,
        **versions,
    }
