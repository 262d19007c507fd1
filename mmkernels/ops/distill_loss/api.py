"""The public function :func:`distill_loss`: checks, choice of backend, gradients."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mmkernels.ops import _common, _derivatives, _inference, _lengths
from mmkernels.ops.distill_loss import reference
from mmkernels.ops.distill_loss.schema import OPS

_OP = "distill_loss"


class _DistillLoss(torch.autograd.Function):
    """Arguments: the backend, and the one asked for; then those of the op in the order of its schema."""

    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        asked: str,
        pred: Tensor,
        table: Tensor,
        ids: Tensor,
        counts: Tensor | None,
        cosine_weight: float,
    ) -> Tensor:
        loss, dots, count = OPS[backend][0](pred, table, ids, counts, cosine_weight)
        ctx.save_for_backward(pred, table, ids, counts, dots, count)
        ctx.options = backend, asked, cosine_weight
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = _common.saved_tensors(_OP, ctx)
        pred, table, ids, counts, *_ = saved
        backend, asked, cosine_weight = ctx.options
        nothing = (None,) * 4
        if _derivatives.beyond_kernels(grad):

            def loss(pred: Tensor) -> Tensor:
                return reference.distill_loss(pred, table, ids, counts=counts, cosine_weight=cosine_weight)

            (found,) = _derivatives.reference_gradients(_OP, asked, loss, (pred,), (True,), grad)
            return (None, None, found, *nothing)
        return (None, None, OPS[backend][1](grad, *saved, cosine_weight), *nothing)


def distill_loss(
    pred: Tensor,
    table: Tensor,
    ids: Tensor,
    *,
    counts: Tensor | None = None,
    cosine_weight: float = 5.0,
    backend: str = "auto",
) -> Tensor:
    """Distance of predicted vectors from the embeddings of tokens, rows of a frozen table: the squared
    Euclidean distance, plus ``cosine_weight`` times one minus the cosine.

    Both are means over the valid tokens of the whole batch. The table is read in place: no embedding is
    gathered into memory, and the only new tensor of the size of ``pred`` is its gradient.

    Equivalent to, for ``pred`` ``(N, H)``::

        h = table[ids]
        squared, cosine = (pred - h).square().sum(-1), F.cosine_similarity(pred, h, dim=-1)
        out = squared.mean() + cosine_weight * (1 - cosine).mean()

    Args:
        pred: ``(B, M, H)`` or ``(N, H)``: float32, float16 or bfloat16, on the CPU float64 too. Any strides;
            copied once where its last dimension is not dense.
        table: ``(V, H)``: the embeddings, as ``model.get_input_embeddings().weight.detach()`` of a language
            model. Its dtype may be another than that of ``pred``: each is read as it is. A table whose rows
            are not dense is copied whole, on each call.
        ids: ``(B, M)`` or ``(N,)``: int64 or int32, the row of ``table`` for each vector.
        counts: ``(B,)`` integers: valid tokens of each row, for three-dimensional ``pred``. What comes after
            them is not read, neither vectors nor ids, and gets a gradient of zero.
        cosine_weight: factor of the cosine's part, not negative.
        backend: ``"auto"``, ``"native"`` (compiled), ``"triton"`` or ``"reference"``.

    Returns:
        The loss, one number: float32 (float64 for a float64 ``pred``), as all sums. Without a valid token it
        is 0.

    Gradients flow to ``pred`` alone. pred, table and int64 ids are kept for the backward pass, not copied,
    with three numbers for each token. A NaN in a valid vector makes the loss and that vector's gradient NaN.

    A vector without direction, with a norm below 1e-19 (1e-154 in float64), has the cosine 0, and no gradient
    of it; so has one whose embedding is such. ``F.cosine_similarity`` instead raises norms below ``eps=1e-8``
    to ``eps``, so that its gradient at a zero vector has a norm of 1e8; from norms of 1e-8 on both are equal.

    Forward mode, ``torch.func`` and gradients of gradients are the reference's: ``"auto"`` takes it by
    itself, a kernel asked for by name raises.

    Raises:
        TypeError: A value of the wrong type or dtype.
        ValueError: Shapes, devices or options that do not fit, a table that requires a gradient, or a
            backend that cannot serve; on the CPU also ids outside the table and counts outside ``[0, M]``. On
            CUDA, where reading values would wait for the device, and under ``torch.compile`` and
            ``torch.func``, counts are clamped, and an id outside the table makes the loss and the gradient of
            its vector NaN.
        RuntimeError: In the backward pass: an input was overwritten since the forward pass.

    Source: Tan et al., SSR-Connector (arXiv 2410.00168), the loss of the first stage.
    """
    cosine_weight = _check_weight(cosine_weight)
    _check_inputs(pred, table, ids)
    if counts is not None and pred.dim() != 3:
        raise ValueError(f"{_OP}: counts are for pred (B, M, H), got pred of shape {tuple(pred.shape)}")
    if pred.dim() == 2:
        pred, ids = pred.unsqueeze(0), ids.unsqueeze(0)
    counts = _lengths.check_lengths(_OP, "counts", counts, "pred", pred, pred.shape[1])
    _check_ids(ids, counts, table)
    asked = backend
    if forward_ad._current_level >= 0 or _derivatives.transforms_active():
        backend = _derivatives.backend_in_transforms(_OP, backend, (pred, table, ids, counts))
    # The kernels of a device take both dtypes, or do not serve.
    backend = _common.choose_backend(_OP, backend, table if table.dtype == torch.float64 else pred)
    if backend == "reference":
        return reference.distill_loss(pred, table, ids, counts=counts, cosine_weight=cosine_weight)
    ids = ids.to(torch.int64)
    if _common.needs_gradient(pred):
        inputs = (pred, table, ids, counts, cosine_weight)
        loss: Tensor = _inference.apply(_DistillLoss, pred, backend, asked, *inputs)
        return loss
    return OPS[backend][0](pred, table, ids, counts, cosine_weight)[0]


def _check_weight(cosine_weight: float) -> float:
    if isinstance(cosine_weight, bool) or not isinstance(cosine_weight, (int, float)):
        raise TypeError(f"{_OP}: cosine_weight must be a number, got {type(cosine_weight).__name__}")
    if not 0 <= cosine_weight <= sys.float_info.max:
        raise ValueError(f"{_OP}: cosine_weight must be finite and not negative, got {cosine_weight}")
    return float(cosine_weight)


def _check_inputs(pred: Tensor, table: Tensor, ids: Tensor) -> None:
    for name, tensor in (("pred", pred), ("table", table), ("ids", ids)):
        _common.check_tensor(_OP, name, tensor)
    _common.check_floating(_OP, "pred", pred)
    _common.check_floating(_OP, "table", table)
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{_OP}: ids must be int64 or int32, got {ids.dtype}")
    if pred.dim() not in (2, 3):
        raise ValueError(f"{_OP}: pred must be (B, M, H) or (N, H), got shape {tuple(pred.shape)}")
    if table.dim() != 2 or table.shape[1] != pred.shape[-1]:
        raise ValueError(
            f"{_OP}: table must be (V, {pred.shape[-1]}), rows of the width of pred, "
            f"got shape {tuple(table.shape)}"
        )
    if ids.shape != pred.shape[:-1]:
        raise ValueError(
            f"{_OP}: ids must have shape {tuple(pred.shape[:-1])}, one for each vector of pred, "
            f"got {tuple(ids.shape)}"
        )
    for name, tensor in (("table", table), ("ids", ids)):
        if tensor.device != pred.device:
            raise ValueError(f"{_OP}: {name} is on {tensor.device}, pred is on {pred.device}")
    if table.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{_OP}: table gets no gradient, but requires one; pass table.detach()")


def _check_ids(ids: Tensor, counts: Tensor | None, table: Tensor) -> None:
    if not _lengths.readable(ids) or ids.numel() == 0:
        return
    rows = table.shape[0]
    low, high = (int(value) for value in torch.aminmax(ids))
    if low >= 0 and high < rows:
        return
    wrong = (ids < 0) | (ids >= rows)
    if counts is not None:
        wrong &= torch.arange(ids.shape[1]) < counts[:, None]
    if wrong.any():
        row, token = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"{_OP}: ids must lie in [0, {rows}), the rows of table, got {int(ids[row, token])} in row {row} "
            f"of the batch at token {token}"
        )
