"""``accelerate`` on the two Featurizers of s3prl, and on forks of them."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peers.featurizers import INSTALLED, Featurizer, PaddedFeaturizer
from torch import Tensor, nn

import mmkernels

CLASSES = {"written": Featurizer} | {k: v for k, v in INSTALLED.items() if k == "s3prl.nn"}


def make(
    num_layers: int, selections: list[int] | None = None, normalize: Any = False, cls: Any = Featurizer
) -> Any:
    upstream = SimpleNamespace(
        num_layers=num_layers, hidden_sizes=[16] * num_layers, downsample_rates=[320] * num_layers
    )
    return cls(upstream, selections, normalize)


class Sigmoid(Featurizer):
    def _weighted_sum(self, all_hs: Any, all_lens: Any) -> tuple[Tensor, Tensor]:
        stacked_hs = torch.stack(all_hs, dim=0)
        return (self.weights.sigmoid().view(-1, 1, 1, 1) * stacked_hs).sum(dim=0), all_lens[0]


class DropsWeights(Featurizer):
    """Differs from s3prl in training alone."""

    def _weighted_sum(self, all_hs: Any, all_lens: Any) -> tuple[Tensor, Tensor]:
        stacked_hs = torch.stack(all_hs, dim=0)
        if self.normalize:
            stacked_hs = F.layer_norm(stacked_hs, (stacked_hs.shape[-1],))
        _, *origin_shape = stacked_hs.shape
        stacked_hs = stacked_hs.view(len(self.layer_selections), -1)
        norm_weights = F.dropout(F.softmax(self.weights, dim=-1), 0.5, self.training)
        weighted_hs = (norm_weights.unsqueeze(-1) * stacked_hs).sum(dim=0)
        weighted_hs = weighted_hs.view(*origin_shape)
        return weighted_hs, all_lens[0]


class Temperature(Featurizer):
    """Differs once its temperature is set."""

    temperature = 1.0

    def _weighted_sum(self, all_hs: Any, all_lens: Any) -> tuple[Tensor, Tensor]:
        stacked_hs = torch.stack(all_hs, dim=0)
        if self.normalize:
            stacked_hs = F.layer_norm(stacked_hs, (stacked_hs.shape[-1],))
        _, *origin_shape = stacked_hs.shape
        stacked_hs = stacked_hs.view(len(self.layer_selections), -1)
        norm_weights = F.softmax(self.weights / self.temperature, dim=-1)
        weighted_hs = (norm_weights.unsqueeze(-1) * stacked_hs).sum(dim=0)
        weighted_hs = weighted_hs.view(*origin_shape)
        return weighted_hs, all_lens[0]


class MasksLayers(Featurizer):
    """Differs once a mask is set."""

    mask: Tensor | None = None

    def _weighted_sum(self, all_hs: Any, all_lens: Any) -> tuple[Tensor, Tensor]:
        stacked_hs = torch.stack(all_hs, dim=0)
        if self.normalize:
            stacked_hs = F.layer_norm(stacked_hs, (stacked_hs.shape[-1],))
        if self.mask is not None:
            stacked_hs = stacked_hs * self.mask
        _, *origin_shape = stacked_hs.shape
        stacked_hs = stacked_hs.view(len(self.layer_selections), -1)
        norm_weights = F.softmax(self.weights, dim=-1)
        weighted_hs = (norm_weights.unsqueeze(-1) * stacked_hs).sum(dim=0)
        weighted_hs = weighted_hs.view(*origin_shape)
        return weighted_hs, all_lens[0]


class StoresWeights(Featurizer):
    """The same sum, and an attribute for the caller."""

    def _weighted_sum(self, all_hs: Any, all_lens: Any) -> tuple[Tensor, Tensor]:
        stacked_hs = torch.stack(all_hs, dim=0)
        if self.normalize:
            stacked_hs = F.layer_norm(stacked_hs, (stacked_hs.shape[-1],))
        _, *origin_shape = stacked_hs.shape
        stacked_hs = stacked_hs.view(len(self.layer_selections), -1)
        norm_weights = F.softmax(self.weights, dim=-1)
        weighted_hs = (norm_weights.unsqueeze(-1) * stacked_hs).sum(dim=0)
        weighted_hs = weighted_hs.view(*origin_shape)
        self.last_weights = norm_weights.detach()
        return weighted_hs, all_lens[0]


class OtherEpsilon(Featurizer):
    def _weighted_sum(self, all_hs: Any, all_lens: Any) -> tuple[Tensor, Tensor]:
        stacked_hs = torch.stack(all_hs, dim=0)
        if self.normalize:
            stacked_hs = F.layer_norm(stacked_hs, (stacked_hs.shape[-1],), eps=0.1)
        _, *origin_shape = stacked_hs.shape
        stacked_hs = stacked_hs.view(len(self.layer_selections), -1)
        norm_weights = F.softmax(self.weights, dim=-1)
        weighted_hs = (norm_weights.unsqueeze(-1) * stacked_hs).sum(dim=0)
        weighted_hs = weighted_hs.view(*origin_shape)
        return weighted_hs, all_lens[0]


class CallsParent(Featurizer):
    def _weighted_sum(self, all_hs: Any, all_lens: Any) -> tuple[Tensor, Tensor]:
        mixed, lens = super()._weighted_sum(all_hs, all_lens)
        return F.dropout(mixed, 0.5, self.training), lens


class AddsAround(Featurizer):
    """The sum of s3prl between statements of its own, a third argument and a forward of its own."""

    def _weighted_sum(self, all_hs: Any, all_lens: Any, mask: Any = None) -> tuple[Tensor, Tensor]:
        self.calls = getattr(self, "calls", 0) + 1
        stacked_hs = torch.stack(all_hs, dim=0)
        if self.normalize:
            stacked_hs = F.layer_norm(stacked_hs, (stacked_hs.shape[-1],))
        _, *origin_shape = stacked_hs.shape
        stacked_hs = stacked_hs.view(len(self.layer_selections), -1)
        norm_weights = F.softmax(self.weights, dim=-1)
        weighted_hs = (norm_weights.unsqueeze(-1) * stacked_hs).sum(dim=0)
        weighted_hs = weighted_hs.view(*origin_shape)
        weighted_hs = F.dropout(weighted_hs, 0.5, self.training)
        return weighted_hs if mask is None else weighted_hs * mask, all_lens[0]


class OtherForward(Featurizer):
    def forward(self, all_hs: Any, all_lens: Any) -> tuple[Tensor, Tensor]:
        return super().forward([F.dropout(h, 0.5, self.training) for h in all_hs], all_lens)


def make_layers(count: int, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    layers = [torch.randn(2, 6, 16, generator=generator).to(dtype).requires_grad_() for _ in range(count)]
    return layers, [torch.tensor([6, 4])] * count


def pair(make_one: Any) -> tuple[Any, Any]:
    modules = []
    for _ in range(2):
        torch.manual_seed(0)
        module = make_one()
        nn.init.normal_(module.weights)
        modules.append(module)
    return modules[0], modules[1]


def assert_agree(module: nn.Module, twin: nn.Module, count: int = 3) -> None:
    (layers, lens), (same, _) = make_layers(count), make_layers(count)
    outcomes = []
    for each, hidden in ((module, layers), (twin, same)):
        each.zero_grad()
        torch.manual_seed(1)
        outcomes.append(each(hidden, lens))
        outcomes[-1][0].square().sum().backward()
    (got, got_lens), (expected, expected_lens) = outcomes
    assert got_lens is expected_lens
    torch.testing.assert_close(got, expected)
    for parameter, other in zip(module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad)
    for layer, other in zip(layers, same, strict=True):
        torch.testing.assert_close(layer.grad, other.grad)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of layers of each call of the op by the replacement."""
    from mmkernels.nn import layer_mix

    recorded: list[int] = []
    op = layer_mix.layer_mix

    def recorder(layers: Any, *args: Any, **kwargs: Any) -> Tensor:
        recorded.append(len(layers))
        return op(layers, *args, **kwargs)

    monkeypatch.setattr(layer_mix, "layer_mix", recorder)
    return recorded


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("selections", [None, [1, 3]])
def test_agrees_with_lengths(
    selections: list[int] | None, normalize: bool, name: str, calls: list[int]
) -> None:
    module, twin = pair(lambda: make(5, selections, normalize, CLASSES[name]))
    report = mmkernels.accelerate(module)
    assert [(r.name, r.class_name) for r in report.replaced] == [("", "Featurizer")]
    assert_agree(module, twin, 5)
    module.normalize = twin.normalize = not normalize
    assert_agree(module, twin, 5)
    assert calls == [2 if selections else 5] * 2


@pytest.mark.parametrize("normalize", [False, True, None, 1])
def test_agrees_with_padded_features(normalize: Any, calls: list[int]) -> None:
    module, twin = pair(lambda: PaddedFeaturizer(4, normalize))
    assert len(mmkernels.accelerate(nn.Sequential(module)).replaced) == 1
    layers, _ = make_layers(4, torch.bfloat16)
    got, expected = module({"hidden_states": layers}), twin({"hidden_states": layers})
    torch.testing.assert_close(got.float(), expected.float(), rtol=2e-2, atol=2e-2)
    assert calls == [4]


@pytest.mark.skipif("s3prl.upstream" not in INSTALLED, reason="s3prl is not installed")
def test_agrees_with_the_installed_padded_featurizer(calls: list[int]) -> None:
    class Upstream(nn.Module):
        def forward(self, wavs: list[Tensor]) -> dict[str, Any]:
            frames = len(wavs[0]) // 320
            return {"hidden_states": [torch.ones(len(wavs), frames, 16) * i for i in range(4)]}

    def make_one() -> Any:
        return INSTALLED["s3prl.upstream"](Upstream(), upstream_device="cpu", normalize=False)

    module, twin = pair(make_one)
    assert len(mmkernels.accelerate(module).replaced) == 1
    wavs = [torch.zeros(1600), torch.zeros(640)]
    features = Upstream()(wavs)
    for got, expected in zip(module(wavs, features), twin(wavs, features), strict=True):
        torch.testing.assert_close(got, expected)
    assert calls == [4]


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


def parametrised() -> nn.Module:
    module = make(3)
    nn.utils.parametrize.register_parametrization(module, "weights", nn.Tanh())
    return module


def wrapped() -> nn.Module:
    module = make(3)
    module._weighted_sum = lambda all_hs, all_lens: (all_hs[0], all_lens[0])
    return module


def column_of_weights() -> nn.Module:
    module = make(3)
    module.weights = nn.Parameter(torch.zeros(3, 1))
    return module


@pytest.mark.parametrize(
    ("make_one", "reason"),
    [
        (lambda: make(3, cls=Sigmoid), "the expected statements occur 0 times in its _weighted_sum"),
        (lambda: make(3, cls=DropsWeights).eval(), "the expected statements occur 0 times"),
        (lambda: make(3, cls=Temperature), "the expected statements occur 0 times"),
        (lambda: make(3, cls=MasksLayers), "the expected statements occur 0 times"),
        (lambda: make(3, cls=OtherEpsilon), "the expected statements occur 0 times"),
        (lambda: make(3, cls=CallsParent), "the expected statements occur 0 times"),
        (lambda: make(3, cls=StoresWeights), "uses 'norm_weights' outside the expected statements"),
        (lambda: make(1), "a single layer is passed through"),
        (lambda: make(65), "at most 64"),
        (parametrised, "it is parametrised"),
        (wrapped, "_weighted_sum is overridden on the instance"),
        (column_of_weights, "layer weights of shape (3, 1)"),
    ],
)
def test_others_are_left_alone(make_one: Any, reason: str) -> None:
    module = make_one()
    cls = type(module)
    report = mmkernels.accelerate(module)
    assert report.replaced == []
    assert reason in report.skipped[0].reason
    assert type(module) is cls


@pytest.mark.parametrize("cls", [AddsAround, OtherForward])
def test_the_statements_of_a_fork_stay(cls: Any, calls: list[int]) -> None:
    module, twin = pair(lambda: make(3, cls=cls).eval())
    assert len(mmkernels.accelerate(module).replaced) == 1
    assert_agree(module, twin)
    assert_agree(module.train(), twin.train())
    assert vars(module).get("calls") == vars(twin).get("calls")
    assert calls == [3, 3]


def test_state_that_changes_later(calls: list[int]) -> None:
    """Each change is made to an accelerated module and to its twin; the last ones the op does not serve."""
    module, twin = pair(lambda: make(3, normalize=True))
    mmkernels.accelerate(module)

    def both(change: Any) -> None:
        change(module)
        change(twin)
        assert_agree(module, twin)

    both(lambda m: m.eval())
    both(lambda m: setattr(m, "normalize", False))
    both(lambda m: m.double())
    both(lambda m: m.half().float())
    both(lambda m: setattr(m, "weights", nn.Parameter(torch.randn(3, generator=torch.manual_seed(2)))))
    served = len(calls)
    both(lambda m: nn.utils.parametrize.register_parametrization(m, "weights", nn.Tanh()))
    both(lambda m: nn.utils.parametrize.remove_parametrizations(m, "weights"))
    assert served >= 4


def test_a_selection_that_changes_later() -> None:
    module, twin = pair(lambda: make(4, [0, 1, 2]))
    mmkernels.accelerate(module)
    for selection in ([3, 1, 0], [1, 2]):
        module.layer_selections = twin.layer_selections = selection
        outcomes = []
        for each in (module, twin):
            try:
                outcomes.append(each(*make_layers(4))[0])
            except RuntimeError as error:
                outcomes.append(str(error))
        if isinstance(outcomes[1], Tensor):
            torch.testing.assert_close(*outcomes)
        else:
            assert outcomes[0] == outcomes[1]


def test_a_class_that_was_patched_since_is_read_again() -> None:
    class Patched(Featurizer):
        pass

    Patched.__name__ = "Featurizer"
    first = make(3, cls=Patched)
    assert len(mmkernels.accelerate(first).replaced) == 1
    Patched._weighted_sum = AddsAround._weighted_sum  # type: ignore[method-assign]
    module, twin = pair(lambda: make(3, cls=Patched).eval())
    assert len(mmkernels.accelerate(module).replaced) == 1
    assert_agree(module, twin)
    assert module.calls == 1
    Patched._weighted_sum = Sigmoid._weighted_sum  # type: ignore[method-assign]
    assert mmkernels.accelerate(make(3, cls=Patched)).replaced == []


def test_one_module_in_two_places() -> None:
    module, twin = pair(lambda: make(3))
    model = nn.ModuleDict({"a": module, "b": module})
    report = mmkernels.accelerate(model)
    assert [r.name for r in report.replaced] == ["a"]
    assert_agree(model["b"], twin)
    report.revert()
    assert type(module) is Featurizer


def test_compiled_before_and_after() -> None:
    layers, lens = make_layers(3)
    module, twin = pair(lambda: make(3))
    compiled = torch.compile(module, backend="aot_eager")
    torch.testing.assert_close(compiled(layers, lens)[0], twin(layers, lens)[0])
    assert len(mmkernels.accelerate(compiled).replaced) == 1
    torch.testing.assert_close(compiled(layers, lens)[0], twin(layers, lens)[0])
    torch.testing.assert_close(
        torch.compile(module, backend="aot_eager", fullgraph=True)(layers, lens)[0], twin(layers, lens)[0]
    )


def test_accelerating_leaves_no_trace() -> None:
    module = make(3)
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
    module = make(3)
    mmkernels.accelerate(module)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(twin) is type(module)
        assert mmkernels.accelerate(twin).skipped[0].reason == "already accelerated"
