"""``accelerate(model, adapters=...)`` on bottlenecks that are plain ``nn.Sequential`` modules."""

from __future__ import annotations

import copy
import functools
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from transformers.activations import ACT2FN

import mmkernels
from mmkernels.patch import bottleneck

WIDTH, HIDDEN = 16, 6


class Block(nn.Module):
    """A part of a model that adds its adapter's result itself."""

    def __init__(self, adapter: nn.Module) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))
        self.adapter = adapter

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mlp(x)
        return x + 0.5 * self.adapter(x)


class OwnForward(nn.Sequential):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + input


class Linear(nn.Linear):
    """A layer of the name of torch's, as those of quantisation."""


class Named(nn.Sequential):
    """A subclass that is a Sequential in all but its name."""


def make_adapter(*before: nn.Module, activation: nn.Module | None = None, **linear: Any) -> nn.Sequential:
    function = activation or nn.ReLU()
    return nn.Sequential(
        *before, nn.Linear(WIDTH, HIDDEN, **linear), function, nn.Linear(HIDDEN, WIDTH, **linear)
    )


def make_model(*adapters: nn.Module) -> nn.Sequential:
    return nn.Sequential(*(Block(adapter) for adapter in adapters))


def make_input(dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 5, WIDTH, generator=generator).to(dtype).requires_grad_()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """One entry for each call of the op by a replacement."""
    recorded: list[Any] = []
    op = bottleneck.adapter

    def recorder(*args: Any, **kwargs: Any) -> Tensor:
        recorded.append(kwargs["activation"])
        return op(*args, **kwargs)

    monkeypatch.setattr(bottleneck, "adapter", recorder)
    return recorded


def assert_agree(
    model: nn.Module, twin: nn.Module, dtype: torch.dtype = torch.float32, **tolerance: float
) -> None:
    outcomes = []
    for module in (model, twin):
        module.zero_grad()
        x = make_input(dtype)
        output = module(x)
        output.backward(torch.linspace(-1, 1, output.numel()).view_as(output).to(output.dtype))
        outcomes.append([output, x.grad, *(parameter.grad for parameter in module.parameters())])
    for got, expected in zip(*outcomes, strict=True):
        torch.testing.assert_close(got, expected, **tolerance)


MADE = {
    "relu": make_adapter,
    "gelu": lambda: make_adapter(activation=nn.GELU()),
    "gelu_tanh": lambda: make_adapter(activation=nn.GELU(approximate="tanh")),
    "silu": lambda: make_adapter(activation=nn.SiLU(inplace=True)),
    "none": lambda: make_adapter(activation=nn.Identity()),
    "norm": lambda: make_adapter(nn.LayerNorm(WIDTH, eps=1e-3)),
    "norm without bias": lambda: make_adapter(nn.LayerNorm(WIDTH, bias=False), bias=False),
    "dropouts of 0": lambda: nn.Sequential(nn.Dropout(0.0), *make_adapter(), nn.Dropout(0.0)),
    "transformers gelu": lambda: make_adapter(activation=ACT2FN["gelu"]),
    "transformers tanh": lambda: make_adapter(activation=ACT2FN["gelu_new"]),
    "subclass": lambda: Named(*make_adapter()),
}


@pytest.mark.parametrize("name", MADE)
def test_agrees(name: str, calls: list[Any]) -> None:
    torch.manual_seed(0)
    model = make_model(MADE[name](), MADE[name]())
    twin = copy.deepcopy(model)
    report = mmkernels.accelerate(model, adapters=["*.adapter"])
    assert [r.name for r in report.replaced] == ["0.adapter", "1.adapter"]
    assert_agree(model, twin)
    assert len(calls) == 2
    assert_agree(model.double(), twin.double(), torch.float64)
    assert len(calls) == 4


def test_only_what_is_named_is_replaced() -> None:
    model = make_model(make_adapter(), make_adapter(), make_adapter())
    assert mmkernels.accelerate(model).replaced == []
    report = mmkernels.accelerate(model, adapters=["1.adapter", "[2-9].ada?ter"])
    assert [(r.name, r.class_name) for r in report.replaced] == [
        ("1.adapter", "Sequential"),
        ("2.adapter", "Sequential"),
    ]
    assert type(model[0].adapter) is nn.Sequential
    assert type(model[1].mlp) is nn.Sequential
    assert type(model[1].adapter) is not nn.Sequential


def test_model_itself_can_be_named() -> None:
    adapter = make_adapter()
    assert len(mmkernels.accelerate(adapter, adapters=[""]).replaced) == 1


def test_shared_adapter_is_found_by_each_of_its_names() -> None:
    shared = make_adapter()
    model = make_model(shared, shared)
    assert len(mmkernels.accelerate(model, adapters=["1.adapter"]).replaced) == 1


def test_again_and_back() -> None:
    model = make_model(make_adapter(), Named(*make_adapter()))
    attributes = [dict(vars(block.adapter)) for block in model]
    keys = list(model.state_dict())
    report = mmkernels.accelerate(model, adapters=("*.adapter",))
    assert list(model.state_dict()) == keys
    again = mmkernels.accelerate(model, adapters=("*.adapter",))
    assert again.replaced == []
    assert again.skipped == [(f"{i}.adapter", "already accelerated") for i in range(2)]
    report.revert()
    assert [type(block.adapter) for block in model] == [nn.Sequential, Named]
    assert [vars(block.adapter) for block in model] == attributes


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: make_adapter(activation=nn.Tanh()), "its activation is Tanh; the op has none, relu, gelu"),
        (lambda: make_adapter(activation=nn.Dropout(0.1)), "its activation is Dropout"),
        (lambda: nn.Sequential(*make_adapter(), nn.Dropout(0.1)), "it has Linear, ReLU, Linear, Dropout;"),
        (lambda: nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)), "it has Linear, Linear;"),
        (nn.Sequential, "it has no layer"),
        (lambda: nn.Sequential(nn.LayerNorm(WIDTH), nn.ReLU()), "it has LayerNorm, ReLU"),
        (lambda: nn.Sequential(nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 8)), "16 -> 6 and 6 -> 8"),
        (lambda: make_adapter(nn.LayerNorm((5, WIDTH))), r"the shape \(16,\)"),
        (lambda: make_adapter(nn.LayerNorm(WIDTH, elementwise_affine=False)), "must have a weight"),
        (lambda: OwnForward(*make_adapter()), "its class OwnForward overrides forward"),
        (lambda: nn.ModuleList(make_adapter()), "it is a ModuleList, not a torch.nn.Sequential"),
        (
            lambda: nn.Sequential(*make_adapter()[:2], nn.Conv1d(HIDDEN, WIDTH, 1)),
            "it has Linear, ReLU, Conv1d",
        ),
        (
            lambda: nn.Sequential(Linear(16, 6), nn.ReLU(), Linear(6, 16)),
            r"it has test_seq.*\.Linear, ReLU",
        ),
        (lambda: with_lora(make_adapter()), r"it has peft\.tuners\.lora\.layer\.Linear, ReLU, Linear"),
        (lambda: torch.jit.script(make_adapter()), "it is a TorchScript module"),
    ],
)
def test_other_modules_are_refused_and_nothing_is_replaced(make: Any, reason: str) -> None:
    model = make_model(make_adapter(), make())
    with pytest.raises(ValueError, match=rf"module '1\.adapter' cannot be replaced: .*{reason}"):
        mmkernels.accelerate(model, adapters=["*.adapter"])
    assert type(model[0].adapter) is nn.Sequential


def test_names_that_match_nothing_are_refused_and_nothing_is_replaced() -> None:
    model = make_model(make_adapter())
    with pytest.raises(ValueError, match=r"adapters: 'encoder\.\*\.adapter' matches no module"):
        mmkernels.accelerate(model, adapters=["*.adapter", "encoder.*.adapter"])
    assert type(model[0].adapter) is nn.Sequential


@pytest.mark.parametrize("adapters", ["0.adapter", [0], [None], [nn.ReLU()]])
def test_names_must_be_strings(adapters: Any) -> None:
    with pytest.raises(TypeError, match="adapters must be a list of module names or patterns, got"):
        mmkernels.accelerate(make_model(make_adapter()), adapters=adapters)


def with_lora(adapter: nn.Sequential) -> nn.Module:
    peft = pytest.importorskip("peft")
    return peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["0"]), adapter)


def hooked() -> nn.Sequential:
    adapter = make_adapter()
    adapter[0].register_forward_hook(lambda module, args, output: output)
    return adapter


def parametrised() -> nn.Sequential:
    adapter = make_adapter()
    nn.utils.parametrizations.weight_norm(adapter[2])
    return adapter


def pruned() -> nn.Sequential:
    adapter = make_adapter()
    prune.random_unstructured(adapter[2], "weight", 0.5)
    return adapter


def wrapped() -> nn.Sequential:
    adapter = make_adapter()
    adapter.forward = functools.partial(adapter.forward)  # type: ignore[method-assign]
    return adapter


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (hooked, "0 has hooks"),
        (pruned, "2 has hooks"),
        (parametrised, "2 is parametrised"),
        (wrapped, "forward is overridden on the instance"),
    ],
)
def test_layers_with_more_to_them_are_skipped(make: Any, reason: str) -> None:
    model = make_model(make(), make_adapter())
    report = mmkernels.accelerate(model, adapters=["*.adapter"])
    assert [r.name for r in report.replaced] == ["1.adapter"]
    assert [s.name for s in report.skipped] == ["0.adapter"]
    assert reason in report.skipped[0].reason


def test_global_hooks_see_the_layers(calls: list[Any]) -> None:
    model = make_model(make_adapter())
    mmkernels.accelerate(model, adapters=["*.adapter"])
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(module))
    try:
        model(make_input())
    finally:
        handle.remove()
    assert set(model[0].adapter) <= set(seen)
    assert calls == []


def test_a_forward_that_was_replaced_on_its_class_runs(
    calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(make_adapter())
    mmkernels.accelerate(model, adapters=["*.adapter"])
    forward = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: 2 * forward(self, x))
    other = make_model(make_adapter())
    reason = mmkernels.accelerate(other, adapters=["*.adapter"]).skipped[0].reason
    assert reason == "forward of the class of 0, Linear, was replaced"
    x = make_input()
    adapter = model[0].adapter
    assert torch.equal(adapter(x), adapter[2](adapter[1](adapter[0](x))))
    assert calls == []


def test_changes_after_the_replacement_are_respected(calls: list[Any]) -> None:
    def double_up(adapter: nn.Sequential) -> None:
        adapter[2].register_forward_hook(lambda module, args, output: output * 2)

    def exchange(adapter: nn.Sequential) -> None:
        adapter[1] = nn.Tanh()

    def orthogonal(adapter: nn.Sequential) -> None:
        torch.manual_seed(0)
        nn.utils.parametrizations.orthogonal(adapter[0])

    for change in (double_up, exchange, orthogonal):
        model = make_model(make_adapter())
        twin = copy.deepcopy(model)
        mmkernels.accelerate(model, adapters=["0.adapter"])
        for module in (model, twin):
            change(module[0].adapter)
        torch.testing.assert_close(model(make_input()), twin(make_input()))
    assert calls == []


def test_hooks_on_the_adapter_itself_still_run(calls: list[Any]) -> None:
    model = make_model(make_adapter())
    twin = copy.deepcopy(model)
    mmkernels.accelerate(model, adapters=["0.adapter"])
    for module in (model, twin):
        module[0].adapter.register_forward_hook(lambda module, args, output: output * 2)
    assert_agree(model, twin)
    assert len(calls) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast_keep_dtypes(dtype: torch.dtype, calls: list[Any]) -> None:
    torch.manual_seed(0)
    model = make_model(make_adapter(nn.LayerNorm(WIDTH), activation=nn.GELU()))
    twin = copy.deepcopy(model)
    mmkernels.accelerate(model, adapters=["0.adapter"])
    tolerance = {"rtol": 3e-2, "atol": 6e-2} if dtype == torch.bfloat16 else {"rtol": 1e-2, "atol": 1e-2}
    for source in (torch.float32, dtype):
        with torch.autocast("cpu", dtype):
            assert_agree(model, twin, source, **tolerance)
            assert model[0].adapter(make_input(source)).dtype == dtype
    assert_agree(model.to(dtype), twin.to(dtype), dtype, **tolerance)
    assert len(calls) == 5


@pytest.mark.parametrize(
    "x", [torch.ones(2, 7), torch.ones(2, WIDTH, dtype=torch.bfloat16), torch.ones(2, WIDTH).int(), None, 1.0]
)
def test_inputs_that_the_op_does_not_take_raise_what_the_layers_raise(x: Any) -> None:
    adapter = make_adapter()
    twin = copy.deepcopy(adapter)
    mmkernels.accelerate(adapter, adapters=[""])
    errors = []
    for module in (adapter, twin):
        with pytest.raises((RuntimeError, TypeError)) as error:
            module(x)
        errors.append(str(error.value))
    assert errors[0] == errors[1]


def test_indices_and_slices_are_those_of_a_sequential() -> None:
    adapter = make_adapter()
    mmkernels.accelerate(adapter, adapters=[""])
    assert isinstance(adapter[0], nn.Linear)
    x = make_input()
    torch.testing.assert_close(adapter[:2](x), adapter[1](adapter[0](x)))


@pytest.mark.parametrize("protocol", [None, 2, 5])
def test_copies_and_pickles_stay_accelerated(protocol: int | None, calls: list[Any]) -> None:
    adapter = make_adapter()
    twin = copy.deepcopy(adapter)
    mmkernels.accelerate(adapter, adapters=[""])
    other = copy.deepcopy(adapter) if protocol is None else pickle.loads(pickle.dumps(adapter, protocol))
    assert type(other) is type(adapter)
    torch.testing.assert_close(other(make_input()), twin(make_input()))
    assert len(calls) == 1


def test_compiles_in_one_graph() -> None:
    model = make_model(make_adapter(nn.LayerNorm(WIDTH)))
    twin = copy.deepcopy(model)
    mmkernels.accelerate(model, adapters=["0.adapter"])
    assert_agree(torch.compile(model, backend="aot_eager", fullgraph=True), twin)
