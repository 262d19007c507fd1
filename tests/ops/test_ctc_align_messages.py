"""ctc_align: bad input is refused by a message that names it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

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


def of_a_row(change: Callable[[Tensor], object]) -> Tensor:
    """Probabilities of two utterances, changed."""
    probabilities = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(1)).softmax(2)
    change(probabilities)
    return probabilities


PROBABILITIES = {
    "softmax": of_a_row(lambda p: None),
    "padding of zeros in front": of_a_row(lambda p: p[:, 0].zero_()),
    "sure of the token in the middle": of_a_row(lambda p: p[:, 3].zero_()[:, 1].fill_(1)),
    "garbage behind the end": of_a_row(lambda p: p[1, 4:].fill_(-7)),
    "one frame": of_a_row(lambda p: None)[:, :1],
}
LOG_PROBABILITIES = {
    "log_softmax": of_a_row(lambda p: p.log_()),
    "padding of zeros in front": of_a_row(lambda p: p.log_()[:, 0].zero_()),
    "all zero": torch.zeros(2, 6, 4),
    "no frames": torch.zeros(2, 0, 4),
    "no utterances": torch.zeros(0, 6, 4),
    "logits of one utterance": of_a_row(lambda p: p[0].log_()),
    "sure of a token": of_a_row(lambda p: p.fill_(-torch.inf)[..., 0].zero_()),
}


def align(
    log_probs: Tensor, lengths: tuple[int, int] | None = None, dtype: torch.dtype | None = None
) -> None:
    targets = torch.zeros(len(log_probs), 0, dtype=torch.int64)
    ctc_align(log_probs.to(dtype), targets, None if lengths is None else torch.tensor(lengths))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", PROBABILITIES)
def test_probabilities_are_named(case: str, dtype: torch.dtype) -> None:
    values = PROBABILITIES[case]
    with pytest.warns(UserWarning, match="log_probs look like probabilities") as caught:
        align(values, (min(6, values.shape[1]), min(4, values.shape[1])), dtype)
    assert caught[0].filename == __file__
    if "garbage" not in case:
        with pytest.warns(UserWarning, match="log_probs look like probabilities"):
            align(values, dtype=dtype)


@pytest.mark.parametrize("case", LOG_PROBABILITIES)
def test_log_probabilities_are_taken_as_they_are(case: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        align(LOG_PROBABILITIES[case])
        if case != "no utterances":
            align(LOG_PROBABILITIES[case], (0, 0))
