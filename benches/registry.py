"""Finds the cases: every ``bench_*.py`` in ``ops`` and ``methods`` has a function ``cases(device, tiny)``."""

from __future__ import annotations

import importlib
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benches.case import Candidate, Case
from mmkernels.backends import why_not


def registry(device: str, *, tiny: bool = False) -> Iterator[Case]:
    """Every case for ``device``; ``tiny`` shrinks the sizes, to test the benches themselves."""
    root = pathlib.Path(__file__).parent
    for file in sorted(root.glob("*/bench_*.py")):
        module = ".".join(("benches", *file.relative_to(root).with_suffix("").parts))
        yield from importlib.import_module(module).cases(device, tiny)


def kernel_candidates(function: Callable[..., Any], device: str) -> tuple[Candidate, ...]:
    """``function`` by each fused backend that serves ``device``; ``"auto"`` takes the first."""

    def bind(backend: str) -> Callable[..., Any]:
        return lambda *args, **options: function(*args, backend=backend, **options)

    return tuple(
        Candidate(f"mmkernels {backend}", "kernel", bind(backend))
        for backend in ("native", "triton")
        if why_not(backend, device, torch.float32) is None
    )
