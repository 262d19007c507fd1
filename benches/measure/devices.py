"""Clocks, memory and ceilings of the CPU and of CUDA devices."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable

import torch
from torch import Tensor

from benches.case import Runner
from mmtransfer.training.memory import peak_memory

# glibc, malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
_MIB = 1 << 20


class Device:
    name: str

    def set_memory(self, memory: str) -> None:
        """Keep freed memory in the process, or return it to the system; see ``benches.case.Memory``."""

    def sampler(self, runner: Runner) -> Callable[[], float]:
        """Warm the runner up; each call of the result then gives the seconds of one call of the runner."""
        if runner.timer is not None:
            return runner.timer
        for _ in range(0 if runner.warm else 2):
            runner.run(runner.prepare())
        return self._warm_sampler(runner)

    def peak_memory(self, runner: Runner) -> int:
        """Peak bytes of torch's allocator during one call, above those held before; results count."""
        state = runner.prepare()
        return peak_memory(lambda: runner.run(state), self.name)

    def _warm_sampler(self, runner: Runner) -> Callable[[], float]:
        raise NotImplementedError


class Cpu(Device):
    name = "cpu"
    memory_note = (
        "system: glibc's allocator, thresholds at their highest (blocks over 32 MiB come with fresh pages); "
        "reused: freed memory stays in the process (no mmap, no trim), for all candidates alike"
    )

    def __init__(self) -> None:
        try:
            self._libc: ctypes.CDLL | None = ctypes.CDLL("libc.so.6")
        except OSError:
            self._libc = None  # not glibc: its allocator decides

    def _warm_sampler(self, runner: Runner) -> Callable[[], float]:
        return lambda: self._sample(runner)

    def _sample(self, runner: Runner) -> float:
        state = runner.prepare()
        start = time.perf_counter()
        results = runner.run(state)
        end = time.perf_counter()
        del results
        return (end - start) / runner.calls

    def set_memory(self, memory: str) -> None:
        if self._libc is None:
            return
        reused = memory == "reused"
        # glibc raises its two thresholds as large blocks are freed. Set their highest values at once, so that
        # no case depends on those before it: blocks up to 32 MiB are reused, larger ones are fresh.
        self._libc.mallopt(_M_MMAP_THRESHOLD, 32 * _MIB)
        self._libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1 if reused else 64 * _MIB)
        self._libc.mallopt(_M_MMAP_MAX, 0 if reused else 65536)
        self._libc.malloc_trim(0)


class Cuda(Device):
    """CUDA events with a cold L2 cache; for calls under 20 us, replays of a CUDA graph.

    A kernel that only waits runs before a call that is to be queued, for longer than the host needs.

    ``set_memory`` has no effect: torch's caching allocator always reuses.
    """

    name = "cuda"
    graph_below = 20e-6
    graph_calls = 20
    #: Clock of the waiting kernel: at least that of the GPUs of 2020 to 2026.
    cycles_per_second = 2.6e9

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties(0)
        # A write of this size evicts everything else.
        size = max(4 * properties.L2_cache_size, 64 * _MIB)
        self._flush_buffer = torch.empty(size // 4, dtype=torch.int32, device="cuda")

    def _warm_sampler(self, runner: Runner) -> Callable[[], float]:
        if runner.calls > 1:
            return lambda: self._host_sample(runner)
        # Twice what the host needs, and time to start the wait.
        wait = int((2 * self._host_seconds(runner) + 50e-6) * self.cycles_per_second) if runner.queued else 0
        by_graph = None
        if min(self._event_sample(runner, wait) for _ in range(5)) < self.graph_below:
            by_graph = self._graph_sampler(runner)
        return by_graph or (lambda: self._event_sample(runner, wait))

    def _host_seconds(self, runner: Runner) -> float:
        """Time that the host needs to queue one call."""
        seconds = []
        for _ in range(3):
            state = runner.prepare()
            torch.cuda.synchronize()
            start = time.perf_counter()
            results = runner.run(state)
            seconds.append(time.perf_counter() - start)
            del results
        return min(seconds)

    def _event_sample(self, runner: Runner, wait: int = 0) -> float:
        state = runner.prepare()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush_buffer.zero_()
        if wait:
            torch.cuda._sleep(wait)
        start.record()
        results = runner.run(state)
        end.record()
        end.synchronize()
        del results
        return start.elapsed_time(end) * 1e-3

    def _host_sample(self, runner: Runner) -> float:
        """Time until the calls are queued: the dispatch cost on the host."""
        torch.cuda.synchronize()
        start = time.perf_counter()
        runner.run(None)
        end = time.perf_counter()
        torch.cuda.synchronize()
        return (end - start) / runner.calls

    def _graph_sampler(self, runner: Runner) -> Callable[[], float] | None:
        """Seconds of a call without its launch: a graph of flushes and calls, minus a graph of flushes."""
        if runner.prepare() is not None:
            return None
        try:
            full, flushes = self._capture(runner), self._capture(None)
        except RuntimeError:
            return None  # cannot be captured: CUDA events then

        def sample() -> float:
            seconds = [self._replay(graph) for graph in (full, flushes)]
            return (seconds[0] - seconds[1]) / self.graph_calls

        return sample

    def _capture(self, runner: Runner | None) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            for _ in range(self.graph_calls):
                self._flush_buffer.zero_()
                if runner is not None:
                    runner.run(None)
        return graph

    @staticmethod
    def _replay(graph: torch.cuda.CUDAGraph) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3


def open_device(name: str) -> Device:
    return Cuda() if name == "cuda" else Cpu()


def copy_runner(device: str) -> tuple[Runner, int]:
    """A copy between two buffers that no cache holds, both already touched, and the bytes it moves."""
    size = (128 if device == "cpu" else 1024) * _MIB
    source = torch.ones(size // 4, device=device)
    target = torch.zeros_like(source)

    def run(_: None) -> list[Tensor]:
        target.copy_(source)
        return []

    return Runner(run), 2 * size


def matmul_runner(device: str, dtype: torch.dtype) -> tuple[Runner, int]:
    """A large square product into an existing buffer, and its operations."""
    size = 1024 if device == "cpu" else 8192
    a, b = (torch.rand(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)

    def run(_: None) -> list[Tensor]:
        torch.mm(a, b, out=out)
        return []

    return Runner(run), 2 * size**3
