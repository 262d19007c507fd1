"""Lengths of the utterances of a batch, and checks of values where reading them is free."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.ops import _common, _derivatives

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


def readable(tensor: Tensor) -> bool:
    """Whether reading values is free: on the CPU, unless they are traced or a transform hides them."""
    traced = torch.compiler.is_compiling() or isinstance(tensor, torch._subclasses.FakeTensor)
    return tensor.is_cpu and not traced and not _derivatives.transforms_active()


def check_lengths(
    op: str, name: str, lengths: Tensor | None, of_name: str, of: Tensor, most: int | None
) -> Tensor | None:
    """``lengths`` as int64: one integer for each entry of ``of``, from 0 to ``most`` if they are readable."""
    if lengths is None:
        return None
    _common.check_tensor(op, name, lengths)
    if lengths.dtype not in INTEGERS:
        raise TypeError(f"{op}: {name} must be an integer tensor, got {lengths.dtype}")
    if lengths.shape != of.shape[:1]:
        raise ValueError(
            f"{op}: {name} must have shape {tuple(of.shape[:1])}, one entry for each utterance, "
            f"got {tuple(lengths.shape)}"
        )
    if lengths.device != of.device:
        raise ValueError(f"{op}: {name} is on {lengths.device}, {of_name} is on {of.device}")
    if readable(lengths) and lengths.numel() > 0:
        low, high = (int(value) for value in torch.aminmax(lengths))
        if most is not None and (low < 0 or high > most):
            raise ValueError(f"{op}: {name} must lie in [0, {most}], got values from {low} to {high}")
        if low < 0:
            raise ValueError(f"{op}: {name} must not be negative, got {low}")
    return lengths.to(torch.int64)
