"""The CUDA kernels of merge, run on the CPU by the host SIMT runtime, against the float64 reference."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
import simt_build
import torch
from devices import DEVICES
from simt_tensors import DTYPE_CODES, HALF_DTYPES, GuardedTensors, integers, pointer, pointers
from torch import Tensor

from mmkernels.ops.merge import reference

pytestmark = pytest.mark.skipif(
    simt_build.missing_tools() is not None, reason=str(simt_build.missing_tools())
)

SOURCES = ["csrc/cuda/merge.cu", "csrc/cuda/merge_backward.cu", "tests/csrc/merge_shim.cpp"]
CHUNK = 16384
#: Pairs of one launch.
TABLE = 128
#: Groups of one launch of the second stage.
GROUPS = 256

Types = tuple[torch.dtype, torch.dtype, torch.dtype]
FLOAT32: Types = (torch.float32, torch.float32, torch.float32)
#: Of target, source and result: float32 with one half type.
TYPES: list[Types] = sorted(
    {types for half in HALF_DTYPES for types in itertools.product((torch.float32, half), repeat=3)}, key=str
)
#: Tensors of a few elements, of a whole chunk, of almost one, and of whole chunks and a rest.
SIZES = (5, CHUNK, 0, CHUNK - 1, 2 * CHUNK + 20, 1)
GROUP_OF = (2, 0, 1, 2, 0, 2)
LAM = (0.3, 0.7, 0.9, 0.1)


@dataclass
class Problem:
    """Inputs of one call, whose tensors start `offset` elements past an aligned address."""

    types: Types = FLOAT32
    sizes: Sequence[int] = SIZES
    groups: Sequence[int] = GROUP_OF
    lam: Sequence[float] = LAM
    offset: int = 0
    readable: bool = True  # else the kernels get no targets and sources
    memory: GuardedTensors = field(default_factory=GuardedTensors)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(sum(self.sizes))
        self.target, self.source, self.grad = (
            [self.memory.of(torch.randn(n, generator=generator).to(dtype), self.offset) for n in self.sizes]
            for dtype in self.types
        )
        self.inputs = (self.target, self.source)
        self.weights = self.memory.of(torch.tensor(self.lam))

    def arguments(self) -> tuple[object, ...]:
        types = integers(*(DTYPE_CODES[dtype] for dtype in self.types))
        inputs = [pointers(tensors if self.readable else [None] * len(tensors)) for tensors in self.inputs]
        sizes = (len(self.sizes), integers(*self.sizes), integers(*self.groups))
        return (types, *sizes, *inputs, pointer(self.weights))


@pytest.fixture(scope="module")
def kernels() -> simt_build.Library:
    return simt_build.load(simt_build.build("merge", SOURCES, races=True))


def forward(kernels: simt_build.Library, problem: Problem, *, order: int = 2) -> list[Tensor]:
    dtype = problem.types[2]
    out = [problem.memory.of(torch.full((n,), torch.nan, dtype=dtype), problem.offset) for n in problem.sizes]
    kernels.call("merge_forward", *problem.arguments(), pointers(out), order=order)
    problem.memory.check()
    return out


def check_forward(kernels: simt_build.Library, problem: Problem) -> None:
    """Each result is rounded once, after a float32 computation."""
    dtype = problem.types[2]
    exact = reference.merge(
        [t.double() for t in problem.target],
        [t.double() for t in problem.source],
        problem.weights.double(),
        groups=problem.groups,
    )
    for out, e in zip(forward(kernels, problem), exact, strict=True):
        assert out.dtype == dtype
        bound = 4 * torch.finfo(torch.float32).eps * 4 + torch.finfo(dtype).eps / 2 * e.abs()
        assert ((out.double() - e).abs() <= bound).all()


@pytest.mark.parametrize("types", TYPES, ids=str)
def test_forward(kernels: simt_build.Library, types: Types) -> None:
    check_forward(kernels, Problem(types))


@pytest.mark.parametrize(
    "types", [FLOAT32, (torch.bfloat16,) * 3, (torch.float32, torch.float16, torch.float32)]
)
@pytest.mark.parametrize("offset", [1, 2, 4])
def test_forward_of_any_alignment(kernels: simt_build.Library, types: Types, offset: int) -> None:
    problem = Problem(types, offset=offset)
    check_forward(kernels, problem)
    aligned = forward(kernels, Problem(types))
    assert all(map(torch.equal, forward(kernels, problem), aligned))


@pytest.mark.parametrize("dtype", DTYPE_CODES)
@pytest.mark.parametrize("size", [9, CHUNK])
def test_the_ends_are_copies_of_one_side(kernels: simt_build.Library, dtype: torch.dtype, size: int) -> None:
    problem = Problem((dtype,) * 3, sizes=(size, size), groups=(0, 1), lam=(0.0, 1.0))
    for side in (problem.source[0], problem.target[1]):
        side[::2] = torch.inf
        side[1::4] = torch.nan
    out = forward(kernels, problem)
    assert torch.equal(out[0], problem.target[0])
    assert torch.equal(out[1], problem.source[1])


def test_the_nearer_side_keeps_its_digits(kernels: simt_build.Library) -> None:
    problem = Problem(sizes=(1, 1), groups=(0, 1), lam=(2**-20, 1 - 2**-20))
    for side, other in ((problem.target[0], problem.source[0]), (problem.source[1], problem.target[1])):
        side.fill_(1.0)
        other.fill_(1e8)
    exact = torch.tensor([1 + 2**-20 * (1e8 - 1)])
    for out in forward(kernels, problem):
        torch.testing.assert_close(out, exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("lam", [-0.5, 0.25, 0.5, 0.75, 1.5, float("nan")])
def test_weights_of_any_value(kernels: simt_build.Library, lam: float) -> None:
    problem = Problem(sizes=(40,), groups=(0,), lam=(lam,))
    if lam == lam:
        check_forward(kernels, problem)
    else:
        assert forward(kernels, problem)[0].isnan().all()


@pytest.mark.parametrize(
    "types", [FLOAT32, (torch.float16,) * 3, (torch.bfloat16, torch.float32, torch.bfloat16)]
)
@pytest.mark.parametrize("offset", [0, 1])
def test_results_in_place_of_the_targets(kernels: simt_build.Library, types: Types, offset: int) -> None:
    problem = Problem(types, offset=offset)
    expected = forward(kernels, problem)
    kernels.call("merge_forward", *problem.arguments(), pointers(problem.target), order=2)
    problem.memory.check()
    assert all(map(torch.equal, problem.target, expected))


def many_pairs(count: int, groups: int) -> Problem:
    """As many pairs with a few elements, and empty ones between them."""
    sizes = [n for k in range(count) for n in (1 + k % 7, 0)[: 1 + (k % 4 == 0)]]
    lam = torch.linspace(0, 1, groups).tolist()
    return Problem(sizes=sizes, groups=[(k * 5) % groups for k in range(len(sizes))], lam=lam)


@pytest.mark.parametrize(("pairs", "launches"), [(0, 0), (1, 1), (TABLE, 1), (TABLE + 1, 2), (300, 3)])
def test_pairs_fill_tables(kernels: simt_build.Library, pairs: int, launches: int) -> None:
    """Pairs without elements take no place in a table."""
    with kernels.recording(run=True) as found:
        check_forward(kernels, many_pairs(pairs, 3))
    assert len(found) == launches


def test_the_merge_of_a_model_is_one_launch(kernels: simt_build.Library) -> None:
    """Blocks of 24 layers with 4 matrices, of real sizes."""
    address = np.full(96, 1 << 20, np.uint64)
    sizes, groups = integers(*[1024 * 1024] * 96), integers(*[k // 4 for k in range(96)])
    weights = torch.zeros(24)
    arguments = (integers(0, 0, 0), 96, sizes, groups, address, address, pointer(weights))
    with kernels.recording(run=False) as found:
        kernels.call("merge_forward", *arguments, address)
        kernels.call("merge_backward", *arguments, 24, *[address] * 3, pointer(weights), pointer(weights))
    assert [launch.blocks for launch in found] == [96 * 64, 96 * 64, 24]


@dataclass(frozen=True)
class Gradients:
    lam: Tensor
    target: list[Tensor | None]
    source: list[Tensor | None]

    def bytes(self) -> np.ndarray:
        tensors = [self.lam, *(t for t in (*self.target, *self.source) if t is not None)]
        return np.concatenate([t.view(torch.uint8).numpy() for t in tensors if t.numel() > 0])


def backward(
    kernels: simt_build.Library,
    problem: Problem,
    *,
    lam: bool = True,
    target: Sequence[int] | None = None,
    source: Sequence[int] | None = None,
    order: int = 2,
) -> Gradients:
    """By default all gradients; `target` and `source` are the indices of those wanted."""
    memory, groups = problem.memory, len(problem.lam)

    def empty(dtype: torch.dtype, wanted: Sequence[int] | None) -> list[Tensor | None]:
        return [
            memory.of(torch.full((n,), torch.nan, dtype=dtype), problem.offset)
            if wanted is None or k in wanted
            else None
            for k, n in enumerate(problem.sizes)
        ]

    d_target, d_source = empty(problem.types[0], target), empty(problem.types[1], source)
    chunks = sum(-(-n // CHUNK) for n in problem.sizes)
    partial = memory.empty((chunks if lam else 0,), torch.float32)
    d_lam = memory.empty((groups if lam else 0,), torch.float32)
    kernels.call(
        "merge_backward",
        *problem.arguments(),
        groups,
        *map(pointers, (problem.grad, d_target, d_source)),
        pointer(partial),
        pointer(d_lam),
        order=order,
    )
    memory.check()
    return Gradients(d_lam, d_target, d_source)


def check_scaled(found: Tensor, grad: Tensor, factor: Tensor) -> None:
    exact = factor.double() * grad.double()
    of_type = torch.finfo(found.dtype)
    # Subnormal numbers are all equally far apart.
    bound = (of_type.eps / 2 + torch.finfo(torch.float32).eps) * exact.abs().clamp_min(
        of_type.smallest_normal
    )
    assert ((found.double() - exact).abs() <= bound).all()


def check_backward(kernels: simt_build.Library, problem: Problem, found: Gradients) -> None:
    lam = problem.weights
    sums, terms = torch.zeros(len(lam), dtype=torch.float64), torch.zeros(len(lam), dtype=torch.float64)
    for k, group in enumerate(problem.groups):
        grad = problem.grad[k]
        if (d_target := found.target[k]) is not None:
            check_scaled(d_target, grad, 1 - lam[group])
        if (d_source := found.source[k]) is not None:
            check_scaled(d_source, grad, lam[group])
        products = grad.double() * (problem.source[k].double() - problem.target[k].double())
        sums[group] += products.sum()
        terms[group] += products.square().sum()
    if found.lam.numel() > 0:
        # A rounding of each product, and of partial sums that are not larger than the root of their squares.
        bound = 4 * torch.finfo(torch.float32).eps * terms.sqrt()
        assert ((found.lam.double() - sums).abs() <= bound).all()


@pytest.mark.parametrize("lam", [False, True])
@pytest.mark.parametrize("types", TYPES, ids=str)
def test_backward(kernels: simt_build.Library, types: Types, lam: bool) -> None:
    problem = Problem(types)
    found = backward(kernels, problem, lam=lam)
    check_backward(kernels, problem, found)
    if lam:
        assert found.lam[1] == 0, "a group without elements"
        assert found.lam[3] == 0, "a group without a tensor"


@pytest.mark.parametrize(
    "types", [FLOAT32, (torch.bfloat16,) * 3, (torch.float32, torch.float16, torch.float32)]
)
@pytest.mark.parametrize("offset", [1, 2, 4])
def test_an_address_changes_no_bit_of_the_gradients(
    kernels: simt_build.Library, types: Types, offset: int
) -> None:
    moved = backward(kernels, Problem(types, offset=offset))
    assert moved.bytes().tobytes() == backward(kernels, Problem(types)).bytes().tobytes()


@pytest.mark.parametrize("lam", [False, True])
@pytest.mark.parametrize("wanted", [((), ()), ((0, 4), ()), ((), (1, 2, 5)), ((1,), (1,))])
def test_backward_computes_what_is_asked_for(
    kernels: simt_build.Library, wanted: tuple[tuple[int, ...], tuple[int, ...]], lam: bool
) -> None:
    problem = Problem()
    with kernels.recording(run=True) as launches:
        found = backward(kernels, problem, lam=lam, target=wanted[0], source=wanted[1])
    check_backward(kernels, problem, found)
    assert len(launches) == 2 * lam + (not lam and wanted != ((), ()))


def test_targets_and_sources_are_read_only_for_d_lam(kernels: simt_build.Library) -> None:
    problem = Problem()
    expected = backward(kernels, problem, lam=False)
    problem.readable = False
    assert backward(kernels, problem, lam=False).bytes().tobytes() == expected.bytes().tobytes()


@pytest.mark.parametrize(("groups", "launches"), [(1, 1), (GROUPS, 1), (GROUPS + 1, 2)])
def test_sums_of_many_pairs_in_many_groups(kernels: simt_build.Library, groups: int, launches: int) -> None:
    """The pairs of a group lie in several launches."""
    problem = many_pairs(2 * TABLE + 20, groups)
    with kernels.recording(run=True) as found:
        check_backward(kernels, problem, backward(kernels, problem))
    assert len(found) == 3 + launches


def test_a_sum_is_that_of_its_group_alone(kernels: simt_build.Library) -> None:
    """Pairs of other groups between those of a group, and empty ones, change no bit of its sum."""
    problem = Problem()
    d_lam = backward(kernels, problem).lam
    for group in range(len(LAM)):
        own = [k for k, other in enumerate(GROUP_OF) if other == group]
        alone = Problem(sizes=[SIZES[k] for k in own], groups=[group] * len(own))
        for place, k in enumerate(own):
            for name in ("target", "source", "grad"):
                getattr(alone, name)[place].copy_(getattr(problem, name)[k])
        assert torch.equal(backward(kernels, alone).lam[group], d_lam[group])


def test_no_pairs_give_zero_sums(kernels: simt_build.Library) -> None:
    assert (backward(kernels, Problem(sizes=(), groups=())).lam == 0).all()
    assert (backward(kernels, Problem(sizes=(0, 0), groups=(0, 3))).lam == 0).all()


def test_results_are_the_same_on_every_device_and_in_all_thread_orders(kernels: simt_build.Library) -> None:
    problem = Problem((torch.float32, torch.bfloat16, torch.float32))

    def run(order: int) -> np.ndarray:
        out = torch.cat(forward(kernels, problem, order=order))
        return np.concatenate(
            [out.view(torch.uint8).numpy(), backward(kernels, problem, order=order).bytes()]
        )

    first = simt_build.same_in_all_orders(run)
    for device in DEVICES:
        with kernels.on(device):
            assert run(0).tobytes() == first.tobytes()


@pytest.mark.parametrize(
    "types",
    [(1, 1, 1), (1, 0, 0), (0, 1, 0), (2, 3, 0), (3, 0, 2), (2, 2, 3)],
)
def test_other_types_are_refused(kernels: simt_build.Library, types: tuple[int, int, int]) -> None:
    problem = Problem()
    arguments = (integers(*types), *problem.arguments()[1:])
    with pytest.raises(simt_build.SimtFault, match="the launcher returned 1"):
        kernels.call("merge_forward", *arguments, pointers(problem.target))
