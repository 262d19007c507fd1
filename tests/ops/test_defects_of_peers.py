"""Faults of the packages that have these primitives (torchaudio, torch-cif, torch.segment_reduce,
torch-scatter), each a test of every backend here. Others are among the cases of test_segment_oracles.py."""

from __future__ import annotations

import mmap
from typing import Any

import pytest
import torch
from segment_oracles import EachBackend, leaf_of
from torch import Tensor

from mmkernels import cif, ctc_align, monotonic_align, segment_pool
from mmkernels.ops.segment_pool.schema import REDUCTIONS
from op_tests import poisoned_memory

each_reduction = pytest.mark.parametrize("reduce", REDUCTIONS)
#: Elements from one utterance to the next, so that the third begins past 2^31.
FAR = 2**30 + 8
MAP_NORESERVE = 0x4000


def pool(x: Tensor, ends: list[list[int]], reduce: str, backend: str, **options: Any) -> Tensor:
    scores = torch.zeros(x.shape[:2], device=x.device) if reduce == "attention" else None
    given = torch.tensor(ends, device=x.device)
    with poisoned_memory():
        return segment_pool(x, given, reduce=reduce, scores=scores, backend=backend, **options)


def far_apart(values: Tensor) -> Tensor:
    """Three utterances at addresses of which most is never touched, so that it takes no memory."""
    size = 3 * FAR * values.dtype.itemsize
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    rows = torch.frombuffer(memory, dtype=values.dtype)
    return rows.as_strided(values.shape, (FAR, *values.stride()[1:])).copy_(values)


class DefectsOfPeers(EachBackend):
    @each_reduction
    def test_empty_segments_are_zero_and_get_no_gradient(
        self, device: str, backend: str, reduce: str
    ) -> None:
        """torch.segment_reduce: NaN for the mean, -inf for the maximum."""
        x = leaf_of(torch.randn(1, 5, 3), device, torch.float32)
        out = pool(x, [[0, 3, 3, 5, 5]], reduce, backend)
        assert out[0, [0, 2, 4]].eq(0).all()
        assert out[0, [1, 3]].ne(0).all()
        grad = torch.zeros_like(out)
        grad[0, [0, 2, 4]] = torch.nan
        assert torch.autograd.grad(out, x, grad)[0].eq(0).all()

    @each_reduction
    def test_the_gradient_of_frames_in_no_segment_is_zero(
        self, device: str, backend: str, reduce: str
    ) -> None:
        """torch-scatter: memory that nobody wrote; the backward pass of its mean fails."""
        x = torch.randn(2, 30, 3)
        x[0, 20:], x[1, 3:] = torch.nan, torch.nan
        leaf = leaf_of(x, device, torch.float32)
        out = pool(leaf, [[9, 20], [0, 3]], reduce, backend)
        with poisoned_memory():
            (found,) = torch.autograd.grad(out, leaf, torch.ones_like(out))
        assert out.isfinite().all()
        assert found[0, 20:].eq(0).all()
        assert found[1, 3:].eq(0).all()
        assert found[0, :20].ne(0).any()

    def test_sums_are_wide(self, device: str, backend: str) -> None:
        """torch.segment_reduce: 256 for the sum of 1,024 ones in bfloat16, inf for the mean in float16."""
        ones = torch.ones(1, 1024, 2, device=device, dtype=torch.bfloat16)
        hundreds = torch.full((1, 1024, 2), 100.0, device=device, dtype=torch.float16)
        assert pool(ones, [[1024]], "sum", backend).eq(1024).all()
        assert pool(hundreds, [[1024]], "mean", backend).eq(100).all()

    @pytest.mark.parametrize("sign", [1, -1])
    def test_equal_maxima_are_the_first(self, device: str, backend: str, sign: int) -> None:
        """torch.segment_reduce: shared for a positive gradient, to each of them whole for a negative one."""
        values = torch.zeros(1, 150, 2)
        values[0, [2, 4, 149]] = 3
        x = leaf_of(values, device, torch.float32)
        out = pool(x, [[150]], "max", backend)
        (found,) = torch.autograd.grad(out, x, torch.full_like(out, sign))
        assert found[0].nonzero().tolist() == [[2, 0], [2, 1]]
        assert found[0, 2].eq(sign).all()

    @pytest.mark.parametrize("targets", [None, 301])
    def test_more_tokens_than_bfloat16_counts(self, device: str, backend: str, targets: int | None) -> None:
        """torch-cif: the number of tokens is in the dtype of the frames, where 257 is 256."""
        x = torch.ones(1, 113, 1, dtype=torch.bfloat16, device=device)
        alpha = torch.full((1, 113), 2.75, dtype=torch.bfloat16, device=device)
        count = targets or 311
        wanted = None if targets is None else torch.tensor([targets], device=device)
        found = cif(x, alpha, target_lengths=wanted, max_length=320, backend=backend)
        assert found.lengths.tolist() == [count]
        assert (found.features[0, :count] - 1).abs().max() <= torch.finfo(torch.bfloat16).eps
        assert found.features[0, count:].eq(0).all()

    def test_past_the_target_length_all_is_zero(self, device: str, backend: str) -> None:
        """torch-cif: a trace of the last frame, of the eps in the scaling."""
        x = leaf_of(1e6 * torch.randn(2, 9, 3), device, torch.float32)
        alpha, targets = torch.rand(2, 9, device=device), torch.tensor([2, 5], device=device)
        with poisoned_memory():
            found = cif(x, alpha, target_lengths=targets, max_length=6, backend=backend)
            (dx,) = torch.autograd.grad(found.features[0, 2:].sum() + found.features[1, 5:].sum(), x)
        assert found.features[0, 2:].eq(0).all()
        assert found.features[1, 5:].eq(0).all()
        assert found.features[0, :2].ne(0).all()
        assert dx.eq(0).all()

    @pytest.mark.parametrize("scaled", [False, True])
    def test_weights_of_zero(self, device: str, backend: str, scaled: bool) -> None:
        """torch-cif: NaN, and an index out of bounds."""
        x = leaf_of(torch.randn(2, 6, 4), device, torch.float32)
        alpha = leaf_of(torch.tensor([[0.0] * 6, [0.5] * 6]), device, torch.float32)
        targets = torch.tensor([2, 2], device=device) if scaled else None
        with poisoned_memory():
            found = cif(x, alpha, target_lengths=targets, max_length=4, backend=backend)
            gradients = torch.autograd.grad(found.features.sum(), (x, alpha))
        assert found.lengths.tolist() == ([2, 2] if scaled else [0, 3])
        assert found.features[0].eq(0).all()
        assert all(gradient.isfinite().all() for gradient in gradients)
        assert gradients[0][0].eq(0).all()

    def test_the_gradient_through_the_tail(self, device: str, backend: str) -> None:
        """torch-cif: the scaling of the tail has none. Its token is a mean: the same weights twice as large
        give the same, so that the gradient along them is zero."""
        x = leaf_of(torch.randn(1, 3, 4), device, torch.float32)
        alpha = leaf_of(torch.tensor([[0.125, 0.25, 0.25]]), device, torch.float32)
        found = cif(x, alpha, backend=backend)
        assert found.lengths.tolist() == [1]
        (slope,) = torch.autograd.grad(found.features.square().sum(), alpha)
        assert slope.abs().max() > 1e-2
        assert (slope * alpha).sum().abs() < 1e-5

    def test_an_empty_target(self, device: str, backend: str) -> None:
        """torchaudio: undefined, reads a state before the first."""
        log_probs = torch.randn(2, 5, 3).log_softmax(2).to(device)
        targets = torch.zeros(2, 0, dtype=torch.int64, device=device)
        with poisoned_memory():
            found = ctc_align(log_probs, targets, torch.tensor([5, 3], device=device), backend=backend)
        assert found.paths.tolist() == [[0] * 5, [0] * 3 + [-1] * 2]
        assert found.feasible.all()
        torch.testing.assert_close(found.total[1], log_probs[1, :3, 0].sum())

    def test_a_step_of_one_and_of_two_that_are_equal(self, device: str, backend: str) -> None:
        """torchaudio on CUDA: stays where it is, and misses the best path. And it takes one utterance, not in
        bfloat16."""
        never = -torch.inf
        rows = [[-1.0, -1.0, never], [-1.0, -1.0, -5.0], [-9.0, -9.0, -1.0]]
        log_probs = torch.tensor([rows, rows], device=device, dtype=torch.bfloat16)
        found = ctc_align(log_probs, torch.tensor([[1, 2]] * 2, device=device), backend=backend)
        assert found.total.tolist() == [-3.0, -3.0]
        assert found.paths[:, 2].eq(2).all()

    def test_offsets_past_two_to_the_31(self, device: str, backend: str) -> None:
        """torch-scatter: 32-bit offsets of elements."""
        if device != "cpu":
            pytest.skip("its memory would be used")
        x = torch.randint(-8, 8, (3, 4, 8), generator=torch.Generator().manual_seed(1)).bfloat16() / 4
        far = far_apart(x)
        assert far.data_ptr() % 16 == 0
        ends, weights = torch.tensor([[2, 4]] * 3), torch.full((3, 4), 0.5)
        targets = torch.tensor([[1, 2]] * 3)
        for reduce in REDUCTIONS:
            scores = weights if reduce == "attention" else None
            near, found = (
                segment_pool(each, ends, reduce=reduce, scores=scores, backend=backend) for each in (x, far)
            )
            assert torch.equal(near, found), reduce
        near, found = (cif(each, weights, backend=backend).features for each in (x, far))
        assert torch.equal(near, found)
        log_probs = -x.abs() - 1
        for align in (
            lambda each: ctc_align(each, targets, backend=backend).paths,
            lambda each: monotonic_align(each[..., :3], backend=backend),
        ):
            near = align(log_probs)
            assert torch.equal(near, align(far.copy_(log_probs)))
            assert not torch.equal(near[2], near[0])


class TestDefectsOfPeers(DefectsOfPeers):
    pass


@pytest.mark.parametrize("scaled", [False, True])
def test_memory_of_cif_is_its_results(scaled: bool) -> None:
    """torch-cif: 3.2 times the frames forward, 6.2 times backward. Here the gradient of x, whose size is
    that of the frames, and the plan and the dots, a few numbers for each frame."""
    x, alpha = torch.randn(2, 300, 256, requires_grad=True), torch.rand(2, 300, requires_grad=True)
    targets = torch.tensor([40, 70]) if scaled else None
    grad = torch.ones(2, 80, 256)

    def peak(run: Any) -> tuple[Any, int]:
        with torch.profiler.profile(profile_memory=True) as profile:
            result = run()
        events = profile.events()
        return result, sum(max(event.self_cpu_memory_usage, 0) for event in events)

    features, forward = peak(lambda: cif(x, alpha, target_lengths=targets, max_length=80).features)
    _, backward = peak(lambda: torch.autograd.grad(features, (x, alpha), grad))
    small = 64 * 2 * 300 + 8192
    assert forward <= features.numel() * 4 + small
    assert backward <= x.numel() * 4 + small
