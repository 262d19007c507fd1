"""The CUDA kernels of segment_pool, run by the host SIMT runtime, against the float64 reference."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import simt_build
import torch
from devices import DEVICES
from hypothesis import given, settings
from hypothesis import strategies as st
from simt_tensors import DTYPE_CODES, HALF_DTYPES, GuardedTensors, integers, pointer
from torch import Tensor

from mmkernels.ops.segment_pool import reference
from mmkernels.ops.segment_pool.schema import REDUCTIONS
from op_tests import assert_close_to_reference

pytestmark = pytest.mark.skipif(
    simt_build.missing_tools() is not None, reason=str(simt_build.missing_tools())
)

SOURCES = [
    "csrc/cuda/segment_pool.cu",
    "csrc/cuda/segment_pool_backward.cu",
    "tests/csrc/segment_pool_shim.cpp",
]
PIECE = 64
#: Segments of a few frames, of none, of a piece, of one more, and of several; frames in none.
ENDS = ((3, 3, 67, 132, 140, 300), (0, 64, 65, 65, 200, 329), (5, 5, 5, 6, 6, 6))
FRAMES = 330
each_reduction = pytest.mark.parametrize("reduce", REDUCTIONS)
each_dtype = pytest.mark.parametrize("dtype", DTYPE_CODES, ids=str)


@dataclass
class Problem:
    """Inputs of one call, of rows `gap` elements apart and `offset` elements past an aligned address."""

    reduce: str
    dtype: torch.dtype = torch.float32
    width: int = 40
    ends: Sequence[Sequence[int]] = ENDS
    frames: int = FRAMES
    counts: tuple[int, ...] | None = None
    offset: int = 0
    gap: int = 0
    save: bool = True
    memory: GuardedTensors = field(default_factory=GuardedTensors)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.frames * 1000 + self.width)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        def rows(count: int) -> Tensor:
            values = random(self.batch, count, self.width + self.gap).to(self.dtype)
            return self.memory.of(values, self.offset)[:, :, : self.width]

        self.stops = self.memory.of(torch.tensor(self.ends, dtype=torch.int64).reshape(self.batch, -1))
        self.valid = None if self.counts is None else self.memory.of(torch.tensor(self.counts))
        self.x, self.grad = rows(self.frames), rows(self.segments)
        attends = self.reduce == "attention"
        self.scores = self.memory.of(2 * random(self.batch, self.frames)) if attends else None
        clamped = reference.segment_stops(self.stops, self.valid, self.frames)
        for row in range(self.batch if self.segments else 0):
            self.x[row, clamped[row, -1] :] = torch.nan
            if self.scores is not None:
                self.scores[row, clamped[row, -1] :] = torch.nan

    @property
    def batch(self) -> int:
        return len(self.ends)

    @property
    def segments(self) -> int:
        return len(self.ends[0])

    @property
    def partials(self) -> int:
        return 2 * self.batch * (-(-self.frames // PIECE) if self.frames > PIECE else 0)

    def common_arguments(self) -> tuple[object, ...]:
        code = DTYPE_CODES[self.dtype], REDUCTIONS.index(self.reduce)
        sizes = integers(*code, self.batch, self.frames, self.segments, self.width)
        scratch = self.memory.empty((self.batch, self.segments), torch.int64)
        return sizes, pointer(self.stops), pointer(self.valid), pointer(scratch)

    def reference(self, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
        """The reference's result in `dtype`, and its gradients of frames and scores."""
        x = self.x.to(dtype, copy=True).requires_grad_()
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        scores = None if self.scores is None else self.scores.to(wide, copy=True).requires_grad_()
        out = reference.segment_pool(x, self.stops, reduce=self.reduce, scores=scores, counts=self.valid)
        leaves = [x] if scores is None else [x, scores]
        return out.detach(), list(torch.autograd.grad(out, leaves, self.grad.to(dtype)))


@pytest.fixture(scope="module")
def kernels() -> simt_build.Library:
    return simt_build.load(simt_build.build("segment_pool", SOURCES, races=True))


def forward(
    kernels: simt_build.Library, problem: Problem, *, order: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, and what the backward pass reads of it: statistics and frames of maxima."""
    empty = problem.memory.empty
    shape = problem.batch, problem.segments, problem.width
    kept = {"attention": problem.save, "max": problem.save}.get(problem.reduce, False)
    indexed, attends = problem.reduce == "max", problem.reduce == "attention"
    out = empty(shape, problem.dtype)
    stats = empty((*shape[:2], 2) if attends and kept else (0,), torch.float32)
    index = empty(shape if indexed and kept else (0,), torch.int32)
    partials = problem.partials if problem.reduce != "last" else 0
    scratch = [
        empty((partials, problem.width), torch.float32),
        empty((partials if indexed and kept else 0, problem.width), torch.int32),
        empty((partials if attends else 0, 2), torch.float32),
    ]
    kernels.call(
        "segment_pool_forward",
        *problem.common_arguments(),
        pointer(problem.x),
        integers(*problem.x.stride()[:2]),
        pointer(problem.scores),
        *map(pointer, (out, stats, index, *scratch)),
        order=order,
    )
    problem.memory.check()
    return out, stats, index


def backward(
    kernels: simt_build.Library,
    problem: Problem,
    *,
    x: bool = True,
    scores: bool | None = None,
    order: int = 2,
) -> tuple[Tensor, Tensor]:
    """The gradients of frames and scores; by default all that the problem has."""
    scores = problem.reduce == "attention" if scores is None else scores
    _, stats, index = forward(kernels, problem)
    empty = problem.memory.empty
    dx = empty((problem.batch if x else 0, problem.frames, problem.width), problem.dtype)
    d_scores = empty((problem.batch if scores else 0, problem.frames), torch.float32)
    partial = empty((problem.partials if scores else 0,), torch.float32)
    kernels.call(
        "segment_pool_backward",
        *problem.common_arguments(),
        pointer(problem.grad),
        integers(*problem.grad.stride()[:2]),
        pointer(problem.x if scores else None),
        integers(*problem.x.stride()[:2]),
        *map(pointer, (problem.scores, stats, index, dx, d_scores, partial)),
        order=order,
    )
    problem.memory.check()
    return dx, d_scores


def check(kernels: simt_build.Library, problem: Problem) -> None:
    exact, exact_gradients = problem.reference(torch.float64)
    eager, eager_gradients = problem.reference(problem.dtype)
    assert_close_to_reference(forward(kernels, problem)[0], exact, eager, problem.dtype)
    found = backward(kernels, problem)
    for gradient, r, e in zip(found, exact_gradients, eager_gradients, strict=False):
        assert_close_to_reference(gradient, r, e, problem.dtype, "gradient")
    stops = reference.segment_stops(problem.stops, problem.valid, problem.frames)
    for row in range(problem.batch if problem.segments else 0):
        for gradient in found[: len(exact_gradients)]:
            assert gradient[row, stops[row, -1] :].eq(0).all()


@each_dtype
@each_reduction
def test_values_and_gradients(kernels: simt_build.Library, reduce: str, dtype: torch.dtype) -> None:
    check(kernels, Problem(reduce, dtype))


@each_reduction
@pytest.mark.parametrize("width", [1, 4, 33, 264])
def test_widths(kernels: simt_build.Library, width: int, reduce: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        check(kernels, Problem(reduce, dtype, width, ends=((2, 9), (3, 75)), frames=80))


@each_reduction
@pytest.mark.parametrize(("offset", "gap"), [(1, 0), (0, 3), (0, 8), (8, 0)])
def test_any_alignment(kernels: simt_build.Library, offset: int, gap: int, reduce: str) -> None:
    plain = Problem(reduce, torch.float16, 24, ends=((2, 70),), frames=75)
    moved = Problem(reduce, torch.float16, 24, ends=((2, 70),), frames=75, offset=offset, gap=gap)
    moved.x.copy_(plain.x)
    moved.grad.copy_(plain.grad)
    if plain.scores is not None and moved.scores is not None:
        moved.scores.copy_(plain.scores)
    assert torch.equal(forward(kernels, moved)[0], forward(kernels, plain)[0])
    assert torch.equal(backward(kernels, moved)[0], backward(kernels, plain)[0])


@each_reduction
def test_counts(kernels: simt_build.Library, reduce: str) -> None:
    """Counts are clamped, and the ends past them are not read."""
    ends = ((3, 70, 90), (2**40, -(2**40), 7), (8, 9, 10))
    for counts in ((2, 0, 3), (1, -5, 99)):
        check(kernels, Problem(reduce, ends=ends, frames=100, counts=counts))


@each_reduction
def test_ends_of_any_value(kernels: simt_build.Library, reduce: str) -> None:
    """They are clamped to the frames, and to their running maximum."""
    extreme = (-(2**63), 2**63 - 1)
    ends = ((5, 2, 70, 60, 99), (-4, 3, 2, 1000, 4), (extreme[0], 7, 3, *extreme[::-1]))
    check(kernels, Problem(reduce, ends=ends, frames=80))


@pytest.mark.parametrize("segments", [255, 256, 257, 600])
def test_stops_of_many_segments(kernels: simt_build.Library, segments: int) -> None:
    generator = torch.Generator().manual_seed(segments)
    drawn = torch.randint(-50, 700, (2, segments), generator=generator)
    problem = Problem("sum", width=4, ends=drawn.tolist(), frames=650)
    check(kernels, problem)


@each_reduction
def test_no_frames_segments_or_rows(kernels: simt_build.Library, reduce: str) -> None:
    out, *_ = forward(kernels, Problem(reduce, ends=((0, 0),), frames=0))
    assert out.eq(0).all()
    dx, _ = backward(kernels, Problem(reduce, ends=((), ()), frames=70))
    assert dx.eq(0).all()
    forward(kernels, Problem(reduce, width=0, ends=((2, 3),), frames=5))


@pytest.mark.parametrize("frames", [5, 64, 65, 700])
def test_the_first_of_equal_maxima_and_of_nan(kernels: simt_build.Library, frames: int) -> None:
    problem = Problem("max", width=4, ends=((frames,),), frames=frames)
    problem.x.zero_()
    problem.x[0, [3, frames - 1], 0] = 2.0
    problem.x[0, [2, frames - 1], 1] = torch.nan
    problem.x[0, :, 2] = -torch.inf
    out, _, index = forward(kernels, problem)
    assert index.flatten().tolist() == [3, 2, 0, 0]
    torch.testing.assert_close(out[0, 0], torch.tensor([2, torch.nan, -torch.inf, 0]), equal_nan=True)
    problem.save = False
    assert torch.equal(forward(kernels, problem)[0].nan_to_num(), out.nan_to_num())


@pytest.mark.parametrize("frames", [5, 700])
def test_scores_of_minus_infinity(kernels: simt_build.Library, frames: int) -> None:
    problem = Problem("attention", width=4, ends=((frames,),), frames=frames)
    assert problem.scores is not None
    problem.scores[0, 1 : frames - 2] = -torch.inf
    check(kernels, problem)
    problem.scores.fill_(-torch.inf)
    assert forward(kernels, problem)[0].eq(0).all()
    assert all(gradient.eq(0).all() for gradient in backward(kernels, problem))


@pytest.mark.parametrize(("reduce", "expected"), [("mean", 1), ("sum", 4096)])
def test_sums_are_wide(kernels: simt_build.Library, reduce: str, expected: float) -> None:
    problem = Problem(reduce, torch.bfloat16, 8, ends=((4096,),), frames=4096)
    problem.x.fill_(1)
    assert forward(kernels, problem)[0].eq(expected).all()


@pytest.mark.parametrize(("x", "scores"), [(True, False), (False, True)])
def test_gradients_alone(kernels: simt_build.Library, x: bool, scores: bool) -> None:
    problem = Problem("attention", torch.bfloat16, 40)
    both, alone = backward(kernels, problem), backward(kernels, problem, x=x, scores=scores)
    assert torch.equal(alone[0], both[0]) if x else torch.equal(alone[1], both[1])


@each_reduction
def test_the_same_in_all_thread_orders(kernels: simt_build.Library, reduce: str) -> None:
    problem = Problem(reduce, torch.float16, 40, ends=((3, 80),), frames=140)

    def run(order: int) -> Tensor:
        out, _, _ = forward(kernels, problem, order=order)
        gradients = backward(kernels, problem, order=order)
        return torch.cat([t.reshape(-1).view(torch.uint8) for t in (out, *gradients)]).numpy()

    simt_build.same_in_all_orders(run)


@each_reduction
def test_a_row_does_not_depend_on_the_batch(kernels: simt_build.Library, reduce: str) -> None:
    together = Problem(reduce)
    out, dx = forward(kernels, together)[0], backward(kernels, together)[0]
    alone = Problem(reduce, ends=(ENDS[1],), frames=329)
    alone.x.copy_(together.x[1:2, :329])
    alone.grad.copy_(together.grad[1:2])
    if alone.scores is not None and together.scores is not None:
        alone.scores.copy_(together.scores[1:2, :329])
    assert torch.equal(forward(kernels, alone)[0], out[1:2])
    assert torch.equal(backward(kernels, alone)[0], dx[1:2, :329])


@each_reduction
def test_launches_depend_on_the_sizes_alone(kernels: simt_build.Library, reduce: str) -> None:
    """Of a batch of Whisper's encoder. No kernel is launched for a longest segment that is not there."""
    shape = (16, 1500, 375, 1024)
    sizes = integers(DTYPE_CODES[torch.bfloat16], REDUCTIONS.index(reduce), *shape)
    memory = pointer(torch.zeros(64))  # not read
    grids = []
    for device in DEVICES:
        with kernels.on(device), kernels.recording(run=False) as found:
            strides = integers(1500 * 1024, 1024)
            arguments = (sizes, memory, None, memory, memory, strides, memory)
            kernels.call("segment_pool_forward", *arguments, *[memory] * 6)
        grids.append([launch.blocks for launch in found])
    assert grids == [grids[0]] * len(DEVICES)
    assert len(grids[0]) == (2 if reduce == "last" else 3)


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    st.sampled_from(REDUCTIONS),
    st.sampled_from([torch.float32, *HALF_DTYPES]),
    st.lists(st.integers(0, 220), min_size=1, max_size=6),
    st.integers(1, 200),
    st.sampled_from([1, 8, 33]),
)
def test_fuzz(reduce: str, dtype: torch.dtype, ends: list[int], frames: int, width: int) -> None:
    library = simt_build.load(simt_build.build("segment_pool", SOURCES, races=True))
    rows = [sorted(ends), list(itertools.accumulate(ends))]
    check(library, Problem(reduce, dtype, width, ends=rows, frames=frames))
