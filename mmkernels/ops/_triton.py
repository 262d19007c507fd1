"""Shared by the Triton kernels of several ops: argument checks, device guard, activations, tiles of products,
row statistics.

Rules of all Triton kernels here: cast program ids to int64 before multiplying them, so that offsets never
wrap; take launch configurations from fixed tables, because autotuning would make results depend on timing;
mask every dimension; make the bounds of loops with products constants of a compilation (sizes of a model), so
that they can be pipelined; do not specialise on sizes that vary from batch to batch, because each kind of
value would compile again while a model trains.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.backends import TRITON_INTERPRETED
from mmkernels.ops._common import ACTIVATION_CODES, accumulate_dtype

RELU = tl.constexpr(ACTIVATION_CODES["relu"])
GELU = tl.constexpr(ACTIVATION_CODES["gelu"])
GELU_TANH = tl.constexpr(ACTIVATION_CODES["gelu_tanh"])
SILU = tl.constexpr(ACTIVATION_CODES["silu"])
INTERPRETED = tl.constexpr(TRITON_INTERPRETED)


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Makes the tensor's device current, because Triton launches on the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


@cache
def shared_memory_limit(device: torch.device) -> int:
    """The most bytes of shared memory that a block may have; the interpreter has no limit."""
    if TRITON_INTERPRETED:
        return sys.maxsize
    properties = triton.runtime.driver.active.utils.get_device_properties(device.index)
    limit: int = properties["max_shared_mem"]
    return limit


def expect(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The tensor, checked for memory safety (the public functions have better messages) and contiguous."""
    if tuple(tensor.shape) != shape or tensor.dtype != dtype or tensor.device != device:
        raise ValueError(
            f"{name}: expected shape {shape}, {dtype} on {device}, "
            f"got {tuple(tensor.shape)}, {tensor.dtype} on {tensor.device}"
        )
    return tensor.contiguous()


def expect_optional(
    name: str, tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor | None:
    return None if tensor is None else expect(name, tensor, shape, dtype, device)


def parameter_dtype(name: str, parameter: Tensor, x: Tensor) -> torch.dtype:
    """The dtype that all parameters of a call have: that of ``parameter``, if the ops take it."""
    allowed = x.dtype, accumulate_dtype(x.dtype)
    if parameter.dtype not in allowed:
        raise ValueError(f"{name}: expected {allowed[0]} or {allowed[1]}, got {parameter.dtype}")
    return parameter.dtype


def dense_rows(tensor: Tensor) -> Tensor:
    """The tensor itself if elements of its last dimension are neighbours, else a copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()


def batched_product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """``left @ right`` of each of a batch of matrices, accumulated and returned in ``dtype``."""
    # A backward pass inside an autocast region must not round a float32 product.
    with torch.autocast(left.device.type, enabled=False):
        if left.dtype != dtype and left.is_cuda:
            return torch.bmm(left, right, out_dtype=dtype)
        return torch.bmm(left.to(dtype), right.to(dtype))


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    if ACTIVATION == RELU:
        # Written so that NaN passes through.
        return tl.where(z < 0.0, 0.0, z)
    elif ACTIVATION == GELU:
        return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == GELU_TANH:
        # (1 + tanh(u)) / 2 = sigmoid(2 u), without the cancellation.
        return z * sigmoid(1.5957691216057308 * z * (1.0 + 0.044715 * z * z))
    elif ACTIVATION == SILU:
        return z * sigmoid(z)
    else:
        return z


@triton.jit
def activation_slope(z, ACTIVATION: tl.constexpr):
    """Derivative at z; for relu the output may be given in place of z."""
    if ACTIVATION == RELU:
        return tl.where(z <= 0.0, 0.0, 1.0)
    elif ACTIVATION == GELU:
        return 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
    elif ACTIVATION == GELU_TANH:
        cubic = 0.044715 * z * z
        u = 1.5957691216057308 * z * (1.0 + cubic)
        # sigmoid(-u), because 1 - sigmoid(u) has few digits.
        return sigmoid(u) * (1.0 + z * sigmoid(-u) * 1.5957691216057308 * (1.0 + 3.0 * cubic))
    elif ACTIVATION == SILU:
        return sigmoid(z) * (1.0 + z * sigmoid(-z))
    else:
        return tl.full(z.shape, 1.0, z.dtype)


@triton.jit
def add_product(a, b, total):
    if INTERPRETED:
        # Triton 3.6's interpreter multiplies the bit patterns of bfloat16; widening is exact.
        a, b = a.to(total.dtype), b.to(total.dtype)
    return tl.dot(a, b, total, out_dtype=total.dtype)


@triton.jit
def loop_bound(value):
    """An integer argument, as the bound of a loop."""
    if INTERPRETED:
        # Triton 3.6's interpreter has an array of one element, to which NumPy 2.4 does not count.
        return value.handle.data.item()
    else:
        return value


@dataclass(frozen=True)
class ProductTile:
    """Tile of a product, BLOCK_M x BLOCK_N in steps of BLOCK_K; GROUP tiles of rows share columns in L2."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    group: int = 8


#: One for all sizes, because a row's numbers must not depend on the number of rows.
PRODUCT_TILE = ProductTile(128, 128, 64, warps=8, stages=3)


def library_multiplies(dtype: torch.dtype) -> bool:
    """Whether torch multiplies factors of this dtype, and a kernel only finishes the result.

    Where the tensor cores do not serve, the BLAS is faster and more exact than a Triton kernel.
    """
    return dtype.itemsize > 2


def multiply_into(out: Tensor, left: Tensor, right: Tensor) -> None:
    """``out = left @ right``, by torch, of matrices or batches of matrices."""
    # A pass inside an autocast region must not round the factors.
    with torch.autocast(left.device.type, enabled=False):
        torch.matmul(left, right, out=out)


def product_grid(rows: int, columns: int, batch: int) -> tuple[int, int]:
    return triton.cdiv(rows, PRODUCT_TILE.block_m) * triton.cdiv(columns, PRODUCT_TILE.block_n), batch


def product_options() -> dict[str, int]:
    return {
        "BLOCK_M": PRODUCT_TILE.block_m,
        "BLOCK_N": PRODUCT_TILE.block_n,
        "BLOCK_K": PRODUCT_TILE.block_k,
        "GROUP": PRODUCT_TILE.group,
        "num_warps": PRODUCT_TILE.warps,
        "num_stages": PRODUCT_TILE.stages,
    }


@triton.jit
def tile_of(program, row_tiles, column_tiles, GROUP: tl.constexpr):
    """Row and column of a tile. GROUP tiles of rows pass over the columns together: both then stay in L2."""
    group = program // (GROUP * column_tiles)
    first = group * GROUP
    size = tl.minimum(row_tiles - first, GROUP)
    within = program - group * (GROUP * column_tiles)
    return first + within % size, within // size


#: Triton compiles again for every pattern of arguments that are 1, fit in 32 bits, or are multiples of 16. An
#: encoded integer (a constant added, the lowest bit set) is none of these.
TABLE_BIAS = tl.constexpr(1 << 61)


def encode_for_table(value: int) -> int:
    return 2 * (TABLE_BIAS.value + value) + 1


@triton.jit
def write_table_kernel(values, table, COUNT: tl.constexpr):
    for index in tl.static_range(COUNT):
        tl.store(table + index, (values[index] >> 1) - TABLE_BIAS)


def device_table(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Integers as an int64 tensor on the device: ``(len(rows), len(rows[0]))``, 256 entries at most.

    They are arguments of a launch: nothing is copied from host memory, the host does not wait, and a CUDA
    graph can capture it.
    """
    table = torch.empty((len(rows), len(rows[0])), dtype=torch.int64, device=device)
    values = tuple(encode_for_table(value) for row in rows for value in row)
    write_table_kernel[(1,)](values, table, COUNT=len(values), num_warps=1)
    return table


@triton.jit
def locate_rows(first, rows, inner, lengths, BLOCK_ROWS: tl.constexpr):
    """Rows first, first + 1, ... of ``(outer, inner)``; valid: below ``rows`` and before ``lengths[outer]``.

    Lengths are clamped to ``[0, inner]`` here, because the host does not read them.
    """
    row = first + tl.arange(0, BLOCK_ROWS)
    outer_index = row // inner
    inner_index = row - outer_index * inner
    valid = row < rows
    if lengths is not None:
        valid = valid & (inner_index < tl.load(lengths + outer_index, mask=valid, other=0))
    return row, outer_index, inner_index, valid


@triton.jit(do_not_specialize=["inner"])
def row_stats_kernel(
    x,
    lengths,
    stats,
    inner,
    outer_stride,
    inner_stride,
    stats_stride,
    WIDTH: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Mean and 1 / deviation of one row of ``x (outer, inner, width)``, in two passes; zeros for padding."""
    row = tl.program_id(0).to(tl.int64)
    outer_index = row // inner
    inner_index = row - outer_index * inner
    valid = inner_index < inner
    if lengths is not None:
        valid = inner_index < tl.load(lengths + outer_index)
    source = x + outer_index * outer_stride + inner_index * inner_stride
    column = tl.arange(0, BLOCK_D).to(tl.int64)
    accumulate: tl.constexpr = stats.dtype.element_ty

    total = tl.zeros((BLOCK_D,), accumulate)
    for start in range(0, WIDTH, BLOCK_D):
        inside = valid & (start + column < WIDTH)
        total += tl.load(source + start + column, mask=inside, other=0.0).to(accumulate)
    mean = tl.sum(total, 0) / WIDTH
    squares = tl.zeros((BLOCK_D,), accumulate)
    for start in range(0, WIDTH, BLOCK_D):
        inside = valid & (start + column < WIDTH)
        value = tl.load(source + start + column, mask=inside, other=0.0).to(accumulate)
        centred = tl.where(inside, value - mean, 0.0)
        squares += centred * centred
    rstd = 1.0 / tl.sqrt(tl.sum(squares, 0) / WIDTH + EPS)
    tl.store(stats + row * stats_stride, tl.where(valid, mean, 0.0))
    tl.store(stats + row * stats_stride + 1, tl.where(valid, rstd, 0.0))


def row_stats(x: Tensor, lengths: Tensor | None, stats: Tensor, eps: float) -> None:
    """Statistics of each row of ``x (outer, inner, width)``, written ``stats.stride(0)`` elements apart."""
    outer, inner, width = x.shape
    block, warps = row_block(width)
    row_stats_kernel[(outer * inner,)](
        x,
        lengths,
        stats,
        inner,
        x.stride(0),
        x.stride(1),
        stats.stride(0),
        WIDTH=width,
        EPS=eps,
        BLOCK_D=block,
        num_warps=warps,
    )


def row_block(width: int) -> tuple[int, int]:
    """Columns that a program of a row kernel takes at a time, and its warps: 32 elements a thread at most."""
    block = min(triton.next_power_of_2(max(width, 1)), 4096)
    return block, max(1, block // 1024)
