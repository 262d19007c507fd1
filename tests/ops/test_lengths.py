"""Lengths of the rows of a batch: the ops on segments and alignments check them in one way, and name the
op, the argument and the row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from mmkernels import cif, ctc_align, monotonic_align, segment_pool
from op_tests import backends

ROWS, FRAMES, TOKENS = 3, 6, 4


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities or frames, weights, and targets or ends."""
    x = torch.randn(ROWS, FRAMES, TOKENS + 1).log_softmax(2)
    return x, torch.full((ROWS, FRAMES), 0.5), torch.arange(1, TOKENS + 1).expand(ROWS, -1)


def align_ctc(**options: Any) -> object:
    x, _, targets = inputs()
    return ctc_align(x, targets, **options)


def align_monotonic(**options: Any) -> object:
    return monotonic_align(inputs()[0][..., :TOKENS], **options)


def fire(**options: Any) -> object:
    x, alpha, _ = inputs()
    return cif(x, alpha, max_length=TOKENS, **options)


def pool(**options: Any) -> object:
    x, _, ends = inputs()
    return segment_pool(x, ends, **options)


#: Op and argument; a call; the largest length allowed.
ARGUMENTS: dict[tuple[str, str], tuple[Callable[..., object], int | None]] = {
    ("ctc_align", "input_lengths"): (align_ctc, FRAMES),
    ("ctc_align", "target_lengths"): (align_ctc, TOKENS),
    ("monotonic_align", "frame_lengths"): (align_monotonic, FRAMES),
    ("monotonic_align", "token_lengths"): (align_monotonic, TOKENS),
    ("cif", "lengths"): (fire, FRAMES),
    ("cif", "target_lengths"): (fire, None),
    ("segment_pool", "counts"): (pool, TOKENS),
}
each_argument = pytest.mark.parametrize("where", ARGUMENTS, ids=" ".join)
each_backend = pytest.mark.parametrize("backend", [*backends("cpu", torch.float32), "reference"])


@each_argument
def test_kinds(where: tuple[str, str]) -> None:
    (op, name), (call, _) = where, ARGUMENTS[where]
    good = torch.full((ROWS,), TOKENS)
    wrong: list[tuple[object, type[Exception], str]] = [
        ([4, 4, 4], TypeError, "must be a tensor, got list"),
        (4, TypeError, "must be a tensor, got int"),
        (good.float(), TypeError, "must be an integer tensor, got torch.float32"),
        (good > 0, TypeError, "must be an integer tensor, got torch.bool"),
        (good[:2], ValueError, r"must have shape \(3,\), one entry for each row of the batch, got \(2,\)"),
        (good[:, None], ValueError, r"must have shape \(3,\), .* got \(3, 1\)"),
        (good[0], ValueError, r"must have shape \(3,\), .* got \(\)"),
        (good.to("meta"), ValueError, "is on meta, (x|log_probs) is on cpu"),
    ]
    for given, error, message in wrong:
        with pytest.raises(error, match=f"^{op}: {name} {message}"):
            call(**{name: given})
    for dtype in (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8):
        call(**{name: good.to(dtype)})


@each_argument
@each_backend
def test_values(where: tuple[str, str], backend: str) -> None:
    """The message names the first row that is wrong, and its value."""
    (op, name), (call, most) = where, ARGUMENTS[where]
    for row in range(ROWS):
        for value in (-1, -(2**40), *(() if most is None else (most + 1, 2**40))):
            lengths = torch.full((ROWS,), TOKENS)
            lengths[row:] = value
            allowed = "not be negative" if most is None else rf"lie in \[0, {most}\]"
            message = f"^{op}: {name} must {allowed}, got {value} in row {row} of the batch$"
            with pytest.raises(ValueError, match=message):
                call(**{name: lengths, "backend": backend})


@each_argument
def test_values_are_not_read_where_there_are_none(where: tuple[str, str]) -> None:
    """Fake tensors, as torch.export traces with, hold no values."""
    (_, name), (call, _) = where, ARGUMENTS[where]
    with FakeTensorMode():
        call(**{name: torch.full((ROWS,), 99)})
