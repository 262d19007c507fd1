"""torch ops behind :func:`mmkernels.cif`; ``alpha`` is of the accumulation type, lengths are int64.

The forward op also returns the plan that the backward op follows: ``token (B, T + 1)`` int32, the token in
which frame t begins, and the one in which the last frame ends; ``weights (B, T, 2)``, the frame's weights in
the tokens in which it begins and ends; ``facts (B, 2)`` float64, the scale of alpha and 1 / its sum with
target lengths; else the factor of the tail and 1, or 1 and 0 where no tail fires.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels import _library
from mmkernels.ops._common import accumulate_dtype


def _forward_fake(
    x: Tensor,
    alpha: Tensor,
    lengths: Tensor | None,
    target_lengths: Tensor | None,
    beta: float,
    tail_threshold: float,
    max_length: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, frames, width = x.shape
    return (
        x.new_empty((batch, max_length, width)),
        x.new_empty((batch,), dtype=torch.int64),
        x.new_empty((batch, max_length), dtype=torch.int64),
        x.new_empty((batch, frames + 1), dtype=torch.int32),
        x.new_empty((batch, frames, 2), dtype=accumulate_dtype(x.dtype)),
        x.new_empty((batch, 2), dtype=torch.float64),
    )


def _backward_fake(
    grad: Tensor,
    x: Tensor,
    alpha: Tensor,
    lengths: Tensor | None,
    counts: Tensor,
    token: Tensor,
    weights: Tensor,
    facts: Tensor,
    beta: float,
    scaled: bool,
    need_x: bool,
    need_alpha: bool,
) -> tuple[Tensor, Tensor]:
    batch, frames, width = x.shape
    return (
        x.new_empty((batch, frames, width) if need_x else (0, frames, width)),
        alpha.new_empty((batch, frames) if need_alpha else (0, frames)),
    )


_library.define(
    "cif_fwd",
    "Tensor x, Tensor alpha, Tensor? lengths, Tensor? target_lengths, float beta, float tail_threshold, "
    "SymInt max_length",
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward_fake,
    "mmkernels.ops.cif.triton",
)
_library.define(
    "cif_bwd",
    "Tensor grad, Tensor x, Tensor alpha, Tensor? lengths, Tensor counts, Tensor token, Tensor weights, "
    "Tensor facts, float beta, bool scaled, bool need_x, bool need_alpha",
    "(Tensor, Tensor)",
    _backward_fake,
    "mmkernels.ops.cif.triton",
)

_ops = torch.ops.mmkernels
#: backend -> (forward op, backward op)
OPS = {
    "native": (_ops.cif_fwd.default, _ops.cif_bwd.default),
    "triton": (_ops.cif_fwd_triton.default, _ops.cif_bwd_triton.default),
}
