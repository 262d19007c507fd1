"""Tensors made under ``torch.inference_mode()``: autograd refuses to save them for a backward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def apply(function: type[torch.autograd.Function], activations: Tensor, *arguments: Any) -> Any:
    """``function.apply(*arguments)``, where any argument may be an inference tensor.

    Those are passed as aliases. Asking each of many layers would take longer than a small call: this asks
    ``activations``, one of the arguments, and all of them once autograd has refused.
    """
    if torch.compiler.is_compiling():
        return function.apply(*arguments)  # a compiled function saves its inputs by itself
    if activations.is_inference():
        return function.apply(*map(_ordinary, arguments))
    try:
        return function.apply(*arguments)
    except RuntimeError:
        if not any(isinstance(argument, Tensor) and argument.is_inference() for argument in arguments):
            raise
    return function.apply(*map(_ordinary, arguments))


def _ordinary(argument: Any) -> Any:
    """An alias of an inference tensor that autograd saves; anything else as it is."""
    if not isinstance(argument, Tensor) or not argument.is_inference():
        return argument
    storage, offset = argument.untyped_storage(), argument.storage_offset()
    return argument.new_empty(0).set_(storage, offset, argument.size(), argument.stride())


def widened(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor`` in ``dtype``, for statements that autograd records: an inference tensor is copied."""
    wide = tensor.to(dtype)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling() and wide.is_inference():
        return wide.clone()
    return wide
