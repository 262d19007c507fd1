"""Definitions of the ops of SSR-Connector, segment_attention and distill_loss, that share nothing with their
references, and random batches of small utterances for them.

Values lie on coarse grids, so that they are the same in every dtype.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from segment_oracles import integers
from torch import Tensor

# --- segment_attention -------------------------------------------------------------------------------------


def authors_mask(boundaries: Sequence[int], frames: int, lookback: int) -> Tensor:
    """Which keys each query sees, ``(frames, frames)``. A boundary is the last frame of a segment. Query i
    sees the keys from s(i), the largest boundary below i, or from 0 if there is none; that is a ``lookback``
    of 1, and others begin as much earlier or later."""
    sees = torch.zeros(frames, frames, dtype=torch.bool)
    for i in range(frames):
        below = [boundary for boundary in boundaries if boundary < i]
        first = max(max(below) + 1 - lookback, 0) if below else 0
        sees[i, first : i + 1] = True
    return sees


@dataclass(frozen=True)
class Bounded:
    """A result in float64, and the sum of the magnitudes of its terms, to which rounding is proportional."""

    exact: Tensor
    size: Tensor


@dataclass(frozen=True, eq=False)
class AttentionBatch:
    """Frames in no segment hold NaN, also in the gradient."""

    q: Tensor
    k: Tensor
    v: Tensor
    ends: Tensor
    grad: Tensor
    lookback: int
    scale: float | None

    @functools.cached_property
    def masks(self) -> list[Tensor]:
        """Of the frames of each row that are in segments."""
        stops = self.ends.tolist()
        return [authors_mask([end - 1 for end in ends], ends[-1], self.lookback) for ends in stops]

    @property
    def single(self) -> Tensor:
        """The queries that see one key, ``(B, T)``."""
        found = torch.zeros(self.q.shape[0], self.q.shape[2], dtype=torch.bool)
        for row, sees in zip(found, self.masks, strict=True):
            row[: len(sees)] = sees.sum(1) == 1
        return found

    @functools.cached_property
    def expected(self) -> dict[str, Bounded]:
        """The result and the gradients: each row alone, without its padding, in torch's attention."""
        like = {"out": self.q, "q": self.q, "k": self.k, "v": self.v}
        found = {
            name: Bounded(torch.zeros(x.shape).double(), torch.zeros(x.shape).double())
            for name, x in like.items()
        }
        for row, sees in enumerate(self.masks):
            for name, (exact, size) in self.of_row(row, sees).items():
                found[name].exact[row, :, : len(sees)] = exact
                found[name].size[row, :, : len(sees)] = size
        return found

    def of_row(self, row: int, sees: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        frames = len(sees)
        leaves = [x[row, :, :frames].double().requires_grad_() for x in (self.q, self.k, self.v)]
        grad = self.grad[row, :, :frames].double()
        heads, key_heads = self.q.shape[1], self.k.shape[1]
        of_head = [head * key_heads // heads for head in range(heads)]
        q, k, v = leaves[0], leaves[1][of_head], leaves[2][of_head]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=sees, scale=self.scale)
        exact = (out.detach(), *torch.autograd.grad(out, leaves, grad))
        with torch.no_grad():
            sizes = self.sizes(q, k, v, grad, sees)
        of_keys = [torch.zeros_like(leaves[1]).index_add_(0, torch.tensor(of_head), s) for s in sizes[2:]]
        return dict(zip(("out", "q", "k", "v"), zip(exact, (*sizes[:2], *of_keys), strict=True), strict=True))

    def sizes(self, q: Tensor, k: Tensor, v: Tensor, grad: Tensor, sees: Tensor) -> tuple[Tensor, ...]:
        """Of the result and the gradients of q, k, v, with a head of keys for each of queries."""
        scale = q.shape[-1] ** -0.5 if self.scale is None else self.scale
        scores = (scale * q @ k.mT).masked_fill(~sees, -torch.inf)
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        products = grad.abs() @ v.abs().mT
        of_scores = abs(scale) * weights * (products + (weights * products).sum(-1, keepdim=True))
        return weights @ v.abs(), of_scores @ k.abs(), of_scores.mT @ q.abs(), weights.mT @ grad.abs()


# As many of each as are coprime: successive seeds have others of all of them.
LOOKBACKS = (1, 0, 2, 5, 2**62)
HEADS = ((4, 2), (1, 1), (3, 1), (2, 2))
SIZES = (8, 24, 16)
SCALES = (None, 0.25, None, -0.5, None, 0.0, None)


@functools.cache
def attention_batch(seed: int, batch: int, frames: int = 12, segments: int = 5) -> AttentionBatch:
    """Segments of no frame, of one and of many; of seven rows one is all in segments, one mostly in none."""
    generator = torch.Generator().manual_seed(seed)
    heads, key_heads = HEADS[seed % len(HEADS)]
    size = SIZES[seed % len(SIZES)]
    ends = integers(generator, 0, frames, batch, segments).sort(1).values
    ends[::7, -1] = frames
    ends[4::7] = ends[4::7].clamp(max=2)

    def values(count: int) -> Tensor:
        rows = integers(generator, -6, 6, batch, frames, count, size) / 4
        for row, stop in enumerate(ends[:, -1].tolist()):
            rows[row, stop:] = torch.nan
        return rows.transpose(1, 2)

    return AttentionBatch(
        *(values(heads), values(key_heads), values(key_heads), ends, values(heads)),
        LOOKBACKS[seed % len(LOOKBACKS)],
        SCALES[seed % len(SCALES)],
    )


# --- distill_loss ------------------------------------------------------------------------------------------


def token_loss(z: Sequence[float], h: Sequence[float]) -> tuple[float, float]:
    """Of one token the squared distance, and one minus the cosine, which is 0 without a direction."""
    distance = dot = of_z = of_h = 0.0
    for a, b in zip(z, h, strict=True):
        distance += (a - b) ** 2
        dot += a * b
        of_z += a * a
        of_h += b * b
    cosine = dot / math.sqrt(of_z * of_h) if of_z > 0 and of_h > 0 else 0.0
    return distance, 1 - cosine


def token_gradient(z: Sequence[float], h: Sequence[float], weight: float) -> tuple[list[float], float]:
    """Of the loss of one token, and the largest magnitude of its terms."""
    of_z, of_h = math.sqrt(math.fsum(a * a for a in z)), math.sqrt(math.fsum(b * b for b in h))
    if of_z == 0 or of_h == 0:
        return [2 * (a - b) for a, b in zip(z, h, strict=True)], 0.0
    cosine = math.fsum(a * b for a, b in zip(z, h, strict=True)) / (of_z * of_h)
    angular = [weight * (cosine * a / of_z - b / of_h) / of_z for a, b in zip(z, h, strict=True)]
    return [2 * (a - b) + c for a, b, c in zip(z, h, angular, strict=True)], weight / of_z


@dataclass(frozen=True, eq=False)
class DistillBatch:
    """After the counts there are NaN, and ids outside the table."""

    pred: Tensor
    table: Tensor
    ids: Tensor
    counts: Tensor | None
    weight: float
    grad: float

    @functools.cached_property
    def tokens(self) -> list[tuple[int, int]]:
        counts = [self.pred.shape[1]] * len(self.pred) if self.counts is None else self.counts.tolist()
        return [(row, token) for row, count in enumerate(counts) for token in range(count)]

    def pair(self, row: int, token: int) -> tuple[list[float], list[float]]:
        return self.pred[row, token].tolist(), self.table[int(self.ids[row, token])].tolist()

    @functools.cached_property
    def loss(self) -> tuple[float, float]:
        """The means of distances and of one minus cosines."""
        distances, cosines = 0.0, 0.0
        for row, token in self.tokens:
            distance, cosine = token_loss(*self.pair(row, token))
            distances += distance
            cosines += cosine
        count = max(len(self.tokens), 1)
        return distances / count, cosines / count

    @functools.cached_property
    def gradient(self) -> Bounded:
        exact, size = torch.zeros(self.pred.shape).double(), torch.zeros(self.pred.shape).double()
        for row, token in self.tokens:
            of_token, largest = token_gradient(*self.pair(row, token), self.weight)
            exact[row, token] = self.grad / len(self.tokens) * torch.tensor(of_token, dtype=torch.float64)
            size[row, token] = abs(self.grad) / len(self.tokens) * largest
        return Bounded(exact, size)


WEIGHTS = (5.0, 0.0, 0.75)
WIDTHS = (3, 8, 33, 1, 72)
GRADIENTS = (1.0, -0.375)  # of the loss


@functools.cache
def distill_batch(seed: int) -> DistillBatch:
    """Some vectors are zero, some equal to their embedding, or opposite to it."""
    generator = torch.Generator().manual_seed(seed)

    sizes = [int(integers(generator, 1, most, 1)) for most in (6, 4, 7)]
    batch, tokens, rows, width = *sizes, WIDTHS[seed % len(WIDTHS)]
    table = integers(generator, -6, 6, rows, width) / 4
    table[0] = 0.0
    ids = integers(generator, 0, rows - 1, batch, tokens)
    pred = integers(generator, -8, 8, batch, tokens, width) / 4
    kind = integers(generator, 0, 9, batch, tokens)
    pred[kind == 0] = 0.0
    pred[kind == 1] = table[ids[kind == 1]]
    pred[kind == 2] = -table[ids[kind == 2]]
    counts = integers(generator, 0, tokens, batch) if seed % 4 else None
    if counts is not None:
        for row, count in enumerate(counts.tolist()):
            pred[row, count:], ids[row, count:] = torch.nan, -100
    return DistillBatch(pred, table, ids, counts, WEIGHTS[seed % 3], GRADIENTS[seed % 2])
