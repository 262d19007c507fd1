"""Definitions of segment_pool, cif, ctc_align and monotonic_align that share nothing with their references,
and random batches of small utterances for them.

All paths are tried, frames are integrated one after the other, segments are slices. Values lie on coarse
grids: sums are exact in every dtype, so that equal scores are equal, and the rules for ties can be compared.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from op_tests import backends
from op_tests.running import devices

Array = np.ndarray
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SERVED = [(device, name) for device in devices() for name in (*backends(device, torch.float32), "reference")]


class EachBackend:
    """Tests of every backend of this process: their subclasses run on the CUDA kernels on the CPU, by
    tests/csrc/test_cuda_glue.py, and on the Triton kernels, by tests/triton/test_interpreter.py."""

    served: Sequence[tuple[str, str]] = SERVED
    dtypes: Sequence[torch.dtype] = DTYPES

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "backend" in metafunc.fixturenames:
            metafunc.parametrize(("device", "backend"), self.served)
        if "dtype" in metafunc.fixturenames:
            metafunc.parametrize("dtype", self.dtypes, ids=str)


def leaf_of(values: Tensor, device: str, dtype: torch.dtype) -> Tensor:
    return values.to(device, dtype, copy=True).requires_grad_()


def integers(generator: torch.Generator, low: int, high: int | Tensor, *size: int) -> Tensor:
    """Uniform in ``[low, high]``; ``high`` may differ from row to row."""
    drawn = torch.rand(size, generator=generator, dtype=torch.float64)
    return (low + drawn * (high - low + 1)).floor().long()


# --- monotonic_align ---------------------------------------------------------------------------------------


@functools.cache
def monotonic_paths(frames: int, tokens: int) -> Array:
    """The token of each frame, of every path; in front those in earlier tokens, seen from the end."""
    starts = itertools.combinations(range(1, frames), tokens - 1)
    paths = [tuple(sum(t >= start for start in each) for t in range(frames)) for each in starts]
    return np.array(sorted(paths, key=lambda path: path[::-1]))


def best_durations(log_probs: Array) -> tuple[list[int], float]:
    """Of all paths of one utterance ``(T, U)`` the first of the best, and its score."""
    frames, tokens = log_probs.shape
    paths = monotonic_paths(frames, tokens)
    totals = log_probs[np.arange(frames), paths].sum(1)
    best = int(totals.argmax())
    return np.bincount(paths[best], minlength=tokens).tolist(), float(totals[best])


def monotonic_batch(seed: int, batch: int, frames: int = 7, tokens: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Padding holds NaN; some rows have places that no path may use."""
    generator = torch.Generator().manual_seed(seed)
    token_lengths = integers(generator, 1, tokens, batch)
    frame_lengths = token_lengths + integers(generator, 0, frames - token_lengths, batch)
    x = integers(generator, -6, 0, batch, frames, tokens) / 2
    holes = torch.rand(x.shape, generator=generator) < 0.1
    holes[::2] = False
    x[holes] = -torch.inf
    for row, (t, u) in enumerate(zip(frame_lengths, token_lengths, strict=True)):
        x[row, t:], x[row, :, u:] = torch.nan, torch.nan
    return x, frame_lengths, token_lengths


# --- ctc_align ---------------------------------------------------------------------------------------------


@functools.cache
def ctc_paths(frames: int, target: tuple[int, ...]) -> Array:
    """Every sequence, of one frame or more, of the blank, 0, and tokens, that collapses to the target.

    The order is that of preference among equal scores, seen from the end: the last token before the blank
    behind it, then at each frame the state that is nearest, of blank, token, blank, token, ..., blank.
    """
    alphabet = range(max(target, default=0) + 1)
    sequences = np.array(list(itertools.product(alphabet, repeat=frames))).reshape(-1, frames)
    before = np.pad(sequences, ((0, 0), (1, 0)))[:, :-1]
    begins = (sequences != 0) & (sequences != before)
    right = begins.sum(1) == len(target)
    sequences, begins = sequences[right], begins[right]
    right = (sequences[begins].reshape(len(sequences), len(target)) == target).all(1)
    sequences, begins = sequences[right], begins[right]
    states = 2 * begins.cumsum(1) - (sequences != 0)
    states[:, -1] *= -1  # of the two last states, the earlier first
    return sequences[np.lexsort(-states.T)]


def ctc_ends(path: Sequence[int], tokens: int, blank: int) -> list[int]:
    """A token ends where the next begins, the last one at the end."""
    begins = [t for t, label in enumerate(path) if label != blank and (t == 0 or label != path[t - 1])]
    return [*begins[1:], *[len(path)] * (tokens - max(len(begins) - 1, 0))]


def ctc_best(log_probs: Array, target: Sequence[int], blank: int) -> tuple[list[int] | None, float]:
    """The first of the best of all paths of one utterance ``(T, C)``, and its score; None where no path has a
    score above -inf."""
    frames = len(log_probs)
    if frames == 0:
        return (None, -np.inf) if target else ([], 0.0)
    names = {token: index for index, token in enumerate(dict.fromkeys(target), 1)}
    labels = np.array([blank, *names])
    paths = labels[ctc_paths(frames, tuple(names[token] for token in target))]
    totals = log_probs[np.arange(frames), paths].sum(1)
    if len(paths) == 0 or totals.max() == -np.inf:
        return None, -np.inf
    best = int(totals.argmax())
    return paths[best].tolist(), float(totals[best])


def viterbi(log_probs: Array, target: Sequence[int], blank: int) -> tuple[list[int] | None, float]:
    """The same for any length, state by state: of equal predecessors the nearest."""
    labels = [blank, *itertools.chain.from_iterable((token, blank) for token in target)]
    best, moves = [0.0, *[-np.inf] * (len(labels) - 1)], []
    for emission in log_probs:
        now, came = [], []
        for s, label in enumerate(labels):
            sources = [best[s], best[s - 1] if s > 0 else -np.inf]
            if s > 1 and label not in (blank, labels[s - 2]):
                sources.append(best[s - 2])
            move = max(range(len(sources)), key=sources.__getitem__)  # the first of equal ones
            now.append(sources[move] + float(emission[label]))
            came.append(move)
        best = now
        moves.append(came)
    state = len(labels) - 1
    if target and best[state - 1] >= best[state]:
        state -= 1
    total = best[state]
    if total == -np.inf:
        return None, total
    path = []
    for came in reversed(moves):
        path.append(labels[state])
        state -= came[state]
    return path[::-1], total


def ctc_batch(
    seed: int, batch: int, frames: int = 6, tokens: int = 3, classes: int = 4, holes: float = 0.1
) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """Log-probabilities, targets, both lengths and the blank. Tokens repeat; some rows have no path."""
    generator = torch.Generator().manual_seed(seed)
    log_probs = integers(generator, -6, -1, batch, frames, classes) / 2
    impossible = torch.rand(log_probs.shape, generator=generator) < holes
    impossible[::2] = False
    log_probs[impossible] = -torch.inf
    blank = seed % classes
    targets = integers(generator, 0, classes - 2, batch, tokens)
    targets += targets >= blank
    input_lengths, target_lengths = (
        integers(generator, 0, frames, batch),
        integers(generator, 0, tokens, batch),
    )
    for row, (t, u) in enumerate(zip(input_lengths, target_lengths, strict=True)):
        log_probs[row, t:], targets[row, u:] = torch.nan, -1
    return log_probs, targets, input_lengths, target_lengths, blank


# --- cif ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fired:
    """Of each token its frames and their weights, and the frame in which it fires + 1."""

    parts: list[dict[int, float]]
    ends: list[int]
    #: Whether no frame ends where a token fires, but for rounding: then ends and slopes are well defined.
    certain: bool = True

    def weights(self, frames: int, tokens: int) -> Array:
        """As a matrix ``(frames, tokens)``, of the first tokens."""
        dense = np.zeros((frames, tokens))
        for token, part in enumerate(self.parts[:tokens]):
            for t, weight in part.items():
                dense[t, token] = weight
        return dense


def integrate_and_fire(
    alpha: Sequence[float], beta: float, threshold: float = 0.5, target: int | None = None
) -> Fired:
    """Algorithm 1 of the paper, frame by frame; then the tail, or with a target the scaling before."""
    frames, total = len(alpha), sum(alpha)
    if target is not None:
        scale = beta * target / total if total > 0 else 0.0
        alpha = [scale * weight for weight in alpha]
    parts: list[dict[int, float]] = [{}]  # of each token: frame -> weight
    ends: list[int] = []
    held, certain = 0.0, True
    for t, left in enumerate(alpha):
        while held + left >= beta:
            parts[-1][t] = beta - held
            left, held = left - (beta - held), 0.0
            parts.append({})
            ends.append(t + 1)
        parts[-1][t] = left
        held += left
        if target is None or t + 1 < frames:  # the last frame is the end of the last token
            apart = min(held, beta - held) if ends else beta - held
            certain = certain and apart > 1e-9 * beta * (1 + len(ends))
    if target is not None:
        # The last token ends with the last frame, whichever way the scaled sum was rounded.
        while len(parts) > max(target, 1):
            for t, weight in parts.pop().items():
                parts[-1][t] = parts[-1].get(t, 0.0) + weight
        ends = [*ends[: max(target - 1, 0)], *[frames] * target][:target]
        parts = [*parts, *[{}] * target][:target]
    elif held >= threshold * beta and held > 0:
        parts[-1] = {t: weight * beta / held for t, weight in parts[-1].items()}
        ends.append(frames)
    else:
        parts.pop()
    return Fired(parts, ends, certain)


def overlaps(alpha: Array, beta: float, tokens: int) -> Array:
    """The dense matrix of overlaps of frames and tokens on the line of weights, without a tail."""
    end, token = np.cumsum(alpha)[:, None], np.arange(tokens)[None]
    begin = end - alpha[:, None]
    return np.maximum(np.minimum(end, (token + 1) * beta) - np.maximum(begin, token * beta), 0.0)


@dataclass(frozen=True, eq=False)
class CifBatch:
    x: Tensor
    alpha: Tensor
    lengths: Tensor
    targets: Tensor | None
    grad: Tensor
    beta: float
    threshold: float

    def fired(self, row: int, add: tuple[int, float] | None = None) -> Fired:
        """With some weight more on one frame."""
        alpha = self.alpha[row, : int(self.lengths[row])].double().tolist()
        if add is not None:
            alpha[add[0]] += add[1]
        target = None if self.targets is None else int(self.targets[row])
        return integrate_and_fire(alpha, self.beta, self.threshold, target)

    @functools.cached_property
    def all_fired(self) -> list[Fired]:
        return [self.fired(row) for row in range(len(self.x))]

    @functools.cached_property
    def expected(self) -> tuple[Array, Array]:
        """The features, and the gradient of the frames."""
        x, grad = self.x.double().numpy(), self.grad.double().numpy()
        features, dx = np.zeros(grad.shape), np.zeros(x.shape)
        for row, (fired, frames) in enumerate(zip(self.all_fired, self.lengths.tolist(), strict=True)):
            weights = fired.weights(frames, grad.shape[1])
            features[row] = weights.T @ x[row, :frames]
            dx[row, :frames] = weights @ grad[row]
        return features, dx

    @functools.cached_property
    def slopes(self) -> Array:
        """The gradient of the weights."""
        found = np.zeros(self.alpha.shape)
        for row, frames in enumerate(self.lengths.tolist()):
            found[row, :frames] = self.d_alpha(row, 2.0**-24)
        return found

    def d_alpha(self, row: int, step: float) -> Array:
        """Differences towards more weight."""
        frames, tokens = int(self.lengths[row]), self.grad.shape[1]
        dots = (self.grad[row].double() @ self.x[row, :frames].double().T).tolist()

        def value(add: tuple[int, float] | None = None) -> float:
            parts = zip(dots, self.fired(row, add).parts[:tokens], strict=False)
            return sum(weight * of_token[t] for of_token, part in parts for t, weight in part.items())

        if self.targets is None:
            here = value()
            return np.array([value((t, step)) - here for t in range(frames)]) / step
        both = [value((t, step)) - value((t, -step)) for t in range(frames)]
        return np.array(both) / (2 * step)


@functools.cache
def cif_batch(
    seed: int,
    batch: int,
    frames: int = 7,
    tokens: int = 5,
    width: int = 3,
    *,
    scaled: bool,
    grid: bool = True,
) -> CifBatch:
    """Weights in eighths, many of them zero; tokens fire at the ends of frames, twice in one, or never."""
    generator = torch.Generator().manual_seed(seed)
    beta, threshold = (1.0, 0.75, 0.5)[seed % 3], (0.5, 0.25, 2.0)[seed // 3 % 3]
    lengths = integers(generator, 0, frames, batch)
    alpha = integers(generator, -4, 12, batch, frames).clamp(min=0) / 8
    alpha[::16] = 0
    if not grid:
        alpha = 0.1 + 1.4 * torch.rand(alpha.shape, generator=generator, dtype=torch.float64)
    x = integers(generator, -8, 8, batch, frames, width) / 4
    for row, length in enumerate(lengths):
        x[row, length:], alpha[row, length:] = torch.nan, torch.nan
    targets = integers(generator, 0, tokens + 1, batch) if scaled else None
    grad = integers(generator, -8, 8, batch, tokens, width) / 4
    return CifBatch(x, alpha, lengths, targets, grad, beta, threshold)


# --- segment_pool ------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class PoolBatch:
    """Frames in no segment hold NaN, and the ends past the counts are wild."""

    x: Tensor
    ends: Tensor
    counts: Tensor
    scores: Tensor
    grad: Tensor

    def slices(self, row: int) -> list[slice]:
        stops = self.ends[row, : int(self.counts[row])].tolist()
        return [slice(a, b) for a, b in zip([0, *stops], stops, strict=False)]

    @functools.cache  # noqa: B019
    def expected(self, reduce: str) -> tuple[Array, Array, Array]:
        """The result, and the gradients of frames and scores, by loops over slices."""
        x, grad, scores = (each.double().numpy() for each in (self.x, self.grad, self.scores))
        out, dx, d_scores = np.zeros(grad.shape), np.zeros(x.shape), np.zeros(scores.shape)
        for row in range(len(x)):
            for j, part in enumerate(self.slices(row)):
                frames, g, n = x[row, part], grad[row, j], part.stop - part.start
                if n == 0:
                    continue
                if reduce == "max":
                    at, columns = frames.argmax(0), np.arange(x.shape[2])  # the first of equal ones
                    out[row, j] = frames[at, columns]
                    dx[row, part.start + at, columns] = g
                    continue
                if reduce == "sum":
                    weights = np.ones(n)
                elif reduce == "mean":
                    weights = np.full(n, 1 / n)
                elif reduce == "last":
                    weights = (np.arange(n) == n - 1).astype(float)
                else:
                    weights = np.exp(scores[row, part] - scores[row, part].max())
                    weights /= weights.sum()
                    dots = frames @ g
                    d_scores[row, part] = weights * (dots - weights @ dots)
                out[row, j] = weights @ frames
                dx[row, part] = np.outer(weights, g)
        return out, dx, d_scores


@functools.cache
def pool_batch(seed: int, batch: int, frames: int = 7, segments: int = 4, width: int = 3) -> PoolBatch:
    generator = torch.Generator().manual_seed(seed)
    ends = integers(generator, 0, frames, batch, segments).sort(1).values
    counts = integers(generator, 0, segments, batch)
    x = integers(generator, -6, 6, batch, frames, width) / 4
    scores = integers(generator, -4, 4, batch, frames) / 2
    for row, count in enumerate(counts):
        last = int(ends[row, count - 1]) if count > 0 else 0
        ends[row, count:] = -9
        x[row, last:], scores[row, last:] = torch.nan, torch.nan
    grad = integers(generator, -8, 8, batch, segments, width) / 4
    return PoolBatch(x, ends, counts, scores, grad)
