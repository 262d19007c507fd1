"""The registry: what is measured, on which shapes, against what.

A bench file (``ops/bench_<op>.py``, ``methods/bench_<method>.py``) has a function ``cases(device, tiny)``
that yields its :class:`Case` objects, and a test function. Nothing else knows of it.
"""

from __future__ import annotations

import importlib
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benches.case import Candidate, Case
from mmkernels.ops._common import why_not


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
