"""``Merge``: initial values, constraints, and the op that it calls."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

import mmkernels
from mmkernels.nn import Merge

constraints = pytest.mark.parametrize("constraint", ["none", "clamp", "sigmoid"])


def matrices(seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(4, 3), (3, 4), (5,)]
    target, source = ([torch.randn(shape, generator=generator) for shape in shapes] for _ in range(2))
    return target, source


@constraints
def test_starts_from_the_given_weight(constraint: str) -> None:
    module = Merge(3, init=0.2, constraint=constraint)
    torch.testing.assert_close(module.lam, torch.full((3,), 0.2))
    assert Merge(2).lam.tolist() == [pytest.approx(0.05)] * 2
    module.weights.data.zero_()
    module.reset_parameters()
    torch.testing.assert_close(module.lam, torch.full((3,), 0.2))
    assert list(module.state_dict()) == ["weights"]


@constraints
def test_merges_by_its_weights(constraint: str) -> None:
    module = Merge(2, init=0.3, constraint=constraint)
    torch.nn.init.uniform_(module.weights, 0.1, 0.9)
    target, source = matrices()
    found = module(target, source, [1, 0, 1], dtype=torch.bfloat16)
    expected = mmkernels.merge(target, source, module.lam, groups=[1, 0, 1], dtype=torch.bfloat16)
    assert all(map(torch.equal, found, expected))
    assert found[0].dtype == torch.bfloat16


def test_groups_may_be_left_out() -> None:
    target, source = matrices()
    assert all(map(torch.equal, Merge(1)(target, source), mmkernels.merge(target, source, 0.05)))
    three = Merge(3)
    torch.nn.init.uniform_(three.weights)
    expected = mmkernels.merge(target, source, three.weights)
    assert all(map(torch.equal, three(target, source), expected))
    with pytest.raises(ValueError, match="lam must have one entry, or one for each of the 3 pairs, got 2"):
        Merge(2)(target, source)


def test_a_clamped_weight_acts_as_the_nearer_end() -> None:
    module = Merge(3, constraint="clamp")
    module.weights.data = torch.tensor([-0.5, 0.25, 1.5])
    target, source = matrices()
    out = module(target, source)
    assert torch.equal(out[0], target[0])
    assert torch.equal(out[2], source[2])
    assert module.lam.tolist() == [0, 0.25, 1]


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_outside_only_gradients_that_lead_back_pass(sign: float) -> None:
    module = Merge(5, constraint="clamp")
    module.weights.data = torch.tensor([-0.5, 0.0, 0.5, 1.0, 1.5])
    (sign * module.lam).sum().backward()
    assert module.weights.grad is not None
    expected = [0, 1, 1, 1, 1] if sign > 0 else [-1, -1, -1, -1, 0]  # descent goes against it
    assert module.weights.grad.tolist() == expected


@constraints
def test_a_weight_comes_back_from_an_end(constraint: str) -> None:
    """The loss first pulls the weight far beyond the source, then to the middle."""
    target, source = [torch.zeros(8)], [torch.ones(8)]
    module = Merge(1, init=0.5, constraint=constraint)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)

    def train(goal: float, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            (module(target, source)[0] - goal).square().mean().backward()
            optimizer.step()

    train(goal=3.0, steps=20)
    if constraint == "none":
        assert module.lam.item() > 2.9
    else:
        assert 0.95 < module.lam.item() <= 1
    train(goal=0.5, steps=200 if constraint == "sigmoid" else 10)
    assert module.lam.item() == pytest.approx(0.5, abs=0.02)


def test_a_weight_at_an_end_does_not_drift_on() -> None:
    """As it would with a gradient that passes everywhere; the way back would be as long."""
    module = Merge(1, init=0.9, constraint="clamp")
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    for _ in range(50):
        optimizer.zero_grad()
        (-module.lam).sum().backward()
        optimizer.step()
    assert module.weights.item() == pytest.approx(1.9)  # one step beyond the end


@constraints
def test_compiles_and_copies(constraint: str) -> None:
    torch._dynamo.reset()
    module = Merge(2, init=0.3, constraint=constraint)
    target, source = matrices()
    source[0].requires_grad_()
    twin = copy.deepcopy(module)
    expected = twin(target, source, [1, 0, 1])
    found = torch.compile(module, backend="aot_eager", fullgraph=True)(target, source, [1, 0, 1])
    torch.testing.assert_close(found, expected)
    for module_, results in ((module, found), (twin, expected)):
        sum(result.square().sum() for result in results).backward()
        assert module_.weights.grad is not None
    torch.testing.assert_close(module.weights.grad, twin.weights.grad)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_groups": 0}, "num_groups must be at least 1, got 0"),
        ({"constraint": "relu"}, "constraint must be one of none, clamp, sigmoid, got 'relu'"),
        ({"init": math.nan}, "init must be finite with constraint='none', got nan"),
        ({"init": 1.5, "constraint": "clamp"}, r"init must be in \[0, 1\] with constraint='clamp', got 1.5"),
        ({"init": 0.0, "constraint": "sigmoid"}, "init must be between 0 and 1 with constraint='sigmoid'"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Merge(**{"num_groups": 2, **options})  # type: ignore[arg-type]
