"""Problems of CTC alignment, for the tests of all backends."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from mmkernels.ops.ctc_align import reference


@dataclass(frozen=True)
class Problem:
    log_probs: Tensor
    targets: Tensor
    input_lengths: Tensor
    target_lengths: Tensor
    blank: int

    def arguments(self) -> dict[str, object]:
        return dict(vars(self))

    def expected(self) -> tuple[Tensor, Tensor, Tensor]:
        return reference.ctc_align(*vars(self).values())


#: Values of log-probabilities: continuous; with many equal sums; with impossible ones among them; so low that
#: every sum is rounded, and the order of roundings decides between paths.
KINDS = ("continuous", "grid", "holes", "low")


def random_problem(
    seed: int,
    kind: str = "continuous",
    dtype: torch.dtype = torch.float32,
    *,
    batch: int = 16,
    frames: int = 9,
    tokens: int = 4,
    classes: int = 4,
) -> Problem:
    """A ragged batch; some of it is infeasible, and about one of three tokens repeats the one before."""
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, *size: int) -> Tensor:
        return torch.randint(low, high + 1, size, generator=generator)

    blank = int(integers(0, classes - 1, 1))
    log_probs = torch.randn(batch, frames, classes, generator=generator).log_softmax(2)
    if kind == "low":
        log_probs = log_probs * 0.01 - 700
    elif kind != "continuous":
        log_probs = (log_probs * 2).round() / 2
    if kind == "holes":
        log_probs[torch.rand(log_probs.shape, generator=generator) < 0.15] = -torch.inf
    targets = integers(0, classes - 2, batch, tokens)
    targets = targets + (targets >= blank)
    return Problem(
        log_probs.to(dtype),
        targets,
        integers(frames // 2, frames, batch),
        integers(0, tokens, batch),
        blank,
    )


def all_paths(frames: int, target: list[int], blank: int) -> list[tuple[int, ...]]:
    """Every sequence of tokens and blanks that collapses to the target."""
    alphabet = sorted({blank, *target})
    return [
        path
        for path in itertools.product(alphabet, repeat=frames)
        if [token for token, _ in itertools.groupby(path) if token != blank] == target
    ]


def check_row(problem: Problem, row: int, path: Tensor, ends: Tensor, total: float) -> None:
    """What an alignment must be, whatever computed it, but that it is the best one."""
    frames, tokens = int(problem.input_lengths[row]), int(problem.target_lengths[row])
    assert (path[frames:] == -1).all()
    found = path[:frames].tolist()
    target = problem.targets[row, :tokens].tolist()
    assert [token for token, _ in itertools.groupby(found) if token != problem.blank] == target
    scores = problem.log_probs[row].double()[range(frames), found]
    assert abs(float(scores.sum()) - total) <= 1e-5 * (1 + abs(total))
    assert (ends[tokens:] == frames).all()
    begin = 0
    for token, end in zip(target, ends.tolist(), strict=False):
        inside = [t for t in range(begin, end) if found[t] != problem.blank]
        assert {found[t] for t in inside} == {token}
        assert begin == 0 or found[begin] == token, "blanks belong to the token before them"
        begin = end
    assert begin == frames or tokens == 0
