"""The registry: what is measured, on which shapes, against what.

A bench file (``ops/bench_<op>.py``, ``methods/bench_<method>.py``, ``bench_overhead.py``) has a function
``cases(device, tiny)`` that yields its :class:`Case` objects, and a test function. Nothing else knows of it.
"""

from __future__ import annotations

import importlib
import pathlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from benches.problem import Problem
from mmkernels.ops._common import why_not

#: "different" computes less or more than its case and is shown for its time: it has no rate and no share of
#: the ceiling.
Role = Literal["kernel", "papers", "hand_written", "compile", "library", "different"]
Direction = Literal["forward", "backward", "forward_backward", "training step", "call", "import"]
#: What limits a case in the end; "latency": neither, the time itself is the result.
Bound = Literal["memory", "compute", "latency"]
#: "system": glibc's allocator as every user has it, which returns large blocks to the operating system, so
#: that the next come with fresh pages. "reused": freed memory stays in the process, for all candidates alike.
Memory = Literal["system", "reused"]


@dataclass(frozen=True)
class Encoder:
    """Hidden states of a real speech encoder: their number (layers and the embedding) and their width."""

    name: str
    layers: int
    width: int


WHISPER_TINY = Encoder("whisper-tiny", 5, 384)
HUBERT_BASE = Encoder("hubert-base", 13, 768)
WAV2VEC2_LARGE = Encoder("wav2vec2-large", 25, 1024)


@dataclass(frozen=True)
class Candidate:
    """One way to compute a case.

    Attributes:
        call: a function of the inputs; what other problems than ``OpProblem`` make of it is theirs.
        lay_out: turns the inputs into the form that this candidate has them in, off the clock.
        collect: turns its results into the form of the definition's, off the clock.
    """

    name: str
    role: Role
    call: Callable[..., Any]
    lay_out: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    collect: Callable[[list[torch.Tensor]], list[torch.Tensor]] | None = None


@dataclass(frozen=True)
class Case:
    """One line of the table.

    Attributes:
        shape: name of the real model, or of what is timed.
        variant: options of the op, such as ``"norm+affine"``.
        minimum_bytes: what any implementation must read and write, every tensor once.
        flops: floating-point operations of the definition.
        output_bytes: size of the results.
        problem: makes the inputs; called when the case is measured.
        tolerance: largest relative error of a right result, where the harness's table does not fit.
        max_rounds: for what takes long and varies little.
    """

    op: str
    shape: str
    variant: str
    direction: Direction
    dtype: torch.dtype
    device: str
    sizes: dict[str, int]
    minimum_bytes: int
    flops: int
    output_bytes: int
    candidates: tuple[Candidate, ...]
    problem: Callable[[], Problem] = field(repr=False)
    bound: Bound = "memory"
    memory: Memory = "system"
    headline: bool = False
    tolerance: float | None = None
    max_rounds: int = 60

    @property
    def id(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        parts = [self.op, self.shape, self.variant, self.direction, dtype, self.memory]
        return "/".join(part for part in parts if part)


def kernel_candidates(function: Callable[..., Any], device: str) -> tuple[Candidate, ...]:
    """``function`` by each fused backend that serves ``device``; ``"auto"`` takes the first."""

    def bind(backend: str) -> Callable[..., Any]:
        return lambda *args, **options: function(*args, backend=backend, **options)

    return tuple(
        Candidate(f"mmkernels {backend}", "kernel", bind(backend))
        for backend in ("native", "triton")
        if why_not(backend, device, torch.float32) is None
    )


def bench_modules() -> list[str]:
    """Names of all bench modules."""
    root = pathlib.Path(__file__).parent
    files = sorted(root.rglob("bench_*.py"))
    return [".".join(("benches", *file.relative_to(root).with_suffix("").parts)) for file in files]


def registry(device: str, *, tiny: bool = False) -> Iterator[Case]:
    """Every case for ``device``; ``tiny`` shrinks the sizes, for tests of the benches themselves."""
    for name in bench_modules():
        yield from importlib.import_module(name).cases(device, tiny)
