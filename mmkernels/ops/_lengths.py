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


def first_place(wrong: Tensor) -> tuple[int, ...] | None:
    """The first place where it is true."""
    places = wrong.nonzero()
    return tuple(places[0].tolist()) if len(places) else None


def check_lengths(
    op: str, name: str, lengths: Tensor | None, of_name: str, of: Tensor, most: int | None
) -> Tensor | None:
    """``lengths`` as int64: one integer for each row of ``of``, from 0 to ``most`` if they are readable."""
    if lengths is None:
        return None
    check_kind(op, name, lengths, of_name, of)
    check_range(op, name, lengths, most)
    return lengths.to(torch.int64)


def check_kind(op: str, name: str, lengths: Tensor, of_name: str, of: Tensor) -> None:
    """Type, dtype, shape and device; values are not read."""
    _common.check_tensor(op, name, lengths)
    if lengths.dtype not in INTEGERS:
        raise TypeError(f"{op}: {name} must be an integer tensor, got {lengths.dtype}")
    if lengths.shape != of.shape[:1]:
        raise ValueError(
            f"{op}: {name} must have shape {tuple(of.shape[:1])}, one entry for each row of the batch, "
            f"got {tuple(lengths.shape)}"
        )
    if lengths.device != of.device:
        raise ValueError(f"{op}: {name} is on {lengths.device}, {of_name} is on {of.device}")


def check_range(op: str, name: str, lengths: Tensor, most: int | None) -> None:
    """Whether all lie in ``[0, most]``, where reading them is free."""
    if not readable(lengths) or lengths.numel() == 0:
        return
    low, high = (int(value) for value in torch.aminmax(lengths))
    if low >= 0 and (most is None or high <= most):
        return
    wrong = lengths < 0 if most is None else (lengths < 0) | (lengths > most)
    row = int(wrong.nonzero()[0])
    allowed = "not be negative" if most is None else f"lie in [0, {most}]"
    raise ValueError(f"{op}: {name} must {allowed}, got {int(lengths[row])} in row {row} of the batch")
