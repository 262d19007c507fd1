"""The one tolerance rule of the project, and the comparison of an op with its reference by it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .running import generator_for, poisoned_memory, value_and_gradients
from .spec import Call, OpSpec

#: The errors of fewer numbers are luck: such results and gradients are judged over several calls together.
#: With 8 numbers, the ratio of kernel's and eager's is between 0.5 and 2.4 where over many it is 1.0.
FEWEST_NUMBERS = 32


def assert_close_to_reference(
    kernel: Tensor, reference: Tensor, eager: Tensor, dtype: torch.dtype, name: str = "result"
) -> None:
    """The tolerance rule: with R the float64 reference, E the same-dtype eager result, K the kernel's,

    ``max|K - R| <= 2 max|E - R| + 4 eps max|R|`` and ``rms(K - R) <= 1.5 rms(E - R) + eps rms(R)``, eps that
    of ``dtype``.
    """
    assert kernel.shape == reference.shape, (
        f"{name}: shape {tuple(kernel.shape)}, expected {tuple(reference.shape)}"
    )
    if reference.numel() == 0:
        return
    k, r, e = (t.detach().double().cpu() for t in (kernel, reference, eager))
    assert torch.isfinite(k).all(), f"{name}: the kernel's result is not finite"
    if dtype == torch.float64:
        # There is no wider dtype: kernel and reference differ by the order of their sums only.
        assert (k - r).abs().max() <= 1e-11 * (1 + r.abs().max()), f"{name}: float64 results differ"
        return
    eps = torch.finfo(dtype).eps
    worst, allowed = (k - r).abs().max(), 2 * (e - r).abs().max() + 4 * eps * r.abs().max()
    assert worst <= allowed, f"{name}: largest error {worst:.3e}, allowed {allowed:.3e}"
    rms, allowed = _rms(k - r), 1.5 * _rms(e - r) + eps * _rms(r)
    assert rms <= allowed, f"{name}: rms error {rms:.3e}, allowed {allowed:.3e}"


def _rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


def check_against_reference(spec: OpSpec, make: Callable[[int], Call], backend: str, seed: int = 0) -> None:
    """Values and all gradients on one backend, by the tolerance rule.

    ``make(seed)`` builds a call; calls with further seeds are made where its tensors are small.
    """
    # For each result or gradient: the numbers of kernel, reference and eager, one entry for each call.
    found: list[list[tuple[Tensor, Tensor, Tensor]]] = []
    while not found or len(found) * min(r.numel() or FEWEST_NUMBERS for _, r, _ in found[0]) < FEWEST_NUMBERS:
        call = make(seed + 1000 * len(found))
        found.append(_three_ways(spec, call, backend, seed + 1 + len(found)))
    for index, several in enumerate(zip(*found, strict=True)):
        name = f"gradient {index - 1} of {call.differentiable}" if index else "result"
        k, r, e = (torch.stack(tensors) for tensors in zip(*several, strict=True))
        assert_close_to_reference(k, r, e, spec.result_dtype(call), name)


def _three_ways(spec: OpSpec, call: Call, backend: str, seed: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The result and each gradient of one call, by kernel, float64 reference and eager."""
    target = spec.reference(**call.detached(requires_grad=False).arguments)
    grad = torch.randn(target.shape, generator=generator_for(seed)).to(target)
    with poisoned_memory():
        out, gradients = value_and_gradients(spec.function, call.detached(), grad, backend=backend)
    assert out.dtype == spec.result_dtype(call)
    wide = call.detached(torch.float64)
    exact, exact_gradients = value_and_gradients(spec.reference, wide, grad.double())
    eager, eager_gradients = value_and_gradients(spec.eager or spec.reference, call.detached(), grad)
    kernel = (out, *gradients)
    return list(zip(kernel, (exact, *exact_gradients), (eager, *eager_gradients), strict=True))
