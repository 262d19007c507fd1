"""Triton kernels of a product with a LayerNorm folded into it, which several ops share.

A *norm product* is ``act(LN(x[:, l]) @ weight[l]^T + bias[l])`` of a batch of taps ``l``, forward and
backward; the LayerNorm is optional. ``csrc/include/mmkernels/layer_project.h`` derives the algebra: with
``Vc`` the centred ``W * gamma``, ``z = rstd * x Vc^T + b'``. Here ``Vc`` is rounded to the type of ``x``, and
its rows no longer sum to zero exactly. The kernel subtracts ``rstd * mean(x)`` times their sums, so that
rounding is relative to the normalised input, for any mean of ``x``. Backwards, ``g = dL/dz * rstd``, and
``pull`` is the factor of ``x - mean`` in the gradient of a row of ``x``. Parameters have the type of sums, or
that of ``x``; their gradients are sums, rounded once to that type.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mmkernels.ops._triton import (
    activate,
    activation_slope,
    add_product,
    tile_of,
)


@triton.jit
def load_as(pointers, mask, dtype: tl.constexpr):
    return tl.load(pointers, mask=mask, other=0.0).to(dtype)


@triton.jit
def norm_product_fold_kernel(
    weight,
    bias,
    norm_weight,
    norm_bias,
    folded_weight,
    folded_bias,
    weight_sum,
    outputs,
    WIDTH: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One row of ``Vc``, the sum of the rounded row, and its entry of ``b'``; that alone if ``folded_weight``
    is None."""
    row = tl.program_id(0).to(tl.int64)
    tap = row // outputs
    column = tl.arange(0, BLOCK_C).to(tl.int64)
    accumulate: tl.constexpr = folded_bias.dtype.element_ty
    gained = tl.zeros((BLOCK_C,), accumulate)
    shifted = tl.zeros((BLOCK_C,), accumulate)
    for start in range(0, WIDTH, BLOCK_C):
        used = start + column < WIDTH
        w = load_as(weight + row * WIDTH + start + column, used, accumulate)
        if norm_weight is not None:
            gained += w * load_as(norm_weight + tap * WIDTH + start + column, used, accumulate)
        if norm_bias is not None:
            shifted += w * load_as(norm_bias + tap * WIDTH + start + column, used, accumulate)
    total = tl.sum(shifted, 0)
    if bias is not None:
        total += tl.load(bias + row).to(accumulate)
    tl.store(folded_bias + row, total)

    if folded_weight is not None:
        mean = tl.sum(gained, 0) / WIDTH
        rounded_sum = tl.zeros((BLOCK_C,), accumulate)
        for start in range(0, WIDTH, BLOCK_C):
            used = start + column < WIDTH
            w = load_as(weight + row * WIDTH + start + column, used, accumulate)
            if norm_weight is not None:
                w = w * load_as(norm_weight + tap * WIDTH + start + column, used, accumulate) - mean
            rounded = tl.where(used, w, 0.0).to(folded_weight.dtype.element_ty)
            rounded_sum += rounded.to(accumulate)
            tl.store(folded_weight + row * WIDTH + start + column, rounded, mask=used)
        tl.store(weight_sum + row, tl.sum(rounded_sum, 0))


@triton.jit(do_not_specialize=["rows"])
def norm_product_fwd_kernel(
    x,
    folded_weight,
    folded_bias,
    weight_sum,
    stats,
    y,
    preactivation,
    rows,
    taps,
    outputs,
    row_stride,
    tap_stride,
    WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """A tile of ``y``, and of the value before the activation where it is wanted; ``y`` holds the product if
    ``x`` is None."""
    accumulate: tl.constexpr = folded_bias.dtype.element_ty
    tap = tl.program_id(1).to(tl.int64)
    row_tile, column_tile = tile_of(
        tl.program_id(0).to(tl.int64), tl.cdiv(rows, BLOCK_M), tl.cdiv(outputs, BLOCK_N), GROUP
    )
    row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    column = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    line = row * taps + tap
    inside = (row < rows)[:, None] & (column < outputs)[None, :]
    target = line[:, None] * outputs + column[None, :]
    if x is None:
        total = tl.load(y + target, mask=inside, other=0.0).to(accumulate)
    else:
        k = tl.arange(0, BLOCK_K).to(tl.int64)
        source = x + tap * tap_stride + row[:, None] * row_stride + k[None, :]
        factor = folded_weight + (tap * outputs + column[None, :]) * WIDTH + k[:, None]
        total = tl.zeros((BLOCK_M, BLOCK_N), accumulate)
        for start in range(0, WIDTH, BLOCK_K):
            left = WIDTH - start
            a = tl.load(source + start, mask=(row < rows)[:, None] & (k < left)[None, :], other=0.0)
            b = tl.load(factor + start, mask=(column < outputs)[None, :] & (k < left)[:, None], other=0.0)
            total = add_product(a, b, total)

    entry = tap * outputs + column
    if stats is not None:
        mean = tl.load(stats + line * 2, mask=row < rows, other=0.0)
        rstd = tl.load(stats + line * 2 + 1, mask=row < rows, other=0.0)
        remainder = tl.load(weight_sum + entry, mask=column < outputs, other=0.0)
        total = (total - mean[:, None] * remainder[None, :]) * rstd[:, None]
    z = total + tl.load(folded_bias + entry, mask=column < outputs, other=0.0)[None, :]
    if preactivation is not None:
        tl.store(preactivation + target, z.to(preactivation.dtype.element_ty), mask=inside)
    tl.store(y + target, activate(z, ACTIVATION).to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def norm_product_gradient_kernel(
    grad,
    value,
    stats,
    folded_bias,
    scaled_grad,
    pull,
    partial_bias,
    rows,
    taps,
    inputs,
    OUTPUTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """``g = dL/dz * rstd``, ``pull`` of the rows of one tile, and the tile's part of the bias gradient."""
    accumulate: tl.constexpr = partial_bias.dtype.element_ty
    chunk = tl.program_id(0).to(tl.int64)
    tap = tl.program_id(1).to(tl.int64)
    row = chunk * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    line = row * taps + tap
    if stats is not None:
        rstd = tl.load(stats + line * 2 + 1, mask=row < rows, other=0.0)
    pull_sum = tl.zeros((BLOCK_ROWS,), accumulate)
    for start in range(0, OUTPUTS, BLOCK_O):
        column = start + tl.arange(0, BLOCK_O).to(tl.int64)
        used = column < OUTPUTS
        inside = (row < rows)[:, None] & used[None, :]
        place = line[:, None] * OUTPUTS + column[None, :]
        v = tl.load(value + place, mask=inside, other=0.0).to(accumulate)
        dz = tl.load(grad + place, mask=inside, other=0.0).to(accumulate)
        dz = dz * activation_slope(v, ACTIVATION)
        tl.store(partial_bias + (chunk * taps + tap) * OUTPUTS + column, tl.sum(dz, 0), mask=used)
        if stats is not None:
            dz = dz * rstd[:, None]
        if scaled_grad is not None:
            tl.store(scaled_grad + place, dz.to(scaled_grad.dtype.element_ty), mask=inside)
        if pull is not None:
            # relu's output is z where its gradient is not zero.
            shift = tl.load(folded_bias + tap * OUTPUTS + column, mask=used, other=0.0)
            pull_sum += tl.sum(dz * (v - shift[None, :]), 1)
    if pull is not None:
        tl.store(pull + line, pull_sum * rstd / inputs, mask=row < rows)


@triton.jit(do_not_specialize=["rows"])
def norm_product_dx_kernel(
    scaled_grad,
    folded_weight,
    x,
    stats,
    pull,
    addend,
    dx,
    rows,
    taps,
    inputs,
    row_stride,
    tap_stride,
    OUTPUTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """``dx = g Vc - pull * (x - mean)``, with ``addend`` if there is one; rounded once. ``dx`` holds the
    product if ``folded_weight`` is None."""
    tap = tl.program_id(1).to(tl.int64)
    row_tile, column_tile = tile_of(
        tl.program_id(0).to(tl.int64), tl.cdiv(rows, BLOCK_M), tl.cdiv(inputs, BLOCK_N), GROUP
    )
    row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    column = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    line = row * taps + tap
    inside = (row < rows)[:, None] & (column < inputs)[None, :]
    place = line[:, None] * inputs + column[None, :]
    accumulate: tl.constexpr = tl.float64 if dx.dtype.element_ty == tl.float64 else tl.float32
    if folded_weight is None:
        total = tl.load(dx + place, mask=inside, other=0.0).to(accumulate)
    else:
        k = tl.arange(0, BLOCK_K).to(tl.int64)
        source = scaled_grad + line[:, None] * OUTPUTS + k[None, :]
        factor = folded_weight + (tap * OUTPUTS + k[:, None]) * inputs + column[None, :]
        total = tl.zeros((BLOCK_M, BLOCK_N), accumulate)
        for start in range(0, OUTPUTS, BLOCK_K):
            left = OUTPUTS - start
            a = tl.load(source + start, mask=(row < rows)[:, None] & (k < left)[None, :], other=0.0)
            known = (column < inputs)[None, :] & (k < left)[:, None]
            b = tl.load(factor + start * inputs, mask=known, other=0.0)
            total = add_product(a, b, total)

    if stats is not None:
        mean = tl.load(stats + line * 2, mask=row < rows, other=0.0)
        strength = tl.load(pull + line, mask=row < rows, other=0.0)
        values = x + tap * tap_stride + row[:, None] * row_stride + column[None, :]
        centred = tl.load(values, mask=inside, other=0.0).to(accumulate) - mean[:, None]
        total -= strength[:, None] * centred
    if addend is not None:
        total += tl.load(addend + place, mask=inside, other=0.0).to(accumulate)
    tl.store(dx + place, total.to(dx.dtype.element_ty), mask=inside)


@triton.jit
def norm_product_unfold_kernel(
    product,
    product_mean,
    d_bias,
    weight,
    norm_weight,
    norm_bias,
    d_weight,
    d_norm_weight,
    d_norm_bias,
    inputs,
    OUTPUTS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dW, dgamma and dbeta of some columns of one tap, from ``dVc = g^T x``."""
    accumulate: tl.constexpr = product.dtype.element_ty
    tap = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    used = column < inputs
    scale_sum = tl.zeros((BLOCK_C,), accumulate)
    shift_sum = tl.zeros((BLOCK_C,), accumulate)
    gain = load_as(norm_weight + tap * inputs + column, used, accumulate)
    if norm_bias is not None:
        shift = load_as(norm_bias + tap * inputs + column, used, accumulate)
    for start in range(0, OUTPUTS, BLOCK_O):
        output = start + tl.arange(0, BLOCK_O).to(tl.int64)
        inside = (output < OUTPUTS)[:, None] & used[None, :]
        entry = tap * OUTPUTS + output
        place = entry[:, None] * inputs + column[None, :]
        w = load_as(weight + place, inside, accumulate)
        d_shifted = tl.load(d_bias + entry, mask=output < OUTPUTS, other=0.0)
        shift_sum += tl.sum(d_shifted[:, None] * w, 0)
        mean = tl.load(product_mean + entry, mask=output < OUTPUTS, other=0.0)
        d_product = tl.load(product + place, mask=inside, other=0.0) - mean[:, None]
        scale_sum += tl.sum(d_product * w, 0)
        dw = d_product * gain[None, :]
        if norm_bias is not None:
            dw += d_shifted[:, None] * shift[None, :]
        tl.store(d_weight + place, dw.to(d_weight.dtype.element_ty), mask=inside)
    if d_norm_weight is not None:
        place = tap * inputs + column
        tl.store(d_norm_weight + place, scale_sum.to(d_norm_weight.dtype.element_ty), mask=used)
        tl.store(d_norm_bias + place, shift_sum.to(d_norm_bias.dtype.element_ty), mask=used)
