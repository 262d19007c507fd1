"""The CUDA kernels of cif, run on the CPU by the host SIMT runtime, against the float64 reference."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
import simt_build
import torch
from devices import DEVICES
from simt_tensors import DTYPE_CODES, GuardedTensors, integers, pointer
from torch import Tensor

from mmkernels.ops.cif import reference

pytestmark = pytest.mark.skipif(
    simt_build.missing_tools() is not None, reason=str(simt_build.missing_tools())
)

SOURCES = ["csrc/cuda/cif.cu", "csrc/cuda/cif_backward.cu", "tests/csrc/cif_shim.cpp"]
#: Columns of a warp, and frames of a step of a whole utterance.
COLUMNS = 256
THREADS = 256
each_dtype = pytest.mark.parametrize("dtype", DTYPE_CODES, ids=str)


@pytest.fixture(scope="module")
def kernels() -> simt_build.Library:
    return simt_build.load(simt_build.build("cif", SOURCES, races=True))


@dataclass
class Problem:
    """A ragged batch, whose padding is NaN, `offset` elements past an aligned address."""

    frames: int
    width: int
    tokens: int
    dtype: torch.dtype = torch.float32
    scaled: bool = False
    high: float = 0.9
    beta: float = 1.0
    batch: int = 3
    offset: int = 0
    memory: GuardedTensors = field(default_factory=GuardedTensors)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.frames + self.width)
        shape = (self.batch, self.frames, self.width)
        self.lengths = torch.tensor([self.frames, 0, max(self.frames - 3, 0)])[: self.batch]
        self.targets = torch.tensor([self.tokens, 2, max(self.tokens - 2, 0)]) if self.scaled else None
        x = torch.randn(shape, generator=generator)
        alpha = (0.05 + self.high * torch.rand(shape[:2], generator=generator)) * self.beta
        for row, length in enumerate(self.lengths):
            x[row, length:], alpha[row, length:] = torch.nan, torch.nan
        grad = torch.randn(self.batch, self.tokens, self.width, generator=generator)
        self.x, self.grad = (self.memory.of(tensor.to(self.dtype), self.offset) for tensor in (x, grad))
        self.alpha = self.memory.of(alpha)

    def sizes(self) -> np.ndarray:
        return integers(
            DTYPE_CODES[self.dtype],
            *(self.batch, self.frames, self.width, self.tokens),
            *(self.frames * self.width, self.width),
        )

    def inputs(self) -> tuple[object, ...]:
        return pointer(self.x), pointer(self.alpha), pointer(self.lengths)

    def expected(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Features, lengths and ends, and the gradients, of the same numbers in float64."""
        leaves = [tensor.double().requires_grad_() for tensor in (self.x, self.alpha)]
        found = reference.cif(
            *leaves,
            beta=self.beta,
            lengths=self.lengths,
            target_lengths=self.targets,
            max_length=self.tokens,
        )
        gradients = torch.autograd.grad(found.features, leaves, self.grad.double())
        return (found.features.detach(), found.lengths, found.ends, *gradients)


Plan = tuple[Tensor, Tensor, Tensor, Tensor]


def forward(
    kernels: simt_build.Library, problem: Problem, order: int = 2
) -> tuple[Tensor, Tensor, Tensor, Plan]:
    memory, batch, frames, tokens = problem.memory, problem.batch, problem.frames, problem.tokens
    features = memory.of(
        torch.full((batch, tokens, problem.width), torch.nan, dtype=problem.dtype), problem.offset
    )
    counts, ends = memory.empty((batch,), torch.int64), memory.empty((batch, tokens), torch.int64)
    token, weights = (
        memory.empty((batch, frames + 1), torch.int32),
        memory.empty((batch, frames, 2), torch.float32),
    )
    facts, sums = memory.empty((batch, 2), torch.float64), memory.empty((batch, frames), torch.float64)
    outputs = map(pointer, (features, counts, ends, token, weights, facts, sums))
    targets = pointer(problem.targets)
    kernels.call(
        "cif_forward", problem.sizes(), problem.beta, 0.5, *problem.inputs(), targets, *outputs, order=order
    )
    memory.check()
    return features, counts, ends, (counts, token, weights, facts)


def backward(
    kernels: simt_build.Library,
    problem: Problem,
    plan: Plan,
    *,
    need_x: bool = True,
    need_alpha: bool = True,
    order: int = 2,
) -> tuple[Tensor | None, Tensor | None]:
    memory, rows = problem.memory, (problem.batch, problem.frames)
    dx = memory.of(torch.full((*rows, problem.width), torch.nan, dtype=problem.dtype), problem.offset)
    d_alpha = memory.empty(rows, torch.float32)
    dots, sums = memory.empty((*rows, 2), torch.float32), memory.empty(rows, torch.float64)
    strides = integers(problem.tokens * problem.width, problem.width)
    outputs = (dx if need_x else None, d_alpha if need_alpha else None, dots, sums)
    arguments = (pointer(problem.grad), strides, *problem.inputs(), *map(pointer, (*plan, *outputs)))
    kernels.call("cif_backward", problem.sizes(), problem.beta, problem.scaled, *arguments, order=order)
    memory.check()
    return outputs[0], outputs[1]


def close(found: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """Rounded once to its dtype, after sums in float32 of some tens of terms."""
    scale = exact.abs().max().clamp_min(1.0)
    bound = torch.finfo(dtype).eps / 2 * exact.abs() + 64 * torch.finfo(torch.float32).eps * scale
    assert ((found.double() - exact).abs() <= bound).all()


def check(kernels: simt_build.Library, problem: Problem) -> None:
    features, lengths, ends, dx, d_alpha = problem.expected()
    out, counts, found_ends, plan = forward(kernels, problem)
    close(out, features, problem.dtype)
    assert torch.equal(counts, lengths)
    assert torch.equal(found_ends, ends)
    of_x, of_alpha = backward(kernels, problem, plan)
    assert of_x is not None
    assert of_alpha is not None
    close(of_x, dx, problem.dtype)
    terms = problem.width**0.5 * 10
    assert (of_alpha.double() - d_alpha).abs().max() <= terms * 1e-6 * d_alpha.abs().max().clamp_min(1.0)
    for row, length in enumerate(problem.lengths):
        assert of_x[row, length:].eq(0).all()
        assert of_alpha[row, length:].eq(0).all()


@each_dtype
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("width", "offset"), [(24, 0), (24, 1), (13, 0)])
def test_types_and_alignments(
    kernels: simt_build.Library, dtype: torch.dtype, scaled: bool, width: int, offset: int
) -> None:
    check(kernels, Problem(19, width, 9, dtype, scaled, offset=offset))


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(
    ("frames", "width", "tokens", "high"),
    [(1, 1, 1, 0.9), (7, COLUMNS + 40, 6, 1.8), (9, 8, 40, 6.0), (40, 8, 3, 0.9), (100, 4, 4, 0.02)],
)
def test_sizes(
    kernels: simt_build.Library, frames: int, width: int, tokens: int, high: float, scaled: bool
) -> None:
    """Rows of more than one warp; several tokens from a frame; more tokens than there is room for; tokens of
    more frames than a warp has lanes."""
    check(kernels, Problem(frames, width, tokens, scaled=scaled, high=high, beta=0.7))


@pytest.mark.parametrize("scaled", [False, True])
def test_utterances_of_several_steps(kernels: simt_build.Library, scaled: bool) -> None:
    check(kernels, Problem(2 * THREADS + 30, 4, 270, scaled=scaled))


@pytest.mark.parametrize("scaled", [False, True])
def test_one_gradient_alone(kernels: simt_build.Library, scaled: bool) -> None:
    problem = Problem(20, 24, 10, scaled=scaled)
    *_, plan = forward(kernels, problem)
    dx, d_alpha = backward(kernels, problem, plan)
    with kernels.recording(run=True) as launches:
        alone, nothing = backward(kernels, problem, plan, need_alpha=False)
    assert nothing is None
    assert len(launches) == 1
    assert alone is not None
    assert dx is not None
    assert torch.equal(alone, dx)
    nothing, other = backward(kernels, problem, plan, need_x=False)
    assert nothing is None
    assert other is not None
    assert d_alpha is not None
    assert torch.equal(other, d_alpha)
    with kernels.recording(run=True) as launches:
        backward(kernels, problem, plan, need_x=False, need_alpha=False)
    assert not launches


def test_sums_ascend_for_weights_of_any_size(kernels: simt_build.Library) -> None:
    """Where sums in another order have another last bit, a frame must not end before it begins."""
    problem = Problem(300, 1, 40, batch=1)
    exponent = torch.randint(-30, 2, (300,), generator=torch.Generator().manual_seed(1))
    problem.alpha[0] = 0.7 * 2.0**exponent * (1 + torch.rand(300, generator=torch.Generator().manual_seed(2)))
    problem.alpha[0, ::7] = 0
    *_, ends, (_, token, weights, _) = forward(kernels, problem)
    assert (token.diff() >= 0).all()
    assert (ends.diff() >= 0).all()
    assert (weights >= 0).all()


def test_values_that_are_not_weights(kernels: simt_build.Library) -> None:
    problem = Problem(8, 4, 5)
    problem.lengths = torch.tensor([99, -4, 8])
    problem.alpha[2] = torch.tensor([-1.0, torch.nan, torch.inf, 1e38, -0.0, 3e38, 0.5, -torch.inf])
    problem.alpha[0] = 0.4
    problem.x.nan_to_num_(0.0)
    features, counts, ends, plan = forward(kernels, problem)
    backward(kernels, problem, plan)
    assert counts.tolist() == [3, 0, 5]
    assert features[1].eq(0).all()
    assert ((ends >= 0) & (ends <= 8)).all()


@pytest.mark.parametrize("scaled", [False, True])
def test_nothing(kernels: simt_build.Library, scaled: bool) -> None:
    for frames, width, tokens in ((0, 4, 3), (5, 0, 3), (5, 4, 0)):
        problem = Problem(frames, width, tokens, scaled=scaled)
        features, _, ends, plan = forward(kernels, problem)
        assert features.eq(0).all() or frames > 0
        assert torch.equal(ends, problem.expected()[2])
        dx, d_alpha = backward(kernels, problem, plan)
        assert dx is not None
        assert d_alpha is not None
        if tokens == 0 or width == 0:
            assert dx.eq(0).all()
            assert d_alpha.eq(0).all()
    with kernels.recording(run=True) as launches:
        empty = Problem(4, 3, 2, batch=0)
        *_, plan = forward(kernels, empty)
        backward(kernels, empty, plan)
    assert not launches


@pytest.mark.parametrize("scaled", [False, True])
def test_results_are_the_same_on_every_device_and_in_all_thread_orders(
    kernels: simt_build.Library, scaled: bool
) -> None:
    problem = Problem(40, 24, 19, torch.bfloat16, scaled)

    def run(order: int) -> np.ndarray:
        features, _, ends, plan = forward(kernels, problem, order)
        dx, d_alpha = backward(kernels, problem, plan, order=order)
        tensors = [t for t in (features, ends, dx, d_alpha) if t is not None]
        return np.concatenate([t.view(torch.uint8).numpy().reshape(-1) for t in tensors])

    first = simt_build.same_in_all_orders(run)
    for device in DEVICES:
        with kernels.on(device):
            assert run(0).tobytes() == first.tobytes()
