"""Finding methods: names, pairs, options and their ranges, and the JSON that options become and come from."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from prepared_models import complete
from tiny_encoders import TINY, make_input

from mmtransfer import AdaptedModel, registry
from mmtransfer.aat import AAT
from mmtransfer.hff.methods import HFFbMethod
from mmtransfer.method import Combination, EditMethod, Method
from mmtransfer.tasks import Classification

METHODS = registry.methods()
EDITS = [name for name, method in METHODS.items() if issubclass(method, EditMethod)]
READOUTS = [name for name, method in METHODS.items() if method.readout is not Method.readout]

#: Values other than the defaults, by the name of the field.
OTHER = {
    "activation": "silu",
    "aligner": "fixed",
    "aligner_description": '{"base": {}, "name": "hff-b", "options": {}, "task": {}}',
    "aligner_weight": 0.5,
    "aligner_width": 8,
    "alphabet": "abc",
    "attention": "causal",
    "backend": "reference",
    "bias": True,
    "bottleneck": 3,
    "constraint": "clamp",
    "depth": 2,
    "dropout": 0.25,
    "folded": True,
    "frames_per_token": 4.0,
    "frozen": True,
    "fusion": "hff-b",
    "heads": 2,
    "hidden": 5,
    "initial": 0.25,
    "key_heads": 1,
    "lambda_rate": 0.5,
    "layer": 0,
    "layer_map": (3, 2, 1, 0),
    "layers": (0, -1),
    "lookback": 0,
    "match_rms": True,
    "match_scale": False,
    "mixing_rate": 0.5,
    "norm": False,
    "out_dim": 6,
    "per": "global",
    "pooling": "mean",
    "projections": ("v",),
    "prompt_tokens": 2,
    "rank": 2,
    "recompute": "full",
    "rewrite": True,
    "scale": 0.5,
    "source": "N(target)",
    "source_dtype": "bfloat16",
    "taps": ("embeddings", 1, -1),
    "textless": True,
    "train_target": False,
    "width": 16,
}
#: A folder that must be there.
FOLDERS = {"aligner_model"}


def whisper() -> torch.nn.Module:
    return TINY["whisper"].build()


def fields_of(name: str) -> dict[str, dataclasses.Field]:
    return {each.name: each for each in dataclasses.fields(METHODS[name])}


class TestPairs:
    @pytest.mark.parametrize("edit", EDITS)
    @pytest.mark.parametrize("readout", READOUTS)
    def test_every_pair_runs_forwards_and_backwards(self, readout: str, edit: str) -> None:
        model = AdaptedModel(whisper(), complete(f"{readout}+{edit}"), Classification(num_labels=3))
        output = model(input_features=make_input("whisper"), labels=torch.tensor([0, 2, 1]))
        assert output.logits.shape == (3, 3)
        output.loss.backward()
        assert not model.edit_is_empty
        assert any(p.grad is not None and p.grad.any() for p in model.readout.parameters())
        inside = model.encoder.edit.parameters
        assert inside
        assert any(p.grad is not None and p.grad.any() for p in inside)
        # The norm after the last layer and the like may have no part in the result; adapters have.
        if edit not in ("full", "bitfit", "partial"):
            assert all(p.grad is not None for p in inside)

    @pytest.mark.parametrize("edit", EDITS)
    @pytest.mark.parametrize("readout", READOUTS)
    def test_a_pair_is_its_two_parts(self, readout: str, edit: str) -> None:
        pair = registry.find(f"{readout}+{edit}")
        one, other = registry.find(readout), registry.find(edit)
        assert isinstance(pair, Combination)
        assert pair.parts() == (one, other)
        assert pair.name == f"{readout}+{edit}"
        assert pair.title == f"{one.title} + {other.title}"
        assert pair.training == other.training
        assert pair.starts_from == readout
        assert pair.options() == {**one.options(), **other.options()}

    @pytest.mark.parametrize(
        "name",
        ["hff-b+lff", "aat-ms+hff-b", "head+aat-ms", "hff-b+head", "aat-ms+hff-b+lora", "hff-b+lff+lora"],
    )
    def test_other_pairs_are_refused_with_those_that_are_possible(self, name: str) -> None:
        with pytest.raises(ValueError, match="must be one method, or a readout") as raised:
            registry.find(name)
        text = str(raised.value)
        assert repr(name) in text
        assert f"readouts are {', '.join(READOUTS)}" in text
        assert f"edits are {', '.join(EDITS)}" in text


class TestSeveralEdits:
    def test_it_is_its_parts(self) -> None:
        found = registry.find("hff-b+lora+aat-ms", rank=3, bottleneck=5, **{"aat-ms": {"layers": (0,)}})
        lora, aat = registry.find("lora", rank=3), registry.find("aat-ms", bottleneck=5, layers=(0,))
        assert found.parts() == (registry.find("hff-b"), lora, aat)
        assert found.name == "hff-b+lora+aat-ms"
        assert (found.has_readout, found.has_edit, found.starts_from) == (True, True, "hff-b")
        without = registry.find("lora+aat-ms")
        assert (without.has_readout, without.has_edit, without.starts_from) == (False, True, "head")

    def test_recompute_wraps_a_layer_once(self) -> None:
        model = whisper()
        found = registry.find("full+aat-ms", recompute="full", **{"aat-ms": {"layers": (1,)}})
        AdaptedModel(model, found, Classification(num_labels=3))
        kinds = [type(each.forward.inner).__name__ for each in model.encoder.layers]
        assert kinds == ["method"] * len(model.encoder.layers)

    @pytest.mark.parametrize(
        ("name", "options", "message"),
        [
            ("lora+lora", {}, "names a method twice"),
            (
                "full+aat-ms",
                {"full": {"recompute": "full"}, "aat-ms": {"recompute": "selective"}},
                "one value of",
            ),
            ("aat-ms+aat-m", {}, "has an attribute 'adapter_mlp' already"),
        ],
    )
    def test_what_does_not_go_together(self, name: str, options: dict[str, Any], message: str) -> None:
        model = whisper()
        before = {key: (id(value), value.requires_grad) for key, value in model.named_parameters()}
        with pytest.raises(ValueError, match=message):
            AdaptedModel(model, registry.find(name, **options), Classification(num_labels=3))
        assert {key: (id(value), value.requires_grad) for key, value in model.named_parameters()} == before


class TestNames:
    @pytest.mark.parametrize("name", METHODS)
    def test_every_method_is_found_with_its_defaults(self, name: str) -> None:
        found = registry.find(name)
        assert found == METHODS[name]()
        assert (found.name, found.parts()) == (name, (found,))
        assert found.title
        assert found.paper in found.about()

    @pytest.mark.parametrize(
        ("name", "close"), [("aat_ms", "aat-ms"), ("hffb", "hff-b"), ("weighted_sum", "weighted-sum")]
    )
    def test_a_wrong_name_gets_all_and_the_closest(self, name: str, close: str) -> None:
        with pytest.raises(ValueError, match=f"no method is called '{name}'") as raised:
            registry.find(name)
        assert f"did you mean {close!r}?" in str(raised.value)
        assert ", ".join(METHODS) in str(raised.value)

    @pytest.mark.parametrize("name", ["", "+", "hff-b+", "+aat-ms", "hff-b + aat-ms", "HFF-b"])
    def test_names_that_are_no_names(self, name: str) -> None:
        with pytest.raises(ValueError, match="no method is called"):
            registry.find(name)

    def test_names_are_unique_over_the_papers(self) -> None:
        listed = [method.name for paper in registry.PAPERS for method in registry._folder(paper).METHODS]
        assert len(listed) == len(set(listed)) == len(METHODS)
        assert {name for each in registry.default_names() for name in each.split("+")} <= set(METHODS)


class TestOptions:
    def test_of_an_instance(self) -> None:
        method = AAT(bottleneck=3)
        assert registry.find(method) is method
        changed = registry.find(method, scale=0.5, backend="reference")
        assert changed == AAT(bottleneck=3, scale=0.5, backend="reference")
        assert method == AAT(bottleneck=3)

    def test_of_an_instance_of_a_pair(self) -> None:
        pair = registry.find("hff-b+aat-ms", bottleneck=3)
        changed = registry.find(pair, out_dim=6, backend="reference")
        assert changed.parts() == (
            HFFbMethod(out_dim=6, backend="reference"),
            AAT(bottleneck=3, backend="reference"),
        )
        assert pair.parts() == (HFFbMethod(), AAT(bottleneck=3))

    def test_one_of_a_pair_goes_to_each_part_that_has_it_and_under_a_name_to_one(self) -> None:
        both = registry.find("hff-b+aat-ms", activation="silu")
        assert [part.activation for part in both.parts()] == ["silu", "silu"]
        one = registry.find("hff-b+aat-ms", activation="silu", **{"aat-ms": {"activation": "relu"}})
        assert [part.activation for part in one.parts()] == ["silu", "relu"]

    def test_under_a_name_wins_in_any_order(self) -> None:
        one = registry.find("hff-b+aat-ms", **{"aat-ms": {"activation": "relu"}, "activation": "silu"})
        assert [part.activation for part in one.parts()] == ["silu", "relu"]

    @pytest.mark.parametrize("name", METHODS)
    def test_an_unknown_one_gets_those_that_there_are(self, name: str) -> None:
        with pytest.raises(ValueError, match=f"{name} has no option 'colour'") as raised:
            registry.find(name, colour=3)
        assert f"it has {', '.join(sorted(fields_of(name))) or 'none'}" in str(raised.value)

    def test_unknown_ones_of_a_pair(self) -> None:
        with pytest.raises(ValueError, match=r"hff-b\+aat-ms has no option 'width'; it has activation, back"):
            registry.find("hff-b+aat-ms", width=3)
        with pytest.raises(ValueError, match="hff-b has no option 'rank'; it has activation, backend"):
            registry.find("hff-b+aat-ms", **{"hff-b": {"rank": 2}})
        with pytest.raises(ValueError, match=r"hff-b\+aat-ms has no option 'lora'"):
            registry.find("hff-b+aat-ms", lora={"rank": 3})

    def test_that_a_method_has_an_option(self) -> None:
        pair = registry.find("hff-b+aat-ms")
        assert all(registry.has_option(pair, key) for key in ("taps", "bottleneck", "hff-b", "aat-ms"))
        assert not any(registry.has_option(pair, key) for key in ("rank", "lora", "of", "name"))

    @pytest.mark.parametrize("name", METHODS)
    def test_values_are_checked_by_their_types(self, name: str) -> None:
        for field in fields_of(name):
            with pytest.raises(ValueError, match=f"{name}: {field} must be .*, got <object"):
                registry.find(name, **{field: object()})

    @pytest.mark.parametrize("name", METHODS)
    def test_values_are_checked_by_their_ranges(self, name: str) -> None:
        for field, each in fields_of(name).items():
            if choices := each.metadata.get("choices"):
                with pytest.raises(
                    ValueError, match=f"{name}: {field} must be one of {', '.join(choices)}, got"
                ):
                    registry.find(name, **{field: "other"})
            if (least := each.metadata.get("least")) is not None:
                for value in (least - 1, -3):
                    with pytest.raises(ValueError, match=f"{name}: {field} must be at least {least}, got"):
                        registry.find(name, **{field: value})

    @pytest.mark.parametrize("name", METHODS)
    def test_numbers_are_finite_and_no_truth_values(self, name: str) -> None:
        for field in fields_of(name).keys() & {"mixing_rate", "scale"}:
            for value in (float("nan"), float("inf"), True):
                with pytest.raises(ValueError, match=f"{name}: {field} must be (finite|float|at least)"):
                    registry.find(name, **{field: value})
        for field in fields_of(name).keys() & {"bottleneck", "out_dim", "depth", "rank", "prompt_tokens"}:
            for value in (True, 2.0):
                with pytest.raises(ValueError, match=rf"{name}: {field} must be int( \| None)?, got"):
                    registry.find(name, **{field: value})


class TestJSON:
    @pytest.mark.parametrize("name", [*METHODS, "hff-b+aat-ms", "weighted-sum+lora"])
    def test_options_come_back(self, name: str) -> None:
        plain = registry.find(name)
        other = {key: value for key, value in OTHER.items() if registry.has_option(plain, key)}
        for given in ({}, other):
            method = registry.find(name, **given)
            text = json.dumps(method.options(), allow_nan=False)
            again = registry.find(name, **json.loads(text))
            assert again.options() == method.options()
            runtime = {
                each.name: getattr(part, each.name)
                for part in method.parts()
                for each in dataclasses.fields(part)
                if each.metadata.get("runtime")
            }
            assert not runtime.keys() & {key for part in method.options().values() for key in part}
            assert registry.find(again, **runtime) == method

    def test_every_field_has_another_value_here(self) -> None:
        """So that the test above leaves none out."""
        fields = {field for name in METHODS for field in fields_of(name)} - FOLDERS
        assert fields == set(OTHER)
        for name in METHODS:
            for field, each in fields_of(name).items():
                assert field in FOLDERS or OTHER[field] != each.default

    def test_methods_are_values(self) -> None:
        assert len({registry.find("aat-ms", layers=[1]), AAT(layers=(1,)), AAT()}) == 2
