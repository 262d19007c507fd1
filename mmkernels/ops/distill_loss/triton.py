"""Triton kernels of :func:`mmkernels.distill_loss`, and the functions behind its ``_triton`` ops.

A program takes one token and reads its prediction and its embedding once; one more adds up the terms of all
tokens, in the order of their blocks.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops._common import accumulate_dtype
from mmkernels.ops._triton import dense_rows, expect, expect_optional, loop_bound, on_device

#: Terms that are added up at a time.
BLOCK_TOKENS = 1024
WARPS = 4


def token_block(width: int) -> tuple[int, int]:
    """Columns that a program takes at a time, and its warps: 16 elements a thread, because it keeps four
    sums for each."""
    block = min(triton.next_power_of_2(max(width, 1)), 2048)
    return block, max(1, block // 512)


@triton.jit
def count_of(counts, row, tokens):
    if counts is None:
        return tokens
    else:
        return tl.minimum(tl.maximum(tl.load(counts + row), 0), tokens)


@triton.jit
def angle_of(pred_pred, pred_row, row_row, LEAST: tl.constexpr):
    """The cosine, and the inverse norms; zeros where a vector has no direction."""
    # NaN has to come through.
    directed = ((pred_pred < LEAST) | (row_row < LEAST)) == 0
    pred = tl.sqrt(tl.where(directed, pred_pred, 1.0))
    row = tl.sqrt(tl.where(directed, row_row, 1.0))
    cosine = tl.where(directed, pred_row / pred / row, 0.0)
    return cosine, tl.where(directed, 1.0 / pred, 0.0), tl.where(directed, 1.0 / row, 0.0)


@triton.jit(do_not_specialize=["tokens", "batch_stride", "token_stride"])
def distill_loss_tokens_kernel(
    pred,
    embeddings,
    ids,
    counts,
    dots,
    terms,
    tokens,
    vocabulary,
    batch_stride,
    token_stride,
    row_stride,
    COSINE_WEIGHT: tl.constexpr,
    LEAST: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Dots and term of one token."""
    index = tl.program_id(0).to(tl.int64)
    batch = index // tokens
    token = index - batch * tokens
    valid = token < count_of(counts, batch, tokens)
    row = tl.load(ids + index, mask=valid, other=0)
    inside = valid & (row >= 0) & (row < vocabulary)
    pred += batch * batch_stride + token * token_stride
    embeddings += tl.where(inside, row, 0) * row_stride
    column = tl.arange(0, BLOCK_D)
    accumulate: tl.constexpr = terms.dtype.element_ty
    squares = tl.zeros((BLOCK_D,), accumulate)
    pred_pred = tl.zeros((BLOCK_D,), accumulate)
    pred_row = tl.zeros((BLOCK_D,), accumulate)
    row_row = tl.zeros((BLOCK_D,), accumulate)
    for start in range(0, WIDTH, BLOCK_D):
        read = inside & (start + column < WIDTH)
        z = tl.load(pred + start + column, mask=read, other=0.0).to(accumulate)
        h = tl.load(embeddings + start + column, mask=read, other=0.0).to(accumulate)
        squares += (z - h) * (z - h)
        pred_pred += z * z
        pred_row += z * h
        row_row += h * h
    # NaN for an id outside the table.
    start_value = tl.where(valid & (inside == 0), float("nan"), 0.0).to(accumulate)
    zz = start_value + tl.sum(pred_pred, 0)
    zh = start_value + tl.sum(pred_row, 0)
    hh = start_value + tl.sum(row_row, 0)
    cosine, _, _ = angle_of(zz, zh, hh, LEAST)
    term = start_value + tl.sum(squares, 0) + COSINE_WEIGHT * (1.0 - cosine)
    tl.store(dots + 3 * index, zz)
    tl.store(dots + 3 * index + 1, zh)
    tl.store(dots + 3 * index + 2, hh)
    tl.store(terms + index, tl.where(valid, term, 0.0).to(accumulate))


@triton.jit(do_not_specialize=["rows", "tokens"])
def distill_loss_mean_kernel(counts, terms, loss, count, rows, tokens, BLOCK_TOKENS: tl.constexpr):
    """The only program: loss and count."""
    lane = tl.arange(0, BLOCK_TOKENS).to(tl.int64)
    places = rows.to(tl.int64) * tokens
    total = tl.zeros((BLOCK_TOKENS,), tl.float64)
    for step in range(loop_bound((places + BLOCK_TOKENS - 1) // BLOCK_TOKENS)):
        place = step * BLOCK_TOKENS + lane
        total += tl.load(terms + place, mask=place < places, other=0.0).to(tl.float64)
    if counts is None:
        valid = places
    else:
        counted = tl.zeros((BLOCK_TOKENS,), tl.int64)
        for step in range(loop_bound((rows + BLOCK_TOKENS - 1) // BLOCK_TOKENS)):
            row = step * BLOCK_TOKENS + lane
            found = tl.load(counts + row, mask=row < rows, other=0)
            counted += tl.minimum(tl.maximum(found, 0), tokens)
        valid = tl.sum(counted, 0)
    tl.store(count, valid)
    mean = tl.sum(total, 0) / tl.maximum(valid, 1).to(tl.float64)
    tl.store(loss, mean.to(loss.dtype.element_ty))


@triton.jit(do_not_specialize=["tokens", "batch_stride", "token_stride"])
def distill_loss_gradient_kernel(
    grad_loss,
    pred,
    embeddings,
    ids,
    counts,
    dots,
    count,
    d_pred,
    tokens,
    vocabulary,
    batch_stride,
    token_stride,
    row_stride,
    COSINE_WEIGHT: tl.constexpr,
    LEAST: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The gradient of one token."""
    index = tl.program_id(0).to(tl.int64)
    batch = index // tokens
    token = index - batch * tokens
    valid = token < count_of(counts, batch, tokens)
    row = tl.load(ids + index, mask=valid, other=0)
    inside = valid & (row >= 0) & (row < vocabulary)
    pred += batch * batch_stride + token * token_stride
    embeddings += tl.where(inside, row, 0) * row_stride
    d_pred += index * WIDTH
    accumulate: tl.constexpr = dots.dtype.element_ty
    zz = tl.load(dots + 3 * index)
    zh = tl.load(dots + 3 * index + 1)
    hh = tl.load(dots + 3 * index + 2)
    cosine, of_pred, of_row = angle_of(zz, zh, hh, LEAST)
    scale = tl.load(grad_loss) / tl.maximum(tl.load(count), 1).to(accumulate)
    scale = tl.where(inside, scale, tl.where(valid, float("nan"), 0.0)).to(accumulate)
    # Products with one inverse norm each: that of two may overflow.
    outer = scale * COSINE_WEIGHT * of_pred
    column = tl.arange(0, BLOCK_D)
    for start in range(0, WIDTH, BLOCK_D):
        written = start + column < WIDTH
        z = tl.load(pred + start + column, mask=inside & written, other=0.0).to(accumulate)
        h = tl.load(embeddings + start + column, mask=inside & written, other=0.0).to(accumulate)
        value = 2.0 * scale * (z - h) + outer * (cosine * of_pred * z - of_row * h)
        value = tl.where(valid, value, 0.0)
        tl.store(d_pred + start + column, value.to(d_pred.dtype.element_ty), mask=written)


def _inputs(
    pred: Tensor, table: Tensor, ids: Tensor, counts: Tensor | None, cosine_weight: float
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    if pred.dim() != 3 or table.dim() != 2 or table.shape[1] != pred.shape[2]:
        raise ValueError(
            f"expected pred (batch, tokens, width) and table (vocabulary, width), got {tuple(pred.shape)} "
            f"and {tuple(table.shape)}"
        )
    if table.device != pred.device or not table.is_floating_point() or not math.isfinite(cosine_weight):
        raise ValueError(f"expected a floating table on {pred.device} and a finite cosine_weight")
    batch, tokens, _ = pred.shape
    ids = expect("ids", ids, (batch, tokens), torch.int64, pred.device)
    counts = expect_optional("counts", counts, (batch,), torch.int64, pred.device)
    return dense_rows(pred), dense_rows(table), ids, counts


def distill_loss_fwd(
    pred: Tensor, table: Tensor, ids: Tensor, counts: Tensor | None, cosine_weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``mmkernels::distill_loss_fwd_triton``."""
    pred, table, ids, counts = _inputs(pred, table, ids, counts, cosine_weight)
    batch, tokens, width = pred.shape
    accumulate = accumulate_dtype(pred.dtype)
    loss = pred.new_empty((), dtype=accumulate)
    dots = pred.new_empty((batch, tokens, 3), dtype=accumulate)
    count = pred.new_empty((), dtype=torch.int64)
    terms = pred.new_empty((batch, tokens), dtype=accumulate)
    block, warps = token_block(width)
    with on_device(pred):
        if batch * tokens > 0:
            distill_loss_tokens_kernel[(batch * tokens,)](
                pred,
                table,
                ids,
                counts,
                dots,
                terms,
                tokens,
                table.shape[0],
                pred.stride(0),
                pred.stride(1),
                table.stride(0),
                COSINE_WEIGHT=cosine_weight,
                LEAST=torch.finfo(accumulate).tiny,
                WIDTH=width,
                BLOCK_D=block,
                num_warps=warps,
            )
        distill_loss_mean_kernel[(1,)](
            counts, terms, loss, count, batch, tokens, BLOCK_TOKENS=BLOCK_TOKENS, num_warps=WARPS
        )
    return loss, dots, count


def distill_loss_bwd(
    grad: Tensor,
    pred: Tensor,
    table: Tensor,
    ids: Tensor,
    counts: Tensor | None,
    dots: Tensor,
    count: Tensor,
    cosine_weight: float,
) -> Tensor:
    """``mmkernels::distill_loss_bwd_triton``."""
    pred, table, ids, counts = _inputs(pred, table, ids, counts, cosine_weight)
    batch, tokens, width = pred.shape
    accumulate, device = accumulate_dtype(pred.dtype), pred.device
    grad = expect("grad", grad, (), accumulate, device)
    dots = expect("dots", dots, (batch, tokens, 3), accumulate, device)
    count = expect("count", count, (), torch.int64, device)
    d_pred = pred.new_empty((batch, tokens, width))
    if d_pred.numel() == 0:
        return d_pred
    block, warps = token_block(width)
    with on_device(pred):
        distill_loss_gradient_kernel[(batch * tokens,)](
            grad,
            pred,
            table,
            ids,
            counts,
            dots,
            count,
            d_pred,
            tokens,
            table.shape[0],
            pred.stride(0),
            pred.stride(1),
            table.stride(0),
            COSINE_WEIGHT=cosine_weight,
            LEAST=torch.finfo(accumulate).tiny,
            WIDTH=width,
            BLOCK_D=block,
            num_warps=warps,
        )
    return d_pred
