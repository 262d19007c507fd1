"""segment_pool, cif, ctc_align and monotonic_align against definitions that share nothing with the
references, on thousands of small utterances: each backend, all dtypes, many equal scores."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from segment_oracles import (
    EachBackend,
    best_durations,
    cif_batch,
    ctc_batch,
    ctc_best,
    ctc_ends,
    integrate_and_fire,
    leaf_of,
    monotonic_batch,
    overlaps,
    pool_batch,
    viterbi,
)
from torch import Tensor

from mmkernels import cif, ctc_align, monotonic_align, segment_pool
from mmkernels.ops.segment_pool.schema import REDUCTIONS
from op_tests import poisoned_memory


def close(found: Tensor, expected: np.ndarray, dtype: torch.dtype, terms: float = 1.0) -> None:
    """Rounded to ``dtype`` once, or truncated by Triton's interpreter, after a few sums in float32."""
    exact = torch.from_numpy(expected)
    bound = torch.finfo(dtype).eps * exact.abs() + 8 * terms * torch.finfo(torch.float32).eps
    assert found.shape == exact.shape
    assert ((found.detach().cpu().double() - exact).abs() <= bound).all()


class OnEveryBackend(EachBackend):
    #: Calls of a test for each dtype; utterances of a call that aligns, and of one that pools.
    calls = 3
    aligned = 256
    pooled = 256
    #: Frames of a call with long segments.
    longer = 150

    def seeds(self, dtype: torch.dtype) -> list[int]:
        """Others for each dtype, so that they add up."""
        return [101 * self.dtypes.index(dtype) + call for call in range(self.calls)]

    def test_monotonic_align_tries_all_paths(self, device: str, backend: str, dtype: torch.dtype) -> None:
        for seed in self.seeds(dtype):
            x, frames, tokens = monotonic_batch(seed, self.aligned)
            with poisoned_memory():
                found = monotonic_align(
                    x.to(device, dtype), frames.to(device), tokens.to(device), backend=backend
                ).tolist()
            for row, (t, u) in enumerate(zip(frames.tolist(), tokens.tolist(), strict=True)):
                durations, score = best_durations(x[row, :t, :u].numpy())
                assert found[row][u:] == [0] * (len(found[row]) - u)
                if score > -np.inf:
                    assert found[row][:u] == durations, (seed, row)
                else:
                    assert sum(found[row]) == t
                    assert min(found[row][:u]) > 0

    def check_ctc(self, device: str, backend: str, dtype: torch.dtype, batch: Any, best: Any) -> int:
        """Paths, ends, totals and the gradient of the scores; returns how many have a path."""
        log_probs, targets, frames, tokens, blank = batch
        leaf = leaf_of(log_probs, device, dtype)
        lengths = frames.to(device), tokens.to(device)
        with poisoned_memory():
            found = ctc_align(leaf, targets.to(device), *lengths, blank=blank, backend=backend)
            (gradient,) = torch.autograd.grad(found.scores.sum(), leaf)
        paths, ends, totals = found.paths.tolist(), found.ends.tolist(), found.total.tolist()
        wanted = torch.zeros(log_probs.shape)
        for row, (t, u) in enumerate(zip(frames.tolist(), tokens.tolist(), strict=True)):
            path, total = best(log_probs[row, :t].double().numpy(), targets[row, :u].tolist(), blank)
            assert totals[row] == total, row
            assert bool(found.feasible[row]) == (path is not None)
            if path is None:
                assert paths[row] == [-1] * len(paths[row])
                assert ends[row] == [0] * len(ends[row])
                continue
            assert paths[row] == path + [-1] * (len(paths[row]) - t), row
            assert ends[row] == ctc_ends(path, len(ends[row]), blank), row
            wanted[row, range(t), path] = 1
        assert torch.equal(gradient.cpu().float(), wanted)
        return int(found.feasible.sum())

    def test_ctc_align_tries_all_paths(self, device: str, backend: str, dtype: torch.dtype) -> None:
        for seed in self.seeds(dtype):
            feasible = self.check_ctc(device, backend, dtype, ctc_batch(seed, self.aligned), ctc_best)
            assert self.aligned // 3 < feasible < self.aligned

    def test_ctc_align_is_the_plain_search(self, device: str, backend: str, dtype: torch.dtype) -> None:
        """Longer than the period of rescaling."""
        longer = ctc_batch(self.seeds(dtype)[0], self.aligned // 16, frames=50, tokens=12, holes=0.02)
        assert self.check_ctc(device, backend, dtype, longer, viterbi) > 0

    @pytest.mark.parametrize("scaled", [False, True], ids=["tail", "targets"])
    def test_cif_integrates_and_fires(
        self, device: str, backend: str, dtype: torch.dtype, scaled: bool
    ) -> None:
        """The gradient of the weights is that of differences, towards more weight where they are zero or a
        token fires at the end of a frame. Scaling moves other frames the other way then, so that it is
        compared off the grid."""
        for seed in self.seeds(dtype):
            batch = cif_batch(seed, self.pooled, scaled=scaled, grid=not scaled or seed % 2 == 0)
            most, targets = batch.grad.shape[1], batch.targets
            x = leaf_of(batch.x, device, dtype)
            alpha = leaf_of(batch.alpha, device, torch.float32)
            with poisoned_memory():
                found = cif(
                    x,
                    alpha,
                    beta=batch.beta,
                    lengths=batch.lengths.to(device),
                    target_lengths=None if targets is None else targets.to(device),
                    tail_threshold=batch.threshold,
                    max_length=most,
                    backend=backend,
                )
                gradients = torch.autograd.grad(found.features, (x, alpha), batch.grad.to(found.features))
            dx, d_alpha = (gradient.cpu() for gradient in gradients)
            ends, lengths = found.ends.tolist(), found.lengths.tolist()
            for row, (fired, frames) in enumerate(zip(batch.all_fired, batch.lengths.tolist(), strict=True)):
                assert lengths[row] == min(len(fired.ends), most), (seed, row)
                if not scaled or fired.certain:
                    assert ends[row] == [*fired.ends, *[frames] * most][:most], (seed, row)
            features, wanted = batch.expected
            close(found.features, features, dtype, terms=8)
            close(dx, wanted, dtype, terms=8)
            if not scaled or seed % 2 == 1:
                slopes = torch.from_numpy(batch.slopes)
                bound = 2e-5 * (1 + slopes.abs().amax(1, keepdim=True))
                assert ((d_alpha - slopes).abs() <= bound).all()
            assert found.features.cpu()[torch.arange(most) >= found.lengths.cpu()[:, None]].eq(0).all()
            padding = torch.arange(x.shape[1]) >= batch.lengths[:, None]
            assert dx[padding].eq(0).all()
            assert d_alpha[padding].eq(0).all()

    @pytest.mark.parametrize("reduce", REDUCTIONS)
    def test_segment_pool_is_a_loop_over_slices(self, device: str, backend: str, reduce: str) -> None:
        """Sums on the grid, maxima and last frames are exact, with their gradients. One call of longer rows,
        of segments of several pieces."""
        for dtype in self.dtypes:
            batch = pool_batch(self.seeds(dtype)[0], self.pooled)
            self.check_pool(device, backend, reduce, dtype, batch)
        self.check_pool(
            device,
            backend,
            reduce,
            torch.float32,
            pool_batch(1, 1 + self.pooled // 32, frames=self.longer, segments=5, width=5),
        )

    def check_pool(self, device: str, backend: str, reduce: str, dtype: torch.dtype, batch: Any) -> None:
        attends = reduce == "attention"
        x = leaf_of(batch.x, device, dtype)
        scores = leaf_of(batch.scores, device, torch.float32) if attends else None
        with poisoned_memory():
            out = segment_pool(
                x,
                batch.ends.to(device),
                reduce=reduce,
                scores=scores,
                counts=batch.counts.to(device),
                backend=backend,
            )
            leaves = [x] if scores is None else [x, scores]
            found = torch.autograd.grad(out, leaves, batch.grad.to(out))
        expected, dx, d_scores = batch.expected(reduce)
        if reduce in ("sum", "max", "last"):
            assert torch.equal(out.detach().cpu().double(), torch.from_numpy(expected).to(dtype).double())
            assert torch.equal(found[0].cpu().double(), torch.from_numpy(dx))
        else:
            close(out, expected, dtype)
            close(found[0], dx, dtype)
        if attends:
            close(found[1], d_scores, torch.float32, terms=8)


class TestOnEveryBackend(OnEveryBackend):
    pass


def test_the_definitions_of_ctc_agree() -> None:
    """All paths, and the search by states."""
    log_probs, targets, frames, tokens, blank = ctc_batch(7, 1000)
    for row, (t, u) in enumerate(zip(frames.tolist(), tokens.tolist(), strict=True)):
        problem = log_probs[row, :t].double().numpy(), targets[row, :u].tolist(), blank
        assert ctc_best(*problem) == viterbi(*problem)


def test_the_definitions_of_cif_agree() -> None:
    """Integration frame by frame, and overlaps on the line of weights."""
    for beta in (1.0, 0.75):
        for alpha in torch.randint(0, 20, (1000, 7), generator=torch.Generator().manual_seed(3)) / 8:
            fired = integrate_and_fire(alpha.tolist(), beta, threshold=np.inf)
            dense = overlaps(alpha.double().numpy(), beta, len(fired.ends))
            np.testing.assert_allclose(fired.weights(7, len(fired.ends)), dense, atol=1e-12)
            np.testing.assert_allclose(dense.sum(0), beta, atol=1e-12)
