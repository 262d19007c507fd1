"""Triton kernels of :func:`mmkernels.layer_mix`, and the functions behind its ``_triton`` ops.

Layers reach the kernels as a tuple of tensors, and their strides as tuples of integers, over which the kernels unroll: pointers
travel as ordinary launch arguments, so nothing is stacked, copied to the device or waited for, and a CUDA graph can capture the
launch. A table of pointers in device memory would need a host-to-device copy for each call.

A program holds whole rows in registers and takes everything it needs from one read of each layer. Rows wider than
``WIDEST_HELD_ROW`` get their row sums from kernels of their own first, and then the same kernels work on pieces of rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops._common import accumulate_dtype
from mmkernels.ops._triton import dense_rows, expect, expect_optional, locate_rows, on_device, row_stats

WIDEST_HELD_ROW = 8192
#: Elements of a tile per warp: 32 for each thread and tensor, so that several tensors fit in registers without spills.
WARP_ELEMENTS = 1024
#: Columns of a tile that need not hold whole rows.
PIECE = 256


@dataclass(frozen=True)
class Tile:
    """Rows and columns that a program works on at a time."""

    rows: int
    columns: int
    warps: int


def tile_for(width: int, whole_rows: bool, least_warps: int = 1) -> Tile:
    """One warp takes 1024 elements: where it holds whole rows, their sums need no barrier."""
    columns = triton.next_power_of_2(width)
    if not (whole_rows and width <= WIDEST_HELD_ROW):
        columns = min(columns, PIECE)
    warps = max(least_warps, columns // WARP_ELEMENTS)
    rows = min(64, max(1, warps * WARP_ELEMENTS // columns))
    return Tile(rows, columns, warps)


@triton.jit
def load_tile(layer, batch_stride, frame_stride, batch, frame, column, inside):
    offset = (batch * batch_stride + frame * frame_stride)[:, None] + column[None, :]
    return tl.load(layer + offset, mask=inside, other=0.0)


@triton.jit
def layer_mix_fwd_kernel(
    layers,
    batch_strides,
    frame_strides,
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
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS
    column = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    row, batch, frame, valid = locate_rows(first_row, rows, frames, lengths, BLOCK_ROWS)
    present = (row < rows)[:, None] & (column < width)[None, :]
    inside = valid[:, None] & (column < width)[None, :]
    accumulate: tl.constexpr = weights.dtype.element_ty

    total = tl.zeros((BLOCK_ROWS, BLOCK_D), accumulate)
    if mixed_bias is not None:
        total += tl.load(mixed_bias + column, mask=column < width, other=0.0)[None, :]
    coming = load_tile(layers[0], batch_strides[0], frame_strides[0], batch, frame, column, inside)
    for layer in tl.static_range(LAYERS):
        x = coming.to(accumulate)
        # Sums of a row would hold back the next layer's loads; asked for here, they are under way meanwhile.
        if layer + 1 < LAYERS:
            coming = load_tile(
                layers[layer + 1],
                batch_strides[layer + 1],
                frame_strides[layer + 1],
                batch,
                frame,
                column,
                inside,
            )
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
    tl.store(out + row[:, None] * width + column[None, :], total.to(out.dtype.element_ty), mask=present)


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
            inputs.layers,
            inputs.batch_strides,
            inputs.frame_strides,
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
            BLOCK_ROWS=tile.rows,
            BLOCK_D=tile.columns,
            num_warps=tile.warps,
        )
    return out, returned


@dataclass(frozen=True)
class Inputs:
    """What both directions read, in the layout that the kernels take."""

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

    @property
    def batch_strides(self) -> tuple[int, ...]:
        return tuple(layer.stride(0) for layer in self.layers)

    @property
    def frame_strides(self) -> tuple[int, ...]:
        return tuple(layer.stride(1) for layer in self.layers)

    def mixed_bias(self) -> Tensor | None:
        """What the shifts of all layers add to every valid frame."""
        return None if self.norm_bias is None else (self.weights[:, None] * self.norm_bias).sum(0)
