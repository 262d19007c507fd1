"""Triton kernels of :func:`mmkernels.merge`, and the functions behind its ``_triton`` ops.

A launch serves up to ``PAIRS`` pairs through a table of addresses and sizes in device memory; more pairs are
more launches. A program takes one chunk of ``CHUNK`` elements of one pair, which it finds in the table. The
table always has room for ``PAIRS`` pairs, so that no number of pairs and no size compiles a kernel again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels.ops._common import accumulate_dtype
from mmkernels.ops._triton import device_table, expect, loop_bound, on_device

#: Pairs of one launch: eight entries for each, as many as a table has.
PAIRS = 32
#: Elements of a program: a partial sum is over these, so the sums do not depend on the GPU.
CHUNK = 16384
#: Elements that a program loads at a time: four vectors of float32 for each thread and tensor.
BLOCK = 2048
WARPS = 4
#: Partial sums that the second stage adds at a time.
SUMS = 1024
#: First chunk of a pair that is not there.
NO_CHUNK = 1 << 60

ELEMENTS = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float64: tl.float64,
}


@triton.jit
def find_pair(table, chunk, PAIRS: tl.constexpr):
    """The pair that has the chunk, and its first chunk, from the table's first row."""
    starts = tl.load(table + tl.arange(0, PAIRS))
    before = starts <= chunk
    return tl.sum(before.to(tl.int32), 0) - 1, tl.max(tl.where(before, starts, 0), 0)


@triton.jit
def merge_chunk(
    target,
    source,
    out,
    weight,
    start,
    size,
    FULL: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One chunk of a result. A full one needs no bounds, which would break its vectors."""
    accumulate: tl.constexpr = weight.dtype
    offset = start + tl.arange(0, BLOCK)
    for _ in range(CHUNK // BLOCK):
        inside = None if FULL else offset < size
        t = tl.load(tl.multiple_of(target + offset, ALIGNMENT), mask=inside).to(accumulate)
        s = tl.load(tl.multiple_of(source + offset, ALIGNMENT), mask=inside).to(accumulate)
        difference = s - t
        # From the nearer end, so that both are exact; a copy there, also where the other side is infinite.
        between = tl.where(weight < 0.5, t + weight * difference, s - (1.0 - weight) * difference)
        merged = tl.where(weight == 0.0, t, tl.where(weight == 1.0, s, between))
        destination = tl.multiple_of(out + offset, ALIGNMENT)
        tl.store(destination, merged.to(out.dtype.element_ty), mask=inside)
        offset += BLOCK


@triton.jit
def merge_fwd_kernel(
    table,
    lam,
    TARGET: tl.constexpr,
    SOURCE: tl.constexpr,
    RESULT: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    PAIRS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One chunk of one result. Rows of the table: first chunk, size, group, target, source, result."""
    chunk = tl.program_id(0).to(tl.int64)
    pair, first = find_pair(table, chunk, PAIRS)
    size = tl.load(table + PAIRS + pair)
    weight = tl.load(lam + tl.load(table + 2 * PAIRS + pair))
    target = tl.load(table + 3 * PAIRS + pair).to(tl.pointer_type(TARGET))
    source = tl.load(table + 4 * PAIRS + pair).to(tl.pointer_type(SOURCE))
    out = tl.load(table + 5 * PAIRS + pair).to(tl.pointer_type(RESULT))
    start = (chunk - first) * CHUNK
    if start + CHUNK <= size:
        merge_chunk(target, source, out, weight, start, size, True, ALIGNMENT, CHUNK, BLOCK)
    else:
        merge_chunk(target, source, out, weight, start, size, False, ALIGNMENT, CHUNK, BLOCK)


@triton.jit
def gradient_chunk(
    grad,
    target,
    source,
    d_target,
    d_source,
    weight,
    start,
    size,
    FULL: tl.constexpr,
    NEED_LAM: tl.constexpr,
    NEED_TARGET: tl.constexpr,
    NEED_SOURCE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gradients of one chunk, stored where their address is not 0; returns its part of that of lam."""
    accumulate: tl.constexpr = weight.dtype
    wants_target = d_target.to(tl.int64) != 0
    wants_source = d_source.to(tl.int64) != 0
    offset = start + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), accumulate)
    for _ in range(CHUNK // BLOCK):
        inside = None if FULL else offset < size
        other = None if FULL else 0.0
        g = tl.load(tl.multiple_of(grad + offset, ALIGNMENT), mask=inside, other=other).to(accumulate)
        if NEED_LAM:
            t = tl.load(tl.multiple_of(target + offset, ALIGNMENT), mask=inside, other=other)
            s = tl.load(tl.multiple_of(source + offset, ALIGNMENT), mask=inside, other=other)
            total += g * (s.to(accumulate) - t.to(accumulate))
        if NEED_TARGET:
            destination = tl.multiple_of(d_target + offset, ALIGNMENT)
            written = wants_target if FULL else inside & wants_target
            tl.store(destination, ((1.0 - weight) * g).to(d_target.dtype.element_ty), mask=written)
        if NEED_SOURCE:
            destination = tl.multiple_of(d_source + offset, ALIGNMENT)
            written = wants_source if FULL else inside & wants_source
            tl.store(destination, (weight * g).to(d_source.dtype.element_ty), mask=written)
        offset += BLOCK
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["first_chunk"])
def merge_bwd_kernel(
    table,
    lam,
    partial,
    partial_group,
    first_chunk,
    TARGET: tl.constexpr,
    SOURCE: tl.constexpr,
    RESULT: tl.constexpr,
    NEED_LAM: tl.constexpr,
    NEED_TARGET: tl.constexpr,
    NEED_SOURCE: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    PAIRS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of one chunk of one pair, and its part of the sum for ``lam`` with the group that it is of.

    Rows of the table: first chunk, size, group, target, source, gradient, and the addresses of the gradients
    of target and source, or 0. ``first_chunk`` is the number of chunks of earlier launches.
    """
    chunk = tl.program_id(0).to(tl.int64)
    pair, first = find_pair(table, chunk, PAIRS)
    size = tl.load(table + PAIRS + pair)
    group = tl.load(table + 2 * PAIRS + pair)
    weight = tl.load(lam + group)
    target = tl.load(table + 3 * PAIRS + pair).to(tl.pointer_type(TARGET))
    source = tl.load(table + 4 * PAIRS + pair).to(tl.pointer_type(SOURCE))
    grad = tl.load(table + 5 * PAIRS + pair).to(tl.pointer_type(RESULT))
    d_target = tl.load(table + 6 * PAIRS + pair).to(tl.pointer_type(TARGET))
    d_source = tl.load(table + 7 * PAIRS + pair).to(tl.pointer_type(SOURCE))
    start = (chunk - first) * CHUNK
    if start + CHUNK <= size:
        total = gradient_chunk(
            grad,
            target,
            source,
            d_target,
            d_source,
            weight,
            start,
            size,
            True,
            NEED_LAM,
            NEED_TARGET,
            NEED_SOURCE,
            ALIGNMENT,
            CHUNK,
            BLOCK,
        )
    else:
        total = gradient_chunk(
            grad,
            target,
            source,
            d_target,
            d_source,
            weight,
            start,
            size,
            False,
            NEED_LAM,
            NEED_TARGET,
            NEED_SOURCE,
            ALIGNMENT,
            CHUNK,
            BLOCK,
        )
    if NEED_LAM:
        tl.store(partial + first_chunk + chunk, total)
        tl.store(partial_group + first_chunk + chunk, group.to(tl.int32))


@triton.jit(do_not_specialize=["chunks"])
def merge_sum_kernel(partial, partial_group, d_lam, chunks, SUMS: tl.constexpr):
    """The partial sums of one group, added in float64 in the order of the chunks."""
    group = tl.program_id(0)
    total = tl.zeros((SUMS,), tl.float64)
    for step in range(loop_bound((chunks + SUMS - 1) // SUMS)):
        index = step * SUMS + tl.arange(0, SUMS)
        mine = (tl.load(partial_group + index, mask=index < chunks, other=-1)) == group
        total += tl.load(partial + index, mask=mine, other=0.0).to(tl.float64)
    tl.store(d_lam + group, tl.sum(total, 0).to(d_lam.dtype.element_ty))


def merge_fwd(
    target: list[Tensor], source: list[Tensor], lam: Tensor, groups: list[int], dtype: torch.dtype
) -> list[Tensor]:
    """``mmkernels::merge_fwd_triton``."""
    inputs = Inputs.checked(target, source, lam, groups)
    out = [tensor.new_empty(tensor.shape, dtype=dtype) for tensor in target]
    _merge_into(inputs, out)
    return out


def merge_out(
    target: list[Tensor], source: list[Tensor], lam: Tensor, groups: list[int], out: list[Tensor]
) -> None:
    """``mmkernels::merge_out_triton``."""
    inputs = Inputs.checked(target, source, lam, groups)
    for tensor, like in zip(out, target, strict=True):
        alike = tensor.shape == like.shape and tensor.dtype == out[0].dtype and tensor.device == like.device
        if not alike or not tensor.is_contiguous():
            raise ValueError("out: expected contiguous tensors like those of target, of one dtype")
    _merge_into(inputs, out)


def _merge_into(inputs: Inputs, out: list[Tensor]) -> None:
    for launch in inputs.launches():
        results = launch.of(out)
        with on_device(inputs.lam):
            merge_fwd_kernel[(launch.chunks,)](
                launch.table(results),
                inputs.lam,
                RESULT=ELEMENTS[out[0].dtype],
                ALIGNMENT=launch.alignment(results),
                **inputs.options(),
            )


def merge_bwd(
    grad: list[Tensor],
    target: list[Tensor],
    source: list[Tensor],
    lam: Tensor,
    groups: list[int],
    need_lam: bool,
    need_target: list[int],
    need_source: list[int],
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """``mmkernels::merge_bwd_triton``."""
    inputs = Inputs.checked(target, source, lam, groups)
    for tensor, like in zip(grad, target, strict=True):
        if tensor.shape != like.shape or tensor.dtype != grad[0].dtype or tensor.device != like.device:
            raise ValueError("grad: expected tensors like those of target, of one dtype")
    for name, wanted in (("need_target", need_target), ("need_source", need_source)):
        if len(set(wanted)) < len(wanted) or any(not 0 <= index < len(target) for index in wanted):
            raise ValueError(f"{name}: expected indices of pairs, every one once, got {wanted}")
    grad = [tensor.contiguous() for tensor in grad]
    d_target = {index: target[index].new_empty(target[index].shape) for index in need_target}
    d_source = {index: source[index].new_empty(source[index].shape) for index in need_source}
    launches = list(inputs.launches())
    chunks = sum(launch.chunks for launch in launches)
    partial = lam.new_empty(chunks if need_lam else 0)
    partial_group = lam.new_empty(chunks if need_lam else 0, dtype=torch.int32)
    d_lam = lam.new_empty(lam.shape[0] if need_lam else 0)
    first_chunk = 0
    with on_device(lam):
        for launch in launches:
            rows = launch.of(grad), launch.of(d_target), launch.of(d_source)
            merge_bwd_kernel[(launch.chunks,)](
                launch.table(*rows),
                inputs.lam,
                partial,
                partial_group,
                first_chunk,
                RESULT=ELEMENTS[grad[0].dtype],
                NEED_LAM=need_lam,
                NEED_TARGET=bool(need_target),
                NEED_SOURCE=bool(need_source),
                ALIGNMENT=launch.alignment(*rows),
                **inputs.options(),
            )
            first_chunk += launch.chunks
        if need_lam:
            merge_sum_kernel[lam.shape](partial, partial_group, d_lam, chunks, SUMS=SUMS, num_warps=WARPS)
    return d_lam, list(d_target.values()), list(d_source.values())


@dataclass(frozen=True)
class Launch:
    """Pairs that share a launch, none of them empty, and how many chunks each has."""

    pairs: tuple[int, ...]
    target: tuple[Tensor, ...]
    source: tuple[Tensor, ...]
    groups: tuple[int, ...]

    def of(self, tensors: Mapping[int, Tensor] | Sequence[Tensor]) -> list[Tensor | None]:
        """Those of this launch's pairs; None where there is none."""
        if isinstance(tensors, Mapping):
            return [tensors.get(index) for index in self.pairs]
        return [tensors[index] for index in self.pairs]

    @property
    def chunks(self) -> int:
        return sum(triton.cdiv(tensor.numel(), CHUNK) for tensor in self.target)

    def table(self, *others: Sequence[Tensor | None]) -> Tensor:
        """The rows that the kernels document; ``others`` follow the source."""
        counts = [triton.cdiv(tensor.numel(), CHUNK) for tensor in self.target]
        starts = [0, *accumulate(counts)][:-1]
        addresses = [
            [0 if tensor is None else tensor.data_ptr() for tensor in row]
            for row in (self.target, self.source, *others)
        ]
        rows = [starts, [tensor.numel() for tensor in self.target], self.groups, *addresses]
        fill = [NO_CHUNK, *[0] * (len(rows) - 1)]
        padded = [[*row, *[value] * (PAIRS - len(row))] for row, value in zip(rows, fill, strict=True)]
        return device_table(padded, self.target[0].device)

    def alignment(self, *others: Sequence[Tensor | None]) -> int:
        """Bytes that all addresses are multiples of: those of a whole vector, or 1."""
        tensors = (tensor for row in (self.target, self.source, *others) for tensor in row)
        whole = all(tensor is None or tensor.data_ptr() % 16 == 0 for tensor in tensors)
        return 16 if whole else 1


@dataclass(frozen=True)
class Inputs:
    """The operands of both directions, checked and contiguous."""

    target: tuple[Tensor, ...]
    source: tuple[Tensor, ...]
    lam: Tensor
    groups: tuple[int, ...]

    @classmethod
    def checked(cls, target: list[Tensor], source: list[Tensor], lam: Tensor, groups: list[int]) -> Inputs:
        if not target or not len(target) == len(source) == len(groups):
            raise ValueError("target, source and groups: expected lists of one length, at least 1")
        for name, tensors in (("target", target), ("source", source)):
            for tensor, like in zip(tensors, target, strict=True):
                alike = tensor.dtype == tensors[0].dtype and tensor.device == lam.device
                if tensor.shape != like.shape or not alike:
                    raise ValueError(f"{name}: expected the shapes of target, one dtype, the device of lam")
        wide = accumulate_dtype(target[0].dtype)
        lam = expect("lam", lam, (lam.numel(),), wide, lam.device)
        if any(not 0 <= group < lam.shape[0] for group in groups):
            raise ValueError(f"groups: expected indices below {lam.shape[0]}, got {groups}")
        return cls(
            tuple(tensor.contiguous() for tensor in target),
            tuple(tensor.contiguous() for tensor in source),
            lam,
            tuple(groups),
        )

    def launches(self) -> Iterator[Launch]:
        pairs = [index for index, tensor in enumerate(self.target) if tensor.numel() > 0]
        for first in range(0, len(pairs), PAIRS):
            some = tuple(pairs[first : first + PAIRS])
            yield Launch(
                some,
                tuple(self.target[index] for index in some),
                tuple(self.source[index] for index in some),
                tuple(self.groups[index] for index in some),
            )

    def options(self) -> dict[str, Any]:
        """Constants of a launch that the tensors decide, and those of every launch."""
        types = {"TARGET": ELEMENTS[self.target[0].dtype], "SOURCE": ELEMENTS[self.source[0].dtype]}
        return {**types, "PAIRS": PAIRS, "CHUNK": CHUNK, "BLOCK": BLOCK, "num_warps": WARPS}
