"""Triton kernels of :func:`mmkernels.layer_mix`, and the functions behind its ``_triton`` ops.

Layers are read in place through a table of addresses in device memory. A small kernel writes the table from
its launch arguments: no layer is stacked, nothing is copied from the host, the host does not wait, and a CUDA
graph can capture it. (A tuple of layers as kernel arguments needs no table, but the loop over it must be
unrolled: 13 layers then take ten seconds to compile, 64 take minutes, and registers spill.)

A program holds whole rows in registers and reads each layer once. Separate kernels compute the row sums of
rows wider than ``WIDEST_HELD_ROW``; the same kernels then work on pieces of rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops._common import accumulate_dtype
from mmkernels.ops._triton import (
    dense_rows,
    device_table,
    expect,
    expect_optional,
    locate_rows,
    loop_bound,
    on_device,
    row_block,
    row_stats,
)

WIDEST_HELD_ROW = 8192
#: Elements of a tile per warp: 32 for each thread and tensor, so that several tensors fit in registers.
WARP_ELEMENTS = 1024
#: Columns of a tile that holds pieces of rows.
PIECE = 256
#: Each chunk of rows keeps sums as wide as a row, so there are few chunks, with many warps each.
MOST_AFFINE_CHUNKS = 512
AFFINE_WARPS = 8


@dataclass(frozen=True)
class Tile:
    """Rows and columns that a program works on at a time."""

    rows: int
    columns: int
    warps: int


def tile_for(width: int, whole_rows: bool, least_warps: int = 1) -> Tile:
    """One warp takes 1024 elements; a warp that holds whole rows needs no barrier for their sums."""
    columns = triton.next_power_of_2(width)
    if not (whole_rows and width <= WIDEST_HELD_ROW):
        columns = min(columns, PIECE)
    warps = max(least_warps, columns // WARP_ELEMENTS)
    rows = min(64, max(1, warps * WARP_ELEMENTS // columns))
    return Tile(rows, columns, warps)


@triton.jit
def load_layer(
    table,
    layer,
    batch,
    frame,
    column,
    inside,
    element: tl.constexpr,
    LAYERS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    """Tile of a layer, whose address and strides are in the table's first three rows."""
    base = tl.load(table + layer).to(tl.pointer_type(element))
    batch_stride = tl.load(table + LAYERS + layer)
    frame_stride = tl.load(table + 2 * LAYERS + layer)
    source = base + (batch * batch_stride + frame * frame_stride)[:, None] + column[None, :]
    return tl.load(tl.multiple_of(source, (1, ALIGNMENT)), mask=inside, other=0.0)


@triton.jit(do_not_specialize=["rows", "frames"])
def layer_mix_fwd_kernel(
    table,
    weights,
    norm_weight,
    mixed_bias,
    lengths,
    stats,
    out,
    rows,
    frames,
    width,
    EPS: tl.constexpr,
    LAYERS: tl.constexpr,
    NORM: tl.constexpr,
    STATS_GIVEN: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A tile of ``out``; with NORM the statistics of its rows are read or computed, and stored if wanted."""
    accumulate: tl.constexpr = weights.dtype.element_ty
    element: tl.constexpr = out.dtype.element_ty
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS
    column = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    row, batch, frame, valid = locate_rows(first_row, rows, frames, lengths, BLOCK_ROWS)
    present = (row < rows)[:, None] & (column < width)[None, :]
    inside = valid[:, None] & (column < width)[None, :]

    total = tl.zeros((BLOCK_ROWS, BLOCK_D), accumulate)
    if mixed_bias is not None:
        total += tl.load(mixed_bias + column, mask=column < width, other=0.0)[None, :]
    coming = load_layer(table, 0, batch, frame, column, inside, element, LAYERS, ALIGNMENT)
    for layer in range(LAYERS):
        x = coming.to(accumulate)
        # Load the next layer before the row sums, which wait for the whole row; after the last, load nothing.
        following = (layer + 1) % LAYERS
        more = inside & (following > 0)
        coming = load_layer(table, following, batch, frame, column, more, element, LAYERS, ALIGNMENT)
        weight = tl.load(weights + layer)
        if NORM:
            pair = (row * LAYERS + layer) * 2
            if STATS_GIVEN:
                mean = tl.load(stats + pair, mask=valid, other=0.0)
                rstd = tl.load(stats + pair + 1, mask=valid, other=0.0)
                x = tl.where(inside, x - mean[:, None], 0.0)
            else:
                mean = tl.sum(x, 1) / width
                x = tl.where(inside, x - mean[:, None], 0.0)
                rstd = 1.0 / tl.sqrt(tl.sum(x * x, 1) / width + EPS)
                if stats is not None:
                    tl.store(stats + pair, tl.where(valid, mean, 0.0), mask=row < rows)
                    tl.store(stats + pair + 1, tl.where(valid, rstd, 0.0), mask=row < rows)
            x = x * (weight * rstd)[:, None]
            if norm_weight is not None:
                x *= tl.load(norm_weight + layer * width + column, mask=column < width, other=0.0)[None, :]
            total += x
        else:
            total += weight * x
    total = tl.where(inside, total, 0.0)
    tl.store(out + row[:, None] * width + column[None, :], total.to(element), mask=present)


@triton.jit
def load_grad(grad, batch_stride, frame_stride, batch, frame, column, inside, accumulate: tl.constexpr):
    offset = (batch * batch_stride + frame * frame_stride)[:, None] + column[None, :]
    return tl.load(grad + offset, mask=inside, other=0.0).to(accumulate)


@triton.jit(do_not_specialize=["rows", "frames", "tiles"])
def layer_mix_bwd_kernel(
    table,
    grad,
    weights,
    norm_weight,
    norm_bias,
    lengths,
    stats,
    row_dots,
    partial_dot,
    partial_scale,
    partial_shift,
    rows,
    frames,
    tiles,
    width,
    grad_batch_stride,
    grad_frame_stride,
    LAYERS: tl.constexpr,
    NORM: tl.constexpr,
    WRITES_LAYERS: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    ONE_TILE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradients of the layers that have an address in the table's fourth row, and a chunk's part of row sums.

    A chunk is ``tiles`` tiles of rows. Layers are the outer loop, so that sums as wide as a row are in
    registers. One tile of the gradient is read once, several are read again for each layer, from cache.
    """
    accumulate: tl.constexpr = weights.dtype.element_ty
    element: tl.constexpr = grad.dtype.element_ty
    chunk = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    used = column < width

    if partial_shift is not None:
        shift_sum = tl.zeros((BLOCK_D,), accumulate)
        for tile in range(1 if ONE_TILE else loop_bound(tiles)):
            first_row = (chunk * tiles + tile) * BLOCK_ROWS
            row, batch, frame, valid = locate_rows(first_row, rows, frames, lengths, BLOCK_ROWS)
            inside = valid[:, None] & used[None, :]
            g = load_grad(
                grad, grad_batch_stride, grad_frame_stride, batch, frame, column, inside, accumulate
            )
            shift_sum += tl.sum(g, 0)
        tl.store(partial_shift + chunk * width + column, shift_sum, mask=used)
    if ONE_TILE:
        row, batch, frame, valid = locate_rows(chunk * BLOCK_ROWS, rows, frames, lengths, BLOCK_ROWS)
        inside = valid[:, None] & used[None, :]
        g = load_grad(grad, grad_batch_stride, grad_frame_stride, batch, frame, column, inside, accumulate)

    for layer in range(LAYERS):
        weight = tl.load(weights + layer)
        dot_sum = tl.zeros((BLOCK_ROWS,), accumulate)
        scale_sum = tl.zeros((BLOCK_D,), accumulate)
        for tile in range(1 if ONE_TILE else loop_bound(tiles)):
            if not ONE_TILE:
                first_row = (chunk * tiles + tile) * BLOCK_ROWS
                row, batch, frame, valid = locate_rows(first_row, rows, frames, lengths, BLOCK_ROWS)
                inside = valid[:, None] & used[None, :]
                g = load_grad(
                    grad, grad_batch_stride, grad_frame_stride, batch, frame, column, inside, accumulate
                )
            if NORM:
                x = load_layer(table, layer, batch, frame, column, inside, element, LAYERS, ALIGNMENT)
                pair = (row * LAYERS + layer) * 2
                mean = tl.load(stats + pair, mask=valid, other=0.0)
                rstd = tl.load(stats + pair + 1, mask=valid, other=0.0)
                centred = tl.where(inside, x.to(accumulate) - mean[:, None], 0.0)
                if partial_scale is not None:
                    scale_sum += tl.sum(g * centred * rstd[:, None], 0)
                gained = g
                if norm_weight is not None:
                    gained *= tl.load(norm_weight + layer * width + column, mask=used, other=0.0)[None, :]
                if row_dots is not None:
                    along_x = tl.load(row_dots + pair, mask=valid, other=0.0)
                    total = tl.load(row_dots + pair + 1, mask=valid, other=0.0)
                else:
                    along_x = tl.sum(gained * centred, 1)
                    total = tl.sum(gained, 1)
                if partial_dot is not None:
                    dot_sum += along_x * rstd
                    if norm_bias is not None:
                        shift = tl.load(norm_bias + layer * width + column, mask=used, other=0.0)
                        dot_sum += tl.sum(g * shift[None, :], 1)
                slope = along_x * rstd * rstd / width
                dx = (weight * rstd)[:, None] * (gained - (total / width)[:, None] - slope[:, None] * centred)
            else:
                if partial_dot is not None:
                    x = load_layer(table, layer, batch, frame, column, inside, element, LAYERS, ALIGNMENT)
                    dot_sum += tl.sum(g * x.to(accumulate), 1)
                dx = weight * g
            if WRITES_LAYERS:
                address = tl.load(table + 3 * LAYERS + layer)
                target = address.to(tl.pointer_type(element)) + row[:, None] * width + column[None, :]
                wanted = (row < rows)[:, None] & used[None, :] & (address != 0)
                target = tl.multiple_of(target, (1, ALIGNMENT))
                tl.store(target, tl.where(inside, dx, 0.0).to(element), mask=wanted)
        if partial_dot is not None:
            piece = chunk * tl.num_programs(1) + tl.program_id(1)
            tl.store(partial_dot + piece * LAYERS + layer, tl.sum(dot_sum, 0))
        if partial_scale is not None:
            tl.store(partial_scale + (chunk * LAYERS + layer) * width + column, scale_sum, mask=used)


@triton.jit(do_not_specialize=["frames"])
def row_dots_kernel(
    x,
    grad,
    gain,
    shift,
    lengths,
    stats,
    row_dots,
    contribution,
    frames,
    batch_stride,
    frame_stride,
    grad_batch_stride,
    grad_frame_stride,
    LAYERS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sums over the rows of one layer, too wide for registers: two for its gradient, one for its weight's."""
    accumulate: tl.constexpr = stats.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    batch = row // frames
    frame = row - batch * frames
    valid = frame < frames
    if lengths is not None:
        valid = frame < tl.load(lengths + batch)
    source = x + batch * batch_stride + frame * frame_stride
    source_grad = grad + batch * grad_batch_stride + frame * grad_frame_stride
    pair = row * LAYERS * 2
    mean = tl.load(stats + pair)
    rstd = tl.load(stats + pair + 1)
    along_x = tl.zeros((BLOCK_D,), accumulate)
    total = tl.zeros((BLOCK_D,), accumulate)
    along_shift = tl.zeros((BLOCK_D,), accumulate)
    for start in range(0, WIDTH, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D).to(tl.int64)
        used = column < WIDTH
        g = tl.load(source_grad + column, mask=valid & used, other=0.0).to(accumulate)
        value = tl.load(source + column, mask=valid & used, other=0.0).to(accumulate)
        if shift is not None:
            along_shift += g * tl.load(shift + column, mask=used, other=0.0)
        if gain is not None:
            g *= tl.load(gain + column, mask=used, other=0.0)
        along_x += g * (value - mean)
        total += g
    along_x_sum = tl.sum(along_x, 0)
    tl.store(row_dots + pair, along_x_sum)
    tl.store(row_dots + pair + 1, tl.sum(total, 0))
    tl.store(contribution + row * LAYERS, along_x_sum * rstd + tl.sum(along_shift, 0))


def layer_mix_fwd(
    layers: list[Tensor],
    weights: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    lengths: Tensor | None,
    norm: bool,
    eps: float,
    save_stats: bool,
) -> tuple[Tensor, Tensor]:
    """``mmkernels::layer_mix_fwd_triton``."""
    inputs = Inputs.checked(layers, weights, norm_weight, norm_bias, lengths)
    first = inputs.layers[0]
    batch, frames, width = first.shape
    rows = batch * frames
    whole_rows = norm and width <= WIDEST_HELD_ROW
    given = norm and not whole_rows
    out = first.new_empty(first.shape)
    keep_stats = norm and (save_stats or given)
    stats = inputs.weights.new_empty((rows if keep_stats else 0, len(layers), 2))
    returned = stats if save_stats else stats.new_empty((0, len(layers), 2))
    if out.numel() == 0:
        return out, returned.zero_()

    tile = tile_for(width, whole_rows=norm)
    grid = (triton.cdiv(rows, tile.rows), triton.cdiv(width, tile.columns))
    with on_device(first):
        if given:
            for index, layer in enumerate(inputs.layers):
                row_stats(layer, inputs.lengths, stats[:, index], eps)
        layer_mix_fwd_kernel[grid](
            inputs.table(),
            inputs.weights,
            inputs.norm_weight,
            inputs.mixed_bias(),
            inputs.lengths,
            stats if keep_stats else None,
            out,
            rows,
            frames,
            width,
            EPS=eps,
            LAYERS=len(layers),
            NORM=norm,
            STATS_GIVEN=given,
            ALIGNMENT=inputs.alignment(),
            BLOCK_ROWS=tile.rows,
            BLOCK_D=tile.columns,
            num_warps=tile.warps,
        )
    return out, returned


def layer_mix_bwd(
    grad: Tensor,
    layers: list[Tensor],
    weights: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    lengths: Tensor | None,
    stats: Tensor,
    norm: bool,
    need_weights: bool,
    need_affine: bool,
    wanted: list[int],
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """``mmkernels::layer_mix_bwd_triton``."""
    inputs = Inputs.checked(layers, weights, norm_weight, norm_bias, lengths)
    first, count = inputs.layers[0], len(layers)
    batch, frames, width = first.shape
    rows = batch * frames
    if grad.shape != first.shape or grad.dtype != first.dtype or grad.device != first.device:
        raise ValueError("grad: expected the shape, dtype and device of the layers")
    if any(not 0 <= index < count for index in wanted):
        raise ValueError(f"wanted: expected layer indices below {count}, got {wanted}")
    if len(set(wanted)) < len(wanted):
        raise ValueError(f"wanted: expected every layer index once, got {wanted}")
    if need_affine and not norm:
        raise ValueError("need_affine: expected False without norm")
    new = inputs.weights.new_empty
    if norm:
        stats = expect("stats", stats, (rows, count, 2), inputs.weights.dtype, first.device)
    d_layers = {index: first.new_empty(first.shape) for index in wanted}
    affine_shape = (count if need_affine else 0, width)
    if first.numel() == 0:
        return (
            new((count if need_weights else 0,)).zero_(),
            new(affine_shape).zero_(),
            new(affine_shape).zero_(),
            list(d_layers.values()),
        )

    grad = dense_rows(grad)
    sums_given = norm and width > WIDEST_HELD_ROW
    tile = tile_for(width, whole_rows=norm, least_warps=AFFINE_WARPS if need_affine else 1)
    tiles = 1
    if need_affine:
        tiles = triton.cdiv(rows, tile.rows * MOST_AFFINE_CHUNKS)
    grid = (triton.cdiv(rows, tile.rows * tiles), triton.cdiv(width, tile.columns))
    partial_dot = new((rows if sums_given else grid[0] * grid[1], count))
    partial_scale = new((grid[0], count, width)) if need_affine else None
    partial_shift = new((grid[0], width)) if need_affine else None
    with on_device(first):
        row_dots = inputs.row_dots(grad, stats, partial_dot) if sums_given else None
        layer_mix_bwd_kernel[grid](
            inputs.table(d_layers),
            grad,
            inputs.weights,
            inputs.norm_weight,
            inputs.norm_bias,
            inputs.lengths,
            stats if norm else None,
            row_dots,
            partial_dot if need_weights and not sums_given else None,
            partial_scale,
            partial_shift,
            rows,
            frames,
            tiles,
            width,
            grad.stride(0),
            grad.stride(1),
            LAYERS=count,
            NORM=norm,
            WRITES_LAYERS=bool(wanted),
            ALIGNMENT=inputs.alignment(d_layers.values()),
            ONE_TILE=tiles == 1,
            BLOCK_ROWS=tile.rows,
            BLOCK_D=tile.columns,
            num_warps=tile.warps,
        )
    d_weights = partial_dot.sum(0) if need_weights else new((0,))
    d_scale, d_shift = new(affine_shape), new(affine_shape)
    if partial_scale is not None and partial_shift is not None:
        torch.mul(inputs.weights[:, None], partial_scale.sum(0), out=d_scale)
        torch.mul(inputs.weights[:, None], partial_shift.sum(0), out=d_shift)
    return d_weights, d_scale, d_shift, list(d_layers.values())


@dataclass(frozen=True)
class Inputs:
    """The operands of both directions, in the layout that the kernels take."""

    layers: tuple[Tensor, ...]
    weights: Tensor
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    lengths: Tensor | None

    @classmethod
    def checked(
        cls,
        layers: list[Tensor],
        weights: Tensor,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        lengths: Tensor | None,
    ) -> Inputs:
        first, count = layers[0], len(layers)
        for layer in layers:
            if layer.shape != first.shape or layer.dtype != first.dtype or layer.device != first.device:
                raise ValueError("layers: expected one shape, dtype and device for all")
        if first.dim() != 3:
            raise ValueError(f"layers: expected (batch, frames, width), got {first.dim()} dimensions")
        device, accumulate = first.device, accumulate_dtype(first.dtype)
        affine = (count, first.shape[2])
        return cls(
            tuple(dense_rows(layer) for layer in layers),
            expect("weights", weights, (count,), accumulate, device),
            expect_optional("norm_weight", norm_weight, affine, accumulate, device),
            expect_optional("norm_bias", norm_bias, affine, accumulate, device),
            expect_optional("lengths", lengths, (first.shape[0],), torch.int64, device),
        )

    def table(self, d_layers: Mapping[int, Tensor] | None = None) -> Tensor:
        """Address, batch stride and frame stride of each layer, and the address of its gradient or 0."""
        targets = [0] * len(self.layers)
        for index, d_layer in (d_layers or {}).items():
            targets[index] = d_layer.data_ptr()
        return device_table(
            [
                [layer.data_ptr() for layer in self.layers],
                [layer.stride(0) for layer in self.layers],
                [layer.stride(1) for layer in self.layers],
                targets,
            ],
            self.weights.device,
        )

    def alignment(self, d_layers: Iterable[Tensor] = ()) -> int:
        """The alignment of all rows in bytes, 16 at most; it decides the width of loads."""
        tensors = (*self.layers, *d_layers)
        size = self.layers[0].element_size()
        addresses = [tensor.data_ptr() for tensor in tensors]
        steps = [tensor.stride(d) * size for tensor in tensors for d in (0, 1) if tensor.shape[d] > 1]
        return math.gcd(16, *addresses, *steps)

    def mixed_bias(self) -> Tensor | None:
        """The sum of the weighted shifts of all layers, which every valid frame gets."""
        return None if self.norm_bias is None else (self.weights[:, None] * self.norm_bias).sum(0)

    def row_dots(self, grad: Tensor, stats: Tensor, contribution: Tensor) -> Tensor:
        """The row sums of the backward pass for rows wider than ``WIDEST_HELD_ROW``."""
        batch, frames, width = self.layers[0].shape
        sums = torch.empty_like(stats)
        block, warps = row_block(width)
        for index, layer in enumerate(self.layers):
            row_dots_kernel[(batch * frames,)](
                layer,
                grad,
                None if self.norm_weight is None else self.norm_weight[index],
                None if self.norm_bias is None else self.norm_bias[index],
                self.lengths,
                stats[:, index],
                sums[:, index],
                contribution[:, index],
                frames,
                layer.stride(0),
                layer.stride(1),
                grad.stride(0),
                grad.stride(1),
                LAYERS=len(self.layers),
                WIDTH=width,
                BLOCK_D=block,
                num_warps=warps,
            )
        return sums
