"""An AdaptedModel in training: what is refused, and derivatives beyond the first."""

from __future__ import annotations

import pytest
import torch
from tiny_encoders import TINY, make_input

import mmtransfer
from mmtransfer import AdaptedModel
from mmtransfer.hff import LFF, HFFb, HFFub, WeightedSum
from mmtransfer.tasks import Classification

LABELS = torch.tensor([0, 1, 2])


def adapted(method: str) -> AdaptedModel:
    return AdaptedModel(TINY["wav2vec2"].build(), method, Classification(num_labels=3))


@pytest.mark.parametrize("method", ["weighted-sum", "aat-ms"])
def test_a_model_that_was_cast_to_float16_is_not_trained(method):
    model = adapted(method).half().train()
    inputs = make_input("wav2vec2").half()
    with pytest.raises(ValueError, match="would be trained in float16"):
        model(input_values=inputs, labels=LABELS)
    with torch.no_grad():
        assert model(input_values=inputs).logits.isfinite().all()


def test_a_head_that_becomes_float16_between_two_steps_is_noticed():
    model = TINY["wav2vec2"].build(head=True).train()
    mmtransfer.prepare(model, "aat-m")
    model(make_input("wav2vec2")).logits.sum().backward()
    head = next(child for child in model.children() if isinstance(child, torch.nn.Linear)).half()
    assert any(parameter.requires_grad for parameter in head.parameters())
    with pytest.raises(ValueError, match="would be trained in float16"):
        model(make_input("wav2vec2"))


@pytest.mark.parametrize("fusion", [WeightedSum, LFF, HFFb, HFFub])
def test_a_fusion_takes_features_of_a_half_encoder(fusion):
    module, features = fusion(4, 16, out_dim=8), torch.randn(5, 4, 16)
    found = module(features.half())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, module(features.half().float()))


@pytest.mark.parametrize("lengths", [None, torch.tensor([400, 320, 240])])
def test_transforms_go_through_an_edited_encoder(lengths):
    model = adapted("hff-b+hff-adapters").double().eval()
    model.encoder.model.set_attn_implementation("eager")
    inputs = make_input("wav2vec2").double()
    if lengths is not None:
        lengths = (lengths * inputs.shape[1] / 400).long()
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(values):
        call = {"input_values": inputs, "lengths": lengths}
        return torch.func.functional_call(model, values, kwargs=call).logits.square().sum()

    found = torch.func.grad(loss)(parameters)
    model(input_values=inputs, lengths=lengths).logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(found[name], parameter.grad)
