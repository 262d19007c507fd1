"""Memory that a call takes, counted allocation by allocation."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch

_T = TypeVar("_T")


def peak_memory(call: Callable[[], object], device: str) -> int:
    """Most bytes that torch's allocator held at once during one call beyond what it held before.

    The call's result counts. The size of the process is no measure of this: it also depends on freed
    memory that the C library kept.

    Args:
        call: the function to run.
        device: type of the device whose memory counts, `"cpu"` or `"cuda"`.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = call()
        torch.cuda.synchronize()
        del results
        return torch.cuda.max_memory_allocated() - before
    _, changes = allocations(call)
    return max(itertools.accumulate(changes, initial=0))


def allocations(call: Callable[[], _T]) -> tuple[_T, list[int]]:
    """The result of a call, and the bytes that torch's allocators gave (positive) and took back during it.

    Memory that was allocated before the call and is freed in it does not appear.
    """
    # Otherwise the profiler prints its start and stop to stderr.
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        result = call()
    profiler: Any = profile.profiler
    events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    return result, [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
