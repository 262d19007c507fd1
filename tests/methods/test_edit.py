"""Edit: each kind of change, and that all of them are taken back, also after an error at any step."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from encoder_cases import model_state as state
from encoder_cases import run
from example_methods import LearntMerge
from prepared_models import complete
from steps import BrokenStepError, Steps
from tiny_encoders import TINY
from torch import nn

from mmtransfer import registry
from mmtransfer.encoders import Edit, Encoder
from mmtransfer.encoders.edit import untouched_on_error
from mmtransfer.method import AdapterMethod, EditMethod

MODELS = ("wav2vec2", "whisper", "bert")
EDITS = [name for name, each in registry.methods().items() if issubclass(each, EditMethod)]
AT_WIDTH_16 = {"hff-adapters": {"bottleneck": 4}, "prompt": {"prompt_tokens": 2}, "lora": {"rank": 2}}

ADAPTERS = registry.find("houlsby", bottleneck=4)
assert isinstance(ADAPTERS, AdapterMethod)


def find(name: str, **options: Any) -> Any:
    return complete(name, **AT_WIDTH_16.get(name, {}), **options)


def build(model_type: str = "wav2vec2", **changes: Any) -> nn.Module:
    """A small model, in which flags and modes differ from part to part."""
    layers = {"encoder_layers": 2} if model_type == "whisper" else {"num_hidden_layers": 2}
    model = TINY[model_type].build(**layers, **changes)
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 3 > 0)
    Encoder(model).all_layers[1].eval()
    return model


class Doubled:
    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self.inner(*args, **kwargs)
        return (2 * output[0], *output[1:]) if isinstance(output, tuple) else 2 * output


@pytest.fixture
def model() -> nn.Module:
    return build().eval()


class TestChanges:
    def test_nothing(self, model):
        before, expected = state(model), run(model)
        edit = Edit.nothing(Encoder(model))
        assert edit.is_empty
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert torch.equal(run(model), expected)
        edit.revert()
        assert state(model) == before

    def test_freezes_the_whole_model_and_trains_only_what_was_given(self):
        model = TINY["wav2vec2"].build(head=True)
        encoder = Encoder(model)
        assert encoder.root is model
        with Edit(encoder, "some") as edit:
            assert not any(parameter.requires_grad for parameter in model.parameters())
            edit.train(encoder.layers[1].parameters())
        assert not edit.is_empty
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        assert [*map(id, trained)] == [*map(id, edit.parameters)]
        assert [*map(id, trained)] == [*map(id, encoder.layers[1].parameters())]
        edit.revert()
        assert edit.is_empty
        assert all(parameter.requires_grad for parameter in model.parameters())

    def test_override(self, model):
        before, plain = state(model), run(model)
        layer = Encoder(model).layers[-1]
        with Edit(Encoder(model), "some") as edit:
            edit.override(layer, Doubled(layer.forward))
        assert not edit.is_empty
        assert edit.parameters == []
        norm, twice = Encoder(model).final_norm, []
        norm.register_forward_pre_hook(lambda _, args: twice.append(args[0]))
        doubled = run(model)
        edit.revert()
        assert torch.equal(run(model), plain)
        assert torch.equal(twice[0], 2 * twice[1])
        assert not torch.equal(doubled, plain)
        norm._forward_pre_hooks.clear()
        assert state(model) == before

    def test_overrides_nest_and_go_in_reverse(self, model):
        layer = Encoder(model).layers[0]
        own = Doubled(layer.forward)
        # A forward that somebody else has put there is restored, not removed.
        layer.forward = own
        with Edit(Encoder(model), "some") as edit:
            for _ in range(3):
                edit.override(layer, Doubled(layer.forward))
        assert layer.forward.inner.inner.inner is own
        edit.revert()
        assert layer.__dict__["forward"] is own

    def test_add(self, model):
        before = state(model)
        layer = Encoder(model).layers[0]
        with Edit(Encoder(model), "some") as edit:
            scale = edit.add(layer, "scale", nn.Parameter(torch.ones(3)))
            added = edit.add(layer, "extra", nn.Linear(3, 2))
        assert layer.scale is scale
        assert layer.extra is added
        assert edit.parameters == [scale, added.weight, added.bias]
        assert all(parameter.requires_grad for parameter in edit.parameters)
        assert {"scale", "extra.weight"} <= {name for name, _ in layer.named_parameters()}
        edit.revert()
        assert state(model) == before

    @staticmethod
    def add_two(edit, layer, name):
        edit.add(layer, "scale", nn.Parameter(torch.ones(1)))
        edit.add(layer, name, nn.Parameter(torch.ones(1)))

    @pytest.mark.parametrize("name", ["attention", "forward", "training", "scale"])
    def test_add_refuses_a_name_in_use(self, model, name):
        before, layer = state(model), Encoder(model).layers[1]
        edit = Edit(Encoder(model), "some")
        with pytest.raises(ValueError, match=f"attribute {name!r} already"), edit:
            self.add_two(edit, layer, name)
        assert state(model) == before

    def test_note(self, model):
        model.first = "mine"
        before = state(model)
        with Edit(Encoder(model), "some") as edit:
            for name in ("first", "second"):
                edit.note(model, name)
                setattr(model, name, "changed")
        edit.revert()
        assert state(model) == before
        assert model.first == "mine"
        assert not hasattr(model, "second")

    def test_note_child(self, model):
        before = state(model)
        encoder = Encoder(model)
        with Edit(encoder, "some") as edit:
            edit.note_child(encoder.layers[0].attention, "q_proj")
            encoder.layers[0].attention.q_proj = nn.Linear(16, 16)
        assert not edit.is_empty
        edit.revert()
        assert state(model) == before

    @pytest.mark.parametrize(
        ("dtype", "placed"),
        [
            (torch.float32, torch.float32),
            (torch.bfloat16, torch.float32),
            (torch.float16, torch.float32),
            (torch.float64, torch.float64),
        ],
    )
    def test_place(self, model, dtype, placed):
        encoder = Encoder(model.to(dtype))
        layer = encoder.layers[0].eval()
        with Edit(encoder, "some") as edit:
            assert edit.place(layer) == {"device": torch.device("cpu"), "dtype": placed}
            adapter = ADAPTERS.add(edit, encoder, layer, "extra")
        assert {parameter.dtype for parameter in adapter.parameters()} == {placed}
        assert not adapter.training
        encoder.layers[1].train()
        edit.revert()
        with Edit(encoder, "some") as edit:
            ADAPTERS.append(edit, encoder, encoder.layers[1], "extra", encoder.layers[1])
        assert encoder.layers[1].extra.training

    def test_frozen_parts_ask_for_no_gradient_of_their_input(self):
        model = build().train()
        extractor = model.feature_extractor
        assert extractor._requires_grad
        with Edit(Encoder(model), "some") as edit:
            edit.train(Encoder(model).layers[1].parameters())
        assert not extractor._requires_grad
        edit.revert()
        assert extractor._requires_grad
        with Edit(Encoder(model), "some") as edit:
            edit.train(extractor.parameters())
        assert extractor._requires_grad

    def test_an_edited_model_is_refused_before_anything_is_touched(self, model):
        encoder = Encoder(model)
        with Edit(encoder, "first") as edit:
            edit.train(encoder.layers[1].parameters())
        before = state(model)
        for other in (encoder, Encoder(model)):
            with pytest.raises(ValueError, match="edited already, by method 'first'"):
                Edit(other, "second")
            with pytest.raises(ValueError, match="edited already, by method 'first'"):
                Edit.nothing(other)
        assert state(model) == before
        edit.revert()
        Edit(encoder, "second")

    def test_the_part_that_is_edited_is_named(self):
        model = TINY["wav2vec2"].build(head=True)
        Edit.nothing(Encoder(model.wav2vec2))
        with Edit(Encoder(model.wav2vec2), "first"):
            pass
        with pytest.raises(ValueError, match="by method 'first' in its part 'wav2vec2'"):
            Edit(Encoder(model), "second")

    def test_reverts_once(self, model):
        before = state(model)
        with Edit(Encoder(model), "some") as edit:
            edit.override(model, Doubled(model.forward))
        edit.revert()
        with Edit(Encoder(model), "other") as other:
            other.override(model, Doubled(model.forward))
        forward = model.forward
        edit.revert()
        assert model.forward is forward
        other.revert()
        assert state(model) == before


@pytest.mark.parametrize("model_type", MODELS)
@pytest.mark.parametrize("name", EDITS)
class TestMethods:
    @pytest.mark.parametrize("recompute", ["none", "selective", "full"])
    def test_reverts_to_the_same_bits(self, name, model_type, recompute):
        model = build(model_type)
        encoder = Encoder(model)
        before = state(model)
        edit = find(name, recompute=recompute).edit(encoder)
        assert not edit.is_empty
        wanted = {id(parameter) for parameter in edit.parameters}
        assert {id(parameter) for parameter in model.parameters() if parameter.requires_grad} == wanted
        assert len(wanted) == len(edit.parameters) > 0
        edit.revert()
        assert edit.is_empty
        assert state(model) == before

    def test_trains_nothing_past_the_last_tap(self, name, model_type):
        model = build(model_type)
        encoder = Encoder(model).up_to((0,))
        edit = find(name).edit(encoder)
        low, high = ({id(p) for p in layer.parameters()} for layer in encoder.all_layers)
        trained = {id(parameter) for parameter in edit.parameters}
        assert trained & low
        assert not trained & high
        assert {id(p) for p in model.parameters() if p.requires_grad} == trained

    @pytest.mark.parametrize("recompute", ["none", "selective"])
    def test_copies_stand_alone(self, name, model_type, recompute):
        """Deep and pickled copies compute the same and share neither parameters nor forwards."""
        model = build(model_type).eval()
        edit = find(name, recompute=recompute).edit(Encoder(model))
        with torch.no_grad():
            for parameter in edit.parameters:
                parameter.add_(0.1 * torch.randn_like(parameter))
        expected = run(model)
        twins = [copy.deepcopy(model)]
        if model_type != "wav2vec2":  # torch does not pickle its weight norm
            twins.append(pickle.loads(pickle.dumps(model)))
        for twin in twins:
            assert torch.equal(run(twin), expected)
            with torch.no_grad():
                for parameter in twin.parameters():
                    parameter.zero_()
            assert torch.equal(run(model), expected)
            assert not torch.equal(run(twin), expected)

    def test_a_second_edit_is_refused(self, name, model_type):
        model = build(model_type)
        encoder = Encoder(model)
        find(name).edit(encoder)
        before = state(model)
        for other in ("head", "bitfit", name):
            with pytest.raises(ValueError, match=f"edited already, by method {name!r}"):
                find(other).edit(encoder)
        assert state(model) == before


@pytest.mark.parametrize("model_type", MODELS)
@pytest.mark.parametrize("name", registry.methods())
def test_an_error_at_any_step_leaves_the_model_untouched(name, model_type):
    model = build(model_type).train()
    encoder = Encoder(model)
    options = {"recompute": "selective"} if name in EDITS else {}
    method, before = find(name, **options), state(model)
    # Imports happen once; the runs below must all take the same steps.
    method.edit(encoder).revert()
    with Steps() as steps:
        edit = method.edit(encoder)
    edit.revert()
    assert len(steps.each()) > 3
    for broken in steps.each():
        with pytest.raises(BrokenStepError), Steps(broken):
            method.edit(encoder)
        assert state(model) == before, broken
    method.edit(encoder)


@pytest.mark.parametrize("model_type", MODELS)
def test_a_method_that_fails_half_way(model_type):
    """One that a user wrote, which checks nothing first."""

    class Failing(LearntMerge):
        def change(self, edit, encoder, layers):
            super().change(edit, encoder, layers)
            raise KeyError("half way")

    model = build(model_type)
    before = state(model)
    with pytest.raises(KeyError, match="half way"):
        Failing().edit(Encoder(model))
    assert state(model) == before


def test_untouched_on_error():
    def fail(model):
        model.eval().to(torch.bfloat16).requires_grad_(False)
        raise KeyError("late")

    model = build()
    before = state(model)
    with pytest.raises(KeyError, match="late"), untouched_on_error(model):
        fail(model)
    assert state(model) == before
    with untouched_on_error(model):
        model.eval()
    assert not model.training
