"""mmkernels.compat: the signatures of other packages, and results by their definitions."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mmkernels import compat

SIGNATURES = {
    "cif_function": (
        "(inputs, alpha, beta=1.0, tail_thres=0.5, padding_mask=None, target_lengths=None, eps=0.0001, "
        "unbound_alpha=False)"
    ),
    "forced_align": "(log_probs, targets, input_lengths=None, target_lengths=None, blank=0)",
    "maximum_path": "(neg_cent, mask)",
    "merge_tokens": "(tokens, scores, blank=0)",
    "segment_csr": "(src, indptr, out=None, reduce='sum')",
}


def test_signatures_are_those_of_the_peers() -> None:
    def bare(function: Callable[..., object]) -> str:
        parameters = inspect.signature(function).parameters.values()
        return str(inspect.Signature([p.replace(annotation=p.empty) for p in parameters]))

    assert {name: bare(getattr(compat, name)) for name in compat.__all__} == SIGNATURES


class TestForcedAlign:
    def test_a_path_and_its_spans(self) -> None:
        log_probs = torch.full((1, 7, 4), -9.0)
        spoken = [0, 2, 2, 0, 2, 3, 0]
        log_probs[0, range(7), spoken] = torch.tensor([-0.1, -0.2, -0.4, -0.1, -0.3, -0.5, -0.1])
        paths, scores = compat.forced_align(log_probs, torch.tensor([[2, 2, 3]], dtype=torch.int32))
        assert paths.tolist() == [spoken]
        assert paths.dtype == torch.int32
        torch.testing.assert_close(scores, log_probs.amax(2))
        spans = compat.merge_tokens(paths[0], scores[0])
        assert [(s.token, s.start, s.end) for s in spans] == [(2, 1, 3), (2, 4, 5), (3, 5, 6)]
        assert [s.score for s in spans] == pytest.approx([-0.3, -0.3, -0.5])
        assert [len(s) for s in spans] == [2, 1, 1]
        with pytest.raises(dataclasses.FrozenInstanceError):
            spans[0].end = 9  # type: ignore[misc]

    def test_a_batch_with_padding(self) -> None:
        log_probs, targets = torch.randn(3, 12, 5).log_softmax(2), torch.randint(1, 5, (3, 4))
        frames, tokens = torch.tensor([12, 9, 7]), torch.tensor([4, 2, 0])
        paths, scores = compat.forced_align(log_probs, targets, frames, tokens)
        for row, (t, u) in enumerate(zip(frames.tolist(), tokens.tolist(), strict=True)):
            alone = compat.forced_align(log_probs[row : row + 1, :t], targets[row : row + 1, :u])
            assert torch.equal(paths[row, :t], alone[0][0])
            assert torch.equal(scores[row, :t], alone[1][0])
            assert paths[row, t:].eq(-1).all()
            assert scores[row, t:].eq(0).all()
            assert len(compat.merge_tokens(paths[row], scores[row])) == u

    def test_dtypes_stay(self) -> None:
        log_probs = torch.randn(1, 9, 4, dtype=torch.bfloat16).log_softmax(2).requires_grad_()
        _, scores = compat.forced_align(log_probs, torch.tensor([[1, 3]]))
        assert scores.dtype == torch.bfloat16
        scores.sum().backward()
        assert log_probs.grad is not None
        assert log_probs.grad.sum() == 9

    def test_no_path_is_an_error_that_names_the_utterance(self) -> None:
        with pytest.raises(RuntimeError, match="no path for utterance 1: it has 3 frames for 2 tokens"):
            compat.forced_align(
                torch.full((2, 3, 4), -torch.inf).index_fill(0, torch.tensor(0), -1.0),
                torch.tensor([[1, 2], [3, 2]]),
            )

    def test_shapes_of_merge_tokens(self) -> None:
        with pytest.raises(ValueError, match=r"merge_tokens: tokens and scores must both have shape \(T,\)"):
            compat.merge_tokens(torch.zeros(2, 3), torch.zeros(2, 3))

    def test_torchaudio_gives_the_same(self) -> None:
        torchaudio = pytest.importorskip("torchaudio")
        log_probs, targets = torch.randn(1, 50, 8).log_softmax(2), torch.randint(1, 8, (1, 12))
        for ours, theirs in zip(
            compat.forced_align(log_probs, targets),
            torchaudio.functional.forced_align(log_probs, targets),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs)


def segments_of(src: Tensor, indptr: Tensor, reduce: str) -> Tensor:
    """The definition, row by row."""
    if indptr.dim() > 1:
        rows = indptr.expand(src.shape[0], *indptr.shape[1:])
        return torch.stack([segments_of(s, i, reduce) for s, i in zip(src, rows, strict=True)])
    take = {
        "sum": lambda x: x.sum(0),
        "mean": lambda x: x.mean(0),
        "min": lambda x: x.amin(0),
        "max": lambda x: x.amax(0),
    }[reduce]
    parts = [src[a:b] for a, b in itertools.pairwise(indptr.tolist())]
    return torch.stack([take(part) if len(part) else torch.zeros_like(src[0]) for part in parts])


class TestSegmentCsr:
    @pytest.mark.parametrize("reduce", ["sum", "mean", "min", "max"])
    @pytest.mark.parametrize(
        ("shape", "indptr"),
        [
            ((9,), [0, 3, 3, 9]),
            ((9, 4), [2, 5, 5, 7]),
            ((9, 2, 3), [0, 9]),
            ((2, 9, 4), [[1, 4, 9], [0, 0, 6]]),
            ((3, 9, 4), [[1, 4, 8]]),
            ((2, 3, 9), [[[0, 4, 8]]]),
            ((9, 4), [5]),
        ],
    )
    def test_values_and_gradients(self, shape: tuple[int, ...], indptr: list[int], reduce: str) -> None:
        src = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        pointers = torch.tensor(indptr)
        out = compat.segment_csr(src, pointers, reduce=reduce)
        if pointers.shape[-1] == 1:
            assert out.shape == (0, 4)
            return
        expected = segments_of(src, pointers, reduce)
        torch.testing.assert_close(out, expected)
        grad = torch.randn_like(out)
        found, wanted = (torch.autograd.grad(each, src, grad)[0] for each in (out, expected))
        torch.testing.assert_close(found, wanted)

    def test_frames_outside_have_the_gradient_zero(self) -> None:
        src = torch.randn(10, 3, requires_grad=True)
        compat.segment_csr(src, torch.tensor([2, 4, 7]), reduce="mean").sum().backward()
        assert src.grad is not None
        assert src.grad[:2].eq(0).all()
        assert src.grad[7:].eq(0).all()

    def test_out_is_written(self) -> None:
        src, out = torch.ones(6, 2), torch.empty(2, 2)
        assert compat.segment_csr(src, torch.tensor([0, 4, 6]), out, "add") is out
        assert out.tolist() == [[4, 4], [2, 2]]
        with pytest.raises(ValueError, match=r"out must have shape \(2, 2\)"):
            compat.segment_csr(src, torch.tensor([0, 4, 6]), torch.empty(3, 2))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"reduce": "prod"}, "reduce must be one of sum, add, mean, min, max, got 'prod'"),
            ({"indptr": torch.tensor(3)}, "indptr must have a pointer or more"),
            ({"indptr": torch.zeros(4, 3, dtype=torch.int64)}, "leading dimensions of indptr"),
            ({"indptr": torch.tensor([0, 2, 1])}, "must not decrease"),
        ],
    )
    def test_bad_input(self, arguments: dict[str, object], message: str) -> None:
        given = {"src": torch.randn(2, 6, 3), "indptr": torch.tensor([0, 1, 2]), **arguments}
        with pytest.raises(ValueError, match=message):
            compat.segment_csr(**given)

    def test_integers_are_refused(self) -> None:
        with pytest.raises(TypeError, match="int64"):
            compat.segment_csr(torch.ones(4, 2, dtype=torch.int64), torch.tensor([0, 4]))


def integrate_and_fire(
    x: Tensor, alpha: Tensor, beta: float
) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """Frame by frame, as the paper has it: what fired, with the mean frame numbers, and the rest."""
    fired, delays = [], []
    total, state, delay = torch.zeros(()), torch.zeros(x.shape[1]), torch.zeros(())
    for t in range(len(x)):
        left = alpha[t]
        while total + left >= beta:
            part = beta - total
            fired.append(state + part * x[t])
            delays.append((delay + part * (t + 1)) / beta)
            left, total, state, delay = left - part, torch.zeros(()), torch.zeros(x.shape[1]), torch.zeros(())
        total, state, delay = total + left, state + left * x[t], delay + left * (t + 1)
    return fired, delays, state, total


class TestCifFunction:
    @pytest.mark.parametrize("beta", [1.0, 0.7])
    def test_inference(self, beta: float) -> None:
        x, alpha = torch.randn(3, 20, 4), torch.rand(3, 20)
        padding = torch.arange(20) >= torch.tensor([20, 13, 6])[:, None]
        found = compat.cif_function(x, alpha, beta=beta, padding_mask=padding)
        (out,), (lengths,), (delays,) = found["cif_out"], found["cif_lengths"], found["delays"]
        for row, frames in enumerate((20, 13, 6)):
            tokens, means, rest, weight = integrate_and_fire(x[row, :frames], alpha[row, :frames], beta)
            torch.testing.assert_close(found["tail_weights"][0][row], weight)
            torch.testing.assert_close(delays[row, : len(means)], torch.stack(means))
            if weight >= 0.5:
                tokens.append(rest * beta / weight)
            assert lengths[row] == len(tokens)
            torch.testing.assert_close(out[row, : len(tokens)], torch.stack(tokens), rtol=1e-4, atol=1e-4)
            assert out[row, len(tokens) :].eq(0).all()
        torch.testing.assert_close(found["alpha_sum"][0], alpha.masked_fill(padding, 0).sum(1))

    def test_training(self) -> None:
        x, alpha, targets = torch.randn(2, 20, 4), torch.rand(2, 20), torch.tensor([3, 8])
        found = compat.cif_function(x, alpha, target_lengths=targets)
        assert found["cif_lengths"][0].tolist() == [3, 8]
        assert found["tail_weights"] == []
        torch.testing.assert_close(found["scaled_alpha"][0].sum(1), targets.float())
        assert found["cif_out"][0][0, 3:].eq(0).all()
        torch.testing.assert_close(
            found["cif_out"][0].sum(1), (found["scaled_alpha"][0][..., None] * x).sum(1)
        )

    def test_weights_of_zero_and_many_tokens_in_half_precision(self) -> None:
        found = compat.cif_function(torch.randn(1, 9, 2), torch.zeros(1, 9), target_lengths=torch.tensor([3]))
        assert found["cif_out"][0].eq(0).all()
        x, alpha = (
            torch.ones(1, 600, 2, dtype=torch.bfloat16),
            torch.full((1, 600), 0.5, dtype=torch.bfloat16),
        )
        found = compat.cif_function(x, alpha, target_lengths=torch.tensor([300]))
        assert found["cif_out"][0].eq(1).all()
        assert found["cif_out"][0].shape == (1, 300, 2)

    def test_bad_input(self) -> None:
        x = torch.randn(1, 4, 2)
        with pytest.raises(ValueError, match=r"alpha must lie in \[0, 1\], got values from 1.5 to 1.5"):
            compat.cif_function(x, torch.full((1, 4), 1.5))
        compat.cif_function(x, torch.full((1, 4), 1.5), unbound_alpha=True)
        with pytest.raises(ValueError, match="padding_mask must be true on the right alone"):
            compat.cif_function(x, torch.rand(1, 4), padding_mask=torch.tensor([[1, 0, 0, 0]]))

    def test_torch_cif_gives_the_same(self) -> None:
        torch_cif = pytest.importorskip("torch_cif")
        x, alpha = torch.randn(4, 50, 6), torch.rand(4, 50)
        ours, theirs = (f(x, alpha) for f in (compat.cif_function, torch_cif.cif_function))
        whole = torch.arange(ours["delays"][0].shape[1]) < ours["alpha_sum"][0].floor()[:, None]
        for found in (ours, theirs):
            found["delays"] = [found["delays"][0].where(whole, 0)]
        for name in ours:
            torch.testing.assert_close(ours[name][0], theirs[name][0], rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("beta", [1.0, 0.7, 1.5])
    @pytest.mark.parametrize("frames", [1, 2, 7, 40])
    def test_torch_cif_gives_the_same_tokens_of_many_utterances(self, frames: int, beta: float) -> None:
        """With targets too, and then the gradients; torch-cif adds eps to the sum of the weights."""
        torch_cif = pytest.importorskip("torch_cif")
        x, alpha = torch.randn(256, frames, 3), 0.1 + 0.9 * torch.rand(256, frames)
        for targets in (None, torch.randint(1, frames + 3, (256,))):
            found = []
            for function in (compat.cif_function, torch_cif.cif_function):
                leaves = [x.clone().requires_grad_(), alpha.clone().requires_grad_()]
                result = function(*leaves, beta=beta, target_lengths=targets, eps=1e-5)
                lengths = result["cif_lengths"][0]
                inside = torch.arange(int(lengths.max())) < lengths[:, None]
                tokens = result["cif_out"][0][:, : inside.shape[1]][inside]
                gradients = () if targets is None else torch.autograd.grad(tokens.sin().sum(), leaves)
                found.append((lengths, tokens, *gradients))
            for ours, theirs in zip(found[0][:3], found[1][:3], strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=3e-3)
            if targets is not None:
                # The gradient of the weights jumps where the end of a token passes that of a frame.
                same = torch.isclose(found[0][3], found[1][3], rtol=1e-3, atol=3e-3).all(1)
                assert same.float().mean() > 0.98


class TestMaximumPath:
    def test_the_best_path(self) -> None:
        scores = torch.randn(2, 7, 4)
        mask = torch.zeros(2, 7, 4)
        mask[0], mask[1, :5, :2] = 1, 1
        path = compat.maximum_path(scores, mask)
        assert path.dtype == scores.dtype
        for row, (frames, tokens) in enumerate(((7, 4), (5, 2))):
            assert path[row, :frames].sum(1).eq(1).all()
            assert path[row].sum() == frames
            best = max(
                float(scores[row, range(frames), each].sum())
                for each in itertools.product(range(tokens), repeat=frames)
                if each[0] == 0
                and each[-1] == tokens - 1
                and all(b - a in (0, 1) for a, b in itertools.pairwise(each))
            )
            assert float((path[row] * scores[row]).sum()) == pytest.approx(best, abs=1e-5)

    def test_bad_input(self) -> None:
        with pytest.raises(ValueError, match=r"neg_cent and mask must both have shape \(B, T, U\)"):
            compat.maximum_path(torch.randn(1, 4, 2), torch.ones(1, 4))
        with pytest.raises(ValueError, match="row 0"):
            compat.maximum_path(torch.randn(1, 2, 4), torch.ones(1, 2, 4))
