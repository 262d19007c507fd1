"""The time of a case on an H100, predicted from the machine code of its kernels and from its bytes.

A kernel takes the longest of: its bytes at the rate of a copy; its instructions at the rate at which a
multiprocessor issues them; its accesses to shared memory, 128 bytes a clock; its products at the rate of
the tensor cores; and the steps of its hot loop one after another, by as many warps as are resident. The
facts of each kernel, in `kernels.json`, are those that `python tests/csrc/kernel_facts.py` reads from
the build. Good to about 30 %.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from benches.case import Case

from .launches import Launch, launches

FACTS = Path(__file__).with_name("kernels.json")

MULTIPROCESSORS = 132
CLOCK = 1.755e9
#: Measured by the benches on an H100: a copy of 1 GiB, in bytes per second.
COPY = 3.0e12
#: Instructions that a multiprocessor issues in a clock, one for each of its schedulers.
ISSUE = 4
#: FLOPs per second: of a large product of the library, of mma.sync, and of float32 without tensor cores.
LIBRARY_PRODUCT = 6.5e14
WARP_PRODUCT = 6.2e14
FLOAT_PRODUCT = 5e13
#: Seconds from the end of one kernel to the first results of the next.
LAUNCH = 2.5e-6


@dataclass(frozen=True)
class KernelFacts:
    """Of one iteration of a kernel's hot loop by one warp, on sm_90.

    Attributes:
        instance: the template instance that was read.
        instructions: that it issues.
        critical_path: clocks from one iteration to the next, if no other warp hides them.
        load_bytes: that its loads from device memory ask for; 0 in products.
        tensor_flops: of its products.
        wavefronts: accesses to shared memory, 128 bytes each.
        resident_warps: of a multiprocessor.
    """

    instance: str
    instructions: float
    critical_path: float
    load_bytes: float
    tensor_flops: float
    wavefronts: float
    resident_warps: int


@dataclass(frozen=True)
class Prediction:
    """Seconds, the resource that takes most of them, and the share of a copy's rate at the case's bytes."""

    seconds: float
    limit: str
    share_of_copy: float


@functools.cache
def facts() -> Mapping[str, KernelFacts]:
    return {name: KernelFacts(**each) for name, each in json.loads(FACTS.read_text())["kernels"].items()}


def times(launch: Launch, kernels: Mapping[str, KernelFacts], *, half: bool = True) -> dict[str, float]:
    """Seconds that each resource needs for a launch; half: whether products are of half precision."""
    found = {"bytes": launch.moved / COPY}
    if not half:
        found["products"] = launch.flops / FLOAT_PRODUCT
    if not launch.kernel:
        return {**found, "tensor cores": launch.flops / LIBRARY_PRODUCT if half else 0.0}
    found |= dict.fromkeys(("tensor cores", "issue", "shared memory", "latency"), 0.0)
    clocks = MULTIPROCESSORS * CLOCK
    for name in launch.kernel.split(" + "):
        loop = kernels[name]
        if launch.flops:
            iterations = launch.flops / loop.tensor_flops
        else:
            iterations = launch.loaded / loop.load_bytes if launch.loaded else 0.0
        found["tensor cores"] += launch.flops / WARP_PRODUCT
        found["issue"] += iterations * loop.instructions / (ISSUE * clocks)
        found["shared memory"] += iterations * loop.wavefronts / clocks
        found["latency"] += iterations * loop.critical_path / (loop.resident_warps * clocks)
        found["latency"] += launch.steps * loop.critical_path / CLOCK
    return found


def predict(case: Case, kernels: Mapping[str, KernelFacts] | None = None) -> Prediction | None:
    """None for what has no prediction: training steps, calls, imports."""
    kernels = facts() if kernels is None else kernels
    found = launches(case)
    if found is None:
        return None
    seconds, by_limit = 0.0, dict.fromkeys(("launches", "bytes"), 0.0)
    for launch in found:
        by_resource = times(launch, kernels, half=case.dtype != torch.float32)
        limit = max(by_resource, key=lambda name: by_resource[name])
        seconds += by_resource[limit] + LAUNCH
        by_limit[limit] = by_limit.get(limit, 0.0) + by_resource[limit]
        by_limit["launches"] += LAUNCH
    return Prediction(
        seconds, max(by_limit, key=lambda name: by_limit[name]), case.minimum_bytes / COPY / seconds
    )
