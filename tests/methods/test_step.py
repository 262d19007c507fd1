"""The cost of a training step: its memory, and that a twin that computes something else is noticed."""

from __future__ import annotations

import pytest
import torch
from small_experiment import build, inputs_of, small_experiment, words_of_two_lengths
from torch import nn
from torch.nn import functional as F
from transformers.modeling_outputs import SequenceClassifierOutput

from mmtransfer import registry
from mmtransfer.compare import step as measure
from mmtransfer.compare.experiment import Experiment
from mmtransfer.compare.session import _perturb
from mmtransfer.compare.step import Step, compare_steps


@pytest.fixture(autouse=True)
def _few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test looks at a time."""
    monkeypatch.setattr(measure, "ROUNDS", (2, 2))


@pytest.fixture(scope="module")
def experiment() -> Experiment:
    return small_experiment(words_of_two_lengths())


class Allocating(nn.Module):
    """A linear layer that keeps floats for the backward pass."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements = elements
        self.scale = nn.Parameter(torch.ones(1))
        self.linear = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> SequenceClassifierOutput:
        big = x.new_ones(self.elements)
        logits = self.linear(x) * (big * self.scale).square().mean()
        return SequenceClassifierOutput(loss=F.cross_entropy(logits, labels), logits=logits)


def test_peak_memory_of_a_step_is_measured() -> None:
    batch = {"x": torch.randn(2, 8), "labels": torch.tensor([0, 1])}

    def peak(elements: int) -> float:
        return compare_steps(Step(Allocating(elements), batch)).mmkernels.memory_mib

    # Each of 32 MiB: the ones and the product, which square saves; in its backward pass also the incoming
    # gradient, the product's first power, the double of that, and their product.
    assert peak(2**23) == pytest.approx(6 * 32, abs=0.1)
    assert peak(1) < 0.1


class Scaled(nn.Module):
    """A model whose logits are off by a factor."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, labels: torch.Tensor, **inputs: torch.Tensor) -> SequenceClassifierOutput:
        logits = 1.1 * self.model(**inputs).logits
        return SequenceClassifierOutput(loss=F.cross_entropy(logits, labels), logits=logits)

    def state_dict(self, *args, **kwargs):
        return self.model.state_dict(*args, **kwargs)

    def load_state_dict(self, *args, **kwargs):
        return self.model.load_state_dict(*args, **kwargs)


TWINS = ["aat-ms", "aat-m", "aat-s", "houlsby", "hff-adapters", "hff-b+hff-adapters", "hff-ub+aat-ms"]
FUSIONS = ["weighted-sum", "weighted-sum-norm", "lff", "hff-b", "hff-ub"]


@pytest.mark.parametrize("method", [*FUSIONS, *TWINS])
def test_the_published_twin_agrees_and_a_wrong_one_is_noticed(experiment, method: str) -> None:
    model = build(experiment, method)
    _perturb(model)
    twin = registry.find(method).baseline(model)
    assert twin is not None
    examples = inputs_of(experiment, model)["train"]
    batch = examples.collate([examples[index] for index in range(6)])
    result = compare_steps(Step(model, batch), Step(twin, batch))
    assert result.agrees
    assert 0 <= result.difference < 1e-3
    assert not compare_steps(Step(model, batch), Step(Scaled(twin), batch)).agrees


@pytest.mark.parametrize("method", [*FUSIONS, *TWINS])
def test_the_twin_computes_nothing_with_kernels_and_shares_no_trained_parameter(
    experiment, method: str
) -> None:
    model = build(experiment, method)
    twin = registry.find(method).baseline(model)
    assert all(getattr(module, "backend", "reference") == "reference" for module in twin.modules())
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert not trained & {id(p) for p in twin.parameters()}
    assert sorted(model.state_dict()) == sorted(twin.state_dict())


def test_the_twin_of_a_rewritten_model_has_adapters_next_to_the_products(experiment) -> None:
    model = build(experiment, "aat-ms", rewrite=True)
    _perturb(model)
    twin = model.method.baseline(model)
    examples = inputs_of(experiment, model)["train"]
    batch = examples.collate([examples[index] for index in range(6)])
    assert compare_steps(Step(model, batch), Step(twin, batch)).agrees
    names = {
        type(module.__dict__["forward"]).__name__ for module in twin.modules() if "forward" in vars(module)
    }
    assert names == {"Serial", "ParallelEntry", "ParallelExit"}


@pytest.mark.parametrize("method", ["head", "full", "partial", "bitfit", "prompt", "lora"])
def test_methods_without_kernels_have_no_twin(experiment, method: str) -> None:
    assert registry.find(method).baseline(build(experiment, method)) is None


class Fixed:
    """A step whose logits and gradients are given."""

    def __init__(self, **gradients: float) -> None:
        self._gradients = {name: torch.tensor([value]) for name, value in gradients.items()}

    def backward(self) -> torch.Tensor:
        return torch.tensor([1.0])

    def gradients(self) -> dict[str, torch.Tensor]:
        return self._gradients


def test_a_gradient_that_is_rounding_alone_does_not_differ() -> None:
    """As that of a factor in front of a LayerNorm; a wrong one of the size of the others does."""
    ours = Fixed(weight=1e-2, factor=2.4e-8)
    assert measure._difference(ours, Fixed(weight=1e-2, factor=2.5e-8)) < measure._TOLERANCE
    assert measure._difference(ours, Fixed(weight=1e-2, factor=2e-6)) > measure._TOLERANCE
    assert measure._difference(ours, Fixed(weight=1.1e-2, factor=2.4e-8)) > measure._TOLERANCE
