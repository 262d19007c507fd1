"""Derivatives that the kernels do not have, which the reference gives: forward mode, ``torch.func``, and
gradients of gradients. The kernels compute the first derivative in reverse mode."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mmkernels.ops._common import without_autocast

#: Whether this runs inside a transform of ``torch.func``.
transforms_active = torch._C._are_functorch_transforms_active


def backend_in_transforms(op: str, backend: str, tensors: Iterable[Tensor | None]) -> str:
    """``"reference"`` where a transform of ``torch.func`` or forward mode acts on one of ``tensors``, all
    those of a call; else ``backend``.

    Raises:
        ValueError: a kernel was asked for by name, and a transform acts.
    """
    if not _act_on(tensors):
        return backend
    if backend in ("native", "triton"):
        raise _refusal(op, backend)
    return "reference" if backend == "auto" else backend


def _act_on(tensors: Iterable[Tensor | None]) -> bool:
    functions, duals = transforms_active(), forward_ad._current_level >= 0
    if torch.compiler.is_compiling():
        return functions or duals  # the traced tensors do not tell
    present = [tensor for tensor in tensors if isinstance(tensor, Tensor)]
    if functions and any(_in_function(tensor) for tensor in present):
        return True
    return duals and any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in present)


def _in_function(tensor: Tensor) -> bool:
    """Whether a transform acts on ``tensor``; inside of one, torch's autograd functions take no tensor that
    requires a gradient either."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    return wrapped or (tensor.requires_grad and torch.is_grad_enabled())


def _refusal(op: str, backend: str) -> ValueError:
    return ValueError(
        f"{op}: backend={backend!r} has first derivatives in reverse mode only; for forward mode, torch.func "
        'and gradients of gradients (create_graph=True), use backend="reference", or "auto", which takes the '
        "reference by itself then"
    )


def beyond_kernels(*grads: Tensor) -> bool:
    """In a backward pass: whether the gradients must be differentiable themselves, or one of ``grads`` is one
    that the kernels do not take: several at once (``vmap``, ``is_grads_batched``), or one with a tangent."""
    if torch.compiler.is_compiling():
        return False  # torch refuses gradients of a compiled function's gradients
    if torch.is_grad_enabled() or any(map(torch._C._functorch.is_legacy_batchedtensor, grads)):
        return True
    return (transforms_active() or forward_ad._current_level >= 0) and _act_on(grads)


def reference_gradients(
    op: str,
    asked: str,
    function: Callable[..., Tensor | Sequence[Tensor]],
    tensors: Sequence[Tensor | None],
    needed: Sequence[bool],
    grad: Tensor | Sequence[Tensor],
) -> list[Tensor | None]:
    """The gradients of ``function(*tensors)`` that are ``needed``, each differentiable in every tensor.
    ``grad`` is that of its result, or of each of its results.

    Raises:
        ValueError: the backend that was ``asked`` for is a kernel's.
    """
    if asked != "auto":
        raise _refusal(op, asked)
    differentiable = torch.is_grad_enabled()
    aliases, wanted = list(tensors), []
    with torch.enable_grad(), without_autocast(next(t for t in tensors if t is not None)):
        for index, (tensor, need) in enumerate(zip(tensors, needed, strict=True)):
            if need and tensor is not None:
                # An alias: one tensor may be a function of another, and only its own part is wanted.
                aliases[index] = alias = tensor.view_as(tensor).requires_grad_()
                wanted.append(alias)
        out = function(*aliases)
        found = torch.autograd.grad(out, wanted, grad, create_graph=differentiable, allow_unused=True)
    of_wanted = iter(found)
    return [next(of_wanted) if need else None for need in needed]
