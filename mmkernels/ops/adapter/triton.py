"""Triton kernels of :func:`mmkernels.adapter`, and the functions behind its ``_triton`` ops.

``csrc/include/mmkernels/adapter.h`` derives the algebra. The down-projection is a norm product of one tap
(``ops/_norm_product.py``); the up-projection too is rounded to the type of ``x``. Where the hidden layer of a
block of rows fits into registers, each direction is one kernel that reads the rows once for the
down-projection, and from cache for the up-projection. Wider bottlenecks, and dtypes without tensor cores,
keep the hidden layer in memory between two kernels. Gradients of the matrices are products of whole tensors.

A tile that a product reads must have no other use in the same loop: on sm_90 Triton 3.6 gives such a tile one
buffer too few, and the copy of a later tile overwrites what the tensor cores still read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.activations import ACTIVATIONS
from mmkernels.ops import _norm_product
from mmkernels.ops._common import accumulate_dtype
from mmkernels.ops._triton import (
    activate,
    activation_slope,
    add_product,
    batched_product,
    expect,
    expect_optional,
    library_multiplies,
    multiply_into,
    on_device,
    product_grid,
    product_options,
    row_stats,
    shared_memory_limit,
    tile_of,
)


@dataclass(frozen=True)
class FusedTile:
    """BLOCK_M rows with their hidden layer; the width of x passes in steps of BLOCK_D."""

    block_m: int
    block_d: int
    warps: int
    stages: int


#: Most hidden units -> tile, for products of half precision. Each block of rows reads the matrices again,
#: from L2, so blocks are as tall as registers allow.
FORWARD_TILES = {
    64: FusedTile(128, 64, warps=8, stages=3),
    128: FusedTile(128, 64, warps=8, stages=3),
    256: FusedTile(64, 64, warps=8, stages=3),
}
#: The third stage of the widest tile takes 104 KiB of shared memory on sm_80 and 136 KiB on sm_90. A block of
#: sm_86, sm_89 and sm_120 has 99 KiB.
SHARED_FOR_THREE_STAGES = 136 * 1024
NARROW_FORWARD_TILES = {**FORWARD_TILES, 256: FusedTile(64, 64, warps=8, stages=2)}
BACKWARD_TILES = {
    64: FusedTile(128, 64, warps=16, stages=3),
    128: FusedTile(64, 64, warps=16, stages=3),
    256: FusedTile(32, 64, warps=8, stages=2),
}


def forward_tiles(shared_memory: int) -> dict[int, FusedTile]:
    """The tiles for blocks with so many bytes of shared memory."""
    return FORWARD_TILES if shared_memory >= SHARED_FOR_THREE_STAGES else NARROW_FORWARD_TILES


def fused_tile(table: dict[int, FusedTile], dtype: torch.dtype, bottleneck: int) -> FusedTile | None:
    """The tile of the fused kernel, or None where it has none."""
    if dtype.itemsize != 2:
        return None
    return next((tile for most, tile in table.items() if bottleneck <= most), None)


def fused_options(tile: FusedTile, width: int, bottleneck: int) -> dict[str, int]:
    return {
        "WIDTH": width,
        "BOTTLENECK": bottleneck,
        "BLOCK_M": tile.block_m,
        "BLOCK_H": max(16, triton.next_power_of_2(bottleneck)),
        "BLOCK_D": tile.block_d,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


@triton.jit
def store_sum(product, bias, addend, out, row, column, rows, addend_stride, scale, columns):
    """Writes ``addend + scale * (product + bias)`` to a tile of ``out (rows, columns)``."""
    used = column < columns
    inside = (row < rows)[:, None] & used[None, :]
    if bias is not None:
        product += tl.load(bias + column, mask=used, other=0.0).to(product.dtype)[None, :]
    total = product * scale
    if addend is not None:
        source = addend + row[:, None] * addend_stride + column[None, :]
        total += tl.load(source, mask=inside, other=0.0).to(total.dtype)
    target = out + row[:, None] * columns + column[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def adapter_fwd_kernel(
    x,
    folded_weight,
    folded_bias,
    weight_sum,
    up_weight,
    up_bias,
    addend,
    out,
    hidden,
    stats,
    rows,
    row_stride,
    addend_stride,
    scale,
    WIDTH: tl.constexpr,
    BOTTLENECK: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Rows of ``out``, and of ``hidden`` where it is wanted."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    unit = tl.arange(0, BLOCK_H).to(tl.int64)
    valid, present = row < rows, unit < BOTTLENECK
    d = tl.arange(0, BLOCK_D).to(tl.int64)
    source = x + row[:, None] * row_stride + d[None, :]
    factor = folded_weight + unit[None, :] * WIDTH + d[:, None]

    z = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
    for start in range(0, WIDTH, BLOCK_D):
        used = d < WIDTH - start
        a = tl.load(source + start, mask=valid[:, None] & used[None, :], other=0.0)
        b = tl.load(factor + start, mask=present[None, :] & used[:, None], other=0.0)
        z = add_product(a, b, z)
    if stats is not None:
        mean = tl.load(stats + row * 2, mask=valid, other=0.0)
        rstd = tl.load(stats + row * 2 + 1, mask=valid, other=0.0)
        remainder = tl.load(weight_sum + unit, mask=present, other=0.0)
        z = (z - mean[:, None] * remainder[None, :]) * rstd[:, None]
    z += tl.load(folded_bias + unit, mask=present, other=0.0)[None, :]
    if hidden is not None:
        target = hidden + row[:, None] * BOTTLENECK + unit[None, :]
        tl.store(target, z.to(hidden.dtype.element_ty), mask=valid[:, None] & present[None, :])

    # An infinity in x makes the padding units NaN, which would make the whole row NaN.
    a = tl.where(present[None, :], activate(z, ACTIVATION), 0.0).to(x.dtype.element_ty)
    for start in range(0, WIDTH, BLOCK_D):
        column = start + d
        inside = (column < WIDTH)[None, :] & present[:, None]
        b = tl.load(up_weight + column[None, :] * BOTTLENECK + unit[:, None], mask=inside, other=0.0)
        total = add_product(a, b, tl.zeros((BLOCK_M, BLOCK_D), tl.float32))
        store_sum(total, up_bias, addend, out, row, column, rows, addend_stride, scale, WIDTH)


@triton.jit(do_not_specialize=["rows"])
def adapter_product_kernel(
    left,
    right,
    bias,
    addend,
    out,
    rows,
    columns,
    column_stride,
    inner_stride,
    addend_stride,
    scale,
    INNER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """``addend + scale * (left right^T + bias)``; ``right (columns, INNER)`` may be strided, or None if
    ``out`` holds the product."""
    accumulate: tl.constexpr = tl.float64 if left.dtype.element_ty == tl.float64 else tl.float32
    row_tile, column_tile = tile_of(
        tl.program_id(0).to(tl.int64), tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N), GROUP
    )
    row = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    column = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    if right is None:
        inside = (row < rows)[:, None] & (column < columns)[None, :]
        product = out + row[:, None] * columns + column[None, :]
        total = tl.load(product, mask=inside, other=0.0).to(accumulate)
    else:
        k = tl.arange(0, BLOCK_K).to(tl.int64)
        total = tl.zeros((BLOCK_M, BLOCK_N), accumulate)
        for start in range(0, INNER, BLOCK_K):
            used = start + k < INNER
            source = left + row[:, None] * INNER + (start + k)[None, :]
            a = tl.load(source, mask=(row < rows)[:, None] & used[None, :], other=0.0)
            factor = right + column[None, :] * column_stride + (start + k)[:, None] * inner_stride
            b = tl.load(factor, mask=(column < columns)[None, :] & used[:, None], other=0.0)
            total = add_product(a, b, total)
    store_sum(total, bias, addend, out, row, column, rows, addend_stride, scale, columns)


@triton.jit(do_not_specialize=["rows"])
def adapter_bwd_kernel(
    grad,
    x,
    up_weight,
    folded_weight,
    folded_bias,
    hidden,
    stats,
    dx,
    activated,
    scaled_grad,
    partial_down_bias,
    rows,
    row_stride,
    scale,
    WIDTH: tl.constexpr,
    BOTTLENECK: tl.constexpr,
    ADD_GRAD: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Writes ``dx``, ``act(z)``, ``s`` and a tile's part of ``sum_r dz``, those that are not None."""
    tile = tl.program_id(0).to(tl.int64)
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    unit = tl.arange(0, BLOCK_H).to(tl.int64)
    valid, present = row < rows, unit < BOTTLENECK
    d = tl.arange(0, BLOCK_D).to(tl.int64)

    da = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
    if scaled_grad is not None or dx is not None:
        for start in range(0, WIDTH, BLOCK_D):
            column = start + d
            used = column < WIDTH
            source = grad + row[:, None] * WIDTH + column[None, :]
            g = tl.load(source, mask=valid[:, None] & used[None, :], other=0.0)
            factor = up_weight + column[:, None] * BOTTLENECK + unit[None, :]
            b = tl.load(factor, mask=used[:, None] & present[None, :], other=0.0)
            da = add_product(g, b, da)

    known = valid[:, None] & present[None, :]
    place = row[:, None] * BOTTLENECK + unit[None, :]
    z = tl.load(hidden + place, mask=known, other=0.0).to(tl.float32)
    s = da * activation_slope(z, ACTIVATION) * scale
    if activated is not None:
        tl.store(activated + place, activate(z, ACTIVATION).to(activated.dtype.element_ty), mask=known)
    if partial_down_bias is not None:
        tl.store(partial_down_bias + tile * BOTTLENECK + unit, tl.sum(s, 0), mask=present)
    if stats is not None:
        mean = tl.load(stats + row * 2, mask=valid, other=0.0)
        rstd = tl.load(stats + row * 2 + 1, mask=valid, other=0.0)
        s *= rstd[:, None]
    if scaled_grad is not None:
        tl.store(scaled_grad + place, s.to(scaled_grad.dtype.element_ty), mask=known)

    if dx is not None:
        if stats is not None:
            shift = tl.load(folded_bias + unit, mask=present, other=0.0)
            pull = tl.sum(s * (z - shift[None, :]), 1) * rstd / WIDTH
        a = s.to(dx.dtype.element_ty)
        for start in range(0, WIDTH, BLOCK_D):
            column = start + d
            used = column < WIDTH
            inside = valid[:, None] & used[None, :]
            factor = folded_weight + unit[:, None] * WIDTH + column[None, :]
            b = tl.load(factor, mask=present[:, None] & used[None, :], other=0.0)
            total = add_product(a, b, tl.zeros((BLOCK_M, BLOCK_D), tl.float32))
            if stats is not None:
                value = tl.load(x + row[:, None] * row_stride + column[None, :], mask=inside, other=0.0)
                total -= pull[:, None] * (value.to(tl.float32) - mean[:, None])
            target = row[:, None] * WIDTH + column[None, :]
            if ADD_GRAD:
                total += tl.load(grad + target, mask=inside, other=0.0).to(tl.float32)
            tl.store(dx + target, total.to(dx.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class Inputs:
    """The operands of both directions, in the layout that the kernels take."""

    #: The down-projection as a norm product of one tap.
    down: _norm_product.Inputs
    #: In the type of x.
    up_weight: Tensor
    scale: float
    activation: int

    @classmethod
    def checked(
        cls,
        x: Tensor,
        down_weight: Tensor,
        down_bias: Tensor | None,
        up_weight: Tensor,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        scale: float,
        activation: int,
    ) -> Inputs:
        if x.dim() != 2 or down_weight.dim() != 2:
            raise ValueError(f"x, down_weight: expected 2 dimensions, got {x.dim()} and {down_weight.dim()}")
        shape = (x.shape[1], down_weight.shape[0])
        up_weight = expect("up_weight", up_weight, shape, down_weight.dtype, x.device)

        def one_tap(parameter: Tensor | None) -> Tensor | None:
            return None if parameter is None else parameter.unsqueeze(0)

        down = _norm_product.Inputs.checked(
            x.unsqueeze(1),
            down_weight.unsqueeze(0),
            one_tap(down_bias),
            one_tap(norm_weight),
            one_tap(norm_bias),
        )
        return cls(down, up_weight.to(x.dtype), scale, activation)

    @property
    def x(self) -> Tensor:
        return self.down.x.squeeze(1)

    @property
    def bottleneck(self) -> int:
        return self.up_weight.shape[1]


def if_any(tensor: Tensor) -> Tensor | None:
    """The output as a kernel takes it: None if it has no elements, because it is not wanted."""
    return tensor if tensor.numel() > 0 else None


def adapter_fwd(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    up_bias: Tensor | None,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    scale: float,
    eps: float,
    activation: int,
    add_input: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``mmkernels::adapter_fwd_triton``; see ``schema.py``."""
    args = Inputs.checked(x, down_weight, down_bias, up_weight, norm_weight, norm_bias, scale, activation)
    rows, width = x.shape
    accumulate = accumulate_dtype(x.dtype)
    up_bias = expect_optional("up_bias", up_bias, (width,), down_weight.dtype, x.device)
    if residual is not None:
        if add_input:
            raise ValueError("residual: expected None with add_input")
        dtype = accumulate if residual.dtype == accumulate else x.dtype
        residual = expect("residual", residual, (rows, width), dtype, x.device)
    addend = args.x if add_input else residual
    out = x.new_empty((rows, width), dtype=x.dtype if residual is None else residual.dtype)
    hidden = x.new_empty((rows if save else 0, args.bottleneck))
    stats = x.new_empty((rows if save and norm_weight is not None else 0, 2), dtype=accumulate)
    if out.numel() == 0 or args.bottleneck == 0:
        zeros = x.new_zeros(width, dtype=accumulate)
        constant = zeros if up_bias is None else scale * up_bias.to(accumulate)
        out.copy_(constant if addend is None else addend + constant)
        return out, hidden.zero_(), stats.zero_()

    tile = fused_tile(forward_tiles(shared_memory_limit(x.device)), x.dtype, args.bottleneck)
    with on_device(x):
        moments = row_moments(args, eps, stats)
        if tile is None:
            write_output_in_steps(args, up_bias, addend, out, hidden, moments)
        else:
            write_output(args, tile, up_bias, addend, out, hidden, moments)
    return out, hidden, stats


def row_moments(args: Inputs, eps: float, stats: Tensor) -> Tensor | None:
    """Mean and 1 / deviation of each row, in ``stats`` if it has elements; None without a LayerNorm."""
    if not args.down.norm:
        return None
    stats = stats if stats.numel() > 0 else stats.new_empty((args.x.shape[0], 2))
    row_stats(args.down.x, None, stats, eps)
    return stats


def write_output(
    args: Inputs,
    tile: FusedTile,
    up_bias: Tensor | None,
    addend: Tensor | None,
    out: Tensor,
    hidden: Tensor,
    stats: Tensor | None,
) -> None:
    """Writes ``out``, and ``hidden`` where it has elements, by the fused kernel."""
    rows, width = out.shape
    folded_weight, folded_bias, weight_sum = args.down.fold()
    adapter_fwd_kernel[(triton.cdiv(rows, tile.block_m),)](
        args.x,
        folded_weight,
        folded_bias,
        weight_sum,
        args.up_weight,
        up_bias,
        addend,
        out,
        if_any(hidden),
        stats,
        rows,
        args.x.stride(0),
        0 if addend is None else addend.stride(0),
        args.scale,
        ACTIVATION=args.activation,
        **fused_options(tile, width, args.bottleneck),
    )


def write_output_in_steps(
    args: Inputs,
    up_bias: Tensor | None,
    addend: Tensor | None,
    out: Tensor,
    hidden: Tensor,
    stats: Tensor | None,
) -> None:
    """As ``write_output``, with the hidden layer in memory between two products."""
    rows, _ = out.shape
    activated = args.x.new_empty((rows, 1, args.bottleneck))
    preactivation = if_any(hidden.unsqueeze(1))
    _norm_product.write_output(args.down, stats, args.activation, activated, preactivation)
    write_product(activated.squeeze(1), args.up_weight, up_bias, addend, args.scale, out)


def write_product(
    left: Tensor, right: Tensor, bias: Tensor | None, addend: Tensor | None, scale: float, out: Tensor
) -> None:
    """``out = addend + scale * (left right^T + bias)``; ``left`` and ``out`` are contiguous."""
    rows, columns = out.shape
    by_library = library_multiplies(left.dtype)
    if by_library:
        multiply_into(out, left, right.T)
    adapter_product_kernel[product_grid(rows, columns, 1)](
        left,
        None if by_library else right,
        bias,
        addend,
        out,
        rows,
        columns,
        right.stride(0),
        right.stride(1),
        0 if addend is None else addend.stride(0),
        scale,
        INNER=left.shape[1],
        **product_options(),
    )


def adapter_bwd(
    grad: Tensor,
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor | None,
    up_weight: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    hidden: Tensor,
    stats: Tensor,
    scale: float,
    activation: int,
    add_input: bool,
    need_x: bool,
    need_down: bool,
    need_up: bool,
    need_norm: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``mmkernels::adapter_bwd_triton``; see ``schema.py``."""
    args = Inputs.checked(x, down_weight, down_bias, up_weight, norm_weight, norm_bias, scale, activation)
    rows, width = x.shape
    bottleneck, accumulate = args.bottleneck, accumulate_dtype(x.dtype)
    grad = expect("grad", grad, (rows, width), x.dtype, x.device)
    hidden = expect("hidden", hidden, (rows, bottleneck), x.dtype, x.device)
    if norm_weight is not None:
        stats = expect("stats", stats, (rows, 2), accumulate, x.device)
    # The gain's gradient comes out of the down-projection's.
    need_product = need_down or need_norm
    new = args.down.weight.new_empty
    dx = x.new_empty((rows if need_x else 0, width))
    d_down = new((bottleneck if need_product else 0, width))
    d_down_bias = new((bottleneck if need_product else 0,))
    d_up = new((width if need_up else 0, bottleneck))
    d_up_bias = new((width if need_up else 0,))
    d_gain, d_shift = (new((width if need_norm else 0,)) for _ in range(2))
    if grad.numel() == 0 or bottleneck == 0:
        for gradient in (dx, d_down, d_down_bias, d_up, d_up_bias, d_gain, d_shift):
            gradient.zero_()
        if need_x and add_input:
            dx.copy_(grad)
        if need_up:
            write_up_bias(grad, scale, d_up_bias)
        return dx, d_down, d_down_bias, d_up, d_up_bias, d_gain, d_shift

    activated = x.new_empty((rows if need_up else 0, bottleneck))
    scaled_grad = x.new_empty((rows if need_product else 0, bottleneck))
    bias_sums = args.down.new_sums(*d_down_bias.shape)
    row_gradients = RowGradients(dx, activated, scaled_grad, bias_sums)
    tile = fused_tile(BACKWARD_TILES, x.dtype, bottleneck)
    with on_device(x):
        if tile is None:
            write_row_gradients_in_steps(args, grad, hidden, stats, add_input, row_gradients)
        else:
            write_row_gradients(args, tile, grad, hidden, stats, add_input, row_gradients)
        if need_product:
            # dVc, from which a mean is taken, is not rounded before.
            dtype = accumulate if args.down.norm else d_down.dtype
            product = batched_product(scaled_grad.T[None], args.x[None], dtype)
            if args.down.norm:
                _norm_product.unfold(
                    args.down, product, bias_sums[None], d_down[None], d_gain[None], d_shift[None]
                )
            else:
                d_down = product[0]
        if need_up:
            torch.mul(batched_product(grad.T[None], activated[None], accumulate)[0], scale, out=d_up)
            write_up_bias(grad, scale, d_up_bias)
    return dx, d_down, bias_sums.to(d_down_bias.dtype), d_up, d_up_bias, d_gain, d_shift


def write_up_bias(grad: Tensor, scale: float, d_up_bias: Tensor) -> None:
    torch.mul(torch.sum(grad, 0, dtype=accumulate_dtype(grad.dtype)), scale, out=d_up_bias)


@dataclass(frozen=True)
class RowGradients:
    """The outputs of the backward pass over the rows; those that are not wanted have no elements."""

    dx: Tensor
    #: ``act(z)`` and ``s``, in the type of x: factors of the gradients of the matrices.
    activated: Tensor
    scaled_grad: Tensor
    #: ``sum_r dz``, in the type of sums.
    down_bias: Tensor


def write_row_gradients(
    args: Inputs,
    tile: FusedTile,
    grad: Tensor,
    hidden: Tensor,
    stats: Tensor,
    add_input: bool,
    to: RowGradients,
) -> None:
    """Writes those outputs ``to`` that have elements, by the fused kernel. ``grad`` is contiguous."""
    rows, width = grad.shape
    tiles = triton.cdiv(rows, tile.block_m)
    partial_down_bias = to.down_bias.new_empty((tiles, to.down_bias.shape[0]))
    folded_weight, folded_bias, _ = args.down.fold() if to.dx.numel() > 0 else (None, None, None)
    adapter_bwd_kernel[(tiles,)](
        grad,
        args.x,
        args.up_weight,
        folded_weight,
        folded_bias,
        hidden,
        stats if args.down.norm else None,
        if_any(to.dx),
        if_any(to.activated),
        if_any(to.scaled_grad),
        if_any(partial_down_bias),
        rows,
        args.x.stride(0),
        args.scale,
        ADD_GRAD=add_input,
        ACTIVATION=args.activation,
        **fused_options(tile, width, args.bottleneck),
    )
    torch.sum(partial_down_bias, 0, out=to.down_bias)


def write_row_gradients_in_steps(
    args: Inputs,
    grad: Tensor,
    hidden: Tensor,
    stats: Tensor,
    add_input: bool,
    to: RowGradients,
) -> None:
    """As ``write_row_gradients``, with the gradient of the hidden layer in memory between two products."""
    rows, _ = grad.shape
    need_x, need_product = to.dx.numel() > 0, to.scaled_grad.numel() > 0
    if to.activated.numel() > 0:
        to.activated.copy_(list(ACTIVATIONS.values())[args.activation](hidden))
    if not (need_x or need_product):
        return

    da = args.down.new_sums(*hidden.shape)
    write_product(grad, args.up_weight.T, None, None, args.scale, da)
    scaled_grad = to.scaled_grad if need_product else torch.empty_like(hidden)
    folded_weight, folded_bias, _ = args.down.fold() if need_x else (None, None, None)
    pull = stats.new_empty((rows, 1)) if need_x and args.down.norm else None
    down_bias = _norm_product.write_scaled_gradient(
        args.down, da, hidden.unsqueeze(1), stats, folded_bias, args.activation, scaled_grad, pull
    )
    if need_product:
        to.down_bias.copy_(down_bias[0])
    if need_x:
        _norm_product.write_input_gradient(
            args.down,
            scaled_grad.unsqueeze(1),
            folded_weight,
            stats,
            pull,
            to.dx.unsqueeze(1),
            addend=grad if add_input else None,
        )
