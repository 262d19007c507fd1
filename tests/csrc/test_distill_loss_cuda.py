"""The CUDA kernels of distill_loss, run by the host SIMT runtime, against the float64 reference."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
import simt_build
import torch
from devices import DEVICES
from simt_tensors import DTYPE_CODES, GuardedTensors, integers, pointer
from torch import Tensor

from mmkernels.ops.distill_loss import reference

pytestmark = pytest.mark.skipif(
    simt_build.missing_tools() is not None, reason=str(simt_build.missing_tools())
)

SOURCES = ["csrc/cuda/distill_loss.cu", "tests/csrc/distill_loss_shim.cpp"]
#: The widest row of a warp, and tokens that the last kernel adds up at a time.
OF_WARP = 1024
THREADS = 256
PAIRS = [(a, b) for a in DTYPE_CODES for b in DTYPE_CODES]


@pytest.fixture(scope="module")
def kernels() -> simt_build.Library:
    return simt_build.load(simt_build.build("distill_loss", SOURCES, races=True))


@dataclass
class Problem:
    """A ragged batch, whose padding is NaN with ids outside the table, `offset` elements past an aligned
    address."""

    width: int
    dtype: torch.dtype = torch.float32
    table_dtype: torch.dtype = torch.float32
    batch: int = 3
    tokens: int = 3
    vocabulary: int = 5
    weight: float = 5.0
    offset: int = 0
    ragged: bool = True
    grad: float = 0.7
    memory: GuardedTensors = field(default_factory=GuardedTensors)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.width)
        rows = (self.batch, self.tokens)
        table = torch.randn(self.vocabulary, self.width, generator=generator)
        self.ids = self.memory.of(torch.randint(self.vocabulary, rows, generator=generator))
        pred = table[self.ids] + 0.5 * torch.randn(*rows, self.width, generator=generator)
        self.counts = None
        if self.ragged:
            self.counts = self.memory.of(
                torch.tensor([self.tokens, 0, max(self.tokens - 2, 0)])[: self.batch]
            )
            for row, count in enumerate(self.counts):
                pred[row, count:], self.ids[row, count:] = torch.nan, 2**40
        self.pred = self.memory.of(pred.to(self.dtype), self.offset)
        self.table = self.memory.of(table.to(self.table_dtype), self.offset)

    def sizes(self) -> np.ndarray:
        return integers(
            *(DTYPE_CODES[self.dtype], DTYPE_CODES[self.table_dtype]),
            *(self.batch, self.tokens, self.width, self.vocabulary),
            *(self.tokens * self.width, self.width, self.width),
        )

    def inputs(self) -> tuple[object, ...]:
        tensors = (self.pred, self.table, self.ids, self.counts)
        return (self.sizes(), self.weight, *map(pointer, tensors))

    def expected(self) -> tuple[Tensor, Tensor]:
        leaf = self.pred.double().requires_grad_()
        loss = reference.distill_loss(
            leaf, self.table.double(), self.ids, counts=self.counts, cosine_weight=self.weight
        )
        (gradient,) = torch.autograd.grad(loss * self.grad, leaf)
        return loss.detach(), gradient


def forward(
    kernels: simt_build.Library, problem: Problem, order: int = 2
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    memory, rows = problem.memory, (problem.batch, problem.tokens)
    dots, terms = memory.empty((*rows, 3), torch.float32), memory.empty(rows, torch.float32)
    loss, count = memory.empty((1,), torch.float32), memory.empty((1,), torch.int64)
    kernels.call(
        "distill_loss_forward", *problem.inputs(), *map(pointer, (dots, terms, loss, count)), order=order
    )
    memory.check()
    return loss[0], (dots, count)


def backward(
    kernels: simt_build.Library, problem: Problem, saved: tuple[Tensor, Tensor], order: int = 2
) -> Tensor:
    memory = problem.memory
    grad = memory.of(torch.tensor([problem.grad]))
    d_pred = memory.of(torch.full(problem.pred.shape, torch.nan, dtype=problem.dtype), problem.offset)
    outputs = map(pointer, (*saved, grad, d_pred))
    kernels.call("distill_loss_backward", *problem.inputs(), *outputs, order=order)
    memory.check()
    return d_pred


def check(kernels: simt_build.Library, problem: Problem) -> None:
    exact, gradient = problem.expected()
    loss, saved = forward(kernels, problem)
    assert abs(loss.double() - exact) <= 1e-6 * exact.abs()
    d_pred = backward(kernels, problem, saved)
    # Where the cosine is near 1, its gradient is a difference of vectors of the size weight / |z|.
    inverse = problem.pred.double().norm(dim=-1, keepdim=True).reciprocal().nan_to_num(0.0, 0.0)
    rounded = torch.finfo(problem.dtype).eps / 2 * gradient.abs()
    sums = 1e-6 * (gradient.abs().max() + problem.weight * problem.grad * inverse)
    assert ((d_pred.double() - gradient).abs() <= rounded + sums).all()
    for row, count in enumerate(problem.counts if problem.counts is not None else ()):
        assert d_pred[row, count:].eq(0).all()
        assert saved[0][row, count:].eq(0).all()


@pytest.mark.parametrize(("dtype", "table_dtype"), PAIRS, ids=str)
@pytest.mark.parametrize(("width", "offset"), [(24, 0), (24, 1), (13, 0)])
def test_types_and_alignments(
    kernels: simt_build.Library, dtype: torch.dtype, table_dtype: torch.dtype, width: int, offset: int
) -> None:
    check(kernels, Problem(width, dtype, table_dtype, offset=offset))


@pytest.mark.parametrize(("dtype", "table_dtype"), PAIRS, ids=str)
def test_rows_of_a_block(kernels: simt_build.Library, dtype: torch.dtype, table_dtype: torch.dtype) -> None:
    check(kernels, Problem(OF_WARP + 40, dtype, table_dtype, batch=1, tokens=2, ragged=False))


@pytest.mark.parametrize("width", [1, 8, OF_WARP - 8, OF_WARP, 4096 + 8, 4096 + 3])
def test_widths(kernels: simt_build.Library, width: int) -> None:
    """One step of a warp and several; one of a block and several."""
    check(kernels, Problem(width, batch=1, tokens=1, ragged=False))


@pytest.mark.parametrize("ragged", [False, True])
def test_more_tokens_than_threads(kernels: simt_build.Library, ragged: bool) -> None:
    check(kernels, Problem(4, tokens=THREADS + 30, batch=3, ragged=ragged))


def test_more_rows_than_threads(kernels: simt_build.Library) -> None:
    problem = Problem(4, tokens=1, batch=THREADS + 30, ragged=False)
    problem.counts = problem.memory.of(torch.arange(THREADS + 30) % 2)
    check(kernels, problem)


@pytest.mark.parametrize("width", [8, 5, OF_WARP + 8])
def test_ids_outside_the_table(kernels: simt_build.Library, width: int) -> None:
    """They read nothing, and only their tokens are NaN."""
    problem = Problem(width, ragged=False)
    clean_ids = problem.ids.clone()
    _, saved = forward(kernels, problem)
    clean = backward(kernels, problem, saved)
    problem.ids[0, 2], problem.ids[1, 1], problem.ids[2, 0] = problem.vocabulary, -1, 2**62
    loss, saved = forward(kernels, problem)
    assert loss.isnan()
    d_pred = backward(kernels, problem, saved)
    wrong = problem.ids != clean_ids
    assert torch.equal(d_pred.isnan().all(-1), wrong)
    assert torch.equal(d_pred[~wrong], clean[~wrong])


def test_counts_are_clamped(kernels: simt_build.Library) -> None:
    problem = Problem(8, ragged=False)
    problem.counts = problem.memory.of(torch.tensor([99, -4, 1]))
    loss, (dots, count) = forward(kernels, problem)
    assert count == 4
    d_pred = backward(kernels, problem, (dots, count))
    assert (d_pred.abs().sum(-1) > 0).tolist() == [[True] * 3, [False] * 3, [True, False, False]]
    problem.counts = problem.memory.of(torch.tensor([3, 0, 1]))
    assert torch.equal(forward(kernels, problem)[0], loss)


def test_vectors_without_direction(kernels: simt_build.Library) -> None:
    problem = Problem(8, ragged=False)
    problem.pred[0, 0] = 0
    problem.table[int(problem.ids[1, 1])] = 0
    check(kernels, problem)
    problem.pred[0, 1] = 1e-25
    _, saved = forward(kernels, problem)
    assert backward(kernels, problem, saved).isfinite().all()


def test_nothing(kernels: simt_build.Library) -> None:
    for batch, tokens, width in ((0, 3, 4), (3, 0, 4)):
        problem = Problem(width, batch=batch, tokens=tokens)
        with kernels.recording(run=True) as launches:
            loss, saved = forward(kernels, problem)
            backward(kernels, problem, saved)
        assert loss == 0
        assert saved[1] == 0
        assert len(launches) == 1
    problem = Problem(0, ragged=False)
    loss, saved = forward(kernels, problem)
    assert loss == problem.weight
    backward(kernels, problem, saved)
    problem = Problem(8)
    problem.counts = problem.memory.of(torch.zeros(3, dtype=torch.int64))
    loss, saved = forward(kernels, problem)
    assert loss == 0
    assert backward(kernels, problem, saved).eq(0).all()


@pytest.mark.parametrize("width", [24, OF_WARP + 8])
def test_results_are_the_same_on_every_device_and_in_all_thread_orders(
    kernels: simt_build.Library, width: int
) -> None:
    problem = Problem(width, torch.bfloat16, torch.bfloat16)

    def run(order: int) -> np.ndarray:
        loss, saved = forward(kernels, problem, order)
        tensors = (loss[None], saved[0], backward(kernels, problem, saved, order))
        return np.concatenate([t.view(torch.uint8).numpy().reshape(-1) for t in tensors])

    first = simt_build.same_in_all_orders(run)
    for device in DEVICES:
        with kernels.on(device):
            assert run(0).tobytes() == first.tobytes()
