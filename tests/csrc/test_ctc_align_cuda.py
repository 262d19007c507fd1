"""The CUDA kernels of ctc_align, run on the CPU by the host SIMT runtime: the paths of the reference, bit for
bit."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace

import numpy as np
import pytest
import simt_build
import torch
from ctc_cases import KINDS, Problem, random_problem
from simt_tensors import DTYPE_CODES, GuardedTensors, integers, pointer
from torch import Tensor

pytestmark = pytest.mark.skipif(
    simt_build.missing_tools() is not None, reason=str(simt_build.missing_tools())
)

SOURCES = ["csrc/cuda/ctc_align.cu", "tests/csrc/ctc_align_shim.cpp"]
#: Pairs of states, which are tokens and one, that each kernel takes at most; longer targets take the last.
LAYOUTS = {"1 warp": 64, "4 warps": 208, "4 warps, 4 pairs": 488, "8 warps": 968, "16 warps": 1988}
MOST_PAIRS = max(LAYOUTS.values())


@dataclass(frozen=True)
class Found:
    paths: Tensor
    ends: Tensor
    totals: Tensor

    def bytes(self) -> np.ndarray:
        tensors = (self.paths, self.ends, self.totals)
        return np.concatenate([t.reshape(-1).view(torch.uint8).numpy() for t in tensors if t.numel() > 0])


@pytest.fixture(scope="module")
def kernels() -> simt_build.Library:
    library = simt_build.load(simt_build.build("ctc_align", SOURCES, races=True))
    library.functions.ctc_align_workspace.restype = ctypes.c_int64
    return library


def sizes_of(problem: Problem) -> np.ndarray:
    batch, frames, classes = problem.log_probs.shape
    code, tokens = DTYPE_CODES[problem.log_probs.dtype], problem.targets.shape[1]
    return integers(code, batch, frames, classes, tokens, problem.blank, *problem.log_probs.stride()[:2])


def align(kernels: simt_build.Library, problem: Problem, *, order: int = 2, lengths: bool = True) -> Found:
    memory = GuardedTensors()
    batch, frames, _ = problem.log_probs.shape
    sizes = sizes_of(problem)
    bytes_needed = kernels.functions.ctc_align_workspace(ctypes.c_void_p(sizes.ctypes.data))
    found = Found(
        memory.empty((batch, frames), torch.int64),
        memory.empty((batch, problem.targets.shape[1]), torch.int64),
        memory.empty((batch,), torch.float32),
    )
    inputs = (problem.log_probs, problem.targets)
    given = (problem.input_lengths, problem.target_lengths) if lengths else (None, None)
    workspace = memory.empty((bytes_needed,), torch.uint8)
    arguments = (*inputs, *given, found.paths, found.ends, found.totals, workspace)
    guarded = [memory.of(t) if i < 4 and t is not None else t for i, t in enumerate(arguments)]
    kernels.call("ctc_align", sizes, *map(pointer, guarded), order=order)
    memory.check()
    return found


def check(kernels: simt_build.Library, problem: Problem) -> Found:
    found = align(kernels, problem)
    paths, ends, totals = problem.expected()
    assert torch.equal(found.paths, paths)
    assert torch.equal(found.ends, ends)
    torch.testing.assert_close(found.totals, totals, rtol=1e-6, atol=1e-6)
    return found


@pytest.mark.parametrize("dtype", DTYPE_CODES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_paths_of_the_reference(kernels: simt_build.Library, kind: str, dtype: torch.dtype) -> None:
    """Short utterances, most of them with ties; and longer ones than the frames between two checkpoints."""
    for seed in range(2):
        check(kernels, random_problem(seed, kind, dtype, batch=24))
    check(kernels, random_problem(2, kind, dtype, batch=8, frames=101, tokens=30, classes=6))


@pytest.mark.parametrize("frames", [1, 15, 16, 17, 31, 32, 33, 64, 71])
def test_frames_around_the_blocks_of_frames(kernels: simt_build.Library, frames: int) -> None:
    problem = random_problem(frames, "grid", batch=3, frames=frames, tokens=min(frames, 20))
    check(kernels, problem)
    check(kernels, replace(problem, input_lengths=torch.full((3,), frames)))


@pytest.mark.parametrize("layout", [*LAYOUTS, "wide"])
@pytest.mark.parametrize("whole", [False, True])
def test_every_layout(kernels: simt_build.Library, layout: str, whole: bool) -> None:
    """As many tokens as fit, few or all of them valid: then the path crosses from each warp to the next."""
    pairs = LAYOUTS.get(layout, MOST_PAIRS + 1)
    tokens = pairs - 1
    valid = tokens if whole else min(tokens, 50)
    kind = "low" if whole else "grid"
    problem = random_problem(7, kind, batch=1, frames=valid + 9, tokens=tokens, classes=9)
    target = (torch.arange(tokens) % 7 + 1 + (problem.blank <= torch.arange(tokens) % 7 + 1))[None] % 9
    target = torch.where(target == problem.blank, (target + 1) % 9, target)
    lengths = {"input_lengths": torch.tensor([valid + 9]), "target_lengths": torch.tensor([valid])}
    with kernels.recording(run=True) as launches:
        found = check(kernels, replace(problem, targets=target, **lengths))
    assert found.totals[0] > -torch.inf
    assert len(launches) == 1
    assert ("align_wide" in launches[0].kernel) == (layout == "wide")


@pytest.mark.parametrize("kind", ["grid", "continuous"])
@pytest.mark.parametrize("frames", [97, 128, 129, 160, 161, 300])
def test_paths_between_checkpoints_of_long_targets(
    kernels: simt_build.Library, frames: int, kind: str
) -> None:
    """A padded size that takes the kernel for any number of tokens; a path through few or most frames."""
    problem = random_problem(frames, kind, batch=3, frames=frames, tokens=min(frames, 120), classes=6)
    padded = torch.nn.functional.pad(problem.targets, (0, MOST_PAIRS - problem.targets.shape[1]), value=1)
    with kernels.recording(run=True) as launches:
        found = check(kernels, replace(problem, targets=padded))
    assert "align_wide" in launches[0].kernel
    assert (found.totals > -torch.inf).any()


def test_an_hour_takes_less_than_a_gigabyte(kernels: simt_build.Library) -> None:
    sizes = np.array([1, 1, 180_000, 32, 40_000], np.int64)
    kernels.functions.ctc_align_workspace.restype = ctypes.c_int64
    assert kernels.functions.ctc_align_workspace(ctypes.c_void_p(sizes.ctypes.data)) < 500e6


def test_threads_in_any_order(kernels: simt_build.Library) -> None:
    problem = random_problem(11, batch=2, frames=50, tokens=80, classes=5)
    problem = replace(problem, target_lengths=torch.tensor([21, 33]), input_lengths=torch.tensor([50, 47]))
    simt_build.same_in_all_orders(lambda order: align(kernels, problem, order=order).bytes())


def test_an_utterance_alone_and_in_a_padded_batch(kernels: simt_build.Library) -> None:
    """Alone it may take the kernel of another layout."""
    batch = random_problem(13, batch=3, frames=70, tokens=90, classes=5)
    batch = replace(batch, target_lengths=torch.tensor([25, 90, 3]), input_lengths=torch.tensor([60, 70, 33]))
    together = check(kernels, batch)
    for row in (0, 2):
        frames, tokens = int(batch.input_lengths[row]), int(batch.target_lengths[row])
        single = Problem(
            batch.log_probs[row : row + 1, :frames].contiguous(),
            batch.targets[row : row + 1, :tokens].contiguous(),
            *(lengths[row : row + 1] for lengths in (batch.input_lengths, batch.target_lengths)),
            batch.blank,
        )
        for lengths in (False, True):
            alone = align(kernels, single, lengths=lengths)
            assert torch.equal(alone.paths[0], together.paths[row, :frames])
            assert torch.equal(alone.ends[0], together.ends[row, :tokens])
            assert torch.equal(alone.totals[0], together.totals[row])


def test_any_values_of_tokens_and_lengths(kernels: simt_build.Library) -> None:
    """The host does not read them; what the kernels read and write must stay in bounds."""
    problem = random_problem(17, batch=5, frames=20, tokens=3)
    targets = problem.targets.clone()
    targets[0, 1], targets[1, 2], targets[2, 0], targets[3, 0] = 1 << 40, -1, problem.blank, -(1 << 62)
    wild = torch.tensor([1 << 40, 20, 20, -5, 20]), torch.tensor([3, 1 << 50, 3, 2, -(1 << 50)])
    found = check(kernels, replace(problem, targets=targets, input_lengths=wild[0], target_lengths=wild[1]))
    assert (found.totals[:4] == -torch.inf).all()
    assert found.totals[4] > -torch.inf


def test_strides_and_values_that_are_no_log_probabilities(kernels: simt_build.Library) -> None:
    problem = random_problem(19, batch=6, frames=40, tokens=9)
    spoiled = problem.log_probs.transpose(0, 1).contiguous().transpose(0, 1)
    spoiled[torch.rand(spoiled.shape) < 0.03] = torch.nan
    spoiled[torch.rand(spoiled.shape) < 0.03] = torch.inf
    changed = replace(problem, log_probs=spoiled)
    sizes = sizes_of(changed)
    memory = GuardedTensors()
    flat = memory.of(spoiled.transpose(0, 1).contiguous())
    out = [memory.empty(s, torch.int64) for s in ((6, 40), (6, 9))]
    totals = memory.empty((6,), torch.float32)
    needed = kernels.functions.ctc_align_workspace(ctypes.c_void_p(sizes.ctypes.data))
    rest = (problem.targets, problem.input_lengths, problem.target_lengths, *out, totals)
    workspace = memory.empty((needed,), torch.uint8)
    kernels.call("ctc_align", sizes, pointer(flat), *map(pointer, (*rest, workspace)))
    memory.check()
    paths, ends, _ = changed.expected()
    assert torch.equal(out[0], paths)
    assert torch.equal(out[1], ends)


@pytest.mark.parametrize(("batch", "frames", "tokens"), [(0, 5, 2), (2, 0, 2), (2, 5, 0), (2, 0, 0)])
def test_sizes_of_zero(kernels: simt_build.Library, batch: int, frames: int, tokens: int) -> None:
    check(kernels, random_problem(23, batch=batch, frames=frames, tokens=tokens))
