"""torch ops behind :func:`mmkernels.distill_loss`; ids and counts are int64.

The forward op also returns, for the backward op, ``dots (B, M, 3)``: each token's ``z @ z``, ``z @ h`` and
``h @ h``, in the accumulation type; and ``count ()`` int64, the valid tokens of all rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels import _library
from mmkernels.ops._common import accumulate_dtype


def _forward_fake(
    pred: Tensor, table: Tensor, ids: Tensor, counts: Tensor | None, cosine_weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens, _ = pred.shape
    accumulate = accumulate_dtype(pred.dtype)
    return (
        pred.new_empty((), dtype=accumulate),
        pred.new_empty((batch, tokens, 3), dtype=accumulate),
        pred.new_empty((), dtype=torch.int64),
    )


def _backward_fake(
    grad: Tensor,
    pred: Tensor,
    table: Tensor,
    ids: Tensor,
    counts: Tensor | None,
    dots: Tensor,
    count: Tensor,
    cosine_weight: float,
) -> Tensor:
    return pred.new_empty(pred.shape)


_library.define(
    "distill_loss_fwd",
    "Tensor pred, Tensor table, Tensor ids, Tensor? counts, float cosine_weight",
    "(Tensor, Tensor, Tensor)",
    _forward_fake,
    "mmkernels.ops.distill_loss.triton",
)
_library.define(
    "distill_loss_bwd",
    "Tensor grad, Tensor pred, Tensor table, Tensor ids, Tensor? counts, Tensor dots, Tensor count, "
    "float cosine_weight",
    "Tensor",
    _backward_fake,
    "mmkernels.ops.distill_loss.triton",
)

_ops = torch.ops.mmkernels
#: backend -> (forward op, backward op)
OPS = {
    "native": (_ops.distill_loss_fwd.default, _ops.distill_loss_bwd.default),
    "triton": (_ops.distill_loss_fwd_triton.default, _ops.distill_loss_bwd_triton.default),
}
