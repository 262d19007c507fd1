"""The CUDA kernels of segment_attention, run by the host SIMT runtime, against the float64 reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
import simt_build
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from simt_tensors import DTYPE_CODES, HALF_DTYPES, GuardedTensors, integers, pointer
from test_segment_attention import eager
from torch import Tensor

from mmkernels.ops._segments import segment_stops
from mmkernels.ops.segment_attention import reference
from op_tests import assert_close_to_reference

pytestmark = pytest.mark.skipif(
    simt_build.missing_tools() is not None, reason=str(simt_build.missing_tools())
)

SOURCES = [
    "csrc/cuda/segment_attention.cu",
    "csrc/cuda/segment_attention_backward.cu",
    "tests/csrc/segment_attention_shim.cpp",
]
#: Segments of a few frames, of none, and longer than a block; frames in none.
ENDS = ((3, 3, 20, 110), (0, 7, 40, 64))
FRAMES = 112
each_dtype = pytest.mark.parametrize("dtype", DTYPE_CODES, ids=str)


@dataclass
class Problem:
    """Inputs of one call: rows with `gap` more elements each, `offset` elements past an aligned address."""

    dtype: torch.dtype = torch.float32
    size: int = 16
    ends: Sequence[Sequence[int]] = ENDS
    frames: int = FRAMES
    heads: int = 2
    key_heads: int = 1
    lookback: int = 1
    scale: float = 0.3
    offset: int = 0
    gap: int = 0
    memory: GuardedTensors = field(default_factory=GuardedTensors)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.frames * 1000 + self.size)
        batch = len(self.ends)

        def rows(heads: int) -> Tensor:
            values = torch.randn(batch, self.frames, heads, self.size + self.gap, generator=generator)
            moved = self.memory.of(values.to(self.dtype), self.offset)
            return moved[..., : self.size].transpose(1, 2)

        self.stops = self.memory.of(torch.tensor(self.ends, dtype=torch.int64).reshape(batch, -1))
        self.q, self.grad = rows(self.heads), rows(self.heads)
        self.k, self.v = rows(self.key_heads), rows(self.key_heads)
        for row, stop in enumerate(self.covered()):
            for tensor in (self.q, self.k, self.v, self.grad):
                tensor[row, :, stop:] = torch.nan

    def covered(self) -> list[int]:
        """How many frames of each row are in segments."""
        stops = segment_stops(self.stops, None, self.frames)
        return [int(row[-1]) if len(row) else 0 for row in stops]

    @property
    def sizes(self) -> object:
        shape = len(self.ends), self.heads, self.key_heads, self.frames, self.size
        return integers(DTYPE_CODES[self.dtype], *shape, len(self.ends[0]), self.lookback)

    def expected(self, function: Callable[..., Tensor], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        leaves = [t.to(dtype, copy=True).requires_grad_() for t in (self.q, self.k, self.v)]
        for leaf in leaves:
            leaf.data.nan_to_num_()
        grad = self.grad.to(dtype, copy=True).nan_to_num_()
        stops = segment_stops(self.stops, None, self.frames) if function is eager else self.stops
        out = function(*leaves, stops, lookback=self.lookback, scale=self.scale)
        return out.detach(), list(torch.autograd.grad(out, leaves, grad))


@pytest.fixture(scope="module")
def kernels() -> simt_build.Library:
    return simt_build.load(simt_build.build("segment_attention", SOURCES, races=True))


def strides(*tensors: Tensor) -> object:
    return integers(*(stride for tensor in tensors for stride in tensor.stride()[:3]))


def run(
    kernels: simt_build.Library,
    problem: Problem,
    *,
    needed: tuple[bool, bool, bool] = (True, True, True),
    order: int = 2,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The result, the logarithms of the sums, and the gradients; an empty one for a gradient not needed."""
    p, empty = problem, problem.memory.empty
    batch = len(p.ends)
    extents = empty((batch, 2, p.frames), torch.int32)
    out = empty((batch, p.frames, p.heads, p.size), p.dtype)
    lse = empty((batch, p.heads, p.frames), torch.float32)
    inputs = (p.q, p.k, p.v)
    kernels.call(
        "segment_attention_forward",
        *(p.sizes, pointer(p.stops), pointer(extents)),
        *(*map(pointer, inputs), strides(*inputs), p.scale, pointer(out), pointer(lse)),
        order=order,
    )
    result = out.transpose(1, 2)
    dots = empty(lse.shape, torch.float32)
    counts = (p.heads, p.key_heads, p.key_heads)
    gradients = [
        empty((batch if need else 0, p.frames, heads, p.size), p.dtype)
        for need, heads in zip(needed, counts, strict=True)
    ]
    kernels.call(
        "segment_attention_backward",
        *(p.sizes, pointer(extents), *map(pointer, (*inputs, p.grad, out)), strides(*inputs, p.grad, result)),
        *(p.scale, pointer(lse), pointer(dots), *map(pointer, gradients)),
        order=order,
    )
    problem.memory.check()
    return result, lse, [gradient.transpose(1, 2) for gradient in gradients]


def check(kernels: simt_build.Library, problem: Problem) -> None:
    exact, exact_gradients = problem.expected(reference.segment_attention, torch.float64)
    usual, usual_gradients = problem.expected(eager, problem.dtype)
    out, _, gradients = run(kernels, problem)
    assert_close_to_reference(out, exact, usual, problem.dtype)
    for name, found, r, e in zip("qkv", gradients, exact_gradients, usual_gradients, strict=True):
        assert_close_to_reference(found, r, e, problem.dtype, f"gradient of {name}")
    for row, stop in enumerate(problem.covered()):
        for tensor in (out, *gradients):
            assert tensor[row, :, stop:].eq(0).all()


@each_dtype
def test_values_and_gradients(kernels: simt_build.Library, dtype: torch.dtype) -> None:
    check(kernels, Problem(dtype))


@pytest.mark.parametrize("size", [8, 64, 72, 128, 136])
def test_sizes_of_heads(kernels: simt_build.Library, size: int) -> None:
    """Whole tiles, padded ones, and too wide ones, which take more blocks."""
    for dtype in (torch.float32, torch.bfloat16):
        check(kernels, Problem(dtype, size, ends=((5, 20), (2, 18)), frames=20, scale=0.1))


@each_dtype
@pytest.mark.parametrize("lookback", [0, 5, 1000, 2**62])
def test_lookback(kernels: simt_build.Library, lookback: int, dtype: torch.dtype) -> None:
    check(kernels, Problem(dtype, ends=((2, 3, 9, 70, 75),), frames=80, lookback=lookback))


@pytest.mark.parametrize(("heads", "key_heads"), [(1, 1), (6, 2), (3, 3)])
def test_groups_of_heads(kernels: simt_build.Library, heads: int, key_heads: int) -> None:
    for dtype in (torch.float32, torch.float16):
        check(kernels, Problem(dtype, ends=((4, 30),), frames=33, heads=heads, key_heads=key_heads))


@pytest.mark.parametrize(("offset", "gap"), [(1, 0), (0, 3), (8, 0), (0, 8)])
def test_any_alignment(kernels: simt_build.Library, offset: int, gap: int) -> None:
    check(kernels, Problem(torch.float16, 24, ends=((4, 30),), frames=33, offset=offset, gap=gap))


def test_many_short_segments(kernels: simt_build.Library) -> None:
    """More than a block scans at a time, and more frames than one window of extents."""
    ends = tuple(range(3, 1203, 2))
    problem = Problem(torch.bfloat16, 8, ends=(ends,), frames=1210, heads=1)
    check(kernels, problem)


def test_ends_of_any_value(kernels: simt_build.Library) -> None:
    """They are clamped to the frames, and to their running maximum."""
    lowest, highest = -(2**63), 2**63 - 1
    ends = ((5, 2, 70, 60, 99), (-4, 3, 2, 1000, 4), (lowest, 7, 3, highest, lowest))
    check(kernels, Problem(torch.float16, 8, ends=ends, frames=80, heads=1))


def test_backward_is_safe_for_any_extents(kernels: simt_build.Library) -> None:
    """Of a direct call of the op; the guards of the tensors find what is read or written outside."""
    for low, high in ((-(2**31), 2**31), (-5, 100), (0, 40)):
        for dtype in (torch.float32, torch.bfloat16):
            p = Problem(dtype, ends=((40,),), frames=40)
            generator = torch.Generator().manual_seed(high)
            extents = p.memory.of(torch.randint(low, high, (1, 2, 40), generator=generator).to(torch.int32))
            lse, dots = (p.memory.of(torch.zeros(1, 2, 40)) for _ in range(2))
            out = p.memory.of(torch.zeros(1, 40, 2, 16, dtype=dtype))
            heads = (2, 1, 1)
            gradients = [p.memory.empty((1, 40, count, 16), dtype) for count in heads]
            inputs = (p.q, p.k, p.v, p.grad)
            kernels.call(
                "segment_attention_backward",
                *(p.sizes, pointer(extents), *map(pointer, (*inputs, out))),
                *(strides(*inputs, out.transpose(1, 2)), p.scale, pointer(lse), pointer(dots)),
                *map(pointer, gradients),
            )
            p.memory.check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_gradients_alone(kernels: simt_build.Library, dtype: torch.dtype) -> None:
    problem = Problem(dtype, ends=((3, 40),), frames=50)
    together = run(kernels, problem)[2]
    for index in range(3):
        needed = tuple(i == index for i in range(3))
        assert torch.equal(run(kernels, problem, needed=needed)[2][index], together[index])


@each_dtype
def test_the_same_in_all_thread_orders(kernels: simt_build.Library, dtype: torch.dtype) -> None:
    problem = Problem(dtype, ends=((3, 70),), frames=75, heads=1)

    def outputs(order: int) -> Tensor:
        out, lse, gradients = run(kernels, problem, order=order)
        tensors = (out, lse, *gradients)
        return torch.cat([t.contiguous().reshape(-1).view(torch.uint8) for t in tensors]).numpy()

    simt_build.same_in_all_orders(outputs)


@each_dtype
def test_a_row_does_not_depend_on_the_batch(kernels: simt_build.Library, dtype: torch.dtype) -> None:
    together = Problem(dtype)
    out, lse, gradients = run(kernels, together)
    alone = Problem(dtype, ends=(ENDS[1],), frames=64)
    for name in ("q", "k", "v", "grad"):
        getattr(alone, name).copy_(getattr(together, name)[1:2, :, :64])
    found, sums, others = run(kernels, alone)
    assert torch.equal(found, out[1:2, :, :64])
    assert torch.equal(sums, lse[1:2, :, :64])
    for mine, other in zip(others, gradients, strict=True):
        assert torch.equal(mine, other[1:2, :, :64])


@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(
    st.sampled_from([torch.float32, *HALF_DTYPES]),
    st.lists(st.integers(0, 100), min_size=1, max_size=6),
    st.integers(16, 100),
    st.sampled_from([8, 24, 64]),
    st.sampled_from([0, 1, 3, 50]),
)
def test_fuzz(dtype: torch.dtype, ends: list[int], frames: int, size: int, lookback: int) -> None:
    library = simt_build.load(simt_build.build("segment_attention", SOURCES, races=True))
    inside = sorted(min(end, frames) for end in ends)
    problem = Problem(dtype, size, (inside,), frames, heads=1, lookback=lookback, scale=0.2)
    check(library, problem)
