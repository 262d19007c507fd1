"""Featurizers built like those of s3prl (its interface, typed anew here)."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mmkernels


def stacked_sum(layers: list[Tensor], weights: Tensor, normalize: bool) -> Tensor:
    stacked = torch.stack(layers, dim=0)
    if normalize:
        stacked = nn.functional.layer_norm(stacked, stacked.shape[-1:])
    return (weights.reshape(-1, *[1] * layers[0].dim()) * stacked).sum(dim=0)


class Featurizer(nn.Module):
    """The interface with lengths (``s3prl.nn``)."""

    def __init__(self, num_layers: int, selections: list[int] | None = None, normalize: bool = False) -> None:
        super().__init__()
        self.normalize = normalize
        if num_layers > 1:
            self.layer_selections = selections or list(range(num_layers))
            self.weights = nn.Parameter(torch.zeros(len(self.layer_selections)))

    def _weighted_sum(self, all_hs: list[Tensor], all_lens: list[Tensor]) -> tuple[Tensor, Tensor]:
        assert len(all_hs) == len(all_lens) == len(self.weights), "layers and lengths"
        return stacked_sum(all_hs, self.weights.softmax(dim=-1), self.normalize), all_lens[0]

    def forward(self, all_hs: list[Tensor], all_lens: list[Tensor]) -> tuple[Tensor, Tensor]:
        if len(all_hs) == 1:
            return all_hs[0], all_lens[0]
        chosen = self.layer_selections
        return self._weighted_sum([all_hs[i] for i in chosen], [all_lens[i] for i in chosen])


class PaddedFeaturizer(nn.Module):
    """The interface of upstreams that give padded lists (``s3prl.upstream.interfaces``)."""

    def __init__(self, num_layers: int, normalize: bool = False) -> None:
        super().__init__()
        self.layer_num, self.normalize = num_layers, normalize
        self.weights = nn.Parameter(torch.zeros(num_layers))

    def _weighted_sum(self, feature: list[Tensor]) -> Tensor:
        assert self.layer_num == len(feature), "layer drop"
        return stacked_sum(feature, self.weights.softmax(dim=-1), self.normalize)

    def forward(self, features: dict[str, list[Tensor]]) -> Tensor:
        return self._weighted_sum(features["hidden_states"])


PaddedFeaturizer.__name__ = PaddedFeaturizer.__qualname__ = "Featurizer"


class Sigmoid(Featurizer):
    def _weighted_sum(self, all_hs: list[Tensor], all_lens: list[Tensor]) -> tuple[Tensor, Tensor]:
        return stacked_sum(all_hs, self.weights.sigmoid(), self.normalize), all_lens[0]


class OtherEpsilon(Featurizer):
    def _weighted_sum(self, all_hs: list[Tensor], all_lens: list[Tensor]) -> tuple[Tensor, Tensor]:
        layers = (
            [nn.functional.layer_norm(h, h.shape[-1:], eps=0.1) for h in all_hs] if self.normalize else all_hs
        )
        return stacked_sum(layers, self.weights.softmax(dim=-1), False), all_lens[0]


class ThreeArguments(Featurizer):
    def _weighted_sum(self, all_hs: Any, all_lens: Any, mask: Any) -> Any:  # type: ignore[override]
        return all_hs[0], all_lens[0]


def make_layers(count: int, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    layers = [torch.randn(2, 6, 16, generator=generator).to(dtype).requires_grad_() for _ in range(count)]
    return layers, [torch.tensor([6, 4])] * count


def pair(make: Any) -> tuple[nn.Module, nn.Module]:
    modules = []
    for _ in range(2):
        torch.manual_seed(0)
        module = make()
        nn.init.normal_(module.weights)
        modules.append(module)
    return modules[0], modules[1]


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("selections", [None, [1, 3]])
def test_agrees_with_lengths(selections: list[int] | None, normalize: bool) -> None:
    module, twin = pair(lambda: Featurizer(5, selections, normalize))
    report = mmkernels.accelerate(module)
    assert [(r.name, r.class_name) for r in report.replaced] == [("", "Featurizer")]
    (layers, lens), (same, _) = make_layers(5), make_layers(5)
    got, got_lens = module(layers, lens)
    expected, expected_lens = twin(same, lens)
    assert got_lens is expected_lens
    torch.testing.assert_close(got, expected)
    got.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(module.weights.grad, twin.weights.grad)
    for layer, other in zip(layers, same, strict=True):
        torch.testing.assert_close(layer.grad, other.grad)
    module.normalize = not normalize
    twin.normalize = not normalize
    torch.testing.assert_close(module(layers, lens)[0], twin(layers, lens)[0])


@pytest.mark.parametrize("normalize", [False, True])
def test_agrees_with_padded_features(normalize: bool) -> None:
    module, twin = pair(lambda: PaddedFeaturizer(4, normalize))
    assert len(mmkernels.accelerate(nn.Sequential(module)).replaced) == 1
    layers, _ = make_layers(4, torch.bfloat16)
    got, expected = module({"hidden_states": layers}), twin({"hidden_states": layers})
    torch.testing.assert_close(got.float(), expected.float(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gradients_are_exact_beside_layers_of_any_dtype_made_for_inference(dtype: torch.dtype) -> None:
    """A frozen upstream in half precision and inference mode: the product promotes to float32."""
    module, twin = pair(lambda: PaddedFeaturizer(4))
    mmkernels.accelerate(nn.Sequential(module))
    with torch.inference_mode():
        layers = [layer.detach().clone() for layer in make_layers(4, dtype)[0]]
    got, expected = module({"hidden_states": layers}), twin({"hidden_states": layers})
    torch.testing.assert_close(got, expected)
    grad = torch.randn(got.shape, generator=torch.Generator().manual_seed(1))
    got.backward(grad)
    expected.backward(grad)
    torch.testing.assert_close(module.weights.grad, twin.weights.grad, rtol=1e-5, atol=1e-5)


def test_own_assertions_stay() -> None:
    module = PaddedFeaturizer(4)
    mmkernels.accelerate(module)
    with pytest.raises(AssertionError, match="layer drop"):
        module({"hidden_states": make_layers(3)[0]})


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Sigmoid(3), "_weighted_sum(normalize=False) is another computation"),
        (lambda: OtherEpsilon(3), "_weighted_sum(normalize=True) is another computation"),
        (lambda: ThreeArguments(3), "_weighted_sum takes 3 arguments"),
        (lambda: Featurizer(1), "a single layer is passed through"),
        (lambda: Featurizer(65), "at most 64"),
        (lambda: Featurizer(3, normalize=None), "no attribute normalize"),
    ],
    ids=["sigmoid", "epsilon", "arguments", "single", "many", "normalize"],
)
def test_others_are_left_alone(make: Any, reason: str) -> None:
    module = make()
    cls = type(module)
    report = mmkernels.accelerate(module)
    assert report.replaced == []
    assert reason in report.skipped[0].reason
    assert type(module) is cls


def test_proof_leaves_no_trace() -> None:
    module = Featurizer(3)
    before = dict(vars(module))
    state = torch.random.get_rng_state()
    report = mmkernels.accelerate(module)
    assert vars(module) == before
    assert module._parameters["weights"] is before["_parameters"]["weights"]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(module.weights, torch.zeros(3))
    report.revert()
    assert type(module) is Featurizer


def test_copies_and_pickles_stay_accelerated() -> None:
    module = Featurizer(3)
    mmkernels.accelerate(module)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(twin) is type(module)
        assert mmkernels.accelerate(twin).skipped[0].reason == "already accelerated"
