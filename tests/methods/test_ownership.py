"""Several models on one encoder: each takes back its own part, in any order."""

from __future__ import annotations

import copy
import itertools
import pickle
import threading
from typing import Any

import pytest
import torch
from encoder_cases import model_state
from tiny_encoders import TINY, make_input
from torch import nn

from mmtransfer import AdaptedModel, TappedEncoder, prepare
from mmtransfer.encoders import Edit, Encoder
from mmtransfer.encoders.recompute import Policy
from mmtransfer.tasks import Classification

TASK = Classification(num_labels=3)


def build() -> nn.Module:
    """A model, one of whose parameters was frozen before."""
    model = TINY["bert"].build().eval()
    next(model.parameters()).requires_grad_(False)
    return model


def flags(model: nn.Module) -> list[bool]:
    return [parameter.requires_grad for parameter in model.parameters()]


MAKERS: dict[str, Any] = {
    "tapped": lambda model: TappedEncoder(model, (0,)),
    "adapted": lambda model: AdaptedModel(model, "hff-b", TASK),
    "edit": lambda model: Edit.nothing(Encoder(model)),
}


@pytest.mark.parametrize("order", [*itertools.permutations(range(3))])
def test_frozen_models_revert_in_any_order(order):
    model = build()
    before = model_state(model)
    frozen = [make(model) for make in MAKERS.values()]
    for count, index in enumerate(order):
        assert not any(flags(model)), count
        frozen[index].revert()
    assert model_state(model) == before
    for each in frozen:
        each.revert()
    assert model_state(model) == before


@pytest.mark.parametrize("first", [True, False])
def test_an_edited_model_between_frozen_ones(first):
    model = build()
    before = model_state(model)
    frozen = AdaptedModel(model, "head", TASK)
    edited = AdaptedModel(model, "full", TASK)
    assert any(flags(model))
    edited.revert()
    assert not any(flags(model))
    (edited if first else frozen).revert()
    assert any(flags(model)) is not first
    frozen.revert()
    assert model_state(model) == before


def test_a_frozen_model_and_a_prepared_one():
    model = TINY["bert"].build(head=True).eval()
    before = model_state(model)
    frozen = TappedEncoder(model, (0,))
    prepared = prepare(model, "aat-ms")
    prepared.revert()
    assert not any(flags(model.bert))
    frozen.revert()
    assert model_state(model) == before


def test_a_reverted_copy_leaves_the_model_frozen():
    model = build()
    before = model_state(model)
    frozen = AdaptedModel(model, "hff-b", TASK)
    twin = frozen.copy()
    assert twin.encoder.model is model
    inputs = make_input("bert")
    assert torch.equal(twin.eval()(input_ids=inputs).logits, frozen.eval()(input_ids=inputs).logits)
    twin.revert()
    assert twin.reverted
    assert not frozen.reverted
    assert not any(flags(model))
    frozen.revert()
    assert model_state(model) == before


def test_a_copy_that_is_dropped_does_not_count():
    model = build()
    before = model_state(model)
    frozen = AdaptedModel(model, "hff-b", TASK)
    twin = frozen.copy()
    del twin
    frozen.revert()
    assert model_state(model) == before


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_deep_copy_owns_itself_alone(duplicate):
    model = build()
    expected = flags(model)
    other = AdaptedModel(model, "head", TASK)
    copied = duplicate(AdaptedModel(model, "hff-b", TASK))
    assert copied.encoder.model is not model
    copied.revert()
    assert flags(copied.encoder.model) == expected
    assert not any(flags(model))
    other.revert()
    assert flags(model) == expected


def test_threads_have_their_own_choice_of_products():
    policy = Policy()
    policy.products = True
    seen = []
    thread = threading.Thread(target=lambda: seen.append(policy.products))
    thread.start()
    thread.join()
    assert seen == [False]
    assert policy.products
    for other in (copy.deepcopy(policy), pickle.loads(pickle.dumps(policy))):
        assert isinstance(other, Policy)
        assert not other.products
