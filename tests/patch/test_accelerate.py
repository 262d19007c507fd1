"""``accelerate`` itself: what it refuses, what it leaves untouched, how it is undone and carried along."""

from __future__ import annotations

import copy
import functools
import importlib.util
import inspect
import pathlib
import pickle
import subprocess
import sys
import types
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mmkernels
from mmkernels.patch import Report


def twice_wrapped(function: Any) -> Any:
    """Two honest decorators, the inner one with keyword defaults."""

    @functools.wraps(function)
    def inner(self: Any, *args: Any, offset: float = 1.0, **kwargs: Any) -> Any:
        return function(self, *args, **kwargs) + offset

    @functools.wraps(inner)
    def outer(self: Any, *args: Any, **kwargs: Any) -> Any:
        return inner(self, *args, **kwargs)

    return outer


def hiding(function: Any) -> Any:
    """A decorator that keeps the function where no one finds it."""
    table = {"function": function}

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return table["function"](*args, **kwargs)

    return wrapper


class Mixer(nn.Module):
    """The fragment as transformers has it, in the smallest module."""

    def __init__(self, num_layers: int = 3) -> None:
        super().__init__()
        self.layer_weights = nn.Parameter(torch.linspace(-1, 1, num_layers))
        self.scale = nn.Parameter(torch.tensor(2.0))

    @twice_wrapped
    def forward(self, layers: list[Tensor], gain: float = 1.0, *, shift: float = 0.5) -> Tensor:
        """A docstring
        of two lines."""
        states = layers
        states = torch.stack(states, dim=1)
        softened = nn.functional.softmax(self.layer_weights, dim=-1)
        states = (states * softened.view(-1, 1, 1)).sum(dim=1)
        return states * self.scale * gain + shift


class SumOverBatch(Mixer):
    def forward(self, layers: list[Tensor]) -> Tensor:
        states = torch.stack(layers, dim=0)
        softened = nn.functional.softmax(self.layer_weights, dim=-1)
        return (states * softened.view(-1, 1, 1)).sum(dim=1)


class UsesWeightsTwice(Mixer):
    def forward(self, states: Any) -> Tensor:
        states = torch.stack(states, dim=1)
        softened = nn.functional.softmax(self.layer_weights, dim=-1)
        states = (states * softened.view(-1, 1, 1)).sum(dim=1)
        return states + softened.max()


class ShadowsTorch(Mixer):
    def forward(self, states: Any, torch: Any = torch) -> Tensor:
        states = torch.stack(states, dim=1)
        softened = nn.functional.softmax(self.layer_weights, dim=-1)
        states = (states * softened.view(-1, 1, 1)).sum(dim=1)
        return states


class SumsTwice(Mixer):
    def forward(self, states: Any, others: Any) -> Tensor:
        states = torch.stack(states, dim=1)
        softened = nn.functional.softmax(self.layer_weights, dim=-1)
        states = (states * softened.view(-1, 1, 1)).sum(dim=1)
        others = torch.stack(others, dim=1)
        softened = nn.functional.softmax(self.layer_weights, dim=-1)
        others = (others * softened.view(-1, 1, 1)).sum(dim=1)
        return states + others


class Hidden(Mixer):
    @hiding
    def forward(self, states: Any) -> Tensor:
        states = torch.stack(states, dim=1)
        softened = nn.functional.softmax(self.layer_weights, dim=-1)
        states = (states * softened.view(-1, 1, 1)).sum(dim=1)
        return states


class CallsParent(Mixer):
    def forward(self, layers: list[Tensor]) -> Tensor:
        return super().forward(layers)


class CallsParentInside(Mixer):
    """The fragment beside a zero-argument super(), which needs the class cell."""

    def forward(self, states: Any) -> Tensor:
        states = torch.stack(states, dim=1)
        softened = nn.functional.softmax(self.layer_weights, dim=-1)
        states = (states * softened.view(-1, 1, 1)).sum(dim=1)
        return states + super().forward([states] * len(self.layer_weights))


def make_layers(num_layers: int = 3, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 5, 8, generator=generator).to(dtype) for _ in range(num_layers)]


def is_accelerated(module: nn.Module) -> bool:
    return "_mmkernels_mix" in inspect.unwrap(type(module).forward).__code__.co_freevars


def only_reason(report: Report) -> str:
    assert report.replaced == []
    assert len(report.skipped) == 1
    return report.skipped[0].reason


def test_replaces_the_fragment_and_nothing_else() -> None:
    mixer, twin = Mixer(), Mixer()
    original = Mixer.forward
    report = mmkernels.accelerate(mixer)
    assert is_accelerated(mixer)
    assert not is_accelerated(twin)
    assert Mixer.forward is original
    assert isinstance(mixer, Mixer)
    assert inspect.signature(mixer.forward) == inspect.signature(twin.forward)
    assert mixer.forward.__doc__ == twin.forward.__doc__
    for kwargs in ({}, {"gain": 3.0}, {"shift": 0.0}, {"offset": -1.0}):
        torch.testing.assert_close(mixer(make_layers(), **kwargs), twin(make_layers(), **kwargs))
    assert "1 replaced, 0 skipped" in str(report)
    assert "(model) (Mixer)" in str(report)


def test_class_goes_by_the_same_names() -> None:
    class Local(Mixer):
        """Inherits the fragment."""

    module = Local()
    assert len(mmkernels.accelerate(module).replaced) == 1
    assert type(module) is not Local
    assert str(type(module)) == str(Local)
    assert type(module).__doc__ == Local.__doc__


def test_needs_a_module() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got dict"):
        mmkernels.accelerate({})


def test_revert_restores_everything() -> None:
    mixer = Mixer()
    attributes, state = dict(vars(mixer)), mixer.state_dict()
    report = mmkernels.accelerate(mixer)
    report.revert()
    assert type(mixer) is Mixer
    assert mixer.forward.__func__ is Mixer.forward
    assert vars(mixer) == attributes
    assert list(mixer.state_dict()) == list(state)
    report.revert()
    assert len(mmkernels.accelerate(mixer).replaced) == 1


def test_second_call_replaces_nothing() -> None:
    mixer = Mixer()
    first = mmkernels.accelerate(mixer)
    cls = type(mixer)
    second = mmkernels.accelerate(mixer)
    assert only_reason(second) == "already accelerated"
    second.revert()
    assert type(mixer) is cls
    first.revert()
    assert type(mixer) is Mixer


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (SumOverBatch, "the expected statements occur 0 times"),
        (SumsTwice, "the expected statements occur 2 times"),
        (UsesWeightsTwice, "uses 'softened' outside the expected statements"),
        (ShadowsTorch, "'torch' in its forward is not the expected object"),
        (Hidden, "hides the function it wraps"),
        (CallsParent, "the expected statements occur 0 times"),
    ],
)
def test_unknown_layouts_are_left_alone(cls: type[Mixer], reason: str) -> None:
    module = cls()
    assert reason in only_reason(mmkernels.accelerate(module))
    assert type(module) is cls


def test_class_cell_is_kept() -> None:
    module, twin = CallsParentInside(), CallsParentInside()
    assert len(mmkernels.accelerate(module).replaced) == 1
    torch.testing.assert_close(module(make_layers()), twin(make_layers()))


def import_file(path: pathlib.Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SOURCE = """
import torch
from torch import nn

class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer_weights = nn.Parameter(torch.zeros(3))

    def forward(self, states):
        states = torch.stack(states, dim=1)
        weights = nn.functional.softmax(self.layer_weights, dim=-1)
        states = (states * weights.view(-1, 1, 1)).sum(dim=1)
        return states * 2
"""


def test_source_that_changed_since_import_is_refused(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "mixer_edited.py"
    path.write_text(SOURCE)
    mixer = import_file(path).Mixer()
    path.write_text(SOURCE.replace("states * 2", "states * 3  # edited"))
    assert only_reason(mmkernels.accelerate(mixer)) == "its source on disk is not that of the loaded code"
    path.write_text(SOURCE)
    assert len(mmkernels.accelerate(mixer).replaced) == 1


def test_missing_source_is_refused() -> None:
    namespace: dict[str, Any] = {"__name__": "made_up"}
    exec(SOURCE, namespace)
    assert only_reason(mmkernels.accelerate(namespace["Mixer"]())) == "its source is not available"


def test_parameters_that_the_op_does_not_take() -> None:
    assert "at most 64" in only_reason(mmkernels.accelerate(Mixer(65)))
    mixer = Mixer()
    del mixer.layer_weights
    assert only_reason(mmkernels.accelerate(mixer)) == "it has no layer_weights"
    assert "torch.float8_e5m2 on cpu has no kernel" in only_reason(
        mmkernels.accelerate(Mixer().to(torch.float8_e5m2))
    )


class Bottlenecks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "adapter": nn.Sequential(nn.Linear(8, 2), nn.ReLU(), nn.Linear(2, 8)),
                    "mlp": nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8)),
                }
            )
            for _ in range(3)
        )


class OwnAdapter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(8, 2), nn.Linear(2, 8)


class OwnSum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(5))


class NoSum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = types.SimpleNamespace(use_weighted_layer_sum=False)


class BottleneckLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.adapters = nn.ModuleDict()


def with_lora() -> nn.Module:
    peft = pytest.importorskip("peft")
    return peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["0"]), nn.Sequential(nn.Linear(8, 8)))


@pytest.mark.parametrize(
    ("make", "place", "text"),
    [
        (
            Bottlenecks,
            "layers.*.adapter",
            "it is a bottleneck; if it is an adapter, name it: "
            "accelerate(model, adapters=['layers.*.adapter']) (3 modules)",
        ),
        (lambda: nn.Sequential(OwnAdapter()), "*", "OwnAdapter has the projections of a bottleneck adapter"),
        (OwnSum, "", "if its parameter weights (5,) weighs layers, mmkernels.nn.LayerMix"),
        (NoSum, "", "NoSum sums no layers; transformers' audio classifiers do, with config.use_weighted"),
        (BottleneckLayer, "", "it is a BottleneckLayer without adapters; call accelerate after add_adapter"),
        (with_lora, "*", "it is a Linear of peft, for which there is no op"),
        (lambda: torch.jit.script(nn.Linear(2, 2)), "", "it is a TorchScript module"),
        (lambda: nn.Sequential(nn.Linear(2, 2)), "", "no module of this Sequential resembles one that"),
    ],
)
def test_where_nothing_is_recognised_the_report_says_what_came_near(make: Any, place: str, text: str) -> None:
    report = mmkernels.accelerate(make())
    assert (report.replaced, report.skipped) == ([], [])
    assert [note.name for note in report.notes] == [place]
    assert report.notes[0].text.startswith(text)
    assert f"note     {place or '(model)'}: {text}" in str(report)


def test_a_report_with_replaced_or_skipped_modules_has_no_near_misses() -> None:
    assert mmkernels.accelerate(nn.ModuleList([Mixer(), OwnSum()])).notes == []
    assert mmkernels.accelerate(nn.ModuleList([SumOverBatch(), OwnSum()])).notes == []


@pytest.mark.parametrize("convert", [torch.jit.script, torch.fx.symbolic_trace, torch.compile])
def test_converted_modules_among_others(convert: Any) -> None:
    model = nn.ModuleList([convert(nn.Sequential(nn.Linear(8, 8))), Mixer()])
    assert [r.name for r in mmkernels.accelerate(model).replaced] == ["1"]


def test_a_wrapper_that_shows_the_attributes_of_its_module_is_no_module_of_its_own() -> None:
    report = mmkernels.accelerate(torch.compile(Mixer(), backend="eager"))
    assert [r.name for r in report.replaced] == ["_orig_mod"]
    assert report.skipped == []


def test_parametrised_weights_are_left_alone() -> None:
    mixer, twin = Mixer(), Mixer()
    nn.utils.parametrize.register_parametrization(mixer, "layer_weights", nn.Tanh())
    assert only_reason(mmkernels.accelerate(mixer)) == "it is parametrised (torch.nn.utils.parametrize)"
    late = Mixer()
    mmkernels.accelerate(late)
    for module in (late, twin):
        nn.utils.parametrize.register_parametrization(module, "layer_weights", nn.Tanh())
    torch.testing.assert_close(late(make_layers()), twin(make_layers()))


def test_weights_in_double_with_layers_in_single_keep_their_precision() -> None:
    mixer, twin = Mixer().double(), Mixer().double()
    mmkernels.accelerate(mixer)
    assert torch.equal(mixer(make_layers()), twin(make_layers()))


def test_wrapped_instances_are_left_alone() -> None:
    mixer = Mixer()
    mixer.forward = functools.partial(mixer.forward, gain=2.0)  # type: ignore[method-assign]
    assert "forward is overridden on the instance" in only_reason(mmkernels.accelerate(mixer))


def test_revert_refuses_what_it_cannot_restore_and_then_changes_nothing() -> None:
    model = nn.ModuleList([Mixer(), Mixer()])
    report = mmkernels.accelerate(model)
    model[1].forward = functools.partial(model[1].forward)
    with pytest.raises(RuntimeError, match=r"cannot revert 1: its forward was wrapped"):
        report.revert()
    assert is_accelerated(model[0])
    del model[1].forward
    accelerated = type(model[1])
    model[1].__class__ = type("Sharded", (accelerated,), {})
    with pytest.raises(RuntimeError, match=r"1: its class is now Sharded"):
        report.revert()
    model[1].__class__ = accelerated
    report.revert()
    assert {type(module) for module in model} == {Mixer}


def test_finds_modules_inside_wrappers() -> None:
    class LoraModel(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

    class PeftModel(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.base_model = LoraModel(model)

        def get_base_model(self) -> nn.Module:
            return self.base_model.model

    class Adapted(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.base_layer = layer

    shared = Mixer()
    model = PeftModel(nn.ModuleDict({"head": Adapted(shared), "again": shared, "other": SumOverBatch()}))
    report = mmkernels.accelerate(model)
    assert [r.name for r in report.replaced] == ["base_model.model.head.base_layer"]
    assert [s.name for s in report.skipped] == ["base_model.model.other"]
    assert is_accelerated(model.get_base_model()["again"])


def test_distributed_data_parallel(tmp_path: pathlib.Path) -> None:
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        model = nn.parallel.DistributedDataParallel(Mixer())
        assert [r.name for r in mmkernels.accelerate(model).replaced] == ["module"]
        model(make_layers()).sum().backward()
        twin = Mixer()
        twin(make_layers()).sum().backward()
        torch.testing.assert_close(model.module.layer_weights.grad, twin.layer_weights.grad)
    finally:
        torch.distributed.destroy_process_group()


def test_data_parallel_replicas_use_their_own_parameters() -> None:
    mixer = Mixer()
    mmkernels.accelerate(mixer)
    replica = mixer._replicate_for_data_parallel()
    replica.layer_weights = torch.tensor([9.0, 0.0, 0.0])
    replica.scale = torch.tensor(1.0)
    assert is_accelerated(replica)
    twin = Mixer()
    twin.layer_weights = nn.Parameter(replica.layer_weights)
    twin.scale = nn.Parameter(replica.scale)
    torch.testing.assert_close(replica(make_layers()), twin(make_layers()).detach())


@pytest.mark.parametrize(
    "duplicate",
    [copy.copy, copy.deepcopy, *(functools.partial(pickle.dumps, protocol=p) for p in (0, 2, 5))],
    ids=["copy", "deepcopy", "pickle0", "pickle2", "pickle5"],
)
def test_copies_and_pickles_stay_accelerated(duplicate: Any) -> None:
    mixer = Mixer()
    report = mmkernels.accelerate(mixer)
    twin = duplicate(mixer)
    twin = pickle.loads(twin) if isinstance(twin, bytes) else twin
    assert type(twin) is type(mixer)
    report.revert()
    assert is_accelerated(twin)
    torch.testing.assert_close(twin(make_layers()), mixer(make_layers()))


def test_mixed_dtypes_are_promoted_as_stack_does() -> None:
    for dtypes in (
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.float16, torch.bfloat16, torch.float16),
    ):
        layers = [layer.to(dtype) for layer, dtype in zip(make_layers(), dtypes, strict=True)]
        for weights in (torch.float32, torch.bfloat16, torch.float64):
            mixer, twin = Mixer().to(weights), Mixer().to(weights)
            mmkernels.accelerate(mixer)
            got, expected = mixer(layers), twin(layers)
            assert got.dtype == expected.dtype
            torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    "layers",
    [
        make_layers(2),
        make_layers(1),
        [torch.ones(5, 8)] * 3,
        [torch.ones(2, 5, 8), torch.ones(2, 4, 8), torch.ones(2, 5, 8)],
        torch.stack(make_layers()),
        [torch.ones(2, 5, 8), None, None],
        None,
        [torch.ones(2, 5, 8, dtype=torch.int64)] * 3,
    ],
    ids=["fewer", "one", "matrices", "ragged", "tensor", "none among", "none", "integers"],
)
def test_inputs_that_the_op_does_not_take_get_the_class_own_behaviour(layers: Any) -> None:
    mixer, twin = Mixer(), Mixer()
    mmkernels.accelerate(mixer)

    def outcome(module: Mixer) -> Tensor | str:
        try:
            return module(layers)
        except (RuntimeError, TypeError) as error:
            return f"{type(error).__name__}: {error}"

    got, expected = outcome(mixer), outcome(twin)
    if isinstance(expected, Tensor):
        assert torch.equal(got, expected)
    else:
        assert got == expected


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_replaced_fragment_does_not_break_the_graph(dynamic: bool) -> None:
    mixer, twin = Mixer(), Mixer()
    mmkernels.accelerate(mixer)
    compiled = torch.compile(mixer, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    layers, same = ([x.requires_grad_() for x in make_layers()] for _ in range(2))
    compiled(layers).square().sum().backward()
    twin(same).square().sum().backward()
    for got, expected in zip([*layers, mixer.layer_weights], [*same, twin.layer_weights], strict=True):
        torch.testing.assert_close(got.grad, expected.grad)


def test_patching_a_plain_module_imports_no_transformers() -> None:
    program = (
        "import sys, torch, mmkernels\n"
        "report = mmkernels.accelerate(torch.nn.Sequential(torch.nn.Linear(2, 2)))\n"
        "assert not report.replaced and not report.skipped\n"
        "assert 'transformers' not in sys.modules\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
