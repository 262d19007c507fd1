"""mmkernels.cif: the shared tests of every op, and what is particular to it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import strategies
from torch import Tensor

from mmkernels import cif, nn
from mmkernels.ops.cif import CIF, reference
from mmkernels.ops.cif.schema import OPS
from op_tests import Call, OpSpec, Shape, backends, generator_for, op_tests, poisoned_memory
from op_tests.running import devices


def features(**arguments: Any) -> Tensor:
    return cif(**arguments).features


def reference_features(**arguments: Any) -> Tensor:
    return reference.cif(**arguments).features


def make(shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Call:
    """Weights around half a token, away from the places where a token fires exactly at the end of a frame."""
    batch, frames, width = shape["B"], shape["T"], shape["D"]
    beta, high = shape.get("beta", 1.0), shape.get("high", 0.9)

    def ragged(most: int) -> Tensor:
        return torch.randint(most // 2, most + 1, (batch,), generator=generator).to(device)

    alpha = torch.rand(batch, frames, generator=generator, dtype=torch.float64) * high * beta + 0.05
    tokens = shape.get("M", max(int(frames * (high / 2 + 0.05)), 1))
    arguments = {
        "x": torch.randn(batch, frames, width, generator=generator, dtype=torch.float64).to(device, dtype),
        "alpha": alpha.to(device, dtype),
        "beta": beta,
        "lengths": ragged(frames) if shape.get("lengths", True) else None,
        "target_lengths": ragged(tokens) if shape.get("targets") else None,
        "tail_threshold": shape.get("tail_threshold", 0.5),
        "max_length": tokens,
    }
    return Call(arguments, ("x", "alpha"))


def raw(call: Call) -> list[tuple[Any, tuple[Any, ...]]]:
    a = call.arguments
    x = a["x"]
    alpha = a["alpha"].to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    inputs = (x, alpha, a["lengths"])
    forward = (*inputs, a["target_lengths"], a["beta"], a["tail_threshold"], a["max_length"])
    out, counts, _, *plan = OPS["native"][0](*forward)
    backward = (out, *inputs, counts, *plan, a["beta"], a["target_lengths"] is not None)
    return [
        (OPS["native"][0], forward),
        *(
            (OPS["native"][1], (*backward, *needed))
            for needed in ((True, True), (True, False), (False, True))
        ),
    ]


def shapes() -> Any:
    # Of several frames: the weight of one has no gradient, and the float64 reference rounding errors there.
    size = functools.partial(strategies.integers, 1)
    return strategies.fixed_dictionaries(
        {
            **{"B": size(4), "T": strategies.integers(4, 30), "D": size(70), "M": size(20)},
            "beta": strategies.sampled_from([0.3, 1.0, 2.5]),
            "high": strategies.sampled_from([0.4, 0.9, 3.0]),
            "tail_threshold": strategies.sampled_from([0.0, 0.5, 2.0]),
            "targets": strategies.booleans(),
            "lengths": strategies.booleans(),
        }
    )


def alone(call: Call, index: int) -> tuple[Call, Callable[[Tensor], Tensor]]:
    one = call.mapped(lambda _, tensor: tensor[index : index + 1])
    frames = int(call.arguments["lengths"][index])
    cut = one.mapped(lambda name, tensor: tensor if "lengths" in name else tensor[:, :frames])
    return cut, lambda out: out[index : index + 1]


SPEC = OpSpec(
    name="cif",
    function=features,
    reference=reference_features,
    make=make,
    cases={
        "tail": {"B": 3, "T": 20, "D": 17},
        "targets": {"B": 3, "T": 21, "D": 40, "targets": True, "beta": 0.7},
        "several_tokens_from_a_frame": {"B": 3, "T": 9, "D": 8, "M": 12, "high": 3.0, "beta": 0.7},
        "more_tokens_than_room": {"B": 3, "T": 18, "D": 33, "M": 4},
    },
    zero_cases={
        "batch": {"B": 0, "T": 4, "D": 3, "M": 2},
        "frames": {"B": 2, "T": 0, "D": 3, "M": 2},
        "width": {"B": 2, "T": 4, "D": 0, "M": 2},
        "tokens": {"B": 2, "T": 4, "D": 3, "M": 0},
        "targets": {"B": 2, "T": 0, "D": 3, "M": 2, "targets": True},
    },
    raw=raw,
    shapes=shapes,
    alone=alone,
    dynamic=({"B": 3, "T": 20}, {"B": 4, "T": 33}),
    activations=("x",),
    casts_parameters=True,
)

TestCif = op_tests(SPEC)

SERVED = [
    (device, backend) for device in devices() for backend in (*backends(device, torch.float32), "reference")
]
each_backend = pytest.mark.parametrize(("device", "backend"), SERVED)


def dense_weights(
    alpha: Tensor, tokens: int, beta: float = 1.0, target: int | None = None, threshold: float = 0.5
) -> tuple[Tensor, int]:
    """Weights ``(T, M)`` and the number of tokens of one utterance, by integrating frame after frame."""
    values = alpha.double()
    if target is not None:
        values = values * beta * target / values.sum()
    rows, held, token = torch.zeros(len(values), tokens + 1, dtype=torch.float64), 0.0, 0
    for t, value in enumerate(values.tolist()):
        while held + value >= beta - 1e-12:
            rows[t, min(token, tokens)] += beta - held
            value -= beta - held
            held, token = 0.0, token + 1
        rows[t, min(token, tokens)] += value
        held += value
    if target is not None:
        return rows[:, :tokens], target
    if held >= threshold * beta and held > 0:
        rows[:, min(token, tokens)] *= beta / held
        token += 1
    rows[:, token:] = 0
    return rows[:, :tokens], token


def one(alpha: list[float], **options: Any) -> CIF:
    """Frames that are the unit vectors, so that features are the weights."""
    frames = len(alpha)
    found = cif(torch.eye(frames)[None], torch.tensor([alpha]), **options)
    return CIF(found.features[0], found.lengths[0], found.ends[0])


@pytest.mark.parametrize("backend", [name for device, name in SERVED if device == "cpu"])
class TestExamples:
    def test_weights_of_two_tokens(self, backend: str) -> None:
        found = one([0.4] * 5, backend=backend)
        expected = torch.tensor([[0.4, 0.4, 0.2, 0, 0], [0, 0, 0.2, 0.4, 0.4]])
        torch.testing.assert_close(found.features, expected)
        assert found.ends.tolist() == [3, 5]

    def test_a_frame_fires_twice(self, backend: str) -> None:
        found = one([2.5], backend=backend)
        assert found.features.tolist() == [[1.0], [1.0], [1.0]]
        assert found.ends.tolist() == [1, 1, 1]
        assert one([2.25], backend=backend).lengths == 2

    def test_the_tail_is_scaled_to_a_whole_token(self, backend: str) -> None:
        found = one([0.5, 0.75, 0.375], backend=backend)
        torch.testing.assert_close(found.features, torch.tensor([[0.5, 0.5, 0], [0, 0.4, 0.6]]))
        assert found.ends.tolist() == [2, 3]
        assert one([0.5, 0.75, 0.375], tail_threshold=0.7, backend=backend).lengths == 1

    def test_beta(self, backend: str) -> None:
        """The threshold of the tail is a share of beta."""
        found = one([1.5, 1.0, 1.0], beta=2.0, backend=backend)
        torch.testing.assert_close(found.features, torch.tensor([[1.5, 0.5, 0], [0, 2 / 3, 4 / 3]]))
        assert one([1.5, 1.0, 0.25], beta=2.0, backend=backend).lengths == 1

    def test_targets(self, backend: str) -> None:
        found = one([0.25, 0.25, 0.5], target_lengths=torch.tensor([2]), backend=backend)
        torch.testing.assert_close(found.features, torch.tensor([[0.5, 0.5, 0], [0, 0, 1.0]]))
        assert found.ends.tolist() == [2, 3]
        assert found.lengths == 2

    def test_ends_bound_the_frames_of_a_token(self, backend: str) -> None:
        found = one([0.3, 0.3, 0.5, 0.1, 2.2, 0.0, 0.4], backend=backend)
        for j, (end, row) in enumerate(zip(found.ends.tolist(), found.features, strict=True)):
            used = row.nonzero()[:, 0]
            assert used[-1] == end - 1
            assert used[0] >= (found.ends[j - 1] - 1 if j > 0 else 0)


@pytest.mark.parametrize("backend", [name for device, name in SERVED if device == "cpu"])
@pytest.mark.parametrize("beta", [1.0, 0.7])
@pytest.mark.parametrize("targets", [False, True])
def test_weights_are_those_of_integrating(targets: bool, beta: float, backend: str) -> None:
    generator = generator_for(3)
    for high in (0.3, 1.0, 4.0):
        alpha = torch.rand(6, 17, generator=generator) * high
        target = torch.randint(1, 30, (6,), generator=generator) if targets else None
        x = torch.eye(17).expand(6, 17, 17)
        found = cif(x, alpha, beta=beta, target_lengths=target, backend=backend)
        for row in range(6):
            tokens = found.features.shape[1]
            goal = None if target is None else int(target[row])
            weights, count = dense_weights(alpha[row], tokens, beta, goal)
            assert found.lengths[row] == count
            torch.testing.assert_close(found.features[row], weights.T.float(), rtol=1e-5, atol=2e-6)
            assert found.features[row, count:].eq(0).all()
            sums = found.features[row, :count].sum(1)
            torch.testing.assert_close(sums, torch.full_like(sums, beta), rtol=1e-5, atol=1e-5)


@each_backend
def test_lengths_and_ends_are_the_reference_s(device: str, backend: str) -> None:
    generator = generator_for(4)
    for targets in (None, torch.tensor([5, 0, 12, 1])):
        alpha = torch.rand(4, 40, generator=generator)
        lengths = torch.tensor([40, 13, 0, 27])
        x = torch.randn(4, 40, 6, generator=generator)
        arguments = {"alpha": alpha, "lengths": lengths, "target_lengths": targets}
        on_device = {name: None if t is None else t.to(device) for name, t in arguments.items()}
        with poisoned_memory():
            found = cif(x.to(device), **on_device, backend=backend)  # type: ignore[arg-type]
        expected = reference.cif(x, **arguments)  # type: ignore[arg-type]
        assert torch.equal(found.lengths.cpu(), expected.lengths)
        assert torch.equal(found.ends.cpu(), expected.ends)
        assert (found.ends.diff(dim=1) >= 0).all()


@each_backend
@pytest.mark.parametrize("targets", [False, True])
def test_padding_counts_nothing_and_gets_no_gradient(device: str, backend: str, targets: bool) -> None:
    generator = generator_for(5)
    x = torch.randn(2, 12, 5, generator=generator)
    alpha = torch.rand(2, 12, generator=generator)
    lengths, goal = torch.tensor([12, 7]), torch.tensor([5, 3]) if targets else None
    clean = cif(x, alpha, lengths=lengths, target_lengths=goal)
    x[1, 7:], alpha[1, 7:] = math.nan, math.nan
    leaves = [tensor.to(device).requires_grad_() for tensor in (x, alpha)]
    goal = None if goal is None else goal.to(device)
    found = cif(*leaves, lengths=lengths.to(device), target_lengths=goal, backend=backend)
    torch.testing.assert_close(found.features.cpu(), clean.features)
    dx, d_alpha = torch.autograd.grad(found.features.square().sum(), leaves)
    assert dx[1, 7:].eq(0).all()
    assert d_alpha[1, 7:].eq(0).all()
    assert dx.isfinite().all()
    assert d_alpha.isfinite().all()


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_three_hundred_tokens_in_half_precision(device: str, backend: str, dtype: torch.dtype) -> None:
    """A sum in bfloat16 would be 256 or 260; weights in float16 would be coarse."""
    x = torch.ones(1, 900, 8, dtype=dtype, device=device)
    alpha = torch.full((1, 900), 0.34375, dtype=dtype, device=device)
    for targets in (None, torch.tensor([301], device=device)):
        found = cif(x, alpha, target_lengths=targets, backend=backend)
        count = 309 if targets is None else 301
        assert found.lengths.tolist() == [count]
        torch.testing.assert_close(found.features.float(), torch.ones(1, count, 8, device=device))


@each_backend
def test_weights_of_zero_make_no_token_and_no_nan(device: str, backend: str) -> None:
    x = torch.randn(2, 6, 4, device=device).requires_grad_()
    alpha = torch.zeros(2, 6, device=device)
    alpha[1] = 0.5
    alpha.requires_grad_()
    for targets, lengths in ((None, [0, 3]), (torch.tensor([2, 2], device=device), [2, 2])):
        found = cif(x, alpha, target_lengths=targets, backend=backend)
        assert found.lengths.tolist() == lengths
        assert found.features[0].eq(0).all()
        gradients = torch.autograd.grad(found.features.sum(), (x, alpha))
        assert all(g.isfinite().all() for g in gradients)
        assert all(g[0].eq(0).all() for g in gradients) or targets is None


@each_backend
def test_a_frame_that_is_not_finite_stays_in_its_tokens(device: str, backend: str) -> None:
    x = torch.ones(1, 9, 3, device=device)
    x[0, 3] = math.nan
    found = cif(x, torch.full((1, 9), 0.4, device=device), backend=backend)
    assert found.features[0].isnan().any(1).tolist() == [False, True, False, False]


@pytest.mark.parametrize(
    "backend", [name for device, name in SERVED if device == "cpu" and name != "reference"]
)
@pytest.mark.parametrize("targets", [False, True])
def test_gradients_where_weights_are_zero(backend: str, targets: bool) -> None:
    """The derivative towards larger weights, which frames need to get any."""
    generator = generator_for(6)
    x = torch.randn(1, 10, 4, generator=generator, dtype=torch.float64)
    alpha = torch.rand(1, 10, generator=generator, dtype=torch.float64)
    alpha[0, [2, 5]] = 0
    goal = torch.tensor([4]) if targets else None
    run = functools.partial(cif, target_lengths=goal, max_length=6, backend=backend)
    leaf = alpha.clone().requires_grad_()
    (found,) = torch.autograd.grad(run(x, leaf).features.square().sum(), leaf)
    assert found.isfinite().all()
    for t in (2, 5):
        step = torch.zeros_like(alpha)
        step[0, t] = 1e-7
        difference = run(x, alpha + step).features.square().sum() - run(x, alpha).features.square().sum()
        torch.testing.assert_close(found[0, t], difference / 1e-7, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "backend", [name for device, name in SERVED if device == "cpu" and name != "reference"]
)
@pytest.mark.parametrize("targets", [False, True])
def test_the_weight_of_a_single_frame_has_no_gradient(backend: str, targets: bool) -> None:
    """It is scaled to the sum of its token: not even rounding errors are left."""
    alpha = torch.full((1, 3), 0.7).requires_grad_()
    goal = torch.tensor([2]) if targets else None
    found = cif(torch.randn(1, 3, 5), alpha, lengths=torch.tensor([1]), target_lengths=goal, backend=backend)
    assert found.lengths.tolist() == ([2] if targets else [1])
    (gradient,) = torch.autograd.grad(found.features.square().sum(), alpha)
    assert gradient.eq(0).all()


@each_backend
def test_the_length_of_the_result(device: str, backend: str) -> None:
    x, alpha = torch.randn(2, 8, 3, device=device), torch.full((2, 8), 0.5, device=device)
    lengths = torch.tensor([8, 4], device=device)
    whole = cif(x, alpha, lengths=lengths, backend=backend)
    assert whole.features.shape == (2, 4, 3)
    assert whole.lengths.tolist() == [4, 2]
    longer = cif(x, alpha, lengths=lengths, max_length=6, backend=backend)
    assert torch.equal(longer.features[:, :4], whole.features)
    assert longer.features[:, 4:].eq(0).all()
    assert longer.ends[:, 4:].tolist() == [[8, 8], [4, 4]]
    shorter = cif(x, alpha, lengths=lengths, max_length=3, backend=backend)
    assert torch.equal(shorter.features, whole.features[:, :3])
    assert shorter.lengths.tolist() == [3, 2]


@pytest.mark.parametrize(
    "backend", [name for device, name in SERVED if device == "cpu" and name != "reference"]
)
def test_values_that_only_the_device_sees(backend: str) -> None:
    """The torch ops: lengths are clamped, and weights that are negative or not finite count as zero."""
    x = torch.randn(6, 7, 5)
    alpha = torch.rand(6, 7)
    alpha[0, 2], alpha[1, 3], alpha[2, 4], alpha[3, 1] = -3.0, math.nan, math.inf, 1e38
    lengths = torch.tensor([7, 7, 7, 7, 99, -5])
    clean = torch.where((alpha >= 0) & (alpha < math.inf), alpha, 0.0)
    for targets in (None, torch.tensor([3, 4, 5, 6, -2, 3])):
        out, counts, ends, *plan = OPS[backend][0](x, alpha, lengths, targets, 1.0, 0.5, 6)
        inputs = (out, x, alpha, lengths, counts, *plan, 1.0, targets is not None, True, True)
        dx, d_alpha = OPS[backend][1](*inputs)
        expected = reference.cif(x, clean, lengths=lengths, target_lengths=targets, max_length=6)
        rows = [0, 1, 2, 4, 5]
        torch.testing.assert_close(out[rows], expected.features[rows])
        assert torch.equal(counts[rows], expected.lengths[rows])
        assert torch.equal(ends[rows], expected.ends[rows])
        assert ((ends >= 0) & (ends <= 7)).all()
        assert dx[rows].isfinite().all()
        assert d_alpha[rows].isfinite().all()


def one_frame(**changes: Any) -> Callable[[], object]:
    arguments = {"x": torch.ones(2, 4, 3), "alpha": torch.full((2, 4), 0.5), **changes}
    return lambda: cif(**arguments)


def with_weight(value: float) -> Tensor:
    alpha = torch.full((2, 4), 0.5)
    alpha[1, 2] = value
    return alpha


ERRORS: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "no tensor": (one_frame(x=[1.0]), TypeError, "x must be a tensor, got list"),
    "integers": (one_frame(x=torch.ones(2, 4, 3, dtype=torch.int64)), TypeError, "x must be float32"),
    "two dimensions": (one_frame(x=torch.ones(2, 4)), ValueError, r"x must be \(B, T, D\)"),
    "shape of alpha": (
        one_frame(alpha=torch.ones(2, 3)),
        ValueError,
        r"alpha must have shape \(2, 4\).*\(2, 3\)",
    ),
    "negative": (one_frame(alpha=with_weight(-0.5)), ValueError, "got -0.5 in row 1 of the batch at frame 2"),
    "not a number": (
        one_frame(alpha=with_weight(math.nan)),
        ValueError,
        "got nan in row 1 of the batch at frame 2",
    ),
    "infinite": (one_frame(alpha=with_weight(math.inf)), ValueError, "finite .* got inf in row 1"),
    "beta": (one_frame(beta=0.0), ValueError, "beta must be positive and finite, got 0.0"),
    "negative beta": (one_frame(beta=-1), ValueError, "beta must be positive and finite, got -1"),
    "beta that is no number": (one_frame(beta="1"), TypeError, "beta must be a number, got str"),
    "threshold": (
        one_frame(tail_threshold=-0.1),
        ValueError,
        "tail_threshold must not be negative, got -0.1",
    ),
    "too long": (
        one_frame(lengths=torch.tensor([4, 5])),
        ValueError,
        r"lengths must lie in \[0, 4\], got 5 in row 1 of the batch",
    ),
    "float lengths": (one_frame(lengths=torch.ones(2)), TypeError, "lengths must be an integer tensor"),
    "shape of targets": (
        one_frame(target_lengths=torch.tensor([1])),
        ValueError,
        r"target_lengths must have shape \(2,\), .* got \(1,\)",
    ),
    "negative targets": (
        one_frame(target_lengths=torch.tensor([1, -1])),
        ValueError,
        "target_lengths must not be negative, got -1 in row 1 of the batch",
    ),
    "negative room": (one_frame(max_length=-1), ValueError, "max_length must not be negative, got -1"),
    "room that is no integer": (
        one_frame(max_length=2.0),
        TypeError,
        "max_length must be an integer, got float",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case: str) -> None:
    call, kind, message = ERRORS[case]
    with pytest.raises(kind, match=message):
        call()


def test_the_ops_refuse_what_is_unsafe() -> None:
    x, alpha = torch.ones(2, 4, 3), torch.ones(2, 4)
    forward, backward = OPS["native"]
    for arguments in (
        (x, alpha[:, :3], None, None, 1.0, 0.5, 2),
        (x, alpha.double(), None, None, 1.0, 0.5, 2),
        (x, alpha, torch.ones(3, dtype=torch.int64), None, 1.0, 0.5, 2),
        (x, alpha, None, torch.ones(2, dtype=torch.int32), 1.0, 0.5, 2),
        (x, alpha, None, None, 0.0, 0.5, 2),
        (x, alpha, None, None, 1.0, 0.5, -1),
    ):
        with pytest.raises(RuntimeError):
            forward(*arguments)
    out, counts, _, token, weights, facts = forward(x, alpha, None, None, 1.0, 0.5, 4)
    for plan in ((counts[:1], token, weights, facts), (counts, token[:, 1:], weights, facts)):
        with pytest.raises(RuntimeError):
            backward(out, x, alpha, None, *plan, 1.0, False, True, True)


class TestModule:
    def test_trains_to_the_number_of_tokens(self) -> None:
        torch.manual_seed(0)
        module = nn.CIF(6)
        x, lengths = torch.randn(3, 20, 6), torch.tensor([20, 12, 16])
        targets = torch.tensor([7, 3, 5])
        optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
        for _ in range(60):
            tokens, alpha = module(x, lengths, targets)
            loss = (alpha.sum(1) - targets).abs().mean() + 0.01 * tokens.features.square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found, _ = module(x, lengths)
        assert (found.lengths - targets).abs().max() <= 1

    def test_padding_does_not_matter(self) -> None:
        module = nn.CIF(6, kernel_size=5, beta=0.6)
        x = torch.randn(2, 9, 6)
        x[1, 5:] = math.nan
        found, alpha = module(x, torch.tensor([9, 5]))
        other, other_alpha = module(x[1:, :5])
        torch.testing.assert_close(found.features[1:, : other.features.shape[1]], other.features)
        torch.testing.assert_close(alpha[1:, :5], other_alpha)
        assert alpha[1, 5:].eq(0).all()

    def test_options(self) -> None:
        assert "beta=2.0" in repr(nn.CIF(4, beta=2.0))
        for options in ({"dim": 0}, {"dim": 4, "kernel_size": 2}):
            with pytest.raises(ValueError, match="must be"):
                nn.CIF(**options)
