"""mmkernels.monotonic_align: the best monotonic path, the same on every backend, bit for bit."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

from mmkernels import monotonic_align
from mmkernels.nn import MonotonicAlign
from mmkernels.ops.monotonic_align import reference
from mmkernels.ops.monotonic_align.schema import OPS
from op_tests import backends, generator_for, poisoned_memory
from op_tests.running import devices

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
SERVED = [(device, backend) for device in devices() for backend in backends(device, torch.float32)]


def best_by_trying_all(log_probs: Tensor) -> tuple[float, set[tuple[int, ...]]]:
    """The best score of an utterance ``(T, U)``, and the durations of all paths that have it."""
    frames, tokens = log_probs.shape
    found: dict[tuple[int, ...], float] = {}
    for starts in itertools.combinations(range(1, frames), tokens - 1):
        edges = (0, *starts, frames)
        durations = tuple(b - a for a, b in itertools.pairwise(edges))
        found[durations] = score_of(log_probs, torch.tensor(durations))
    best = max(found.values())
    return best, {durations for durations, score in found.items() if score == best}


def score_of(log_probs: Tensor, durations: Tensor) -> float:
    frames, tokens = log_probs.shape
    path = torch.arange(tokens).repeat_interleave(durations)
    return float(log_probs.double()[torch.arange(frames), path].sum())


def unity2(log_probs: Tensor) -> list[int]:
    """The search of ESPnet and of UnitY2's aligner, from its definition: of equal predecessors the earlier
    token. Scores are float32 here; published, they are float64."""
    frames, tokens = log_probs.shape
    x = log_probs.float().numpy()
    q = np.full((tokens, frames), -np.inf, np.float32)
    q[0] = np.cumsum(x[:, 0], dtype=np.float32)
    for j in range(1, frames):
        for i in range(1, min(j + 1, tokens)):
            q[i, j] = max(q[i - 1, j - 1], q[i, j - 1]) + x[j, i]
    path = [tokens - 1]
    for j in reversed(range(frames - 1)):
        i = path[-1]
        path.append(i if i == 0 else i - 1 if q[i - 1, j] >= q[i, j] else i)
    return np.bincount(path, minlength=tokens).tolist()


def maximum_path(log_probs: Tensor) -> list[int]:
    """``maximum_path_each`` of the Cython code of Glow-TTS and VITS, from its definition: of equal
    predecessors the same token."""
    frames, tokens = log_probs.shape
    value = log_probs.float().numpy().copy()
    impossible = np.float32(-1e9)
    for y in range(frames):
        for x in range(max(0, tokens + y - frames), min(tokens, y + 1)):
            current = impossible if x == y else value[y - 1, x]
            previous = (np.float32(0) if y == 0 else impossible) if x == 0 else value[y - 1, x - 1]
            value[y, x] += max(previous, current)
    durations, index = [0] * tokens, tokens - 1
    for y in reversed(range(frames)):
        durations[index] += 1
        if index != 0 and (index == y or value[y - 1, index] < value[y - 1, index - 1]):
            index -= 1
    return durations


def drawn(seed: int, frames: int, tokens: int, batch: int = 1, *, grid: bool = False) -> Tensor:
    """Random log-probabilities; on a grid of 0.5, where many paths are equally good."""
    x = torch.randn(batch, frames, tokens, generator=generator_for(seed))
    return (x * 2).round() / 2 if grid else x.log_softmax(-1)


def padded(utterances: Sequence[Tensor], fill: float = math.nan) -> tuple[Tensor, Tensor, Tensor]:
    """One batch of utterances ``(T, U)``, and their lengths; padding holds ``fill``."""
    sizes = torch.tensor([u.shape for u in utterances])
    batch = torch.full((len(utterances), *sizes.amax(0).tolist()), fill, dtype=utterances[0].dtype)
    for row, utterance in zip(batch, utterances, strict=True):
        row[: utterance.shape[0], : utterance.shape[1]] = utterance
    return batch, sizes[:, 0], sizes[:, 1]


def ragged(
    count: int, seed: int = 0, most: tuple[int, int] = (40, 20), *, grid: bool = False
) -> list[Tensor]:
    generator = generator_for(seed)
    found = []
    for index in range(count):
        tokens = int(torch.randint(1, most[1] + 1, (), generator=generator))
        frames = int(torch.randint(tokens, most[0] + 1, (), generator=generator))
        found.append(drawn(1000 * seed + index, frames, tokens, grid=grid)[0])
    return found


class OnEveryBackend:
    """Also run on the CUDA kernels on the CPU, by tests/csrc/test_cuda_glue.py."""

    served: Sequence[tuple[str, str]] = SERVED
    dtypes: Sequence[torch.dtype] = DTYPES
    #: Random utterances of a test.
    many = 400

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "backend" in metafunc.fixturenames:
            metafunc.parametrize(("device", "backend"), self.served)
        if "dtype" in metafunc.fixturenames:
            metafunc.parametrize("dtype", self.dtypes, ids=str)

    def align(self, device: str, backend: str, *arguments: Tensor | None) -> Tensor:
        on_device = [None if argument is None else argument.to(device) for argument in arguments]
        with poisoned_memory():
            durations = monotonic_align(*on_device, backend=backend)  # type: ignore[arg-type]
        assert durations.dtype == torch.int64
        assert durations.is_contiguous()
        return durations.cpu()

    @pytest.mark.parametrize("grid", [False, True])
    def test_equals_the_reference(self, device: str, backend: str, dtype: torch.dtype, grid: bool) -> None:
        """Padding holds NaN, which must not be read as a value."""
        if dtype == torch.float64 and device != "cpu":
            pytest.skip("GPUs take no float64")
        batch, frames, tokens = padded([u.to(dtype) for u in ragged(self.many, grid=grid)])
        expected = reference.monotonic_align(batch, frames, tokens)
        assert torch.equal(self.align(device, backend, batch, frames, tokens), expected)
        assert torch.equal(expected.sum(1), frames)
        assert ((expected > 0) == (torch.arange(batch.shape[2]) < tokens[:, None])).all()

    @pytest.mark.parametrize(
        ("frames", "tokens"), [(1, 1), (9, 1), (9, 9), (33, 32), (65, 7), (96, 64), (70, 33)]
    )
    def test_sizes(self, device: str, backend: str, frames: int, tokens: int) -> None:
        """One token, one path, and rows of words that are full or begin with one frame."""
        for grid in (False, True):
            x = drawn(frames, frames, tokens, batch=3, grid=grid)
            assert torch.equal(self.align(device, backend, x), reference.monotonic_align(x))

    def test_many_tokens(self, device: str, backend: str) -> None:
        """Several warps and panels."""
        x = drawn(3, 290, 270, batch=2, grid=True)
        lengths = torch.tensor([290, 280]), torch.tensor([270, 140])
        assert torch.equal(self.align(device, backend, x, *lengths), reference.monotonic_align(x, *lengths))

    def test_a_row_is_the_same_alone(self, device: str, backend: str) -> None:
        utterances = ragged(12, seed=3)
        batch, frames, tokens = padded(utterances)
        together = self.align(device, backend, batch, frames, tokens)
        for row, utterance in zip(together, utterances, strict=True):
            assert torch.equal(row[: utterance.shape[1]], self.align(device, backend, utterance[None])[0])

    @pytest.mark.parametrize("layout", ["sliced", "transposed", "strided", "expanded", "time first"])
    def test_layouts(self, device: str, backend: str, layout: str) -> None:
        x = drawn(5, 30, 12, batch=3).to(device)
        given = {
            "sliced": lambda: x.new_zeros(4, 33, 15)[1:, 2:32, 3:].copy_(x),
            "transposed": lambda: x.mT.contiguous().mT,
            "strided": lambda: x.new_zeros(3, 30, 12, 2)[..., 0].copy_(x),
            "expanded": lambda: x[:1].expand(3, -1, -1),
            "time first": lambda: x.transpose(0, 1).contiguous().transpose(0, 1),
        }[layout]()
        expected = reference.monotonic_align(given.contiguous())
        assert torch.equal(monotonic_align(given, backend=backend), expected)

    def test_impossible_places(self, device: str, backend: str) -> None:
        """-inf forbids places; where every path has one, a path comes out all the same."""
        x = drawn(7, 24, 10, batch=4)
        x[0, :12, 5:] = -torch.inf
        x[1, 7] = -torch.inf
        x[2] = -torch.inf
        x[3, :, 3] = -1e30
        found = self.align(device, backend, x)
        assert torch.equal(found, reference.monotonic_align(x))
        assert found[0, :5].sum() >= 12
        assert (found.sum(1) == 24).all()
        assert (found > 0).all()

    def test_infinite_scores_give_a_path(self, device: str, backend: str) -> None:
        """inf - inf is not a number, but memory stays safe, and each token has its frames."""
        x = drawn(8, 40, 17, batch=6)
        for row in range(6):
            at = torch.randint(0, 40 * 17, (60,), generator=generator_for(row))
            x[row].view(-1)[at] = torch.inf
            x[row].view(-1)[at[::3]] = -torch.inf
        found = self.align(device, backend, x)
        assert torch.equal(found, reference.monotonic_align(x))
        assert (found > 0).all()

    @pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 0), (2, 4, 0), (0, 0, 0)])
    def test_nothing(self, device: str, backend: str, shape: tuple[int, ...]) -> None:
        out = self.align(device, backend, torch.zeros(shape))
        assert out.shape == (shape[0], shape[2])

    def test_empty_utterances_in_a_batch(self, device: str, backend: str) -> None:
        x = drawn(9, 8, 4, batch=3)
        lengths = torch.tensor([0, 8, 5]), torch.tensor([0, 4, 0])
        found = self.align(device, backend, x, *lengths)
        assert found[0].eq(0).all()
        assert found[1].sum() == 8
        assert found[2].eq(0).all()

    def test_values_that_only_the_device_sees(self, device: str, backend: str) -> None:
        """The torch op: lengths are clamped, and rows without a path are zero and disturb no other."""
        x = drawn(10, 20, 9, batch=6).to(device)
        x[4, 3, 2] = torch.nan
        x[5, 15:] = torch.nan
        frames = torch.tensor([99, -3, 4, 20, 20, 15], device=device)
        tokens = torch.tensor([99, 5, 9, -1, 9, 9], device=device)
        with poisoned_memory():
            found = OPS[backend][0](x, frames, tokens).cpu()
        assert found[1:5].eq(0).all()
        assert torch.equal(found[0], reference.monotonic_align(x[:1].cpu())[0])
        assert torch.equal(found[5], reference.monotonic_align(x[5:, :15].cpu())[0])

    def test_repeatable_with_any_number_of_threads(self, device: str, backend: str) -> None:
        batch, frames, tokens = padded(ragged(9, seed=5, grid=True))
        first = self.align(device, backend, batch, frames, tokens)
        threads = torch.get_num_threads()
        try:
            for count in (1, 2):
                torch.set_num_threads(count)
                assert torch.equal(self.align(device, backend, batch, frames, tokens), first)
        finally:
            torch.set_num_threads(threads)

    @pytest.mark.parametrize("kind", [torch.int32, torch.int16, torch.uint8])
    def test_dtypes_of_lengths(self, device: str, backend: str, kind: torch.dtype) -> None:
        batch, frames, tokens = padded(ragged(5, seed=6))
        expected = self.align(device, backend, batch, frames, tokens)
        assert torch.equal(self.align(device, backend, batch, frames.to(kind), tokens.to(kind)), expected)


class TestOnEveryBackend(OnEveryBackend):
    pass


@pytest.mark.parametrize("grid", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 6])
def test_the_path_is_the_best_of_all(tokens: int, grid: bool) -> None:
    x = drawn(tokens, 8, tokens, batch=60, grid=grid).double()
    for utterance, durations in zip(x, monotonic_align(x), strict=True):
        best, all_best = best_by_trying_all(utterance)
        assert math.isclose(score_of(utterance, durations), best, rel_tol=1e-12)
        if grid:
            assert tuple(durations.tolist()) in all_best


def random_problems(count: int, seed: int, *, grid: bool) -> list[Tensor]:
    return ragged(count, seed, most=(14, 8), grid=grid)


def aligned(utterances: Sequence[Tensor]) -> list[list[int]]:
    batch, frames, tokens = padded(utterances)
    found = monotonic_align(batch, frames, tokens)
    return [row[: utterance.shape[1]].tolist() for row, utterance in zip(found, utterances, strict=True)]


@pytest.mark.parametrize("grid", [False, True])
def test_paths_are_those_of_unity2(grid: bool) -> None:
    utterances = random_problems(2000, 21, grid=grid)
    assert aligned(utterances) == [unity2(utterance) for utterance in utterances]


def test_paths_are_those_of_the_cython_search_without_ties() -> None:
    utterances = random_problems(2000, 22, grid=False)
    assert aligned(utterances) == [maximum_path(utterance) for utterance in utterances]


def test_paths_are_as_good_as_those_of_the_cython_search_with_ties() -> None:
    """It stays on a token where this search advances, so that tokens begin later there."""
    utterances = random_problems(2000, 23, grid=True)
    differ = 0
    for utterance, found in zip(utterances, aligned(utterances), strict=True):
        published = maximum_path(utterance)
        assert score_of(utterance, torch.tensor(found)) == score_of(utterance, torch.tensor(published))
        ends, others = itertools.accumulate(found), itertools.accumulate(published)
        assert all(end >= other for end, other in zip(ends, others, strict=True))
        differ += found != published
    assert differ > 200


def test_half_precision_sums_in_float32() -> None:
    """4,096 frames of -1 would stop at -2,048 in float16, and at -256 in bfloat16."""
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.full((1, 4096, 2), -1.0, dtype=dtype)
        x[0, 3000:, 0] = -1.0625
        assert monotonic_align(x).tolist() == [[3000, 1096]]


def test_gradients_are_not_recorded() -> None:
    x = drawn(30, 9, 4).requires_grad_()
    durations = monotonic_align(x)
    assert not durations.requires_grad
    (x * durations[:, None]).sum().backward()


ERRORS: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "a list": (lambda: monotonic_align([[1.0]]), TypeError, "log_probs must be a tensor, got list"),  # type: ignore[arg-type]
    "integers": (
        lambda: monotonic_align(torch.ones(1, 2, 2, dtype=torch.int64)),
        TypeError,
        "must be float32",
    ),
    "two dimensions": (
        lambda: monotonic_align(torch.ones(2, 2)),
        ValueError,
        r"\(B, T, U\), got shape \(2, 2\)",
    ),
    "float lengths": (
        lambda: monotonic_align(torch.ones(1, 2, 2), torch.ones(1)),
        TypeError,
        "frame_lengths must be an integer tensor, got torch.float32",
    ),
    "shape of lengths": (
        lambda: monotonic_align(torch.ones(1, 2, 2), None, torch.ones(2, dtype=torch.int64)),
        ValueError,
        r"token_lengths must have shape \(1,\).* got \(2,\)",
    ),
    "too long": (
        lambda: monotonic_align(torch.ones(2, 3, 2), torch.tensor([3, 4])),
        ValueError,
        r"frame_lengths must lie in \[0, 3\], got 4 in row 1 of the batch",
    ),
    "negative": (
        lambda: monotonic_align(torch.ones(2, 3, 2), None, torch.tensor([1, -1])),
        ValueError,
        r"token_lengths must lie in \[0, 2\], got -1 in row 1 of the batch",
    ),
    "more tokens than frames": (
        lambda: monotonic_align(torch.ones(3, 5, 4), torch.tensor([5, 3, 5])),
        ValueError,
        "row 1 of the batch has 3 frames for 4 tokens",
    ),
    "more tokens than frames anywhere": (
        lambda: monotonic_align(torch.ones(1, 3, 4)),
        ValueError,
        "row 0 of the batch has 3 frames for 4 tokens",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case: str) -> None:
    call, kind, message = ERRORS[case]
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_not_a_number(backend: str) -> None:
    x = drawn(31, 9, 4, batch=3)
    x[1, 8, 3] = torch.nan
    lengths = torch.tensor([9, 8, 9])
    assert (monotonic_align(x, lengths, backend=backend) > 0).all()
    x[2, 4, 1] = torch.nan
    with pytest.raises(ValueError, match=r"must not be NaN .* in row 2 of the batch at frame 4, token 1"):
        monotonic_align(x, lengths, backend=backend)


def test_backend_names() -> None:
    with pytest.raises(ValueError, match="backend must be one of auto, native, triton, reference"):
        monotonic_align(torch.zeros(1, 2, 1), backend="fastest")
    for name in {"native", "triton"} - set(backends("cpu", torch.float32)):
        with pytest.raises(ValueError, match=f"backend='{name}' cannot be used"):
            monotonic_align(torch.zeros(1, 2, 1), backend=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype) -> None:
    batch, frames, tokens = padded([u.to(dtype) for u in ragged(3)])
    for lengths in ((frames, tokens), (None, None)):
        x = batch if lengths[0] is not None else drawn(1, 9, 4).to(dtype)
        torch.library.opcheck(OPS["native"][0], (x, *lengths))


def test_the_op_refuses_what_is_unsafe() -> None:
    op = OPS["native"][0]
    for arguments in (
        (torch.zeros(2, 3), None, None),
        (torch.zeros(2, 3, 1), torch.zeros(3, dtype=torch.int64), None),
        (torch.zeros(2, 3, 1), None, torch.zeros(2, dtype=torch.int32)),
        (torch.zeros(2, 3, 1, dtype=torch.int32), None, None),
    ):
        with pytest.raises(RuntimeError):
            op(*arguments)


def test_compile() -> None:
    """One graph, for all sizes."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(monotonic_align, backend=counter, fullgraph=True, dynamic=True)
    for seed in (1, 2, 3):
        batch, frames, tokens = padded(ragged(4 + seed, seed))
        assert torch.equal(compiled(batch, frames, tokens), monotonic_align(batch, frames, tokens))
    assert counter.frame_count == 1


def test_meta_tensors() -> None:
    out = monotonic_align(torch.zeros(2, 7, 3, device="meta"))
    assert (out.device.type, out.shape, out.dtype) == ("meta", (2, 3), torch.int64)


def test_transforms_take_the_reference() -> None:
    x = drawn(33, 9, 4, batch=6).view(3, 2, 9, 4)
    expected = torch.stack([monotonic_align(batch) for batch in x])
    assert torch.equal(torch.func.vmap(monotonic_align)(x), expected)
    with pytest.raises(ValueError, match='use backend="reference"'):
        torch.func.vmap(lambda batch: monotonic_align(batch, backend="native"))(x)


def test_inference_mode_and_autocast() -> None:
    x = drawn(34, 9, 4, batch=2)
    expected = monotonic_align(x)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(monotonic_align(x.clone()), expected)


class TestModule:
    def frames_and_tokens(self) -> tuple[Tensor, Tensor]:
        """Features that are the embeddings, repeated, and noise."""
        generator = generator_for(40)
        tokens = torch.randn(2, 5, 16, generator=generator)
        repeats = torch.tensor([3, 1, 4, 2, 6])
        frames = tokens.repeat_interleave(repeats, dim=1)
        return frames + 0.01 * torch.randn(frames.shape, generator=generator), tokens

    def test_finds_the_frames_of_each_token(self) -> None:
        log_probs, durations = MonotonicAlign()(*self.frames_and_tokens())
        assert durations.tolist() == [[3, 1, 4, 2, 6]] * 2
        torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(2, 16))

    def test_lengths(self) -> None:
        frames, tokens = self.frames_and_tokens()
        lengths = torch.tensor([16, 8]), torch.tensor([5, 3])
        log_probs, durations = MonotonicAlign()(frames, tokens, *lengths)
        assert durations.tolist() == [[3, 1, 4, 2, 6], [3, 1, 4, 0, 0]]
        assert log_probs[1, :, 3:].eq(-torch.inf).all()
        alone, _ = MonotonicAlign()(frames[1:], tokens[1:, :3])
        torch.testing.assert_close(log_probs[1:, :, :3], alone)

    def test_gradients(self) -> None:
        frames, tokens = self.frames_and_tokens()
        frames.requires_grad_()
        log_probs, durations = MonotonicAlign()(frames, tokens, None, torch.tensor([5, 0]))
        assert durations[1].eq(0).all()
        log_probs[0].sum().backward()
        assert frames.grad is not None
        assert frames.grad.isfinite().all()

    def test_half_precision_and_autocast(self) -> None:
        frames, tokens = self.frames_and_tokens()
        with torch.autocast("cpu", torch.bfloat16):
            log_probs, durations = MonotonicAlign()(frames.bfloat16(), tokens.bfloat16())
        assert log_probs.dtype == torch.float32
        assert durations.tolist() == [[3, 1, 4, 2, 6]] * 2

    def test_scale(self) -> None:
        assert "scale=2.0" in repr(MonotonicAlign(scale=2.0))
        with pytest.raises(ValueError, match="scale must be positive, got 0"):
            MonotonicAlign(scale=0)
