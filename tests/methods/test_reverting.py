"""Faults that a user of several models on one encoder would not see: each was silently wrong once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from tiny_encoders import TINY
from torch import nn

from mmtransfer import AdaptedModel, Edit, EditMethod, Encoder, Group, Method, prepare, registry
from mmtransfer.method import Combination, LastLayer
from mmtransfer.tasks import Classification
from mmtransfer.training.loop import parameter_groups
from mmtransfer.training.settings import Training

TASK = Classification(num_labels=3)


def build() -> nn.Module:
    return TINY["wav2vec2"].build()


def trained(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def test_a_frozen_model_cannot_be_reverted_under_an_edit_of_another() -> None:
    encoder = build()
    frozen = AdaptedModel(encoder, "head", TASK)
    edited = AdaptedModel(encoder, "aat-ms", TASK)
    count = trained(edited)
    with pytest.raises(ValueError, match="edited elsewhere, by method 'aat-ms'"):
        frozen.revert()
    assert trained(edited) == count


def test_a_second_revert_does_nothing() -> None:
    encoder = build()
    model = AdaptedModel(encoder, "aat-m", TASK)
    model.revert()
    encoder.requires_grad_(False)
    model.revert()
    assert trained(encoder) == 0


def test_a_reverted_model_is_not_saved(tmp_path) -> None:
    model = AdaptedModel(build(), "aat-m", TASK)
    model.revert()
    with pytest.raises(ValueError, match="the edit of aat-m was reverted"):
        model.save_pretrained(tmp_path)


@dataclass(frozen=True, kw_only=True)
class Grouped(Method):
    """A readout whose group is an iterator."""

    name: ClassVar[str] = "grouped"
    title: ClassVar[str] = "Grouped"
    paper: ClassVar[str] = "a test"

    def readout(self, encoder: Encoder) -> nn.Module:
        readout: Any = nn.Sequential(LastLayer(encoder.hidden_size), nn.Linear(encoder.hidden_size, 8))
        readout.out_dim = 8
        return readout

    def parameter_groups(self, model: Any) -> dict[str, Group]:
        return {"readout": Group(model.readout.parameters(), 1e-2)}


def test_a_group_may_be_an_iterator() -> None:
    model = AdaptedModel(build(), Grouped(), TASK)
    groups = parameter_groups(model, Training())
    assert sum(parameter.numel() for group in groups for parameter in group["params"]) == trained(model)


@dataclass(frozen=True, kw_only=True)
class Noted(EditMethod):
    """An edit of a plain attribute."""

    name: ClassVar[str] = "noted"
    title: ClassVar[str] = "Noted"
    paper: ClassVar[str] = "a test"

    def change(self, edit: Edit, encoder: Encoder, layers: list[nn.Module]) -> None:
        for layer in layers:
            edit.note(layer.attention, "scaling")
            layer.attention.scaling = 0.0


def test_a_changed_attribute_is_an_edit() -> None:
    assert not AdaptedModel(build(), Noted(), TASK).edit_is_empty


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_lora_trains_in_float32(dtype: torch.dtype) -> None:
    pytest.importorskip("peft")
    model = build().to(dtype)
    prepared = prepare(model, "lora")
    assert {model.get_parameter(name).dtype for name in prepared.trainable} == {torch.float32}


def test_a_head_inside_the_encoder_is_refused() -> None:
    model = TINY["wav2vec2"].build(True)
    with pytest.raises(ValueError, match=r"head 'wav2vec2.feature_projection' is inside the encoder"):
        prepare(model, "aat-ms", head=["lm_head", "wav2vec2.feature_projection"])


def test_a_pair_in_the_wrong_order_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'aat-ms\+hff-b' must be one method, or a readout \+ an edit"):
        Combination(of=(registry.find("aat-ms"), registry.find("hff-b")))
