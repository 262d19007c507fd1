"""All that an adapted model trains takes part in its loss, which DistributedDataParallel needs."""

from __future__ import annotations

import pytest
import torch
from encoder_cases import VARIANTS
from prepared_models import complete
from tiny_encoders import TINY, make_input

from mmtransfer import AdaptedModel, prepare, registry
from mmtransfer.method import EditMethod
from mmtransfer.tasks import Classification

EDITS = [name for name, each in registry.methods().items() if issubclass(each, EditMethod)]
IMPOSSIBLE = {
    ("prompt", "wav2vec2-conformer"),
    ("prompt", "wav2vec2-bert"),
    ("prompt", "gpt2"),
    ("lora", "wavlm"),
    ("lora", "gpt2"),
}


@pytest.mark.parametrize("taps", [None, [0, 2]], ids=str)
@pytest.mark.parametrize("method", EDITS)
@pytest.mark.parametrize(("model_type", "changes"), VARIANTS, ids=str)
def test_all_that_is_trained_gets_a_gradient(model_type, changes, method, taps):
    if (method, model_type) in IMPOSSIBLE or (method == "prompt" and model_type == "wavlm" and taps):
        pytest.skip("a method that the type cannot have")
    method = method if taps is None else f"hff-b+{method}"
    options = {} if taps is None else {"taps": taps}
    if model_type in ("wav2vec2", "hubert"):
        changes = {**changes, "add_adapter": True, "output_hidden_size": 16}
    model = AdaptedModel(
        TINY[model_type].build(**changes), complete(method), Classification(num_labels=3), **options
    ).train()
    name = model.encoder.description.main_input
    model(**{name: make_input(model_type)}, labels=torch.tensor([0, 1, 2])).loss.backward()
    idle = [name for name, each in model.named_parameters() if each.requires_grad and each.grad is None]
    assert idle == []


def test_a_prepared_model_trains_what_its_own_forward_uses():
    names = prepare(TINY["bert"].build(), "full").trainable
    assert "pooler.dense.weight" in names
    names = prepare(TINY["wav2vec2"].build(), "bitfit").trainable
    assert "encoder.layer_norm.bias" in names
