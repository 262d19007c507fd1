"""``accelerate`` on the adapters of AdapterHub's library (its interface, see ``tiny_adapterhub.py``)."""

from __future__ import annotations

import copy
import functools
import pickle
from typing import Any

import pytest
import torch
from tiny_adapterhub import (
    BOTTLENECK,
    WIDTH,
    Activation_Function_Class,
    Adapter,
    BottleneckLayer,
    BottleneckState,
    Fuse,
    Parallel,
    ParallelAdapter,
    Stack,
)
from torch import Tensor, nn

import mmkernels
from mmkernels.patch import bottleneck

PFEIFFER: dict[str, Any] = {"original_ln_before": True}
HOULSBY: dict[str, Any] = {"non_linearity": "swish"}


class OverridesForward(Adapter):
    def forward(self, x: Tensor, residual_input: Tensor, output_gating: bool = False) -> tuple[Tensor, ...]:
        return super().forward(x, residual_input * 2, output_gating)


class AnotherComputation(Adapter):
    def forward(self, x: Tensor, residual_input: Tensor, output_gating: bool = False) -> tuple[Tensor, ...]:
        output, down, up = super().forward(x, residual_input)
        return output + down.mean(), down, up


AnotherComputation.__name__ = AnotherComputation.__qualname__ = "Adapter"


class DropsHidden(Adapter):
    """A fork that differs in training alone."""

    def forward(self, x: Tensor, residual_input: Tensor, output_gating: bool = False) -> tuple[Tensor, ...]:
        down = self.adapter_down(x)
        down = nn.functional.dropout(down, 0.5, self.training)
        up = self.adapter_up(down)
        up = up * self.scaling
        output = self.dropout(up)
        if self.use_gating:
            gate = torch.sigmoid(self.gate(x))
            gate = torch.mean(gate, dim=1).unsqueeze(-1)
            output = output * gate
        if self.add_layer_norm_after:
            output = self.adapter_norm_after(output)
        if self.use_gating and output_gating:
            return output, down, up, gate
        return output, down, up


class Tempered(Adapter):
    """A fork that differs once its temperature is set."""

    temperature = 1.0

    def forward(self, x: Tensor, residual_input: Tensor, output_gating: bool = False) -> tuple[Tensor, ...]:
        output, down, up = super().forward(x / self.temperature, residual_input)
        return output, down, up


class TakesSum(BottleneckLayer):
    """A fork whose stack reads the up-projection."""

    def compose_stack(self, setup: Stack, state: BottleneckState) -> BottleneckState:
        state = super().compose_stack(setup, state)
        self.norm = state.bottleneck_up.norm()
        return state


class DoubledActivation(Activation_Function_Class):
    def forward(self, x: Tensor) -> Tensor:
        return self.f(2 * x)


for fork, name in (
    (DropsHidden, "Adapter"),
    (Tempered, "Adapter"),
    (TakesSum, "BottleneckLayer"),
    (DoubledActivation, "Activation_Function_Class"),
):
    fork.__name__ = fork.__qualname__ = name


class InheritedAdapter(Adapter):
    """A subclass with the library's forward."""


class ReadsUp(BottleneckLayer):
    def compose_single(self, adapter_setup: str, state: BottleneckState, lvl: int = 0) -> BottleneckState:
        layer = self.adapters[adapter_setup]
        gating = False
        result = layer(state.hidden_states, residual_input=state.adapter_residual, output_gating=gating)
        hidden, up = result[0], result[2]
        if gating:
            self._store_gating_score(adapter_setup, result[-1])
        self.norm = up.norm()
        return state._replace(hidden_states=hidden, bottleneck_up=up, last=adapter_setup)


class OwnStack(BottleneckLayer):
    def compose_stack(self, setup: Stack, state: BottleneckState) -> BottleneckState:
        return super().compose_stack(setup, state)


class WidthOutput(BottleneckLayer):
    """As BERT's output layers: the model's own module inherits from the layer."""

    def __init__(self, **adapters: nn.Module) -> None:
        super().__init__(**adapters)
        self.dense = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor, block_input: Tensor, layer_norm: Any) -> Tensor:
        return self.bottleneck_layer_forward(self.dense(hidden), block_input, layer_norm)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Keyword arguments of each call of the op by the replacements, those that examine a class apart."""
    recorded: list[dict[str, Any]] = []
    op = bottleneck.adapter

    def recorder(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if x.shape[-1] == WIDTH:
            recorded.append(kwargs)
        return op(x, *args, **kwargs)

    monkeypatch.setattr(bottleneck, "adapter", recorder)
    return recorded


def make_layer(
    *adapters: nn.Module, cls: type[BottleneckLayer] = BottleneckLayer, seed: int = 0
) -> BottleneckLayer:
    layer = cls(**dict(zip("abc", adapters, strict=False)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return layer


def pair(*adapters: nn.Module, **kwargs: Any) -> tuple[BottleneckLayer, BottleneckLayer]:
    layer = make_layer(*adapters, **kwargs)
    twin = copy.deepcopy(layer)
    mmkernels.accelerate(layer)
    return layer, twin


def make_inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, nn.Module]:
    generator = torch.Generator().manual_seed(1)
    hidden, block_input = (
        torch.randn(2, 5, WIDTH, generator=generator).to(dtype).requires_grad_() for _ in range(2)
    )
    return hidden, block_input, nn.LayerNorm(WIDTH, dtype=dtype)


def assert_agree(
    layer: BottleneckLayer, twin: BottleneckLayer, dtype: torch.dtype = torch.float32, **tolerance: float
) -> None:
    """Same outputs, and the same gradients of inputs and parameters."""
    outcomes = []
    for module in (layer, twin):
        module.zero_grad()
        inputs = make_inputs(dtype)
        output = module(*inputs)
        output.backward(torch.linspace(-1, 1, output.numel()).view_as(output).to(output.dtype))
        outcomes.append(
            {"output": output, "hidden": inputs[0].grad, "input": inputs[1].grad}
            | {name: parameter.grad for name, parameter in module.named_parameters()}
        )
    got, expected = outcomes
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            got[name], value, **tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


def only_reason(layer: nn.Module) -> str:
    cls = type(layer)
    report = mmkernels.accelerate(layer)
    assert report.replaced == []
    assert type(layer) is cls
    assert len(report.skipped) == 1
    return report.skipped[0].reason


ADAPTERS = {
    "houlsby": lambda: Adapter(**HOULSBY),
    "pfeiffer": lambda: Adapter(**PFEIFFER),
    "residual after ln": lambda: Adapter(original_ln_before=True, residual_before_ln=False),
    "parallel": lambda: ParallelAdapter(scaling=4.0),
    "ln before": lambda: Adapter(ln_before=True, non_linearity="gelu", scaling=0.5),
    "gelu_new": lambda: Adapter(non_linearity="gelu_new"),
    "linear": lambda: Adapter(non_linearity="linear", adapter_residual_before_ln=False),
    "learned": lambda: Adapter(scaling="learned", **PFEIFFER),
    "channel": lambda: Adapter(scaling="channel", ln_before=True),
    "parallel learned": lambda: ParallelAdapter(scaling="learned", ln_before=True),
    "inherited": lambda: InheritedAdapter(**PFEIFFER),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_agrees(name: str, calls: list[dict[str, Any]]) -> None:
    layer, twin = pair(ADAPTERS[name]())
    assert_agree(layer, twin)
    assert len(calls) == 1
    layer.double()
    twin.double()
    assert_agree(layer, twin, torch.float64)
    assert len(calls) == 2


def test_residual_goes_into_the_op_where_up_is_not_needed(calls: list[dict[str, Any]]) -> None:
    layer, twin = pair(Adapter(scaling=2.0, **PFEIFFER), Adapter())
    layer(*make_inputs())
    assert [(c["scale"], c["residual"] is None) for c in calls] == [(2.0, False), (1.0, False)]
    calls.clear()
    layer.active_setup = twin.active_setup = Fuse("ab")
    layer(*make_inputs())
    assert [c["residual"] is None for c in calls] == [True, True]


@pytest.mark.parametrize(
    "setup",
    [Stack("ab"), Stack("ba"), Fuse("ab"), Parallel("ab"), Stack(["a", Fuse("bc")]), Stack("c")],
    ids=str,
)
def test_compositions_agree(setup: Any) -> None:
    """The adapter c is one that is not served: it runs itself among the others."""
    layer, twin = pair(Adapter(**PFEIFFER), Adapter(scaling=2.0), Adapter(use_gating=True))
    layer.active_setup = twin.active_setup = setup
    used = {name for name in "abc" if name in str(setup)}
    for module in (layer, twin):
        for name in set("abc") - used:
            module.adapters[name].requires_grad_(False)
    assert_agree(layer, twin)


def test_stacks_with_parallel_adapters_agree() -> None:
    layer, twin = pair(Adapter(**PFEIFFER), ParallelAdapter(scaling=4.0))
    for setup in (Stack("ab"), Stack("ba"), Fuse("ab"), Fuse("ba")):
        layer.active_setup = twin.active_setup = setup
        torch.testing.assert_close(layer(*make_inputs()), twin(*make_inputs()))


def test_first_step_with_zero_up_projection() -> None:
    layer = make_layer(Adapter(**PFEIFFER))
    nn.init.zeros_(layer.adapters["a"].adapter_up.weight)
    twin = copy.deepcopy(layer)
    mmkernels.accelerate(layer)
    assert_agree(layer, twin)


def test_report_and_names() -> None:
    model = nn.ModuleDict(
        {
            "first": WidthOutput(good=Adapter(), bad=Adapter(use_gating=True)),
            "second": BottleneckLayer(bad=Adapter(non_linearity="tanh")),
            "empty": BottleneckLayer(),
        }
    )
    keys = list(model.state_dict())
    report = mmkernels.accelerate(model)
    assert [(r.name, r.class_name) for r in report.replaced] == [("first", "WidthOutput")]
    assert report.skipped == [
        ("first.adapters.bad", "its output is gated (use_gating)"),
        ("second", "adapters.bad: its activation is Tanh; the op has none, relu, gelu, gelu_tanh, silu"),
    ]
    assert list(model.state_dict()) == keys
    assert isinstance(model["first"], WidthOutput)
    again = mmkernels.accelerate(model)
    assert again.replaced == []
    assert again.skipped[0] == ("first", "already accelerated")
    report.revert()
    assert type(model["first"]) is WidthOutput


def test_agrees_where_the_models_own_module_is_the_layer(calls: list[dict[str, Any]]) -> None:
    layer, twin = pair(Adapter(**PFEIFFER), cls=WidthOutput)
    assert_agree(layer, twin)
    assert calls


def hooked(inner: str) -> Adapter:
    adapter = Adapter()
    adapter.get_submodule(inner).register_forward_hook(lambda module, args, output: output * 2)
    return adapter


def parametrised() -> Adapter:
    adapter = Adapter()
    nn.utils.parametrizations.weight_norm(adapter.adapter_down[0])
    return adapter


def wrapped() -> Adapter:
    adapter = Adapter()
    adapter.forward = functools.partial(adapter.forward)  # type: ignore[method-assign]
    return adapter


def doubled_activation() -> Adapter:
    adapter = Adapter()
    adapter.adapter_down[1] = DoubledActivation("relu")
    return adapter


def odd_dropout() -> Adapter:
    adapter = Adapter()
    adapter.dropout = nn.AlphaDropout(0.0)  # type: ignore[assignment]
    return adapter


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Adapter(use_gating=True), "gated"),
        (lambda: Adapter(ln_after=True), "LayerNorm after the up-projection"),
        (lambda: Adapter(stochastic_depth=0.1), "drops whole samples"),
        (lambda: Adapter(phm_layer=True), "it has PHMLayer, Activation_Function_Class, PHMLayer"),
        (lambda: Adapter(non_linearity="tanh"), "its activation is Tanh"),
        (lambda: Adapter(non_linearity="leakyrelu"), "its activation is leaky_relu"),
        (lambda: Adapter(non_linearity="quick_gelu"), "its activation is QuickGELU"),
        (lambda: hooked("adapter_up"), "adapter_up has hooks"),
        (lambda: hooked("adapter_down.1.f"), "has hooks"),
        (lambda: hooked(""), "it has hooks"),
        (parametrised, "adapter_down.0 is parametrised"),
        (wrapped, "forward of it is overridden on the instance"),
        (odd_dropout, "its dropout or scaling is of another type"),
        (OverridesForward, "its forward is overridden in OverridesForward"),
        (AnotherComputation, "its forward is another computation"),
        (lambda: DropsHidden().eval(), "its forward is another computation"),
        (Tempered, "its forward is another computation"),
        (doubled_activation, "its activation is Activation_Function_Class"),
    ],
)
def test_other_adapters_are_left_alone(make: Any, reason: str) -> None:
    assert reason in only_reason(BottleneckLayer(a=make()))


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (ReadsUp, "the expected statements occur 0 times in its compose_single"),
        (OwnStack, "compose_stack is missing or overridden in OwnStack"),
        (TakesSum, "compose_stack reads the up-projection"),
    ],
)
def test_other_layers_are_left_alone(cls: type[BottleneckLayer], reason: str) -> None:
    assert reason in only_reason(cls(a=Adapter()))


def test_layers_changed_on_the_instance_are_left_alone() -> None:
    layer = BottleneckLayer(a=Adapter())
    layer.compose_single = layer.compose_single  # type: ignore[method-assign]
    assert "compose_single is missing or set on the instance" in only_reason(layer)


def test_dropout_runs_the_adapter_itself_in_training_alone(calls: list[dict[str, Any]]) -> None:
    layer, twin = pair(Adapter(dropout=0.5))
    with torch.random.fork_rng():
        outputs = []
        for module in (layer, twin):
            torch.manual_seed(3)
            outputs.append(module(*make_inputs()))
    assert torch.equal(*outputs)
    assert calls == []
    assert_agree(layer.eval(), twin.eval())
    assert len(calls) == 1


def test_gating_scores_come_from_the_adapter(calls: list[dict[str, Any]]) -> None:
    layer, twin = pair(Adapter(), Adapter(use_gating=True))
    for module in (layer, twin):
        module.output_adapter_gating_scores = True
        module(*make_inputs())
    assert calls == []
    assert layer.gating_scores.keys() == {"a", "b"}
    for name, score in twin.gating_scores.items():
        assert torch.equal(layer.gating_scores[name], score)


def test_adapter_called_by_others_returns_all_it_did() -> None:
    layer, twin = pair(Adapter())
    x = make_inputs()[0]
    got, expected = layer.adapters["a"](x, x), twin.adapters["a"](x, x)
    assert got[1].shape == (2, 5, BOTTLENECK)
    for value, other in zip(got, expected, strict=True):
        assert torch.equal(value, other)


def test_changes_after_the_replacement_are_respected(calls: list[dict[str, Any]]) -> None:
    layer, twin = pair(Adapter(**PFEIFFER))
    seen = []
    for module in (layer, twin):
        module.adapters["a"].register_forward_hook(lambda module, args, output: seen.append(output[1]))
    assert_agree(layer, twin)
    assert len(seen) == 2
    layer, twin = pair(Adapter())
    for module in (layer, twin):
        module.adapters["a"].adapter_up.register_forward_hook(lambda module, args, output: output * 2)
    assert_agree(layer, twin)
    layer, twin = pair(Adapter())
    for module in (layer, twin):
        module.adapters["a"].adapter_up = nn.Sequential(module.adapters["a"].adapter_up, nn.Tanh())
    assert_agree(layer, twin)
    assert calls == []


def test_adapters_added_later_are_served(calls: list[dict[str, Any]]) -> None:
    layer, twin = pair(Adapter())
    for module in (layer, twin):
        torch.manual_seed(0)
        module.adapters["late"] = ParallelAdapter(scaling=2.0)
        module.active_setup = Stack(["late"])
    torch.testing.assert_close(layer(*make_inputs()), twin(*make_inputs()))
    assert len(calls) == 1


def test_residual_that_the_op_does_not_take_is_added_outside(calls: list[dict[str, Any]]) -> None:
    layer, twin = pair(Adapter())
    x = make_inputs()[0]
    for residual in (torch.randn(WIDTH), torch.randn(2, 5, WIDTH).double()):
        got, expected = (
            module.compose_single("a", BottleneckState(x, x, residual, None)) for module in (layer, twin)
        )
        torch.testing.assert_close(got.hidden_states, expected.hidden_states, rtol=1e-5, atol=1e-6)
    assert len(calls) == 2


@pytest.mark.parametrize("name", ["houlsby", "pfeiffer", "channel", "parallel learned"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast_keep_dtypes(
    name: str, dtype: torch.dtype, calls: list[dict[str, Any]]
) -> None:
    layer, twin = pair(ADAPTERS[name]())
    tolerance = {"rtol": 3e-2, "atol": 6e-2} if dtype == torch.bfloat16 else {"rtol": 1e-2, "atol": 1e-2}
    for source in (torch.float32, dtype):
        with torch.autocast("cpu", dtype):
            assert_agree(layer, twin, source, **tolerance)
    assert_agree(layer.to(dtype), twin.to(dtype), dtype, **tolerance)
    assert len(calls) == 3


def test_mixed_dtypes_raise_what_the_adapter_raises() -> None:
    layer, twin = pair(Adapter())
    errors = []
    for module in (layer, twin):
        with pytest.raises(RuntimeError) as error:
            module(*make_inputs(torch.bfloat16))
        errors.append(str(error.value))
    assert errors[0] == errors[1]


@pytest.mark.parametrize("protocol", [None, 2, 5])
def test_copies_and_pickles_stay_accelerated(protocol: int | None, calls: list[dict[str, Any]]) -> None:
    layer, twin = pair(Adapter(**PFEIFFER))
    other = copy.deepcopy(layer) if protocol is None else pickle.loads(pickle.dumps(layer, protocol))
    assert type(other) is type(layer)
    assert_agree(other, twin)
    assert len(calls) == 1


def test_revert_restores_a_layer_with_a_forward_of_its_own() -> None:
    """Device maps set one on each module before anything else happens."""
    layer = BottleneckLayer(a=Adapter())
    layer.forward = functools.partial(BottleneckLayer.forward, layer)  # type: ignore[method-assign]
    attributes, state = dict(vars(layer)), torch.random.get_rng_state()
    report = mmkernels.accelerate(layer)
    assert len(report.replaced) == 1
    report.revert()
    assert type(layer) is BottleneckLayer
    assert vars(layer) == attributes
    assert torch.equal(torch.random.get_rng_state(), state)


def test_saved_state_loads_into_the_unchanged_model() -> None:
    layer, _ = pair(Adapter(**PFEIFFER), ParallelAdapter(scaling="learned"))
    fresh = BottleneckLayer(a=Adapter(**PFEIFFER), b=ParallelAdapter(scaling="learned"))
    fresh.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(*make_inputs()), fresh(*make_inputs()))


def test_compiles_in_one_graph() -> None:
    layer, twin = pair(Adapter(**PFEIFFER), ParallelAdapter(scaling=4.0))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*make_inputs()), twin(*make_inputs()))
