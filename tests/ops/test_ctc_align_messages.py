"""ctc_align: bad input is refused by a message that names it."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from mmkernels import ctc_align


def good() -> dict[str, Any]:
    return {"log_probs": torch.randn(2, 6, 4).log_softmax(2), "targets": torch.tensor([[1, 2], [3, 3]])}


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"log_probs": [1.0]}, TypeError, "log_probs must be a tensor, got list"),
    ({"log_probs": torch.zeros(2, 6, 4, dtype=torch.int64)}, TypeError, "log_probs must be float32"),
    ({"log_probs": torch.zeros(6, 4)}, ValueError, r"log_probs must be \(B, T, C\).*log_probs\[None\]"),
    ({"targets": torch.zeros(2, 2)}, TypeError, "targets must be int32 or int64, got torch.float32"),
    (
        {"targets": torch.ones(3, 2, dtype=torch.int64)},
        ValueError,
        "targets must be .* B = 2 as in log_probs",
    ),
    ({"targets": torch.ones(2, dtype=torch.int64)}, ValueError, r"targets must be \(B, U\)"),
    ({"targets": torch.ones(2, 2, dtype=torch.int64, device="meta")}, ValueError, "targets is on meta"),
    ({"targets": torch.tensor([[1, 2], [3, 0]])}, ValueError, r"targets\[1, 1\] is 0, which is the blank"),
    ({"targets": torch.tensor([[1, 4], [3, 3]])}, ValueError, r"targets\[0, 1\] is 4, .* class in \[0, 4\)"),
    (
        {"targets": torch.tensor([[1, 2], [-1, 3]])},
        ValueError,
        r"targets\[1, 0\] is -1, which is not a class",
    ),
    ({"blank": 4}, ValueError, r"blank must be a class in \[0, 4\), got 4"),
    ({"blank": -1}, ValueError, "blank must be a class"),
    ({"blank": 0.0}, TypeError, "blank must be an int, got float"),
    ({"input_lengths": [6, 6]}, TypeError, "input_lengths must be a tensor, got list"),
    ({"input_lengths": torch.ones(2)}, TypeError, "input_lengths must be an integer tensor"),
    ({"input_lengths": torch.tensor([6])}, ValueError, r"input_lengths must have shape \(2,\)"),
    (
        {"input_lengths": torch.tensor([6, 7])},
        ValueError,
        r"input_lengths must lie in \[0, 6\], got 7 in row 1",
    ),
    (
        {"target_lengths": torch.tensor([-1, 2])},
        ValueError,
        r"target_lengths must lie in \[0, 2\], got -1 in row 0",
    ),
    (
        {"target_lengths": torch.tensor([1, 2], device="meta")},
        ValueError,
        "target_lengths is on meta, log_probs",
    ),
    ({"backend": "fast"}, ValueError, "backend must be one of auto, native, triton, reference"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[message for *_, message in BAD])
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"ctc_align: .*{message}"):
        ctc_align(**{**good(), **change})


def test_probabilities_are_named() -> None:
    arguments = good()
    with pytest.warns(UserWarning, match="log_probs look like probabilities"):
        ctc_align(**{**arguments, "log_probs": arguments["log_probs"].exp()})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ctc_align(**arguments)
        ctc_align(**{**arguments, "log_probs": torch.zeros(2, 0, 4)})
