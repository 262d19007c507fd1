"""AAT in every model: places, values and numbers of parameters of the adapters."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from prepared_models import build, encode, gradients, layers_of, perturb, prepared, rewritten
from tiny_encoders import BASE_VARIANT, TINY, make_input
from torch import nn
from torch.nn import functional as F
from transformers import ASTConfig, ASTForAudioClassification
from written_adapters import bottleneck, first, serial

import mmtransfer
from mmtransfer.encoders import ModelDescription, describe

AAT = ("aat-ms", "aat-m", "aat-s")


class TestPlacement:
    """Whole layers, written out, with the adapters where the paper has them."""

    def layer_and_input(self, model_type, method, **changes):
        plain = build(model_type, **changes)
        model = prepared(plain, method)
        generator = torch.Generator().manual_seed(2)
        x = torch.randn(2, 7, 16, generator=generator, dtype=torch.float64)
        # The first layer, as those of wavlm take position biases from it.
        return layers_of(plain)[0], layers_of(model)[0], x

    @pytest.mark.parametrize("model_type", ["audio-spectrogram-transformer", "vit"])
    def test_pre_norm(self, model_type):
        plain, layer, x = self.layer_and_input(model_type, "aat-ms")
        y = x + serial(layer.adapter_attention, plain.attention(plain.layernorm_before(x))[0])
        h = plain.layernorm_after(y)
        torch.testing.assert_close(layer(x), y + plain.mlp(h) + bottleneck(layer.adapter_mlp, h))

    def test_one_adapter_alone(self):
        plain, layer, x = self.layer_and_input("audio-spectrogram-transformer", "aat-m")
        y = x + plain.attention(plain.layernorm_before(x))[0]
        h = plain.layernorm_after(y)
        torch.testing.assert_close(layer(x), y + plain.mlp(h) + bottleneck(layer.adapter_mlp, h))
        plain, layer, x = self.layer_and_input("audio-spectrogram-transformer", "aat-s")
        y = x + serial(layer.adapter_attention, plain.attention(plain.layernorm_before(x))[0])
        torch.testing.assert_close(layer(x), y + plain.mlp(plain.layernorm_after(y)))

    @pytest.mark.parametrize("model_type", ["wav2vec2", "hubert", "wavlm"])
    def test_speech_pre_norm(self, model_type):
        plain, layer, x = self.layer_and_input(model_type, "aat-ms")
        attention = plain.attention(plain.layer_norm(x))[0]
        y = x + serial(layer.adapter_attention, attention)
        h = plain.final_layer_norm(y)
        expected = y + plain.feed_forward(h) + bottleneck(layer.adapter_mlp, h)
        torch.testing.assert_close(first(layer(x)), expected)

    @pytest.mark.parametrize("model_type", ["wav2vec2", "hubert", "wavlm"])
    def test_speech_post_norm(self, model_type):
        plain, layer, x = self.layer_and_input(model_type, "aat-ms", **BASE_VARIANT)
        h = plain.layer_norm(x + serial(layer.adapter_attention, plain.attention(x)[0]))
        expected = plain.final_layer_norm(h + plain.feed_forward(h) + bottleneck(layer.adapter_mlp, h))
        torch.testing.assert_close(first(layer(x)), expected)

    def test_whisper(self):
        plain, layer, x = self.layer_and_input("whisper", "aat-ms")
        attention = plain.self_attn(hidden_states=plain.self_attn_layer_norm(x), attention_mask=None)[0]
        y = x + serial(layer.adapter_attention, attention)
        h = plain.final_layer_norm(y)
        expected = y + plain.fc2(F.gelu(plain.fc1(h))) + bottleneck(layer.adapter_mlp, h)
        torch.testing.assert_close(layer(x, None), expected)

    def test_bert(self):
        plain, layer, x = self.layer_and_input("bert", "aat-ms")
        output = plain.attention.output
        attention = output.dense(plain.attention.self(x)[0])
        h = output.LayerNorm(x + serial(layer.adapter_attention, attention))
        mlp = plain.output.dense(plain.intermediate(h))
        expected = plain.output.LayerNorm(h + mlp + bottleneck(layer.adapter_mlp, h))
        torch.testing.assert_close(layer(x), expected)

    def test_conformers_halve_the_mlp_with_its_adapter(self):
        plain, layer, x = self.layer_and_input("wav2vec2-bert", "aat-m")
        mask = torch.zeros(2, 1, 7, 7, dtype=torch.float64)
        got = layer(x, attention_mask=mask)
        got = got[0] if isinstance(got, tuple) else got
        h = None

        def keep(_module, args):
            nonlocal h
            (h,) = args

        plain.ffn2.register_forward_pre_hook(keep)
        before = []
        plain.final_layer_norm.register_forward_pre_hook(lambda _module, args: before.append(args[0]))
        plain(x, attention_mask=mask)
        expected = plain.final_layer_norm(before[0] + 0.5 * bottleneck(layer.adapter_mlp, h))
        torch.testing.assert_close(got, expected)

    def test_scale_and_activation(self):
        plain = build("audio-spectrogram-transformer")
        layer = layers_of(prepared(plain, "aat-s", scale=0.5, activation="relu", bottleneck=3))[0]
        adapter = layer.adapter_attention
        x = torch.randn(2, 7, 16, dtype=torch.float64)
        attention = layers_of(plain)[0].attention(x)[0]
        hidden = F.linear(attention, adapter.down_weight, adapter.down_bias).relu()
        assert hidden.shape[-1] == 3
        expected = attention + 0.5 * F.linear(hidden, adapter.up_weight, adapter.up_bias)
        torch.testing.assert_close(layer.attention(x)[0], expected)


@pytest.mark.parametrize("method", AAT)
@pytest.mark.parametrize("model_type", TINY)
def test_starts_as_the_frozen_model_and_trains_only_its_adapters(model_type, method):
    model = build(model_type)
    expected = encode(model)
    names = mmtransfer.prepare(model, method, backend="reference").trainable
    torch.testing.assert_close(encode(model), expected)
    places = {"aat-m": ["mlp"], "aat-s": ["attention"]}.get(method, ["attention", "mlp"])
    assert {name.rpartition(".")[0] for name in names} == {
        f"{describe(model).layers}.{layer}.adapter_{place}" for layer in range(4) for place in places
    }
    perturb(model)
    assert not torch.allclose(encode(model), expected, atol=1e-3)
    found = gradients(model)
    assert found.keys() == set(names)
    assert all(gradient.abs().sum() > 0 for gradient in found.values())


@pytest.fixture(scope="module")
def spectrogram_transformer():
    """Of the paper's size, without its weights."""
    with torch.device("meta"):
        return ASTForAudioClassification(ASTConfig(num_labels=20))


class TestCounts:
    @pytest.mark.parametrize(
        ("method", "encoder_count"),
        [
            ("aat-ms", 7_100_928),
            ("aat-m", 3_550_464),
            ("aat-s", 3_550_464),
        ],
    )
    def test_of_the_paper(self, spectrogram_transformer, method, encoder_count):
        model = copy.deepcopy(spectrogram_transformer)
        before = sum(p.numel() for p in model.parameters())
        handle = mmtransfer.prepare(model, method)
        assert handle.trainable_parameters == encoder_count + 1_536 + 769 * 20
        assert handle.trainable_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert handle.total_parameters == before + encoder_count

    def test_seven_point_118_million(self, spectrogram_transformer):
        model = copy.deepcopy(spectrogram_transformer)
        handle = mmtransfer.prepare(model, "aat-ms")
        assert handle.trainable_parameters == 7_117_844
        assert "7,117,844" in str(handle)
        adapter = model.audio_spectrogram_transformer.layers[0].adapter_mlp
        assert sum(p.numel() for p in adapter.parameters()) == 295_872


def test_initial_values():
    model = TINY["audio-spectrogram-transformer"].build(hidden_size=64)
    mmtransfer.prepare(model, "aat-ms")
    adapter = model.layers[0].adapter_mlp
    assert adapter.down_weight.shape == (16, 64)
    assert 0.018 < adapter.down_weight.std() < 0.022
    assert not any(p.any() for p in (adapter.down_bias, adapter.up_weight, adapter.up_bias))


@pytest.mark.parametrize("rewrite", [False, True])
def test_half_precision_model_has_float32_adapters(rewrite):
    model = TINY["audio-spectrogram-transformer"].build().to(torch.bfloat16)
    mmtransfer.prepare(model, "aat-ms", backend="reference", rewrite=rewrite)
    assert model.layers[0].adapter_mlp.down_weight.dtype == torch.float32
    output = model(make_input("audio-spectrogram-transformer").bfloat16()).last_hidden_state
    assert output.dtype == torch.bfloat16
    output.sum().backward()
    assert model.layers[0].adapter_mlp.up_weight.grad.abs().sum() > 0


class DeepNormLayer(nn.Module):
    """A layer as BEATs has it: time before batch, scaled residuals, norms after, the MLP in the layer."""

    alpha = 1.7

    def __init__(self) -> None:
        super().__init__()
        self.self_attn = nn.Module()
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            self.self_attn.add_module(name, nn.Linear(8, 8))
        self.self_attn.forward = self.attend
        self.self_attn_layer_norm, self.final_layer_norm = nn.LayerNorm(8), nn.LayerNorm(8)
        self.fc1, self.fc2 = nn.Linear(8, 12), nn.Linear(12, 8)

    def attend(self, x):
        a = self.self_attn
        q, k, v = (project(x).transpose(0, 1) for project in (a.q_proj, a.k_proj, a.v_proj))
        y = F.scaled_dot_product_attention(q, k, v).transpose(0, 1)
        return a.out_proj(y), None, None

    def forward(self, x):
        x = self.self_attn_layer_norm(self.alpha * x + self.self_attn(x)[0])
        return self.final_layer_norm(self.alpha * x + self.fc2(F.gelu(self.fc1(x)))), None


class DeepNormModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(DeepNormLayer() for _ in range(2))
        self.predictor = nn.Linear(8, 3)

    def forward(self, x):
        for layer in self.encoder.layers:
            x, _ = layer(x)
        return self.predictor(x)


DEEP_NORM = ModelDescription(
    model_type="beats",
    encoder=("encoder",),
    layers="layers",
    main_input="input_values",
    input_dims=3,
    time_dim=1,
    frames="same",
    padding="leaks",
    layer_attention="self_attn",
    layer_query="self_attn.q_proj",
    layer_key="self_attn.k_proj",
    layer_value="self_attn.v_proj",
    layer_attention_output="self_attn.out_proj",
    layer_mlp=("fc1", "fc2"),
    attention_alone_mixes=False,
)


@pytest.mark.parametrize("rewrite", [False, True])
def test_a_described_model_that_is_not_of_transformers(rewrite):
    torch.manual_seed(0)
    model = DeepNormModel().double()
    x = torch.randn(5, 2, 8, dtype=torch.float64)
    plain = copy.deepcopy(model.encoder.layers[0])
    if rewrite:
        model.encoder.config = SimpleNamespace(hidden_act="gelu")
    handle = mmtransfer.prepare(model, "aat-ms", description=DEEP_NORM, backend="reference", rewrite=rewrite)
    assert rewritten(model) == (("attention", "mlp") if rewrite else ())
    assert {"predictor.weight", "encoder.layers.1.adapter_mlp.up_bias"} < set(handle.trainable)
    perturb(model)
    layer = model.encoder.layers[0]
    h = plain.self_attn_layer_norm(plain.alpha * x + serial(layer.adapter_attention, plain.attend(x)[0]))
    mlp = plain.fc2(F.gelu(plain.fc1(h))) + bottleneck(layer.adapter_mlp, h)
    torch.testing.assert_close(layer(x)[0], plain.final_layer_norm(plain.alpha * h + mlp))
    assert model(x).shape == (5, 2, 3)
    handle.revert()
    with pytest.raises(ValueError, match="'prompt' needs layers"):
        mmtransfer.prepare(model, "prompt", description=DEEP_NORM)
