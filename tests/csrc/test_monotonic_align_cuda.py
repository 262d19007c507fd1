"""The CUDA kernel of monotonic_align, run on the CPU by the host SIMT runtime, against the reference."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import pytest
import simt_build
import torch
from devices import DEVICES
from simt_tensors import DTYPE_CODES, GuardedTensors, integers, pointer
from torch import Tensor

from mmkernels.ops.monotonic_align import reference

pytestmark = pytest.mark.skipif(
    simt_build.missing_tools() is not None, reason=str(simt_build.missing_tools())
)

SOURCES = ["csrc/cuda/monotonic_align.cu", "tests/csrc/monotonic_align_shim.cpp"]
#: Tokens of a warp, and of a block: more are taken in panels.
WARP = 124
PANEL = 16 * WARP
each_dtype = pytest.mark.parametrize("dtype", DTYPE_CODES, ids=str)


@pytest.fixture(scope="module")
def kernels() -> simt_build.Library:
    return simt_build.load(simt_build.build("monotonic_align", SOURCES, races=True))


@dataclass
class Problem:
    """A batch of log-probabilities, `offset` elements past an aligned address, whose padding is NaN."""

    batch: int
    frames: int
    tokens: int
    dtype: torch.dtype = torch.float32
    lengths: tuple[list[int], list[int]] | None = None
    grid: bool = True
    offset: int = 0
    memory: GuardedTensors = field(default_factory=GuardedTensors)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.frames + self.tokens)
        x = torch.randn(self.batch, self.frames, self.tokens, generator=generator)
        x = (2 * x).round() / 2 if self.grid else x.log_softmax(-1)
        for row, (frames, tokens) in enumerate(zip(*self.lengths or ([], []), strict=True)):
            x[row, frames:] = torch.nan
            x[row, :, tokens:] = torch.nan
        self.log_probs = self.memory.of(x.to(self.dtype), self.offset)
        self.frame_lengths, self.token_lengths = map(torch.tensor, self.lengths or ([], []))

    def expected(self) -> Tensor:
        lengths = (self.frame_lengths, self.token_lengths) if self.lengths else (None, None)
        return reference.monotonic_align(self.log_probs, *lengths)


def align(kernels: simt_build.Library, problem: Problem, *, order: int = 2) -> Tensor:
    batch, frames, tokens = problem.log_probs.shape
    memory = problem.memory
    durations = memory.empty((batch, tokens), torch.int64)
    words = memory.empty((batch, -(-frames // 32), (tokens + 7) // 8 * 8), torch.int32)
    states = memory.empty((batch, 2 * ((frames + 3) // 4 * 4) if tokens > PANEL else 0), torch.float32)
    sizes = integers(DTYPE_CODES[problem.dtype], batch, frames, tokens, *(problem.log_probs.stride()[:2]))
    lengths = [pointer(lengths) for lengths in (problem.frame_lengths, problem.token_lengths)]
    arguments = (pointer(problem.log_probs), *lengths, pointer(durations), pointer(words), pointer(states))
    kernels.call("monotonic_align", sizes, *arguments, order=order)
    memory.check()
    return durations


def check(kernels: simt_build.Library, problem: Problem) -> None:
    assert torch.equal(align(kernels, problem), problem.expected())


@each_dtype
@pytest.mark.parametrize("tokens", [5, 8])
@pytest.mark.parametrize("offset", [0, 1])
def test_types_and_alignments(
    kernels: simt_build.Library, dtype: torch.dtype, tokens: int, offset: int
) -> None:
    lengths = [21, 9, 16, 5], [tokens, 3, 1, 5]
    check(kernels, Problem(4, 21, tokens, dtype, lengths, offset=offset))
    check(kernels, Problem(2, 13, tokens, dtype, grid=False, offset=offset))


@pytest.mark.parametrize(
    ("frames", "tokens"),
    [
        (1, 1),
        (8, 8),
        (31, 3),
        (32, 32),
        (33, 33),
        (64, 4),
        (97, 40),
        (130, WARP),
        (130, WARP + 1),
        (260, 256),
    ],
)
def test_sizes(kernels: simt_build.Library, frames: int, tokens: int) -> None:
    """Whole and begun rows of words and groups of frames; one warp, two, and three."""
    check(kernels, Problem(1, frames, tokens))


def test_a_row_of_words_in_which_the_path_advances_each_frame(kernels: simt_build.Library) -> None:
    """The window around the path is used to its last word."""
    problem = Problem(2, 140, 128)
    problem.log_probs[0] = 0.0
    problem.log_probs[1] = -torch.arange(128.0)
    check(kernels, problem)


def test_lengths_are_clamped_and_rows_without_a_path_are_zero(kernels: simt_build.Library) -> None:
    problem = Problem(6, 12, 8)
    problem.frame_lengths = torch.tensor([99, -1, 3, 12, 12, 12])
    problem.token_lengths = torch.tensor([99, 4, 4, -1, 8, 4])
    problem.log_probs[4, 11, 7] = torch.nan
    problem.log_probs[5, :, 4:] = torch.nan
    found = align(kernels, problem)
    assert found[1:5].eq(0).all()
    assert torch.equal(found[:1], reference.monotonic_align(problem.log_probs[:1]))
    assert torch.equal(found[5:, :4], reference.monotonic_align(problem.log_probs[5:, :, :4]))


def test_infinite_scores_stay_inside_memory(kernels: simt_build.Library) -> None:
    problem = Problem(4, 40, 30)
    problem.log_probs.view(-1)[::7] = torch.inf
    problem.log_probs.view(-1)[::5] = -torch.inf
    check(kernels, problem)


def test_more_tokens_than_a_block_holds() -> None:
    """The second panel begins with the scores that the first one left. Four million log-probabilities
    are too many for the memory of the race detector."""
    kernels = simt_build.load(simt_build.build("monotonic_align", SOURCES))
    check(
        kernels, Problem(2, PANEL + 40, PANEL + 5, lengths=([PANEL + 40, PANEL + 3], [PANEL + 5, PANEL + 1]))
    )


def test_no_utterances_and_no_tokens(kernels: simt_build.Library) -> None:
    for shape in ((0, 4, 3), (2, 4, 0)):
        with kernels.recording(run=True) as launches:
            align(kernels, Problem(*shape))
        assert not launches
    assert align(kernels, Problem(2, 0, 3)).eq(0).all()


def test_results_are_the_same_on_every_device_and_in_all_thread_orders(kernels: simt_build.Library) -> None:
    problem = Problem(2, 40, 150, lengths=([40, 36], [35, 20]))
    run = functools.partial(align, kernels, problem)
    first = simt_build.same_in_all_orders(lambda order: run(order=order).numpy())
    for device in DEVICES:
        with kernels.on(device):
            assert run(order=0).numpy().tobytes() == first.tobytes()


@pytest.mark.parametrize("code", [1, 7])
def test_other_types_are_refused(kernels: simt_build.Library, code: int) -> None:
    problem = Problem(1, 4, 3)
    durations = problem.memory.empty((1, 3), torch.int64)
    sizes = integers(code, 1, 4, 3, 12, 3)
    with pytest.raises(simt_build.SimtFault, match="the launcher returned 1"):
        kernels.call(
            "monotonic_align", sizes, pointer(problem.log_probs), None, None, pointer(durations), None, None
        )
