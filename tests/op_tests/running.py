"""Where the kernels can run, and how a test runs one call."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from mmkernels.backends import why_not

from .spec import Call


def devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def backends(device: str, dtype: torch.dtype) -> list[str]:
    """The kernels that can serve this device and dtype on this machine; the reference is no kernel."""
    return [name for name in ("native", "triton") if why_not(name, device, dtype) is None]


def generator_for(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside, torch fills uninitialised memory with NaN (in C++ too), which shows where a kernel reads it."""
    settings: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        settings.fill_uninitialized_memory = before[1]


def value_and_gradients(
    function: Callable[..., Tensor], call: Call, grad: Tensor, **options: Any
) -> tuple[Tensor, list[Tensor]]:
    """Result, and gradients of ``call.leaves()`` for an incoming gradient."""
    out = function(**call.arguments, **options)
    leaves = [leaf for leaf in call.leaves() if leaf.requires_grad]
    found = torch.autograd.grad(out, leaves, grad.to(out.dtype), allow_unused=True)
    zeros = (torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves, strict=True))
    return out.detach(), list(zeros)


def of_leaves(function: Callable[..., Tensor], call: Call, **options: Any) -> Callable[..., Tensor]:
    """``function`` as one of ``call.leaves()`` alone, in their order; the other arguments are the call's."""

    def run(*leaves: Tensor) -> Tensor:
        given = iter(leaves)
        changed = {}
        for name in call.differentiable:
            tensors = [next(given) for _ in call.tensors(name)]
            if tensors:
                changed[name] = tensors[0] if isinstance(call.arguments[name], Tensor) else tensors
        return function(**call.with_arguments(**changed).arguments, **options)

    return run
