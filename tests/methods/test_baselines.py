"""The baselines: their values, trained parameters and counts."""

from __future__ import annotations

import copy

import pytest
import torch
from prepared_models import build, encode, gradients, layers_of, perturb, prepared
from tiny_encoders import TINY, make_input
from torch.nn import functional as F
from transformers import ASTConfig, ASTForAudioClassification
from written_adapters import serial

import mmtransfer
from mmtransfer import registry
from mmtransfer.demo.experiments import synthetic_experiment
from mmtransfer.encoders import DESCRIPTIONS, Encoder, describe

CONFORMERS = ("wav2vec2-conformer", "wav2vec2-bert")


@pytest.mark.parametrize("model_type", TINY)
def test_houlsby_starts_as_the_frozen_model_and_trains_only_its_adapters(model_type):
    model = build(model_type)
    expected = encode(model)
    names = mmtransfer.prepare(model, "houlsby", backend="reference").trainable
    torch.testing.assert_close(encode(model), expected)
    assert {name.rpartition(".")[0] for name in names} == {
        f"{describe(model).layers}.{layer}.adapter_{place}"
        for layer in range(4)
        for place in ("attention", "mlp")
    }
    perturb(model)
    assert not torch.allclose(encode(model), expected, atol=1e-3)
    found = gradients(model)
    assert found.keys() == set(names)
    assert all(gradient.abs().sum() > 0 for gradient in found.values())


def test_houlsby_written_out():
    plain = build("audio-spectrogram-transformer")
    layer = layers_of(prepared(plain, "houlsby"))[0]
    plain = layers_of(plain)[0]
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    y = x + serial(layer.adapter_attention, plain.attention(plain.layernorm_before(x))[0])
    mlp = plain.mlp(plain.layernorm_after(y))
    torch.testing.assert_close(layer(x), y + serial(layer.adapter_mlp, mlp))


class TestPrompts:
    @pytest.mark.parametrize(
        "model_type", [name for name in TINY if DESCRIPTIONS[name].attention_alone_mixes]
    )
    def test_prompts_are_seen_and_their_outputs_dropped(self, model_type):
        plain = build(model_type)
        expected = encode(plain)
        model = prepared(plain, "prompt", prompt_tokens=3)
        got = encode(model)
        assert got.shape == expected.shape
        assert not torch.allclose(got, expected, atol=1e-3)
        names = [f"{describe(model).layers}.{layer}.prompt" for layer in range(4)]
        found = gradients(model)
        assert list(found) == names
        assert all(gradient.abs().sum(1).min() > 0 for gradient in found.values())

    @pytest.mark.parametrize("model_type", ["bert", "distilbert", "wav2vec2", "wavlm"])
    @pytest.mark.parametrize("attention", ["eager", "sdpa"])
    def test_prompts_under_a_padding_mask(self, model_type, attention):
        """An utterance has one result alone and in a padded batch: prompts are visible and padding is not."""
        if model_type == "wavlm" and attention == "sdpa":
            pytest.skip("wavlm has eager attention only")
        model = prepared(build(model_type, attn_implementation=attention), "prompt", prompt_tokens=3)
        inputs = make_input(model_type, batch=2)
        size = inputs.shape[1] // 2
        mask = torch.ones(2, inputs.shape[1], dtype=torch.long)
        mask[0, size:] = 0
        alone = encode(model, inputs[:1, :size])
        padded = encode(model, inputs, attention_mask=mask)[:1, : alone.shape[1]]
        torch.testing.assert_close(alone, padded)

    def test_prompts_written_out(self):
        plain = build("audio-spectrogram-transformer")
        model = prepared(plain, "prompt", prompt_tokens=3)
        x = plain.embeddings(make_input("audio-spectrogram-transformer").double())
        for layer, with_prompt in zip(plain.layers, model.layers, strict=True):
            prompt = with_prompt.prompt.double().expand(x.shape[0], -1, -1)
            x = layer(torch.cat([prompt, x], dim=1))[:, 3:]
        torch.testing.assert_close(encode(model), plain.layernorm(x))


@pytest.fixture(scope="module")
def spectrogram_transformer():
    """Of the paper's size, without its weights."""
    with torch.device("meta"):
        return ASTForAudioClassification(ASTConfig(num_labels=20))


class TestCounts:
    @pytest.mark.parametrize(
        ("method", "encoder_count"),
        [
            ("houlsby", 7_100_928),
            ("prompt", 12 * 12 * 768),
            # The upper half.
            ("partial", 6 * 7_087_872),
            ("head", 0),
            ("bitfit", 12 * (4 * 768 + 3072 + 768 + 2 * 768) + 2 * 768),
        ],
    )
    def test_of_the_paper(self, spectrogram_transformer, method, encoder_count):
        model = copy.deepcopy(spectrogram_transformer)
        before = sum(p.numel() for p in model.parameters())
        handle = mmtransfer.prepare(model, method)
        assert handle.trainable_parameters == encoder_count + 1_536 + 769 * 20
        assert handle.trainable_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
        new = encoder_count if method in ("houlsby", "prompt") else 0
        assert handle.total_parameters == before + new

    def test_full(self, spectrogram_transformer):
        handle = mmtransfer.prepare(copy.deepcopy(spectrogram_transformer), "full")
        assert handle.trainable_parameters == handle.total_parameters


def test_lora():
    model = build("audio-spectrogram-transformer")
    keys, expected = list(model.state_dict()), encode(model)
    handle = mmtransfer.prepare(model, "lora", rank=2)
    assert handle.trainable_parameters == 4 * 2 * (2 * 16 + 16 * 2)
    torch.testing.assert_close(encode(model), expected)
    perturb(model)
    assert gradients(model).keys() == set(handle.trainable)
    handle.revert()
    assert list(model.state_dict()) == keys
    assert not hasattr(model, "peft_config")
    assert torch.equal(encode(model), expected)


def test_partial_is_the_upper_half_or_the_layers_named():
    model = build("bert", num_hidden_layers=8)
    names = mmtransfer.prepare(model, "partial").trainable
    assert {name.split(".")[2] for name in names} == {"4", "5", "6", "7"}
    mmtransfer.revert(model)
    names = mmtransfer.prepare(model, "partial", layers=[-1, 0]).trainable
    assert {name.split(".")[2] for name in names} == {"0", "7"}


class TestMLP:
    def test_it_has_as_many_parameters_as_the_tree_that_it_controls(self) -> None:
        encoder = Encoder(synthetic_experiment().model)
        sizes = [
            sum(parameter.numel() for parameter in registry.find(name).readout(encoder).parameters())
            for name in ("mlp", "hff-b")
        ]
        assert 0.95 < sizes[0] / sizes[1] < 1.05

    def test_values(self) -> None:
        encoder = Encoder(synthetic_experiment().model)
        readout = registry.find("mlp", hidden=7, out_dim=5).readout(encoder)
        assert readout.out_dim == 5
        x = torch.randn(3, 1, encoder.hidden_size)
        norm, down, _, up, _ = readout.layers
        expected = F.relu(up(F.relu(down(F.layer_norm(x[:, 0], x.shape[2:], norm.weight, norm.bias)))))
        torch.testing.assert_close(readout(x), expected)
        assert down.out_features == 7
