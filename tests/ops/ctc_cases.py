"""Problems of CTC alignment, for the tests of all backends."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
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
    """Conditions on every alignment; that it is the best one is not among them."""
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


def path_with_little_slack(log_probs: np.ndarray, target: np.ndarray, blank: int) -> list[int]:
    """The definition in float32, where the frames are few more than the tokens: after each frame a path can
    be in few pairs of states, those from ``tokens - frames + t`` on."""
    frames, tokens = len(log_probs), len(target)
    band, never = frames - tokens + 1, np.float32(-np.inf)
    even, odd = np.full(band, never), np.full(band, never)
    moves = []
    for t in range(frames):
        pair = np.arange(tokens - frames + t, t + 1)
        valid = (pair >= 0) & (pair < tokens)
        token = target[np.where(valid, pair, 0)]
        differs = valid & (pair > 0) & (token != target[np.where(valid, pair, 0) - 1])
        left, skip = odd, np.where(differs, odd, never)
        even, odd = np.append(even[1:], np.float32(0) if t == 0 else never), np.append(odd[1:], never)
        moved = np.where((skip > even) & (skip > odd), 2, np.where(even > odd, 1, 0))
        moves.append((pair[0], left > even, moved))
        odd = np.maximum(np.maximum(odd, even), skip) + np.where(valid, log_probs[t, token], never)
        even = np.maximum(even, left) + log_probs[t, blank]
        if (t + 1) % 32 == 0:
            largest = np.maximum(even, odd).max()
            even, odd = even - largest, odd - largest
    at_token = not even[1] > odd[0]  # of the last two pairs
    place = tokens - at_token
    path = []
    for first, from_left, moved in reversed(moves):
        path.append(int(target[place]) if at_token else blank)
        advance = int(moved[place - first]) if at_token else int(from_left[place - first])
        place -= advance == 2 or (advance == 1 and not at_token)
        at_token ^= advance == 1
    return path[::-1]
