"""What `aat.prepare` computes, trains and counts, for every model type and method."""

from __future__ import annotations

import copy
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from aat_models import build, encode, gradients, perturb, prepared
from tiny_encoders import BASE_VARIANT, TINY, make_input
from torch import nn
from torch.nn import functional as F
from transformers import ASTConfig, ASTForAudioClassification

from mmtransfer import aat
from mmtransfer.encoders import descriptions as models

AAT = ("aat_ms", "aat_m", "aat_s")
WITH_NEW_PARAMETERS = (*AAT, "houlsby", "prompt")
CONFORMERS = ("wav2vec2-conformer", "wav2vec2-bert")


def bottleneck(adapter: nn.Module, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """The adapter as the paper writes it, on the parameters of `mmkernels.nn.Adapter`."""
    hidden = F.gelu(F.linear(x, adapter.down_weight, adapter.down_bias))
    return scale * F.linear(hidden, adapter.up_weight, adapter.up_bias)


def serial(adapter: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return x + bottleneck(adapter, x)


class TestPlacement:
    """Whole layers, written out, with the adapters where the paper has them."""

    def layer_and_input(self, model_type, method, **changes):
        plain = build(model_type, **changes)
        model = prepared(plain, method)
        generator = torch.Generator().manual_seed(2)
        x = torch.randn(2, 7, 16, generator=generator, dtype=torch.float64)
        # The first layer, as those of wavlm take position biases from it.
        return models.get_layers(plain)[0], models.get_layers(model)[0], x

    @pytest.mark.parametrize("model_type", ["audio-spectrogram-transformer", "vit"])
    def test_pre_norm(self, model_type):
        plain, layer, x = self.layer_and_input(model_type, "aat_ms")
        y = x + serial(layer.adapter_attention, plain.attention(plain.layernorm_before(x))[0])
        h = plain.layernorm_after(y)
        torch.testing.assert_close(layer(x), y + plain.mlp(h) + bottleneck(layer.adapter_mlp, h))

    def test_one_adapter_alone(self):
        plain, layer, x = self.layer_and_input("audio-spectrogram-transformer", "aat_m")
        y = x + plain.attention(plain.layernorm_before(x))[0]
        h = plain.layernorm_after(y)
        torch.testing.assert_close(layer(x), y + plain.mlp(h) + bottleneck(layer.adapter_mlp, h))
        plain, layer, x = self.layer_and_input("audio-spectrogram-transformer", "aat_s")
        y = x + serial(layer.adapter_attention, plain.attention(plain.layernorm_before(x))[0])
        torch.testing.assert_close(layer(x), y + plain.mlp(plain.layernorm_after(y)))

    def test_houlsby(self):
        plain, layer, x = self.layer_and_input("audio-spectrogram-transformer", "houlsby")
        y = x + serial(layer.adapter_attention, plain.attention(plain.layernorm_before(x))[0])
        mlp = plain.mlp(plain.layernorm_after(y))
        torch.testing.assert_close(layer(x), y + serial(layer.adapter_mlp, mlp))

    @pytest.mark.parametrize("model_type", ["wav2vec2", "hubert", "wavlm"])
    def test_speech_pre_norm(self, model_type):
        plain, layer, x = self.layer_and_input(model_type, "aat_ms")
        attention = plain.attention(plain.layer_norm(x))[0]
        y = x + serial(layer.adapter_attention, attention)
        h = plain.final_layer_norm(y)
        expected = y + plain.feed_forward(h) + bottleneck(layer.adapter_mlp, h)
        torch.testing.assert_close(first(layer(x)), expected)

    @pytest.mark.parametrize("model_type", ["wav2vec2", "hubert", "wavlm"])
    def test_speech_post_norm(self, model_type):
        plain, layer, x = self.layer_and_input(model_type, "aat_ms", **BASE_VARIANT)
        h = plain.layer_norm(x + serial(layer.adapter_attention, plain.attention(x)[0]))
        expected = plain.final_layer_norm(h + plain.feed_forward(h) + bottleneck(layer.adapter_mlp, h))
        torch.testing.assert_close(first(layer(x)), expected)

    def test_whisper(self):
        plain, layer, x = self.layer_and_input("whisper", "aat_ms")
        attention = plain.self_attn(hidden_states=plain.self_attn_layer_norm(x), attention_mask=None)[0]
        y = x + serial(layer.adapter_attention, attention)
        h = plain.final_layer_norm(y)
        expected = y + plain.fc2(F.gelu(plain.fc1(h))) + bottleneck(layer.adapter_mlp, h)
        torch.testing.assert_close(layer(x, None), expected)

    def test_bert(self):
        plain, layer, x = self.layer_and_input("bert", "aat_ms")
        output = plain.attention.output
        attention = output.dense(plain.attention.self(x)[0])
        h = output.LayerNorm(x + serial(layer.adapter_attention, attention))
        mlp = plain.output.dense(plain.intermediate(h))
        expected = plain.output.LayerNorm(h + mlp + bottleneck(layer.adapter_mlp, h))
        torch.testing.assert_close(layer(x), expected)

    def test_conformers_halve_the_mlp_with_its_adapter(self):
        plain, layer, x = self.layer_and_input("wav2vec2-bert", "aat_m")
        mask = torch.zeros(2, 1, 7, 7, dtype=torch.float64)
        got = layer(x, attention_mask=mask)
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
        layer = models.get_layers(prepared(plain, "aat_s", scale=0.5, activation="relu", bottleneck=3))[0]
        adapter = layer.adapter_attention
        x = torch.randn(2, 7, 16, dtype=torch.float64)
        attention = models.get_layers(plain)[0].attention(x)[0]
        hidden = F.linear(attention, adapter.down_weight, adapter.down_bias).relu()
        assert hidden.shape[-1] == 3
        expected = attention + 0.5 * F.linear(hidden, adapter.up_weight, adapter.up_bias)
        torch.testing.assert_close(layer.attention(x)[0], expected)


def first(output):
    return output[0] if isinstance(output, tuple) else output


class TestEveryModel:
    @pytest.mark.parametrize("model_type", TINY)
    def test_starts_as_the_frozen_model_and_trains_only_its_own(self, model_type):
        plain = build(model_type)
        expected = encode(plain)
        for method in (*AAT, "houlsby"):
            model = copy.deepcopy(plain)
            names = aat.prepare(model, method, backend="reference").trainable
            torch.testing.assert_close(encode(model), expected)
            places = {"aat_m": ["mlp"], "aat_s": ["attention"]}.get(method, ["attention", "mlp"])
            assert {name.rpartition(".")[0] for name in names} == {
                f"{models.describe(model).layers}.{layer}.adapter_{place}"
                for layer in range(4)
                for place in places
            }
            perturb(model)
            assert not torch.allclose(encode(model), expected, atol=1e-3)
            found = gradients(model)
            assert found.keys() == set(names)
            assert all(gradient.abs().sum() > 0 for gradient in found.values())

    @pytest.mark.parametrize("model_type", TINY)
    def test_reverting_restores_everything(self, model_type):
        model = build(model_type)
        keys, expected = list(model.state_dict()), encode(model)
        next(model.parameters()).requires_grad_(False)
        flags = [p.requires_grad for p in model.parameters()]
        for method in aat.METHODS:
            impossible = {"head": True, "prompt": model_type in CONFORMERS, "lora": model_type == "wavlm"}
            if impossible.get(method, False):
                continue
            handle = aat.prepare(model, method, recompute="selective")
            handle.revert()
            assert list(model.state_dict()) == keys
            assert [p.requires_grad for p in model.parameters()] == flags
            assert not any("forward" in module.__dict__ for module in model.modules())
            assert torch.equal(encode(model), expected)
        with pytest.raises(ValueError, match="reverted before"):
            handle.revert()

    @pytest.mark.parametrize("model_type", [name for name in TINY if name not in CONFORMERS])
    def test_prompts_are_seen_and_their_outputs_dropped(self, model_type):
        plain = build(model_type)
        expected = encode(plain)
        model = prepared(plain, "prompt", prompt_tokens=3)
        got = encode(model)
        assert got.shape == expected.shape
        assert not torch.allclose(got, expected, atol=1e-3)
        names = [f"{models.describe(model).layers}.{layer}.prompt" for layer in range(4)]
        found = gradients(model)
        assert list(found) == names
        assert all(gradient.abs().sum(1).min() > 0 for gradient in found.values())

    @pytest.mark.parametrize("model_type", ["bert", "distilbert", "wav2vec2", "wavlm"])
    @pytest.mark.parametrize("attention", ["eager", "sdpa"])
    def test_prompts_under_a_padding_mask(self, model_type, attention):
        """An utterance alone is what it is in a padded batch, so prompts are visible and padding is not."""
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
            ("aat_ms", 7_100_928),
            ("aat_m", 3_550_464),
            ("aat_s", 3_550_464),
            ("houlsby", 7_100_928),
            ("prompt", 12 * 12 * 768),
            ("partial", 6 * 7_087_872),
            ("head", 0),
            ("bitfit", 12 * (4 * 768 + 3072 + 768 + 2 * 768) + 2 * 768),
        ],
    )
    def test_of_the_paper(self, spectrogram_transformer, method, encoder_count):
        model = copy.deepcopy(spectrogram_transformer)
        before = sum(p.numel() for p in model.parameters())
        handle = aat.prepare(model, method)
        assert handle.trainable_parameters == encoder_count + 1_536 + 769 * 20
        assert handle.trainable_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
        new = encoder_count if method in WITH_NEW_PARAMETERS else 0
        assert handle.total_parameters == before + new

    def test_seven_point_118_million(self, spectrogram_transformer):
        handle = aat.prepare(copy.deepcopy(spectrogram_transformer))
        assert handle.trainable_parameters == 7_117_844
        assert "7,117,844" in str(handle)
        adapter = handle._model.audio_spectrogram_transformer.layers[0].adapter_mlp
        assert sum(p.numel() for p in adapter.parameters()) == 295_872

    def test_full(self, spectrogram_transformer):
        handle = aat.prepare(copy.deepcopy(spectrogram_transformer), "full")
        assert handle.trainable_parameters == handle.total_parameters


class TestTrainable:
    def test_heads(self):
        model = TINY["audio-spectrogram-transformer"].build(head=True)
        heads = {"classifier.layernorm.weight", "classifier.layernorm.bias"}
        heads |= {"classifier.dense.weight", "classifier.dense.bias"}
        assert set(aat.prepare(model, "head").trainable) == heads
        aat.revert(model)
        assert set(aat.prepare(model, "head", head="classifier.dense").trainable) < heads
        aat.revert(model)
        assert (
            aat.prepare(model, "aat_m", head=[], layers=[-1])
            .trainable[0]
            .startswith("audio_spectrogram_transformer.layers.3.adapter_mlp.")
        )

    def test_parameters_shared_with_the_encoder_stay_frozen(self):
        """A masked language model's decoder is the encoder's embedding table."""
        model = TINY["bert"].build(head=True)
        assert not any("word_embeddings" in name for name in aat.prepare(model, "head").trainable)
        assert not model.bert.embeddings.word_embeddings.weight.requires_grad

    def test_heads_of_audio_classifiers(self):
        """Layer weights are a parameter of the model itself; Whisper's classifier has no decoder."""
        for name, head in (
            ("whisper", "WhisperForAudioClassification"),
            ("wav2vec2", "Wav2Vec2ForSequenceClassification"),
        ):
            tiny = TINY[name]
            options = {**tiny.options, "num_labels": 3, "use_weighted_layer_sum": True}
            config = getattr(transformers, tiny.config_class)(**options)
            names = aat.prepare(getattr(transformers, head)(config), "head").trainable
            assert {name.partition(".")[0] for name in names} == {"layer_weights", "projector", "classifier"}

    def test_a_decoder_is_no_head(self):
        names = aat.prepare(TINY["whisper"].build(head=True), "aat_s").trainable
        assert all("adapter_attention" in name for name in names)

    def test_partial_is_the_last_layers(self):
        model = build("bert", num_hidden_layers=8)
        names = aat.prepare(model, "partial").trainable
        assert {name.split(".")[2] for name in names} == {"2", "3", "4", "5", "6", "7"}

    @pytest.mark.parametrize("model_type", ["audio-spectrogram-transformer", "wav2vec2"])
    @pytest.mark.parametrize("method", ["aat_ms", "prompt"])
    def test_no_graph_below_the_lowest_adapter(self, method, model_type):
        changes = {"layerdrop": 0.0, "mask_time_prob": 0.0} if model_type == "wav2vec2" else {}
        model = prepared(build(model_type, **changes), method, layers=[2, 3]).train()
        outputs = []
        for layer in models.get_layers(model):
            layer.register_forward_hook(
                lambda _layer, _args, output: outputs.append(first(output).requires_grad)
            )
        encode(model)
        assert outputs == [False, False, True, True]


def test_initial_values():
    model = TINY["audio-spectrogram-transformer"].build(hidden_size=64)
    aat.prepare(model)
    adapter = model.layers[0].adapter_mlp
    assert adapter.down_weight.shape == (16, 64)
    assert 0.018 < adapter.down_weight.std() < 0.022
    assert not any(p.any() for p in (adapter.down_bias, adapter.up_weight, adapter.up_bias))


@pytest.mark.parametrize("rewrite", [False, True])
def test_half_precision_model_has_float32_adapters(rewrite):
    model = TINY["audio-spectrogram-transformer"].build().to(torch.bfloat16)
    aat.prepare(model, backend="reference", rewrite=rewrite)
    assert model.layers[0].adapter_mlp.down_weight.dtype == torch.float32
    output = model(make_input("audio-spectrogram-transformer").bfloat16()).last_hidden_state
    assert output.dtype == torch.bfloat16
    output.sum().backward()
    assert model.layers[0].adapter_mlp.up_weight.grad.abs().sum() > 0


class TestErrors:
    @pytest.fixture
    def model(self):
        return TINY["audio-spectrogram-transformer"].build(head=True)

    @pytest.fixture(autouse=True)
    def untouched(self, model):
        flags = {name: p.requires_grad for name, p in model.named_parameters()}
        yield
        assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
        assert not any("forward" in module.__dict__ for module in model.modules())
        assert not any("_mmtransfer" in name for module in model.modules() for name in module.__dict__)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"method": "aat"}, "method must be one of aat_ms, .*, got 'aat'"),
            ({"bottleneck": 0}, "bottleneck must be an integer of at least 1, got 0"),
            ({"bottleneck": -4}, "bottleneck .*-4"),
            ({"ratio": 0.01}, "bottleneck must be .* got 0"),
            ({"ratio": 0.0}, "ratio must be above 0"),
            ({"activation": "tanh"}, "activation must be one of"),
            ({"recompute": "all"}, "recompute must be one of none, selective, full"),
            ({"backend": "cuda"}, "backend must be one of"),
            ({"head": "nothing"}, "head 'nothing' has no parameters .* children are .*classifier"),
            ({"layers": [4]}, r"layers must be indices in \[-4, 3\], got 4"),
            ({"method": "prompt", "prompt_tokens": 0}, "prompt_tokens must be"),
            ({"method": "houlsby", "rewrite": True}, "rewrite is for the adapters of AAT"),
            ({"method": "aat_m", "rewrite": True, "activation": "relu"}, "nothing to rewrite: .*'gelu'"),
        ],
    )
    def test_options(self, model, options, message):
        with pytest.raises(ValueError, match=message):
            aat.prepare(model, **options)

    def test_twice(self):
        model = TINY["bert"].build(head=True)
        aat.prepare(model, "aat_m")
        names = list(model.state_dict())
        with pytest.raises(ValueError, match=r"prepared already, with method .aat_m."):
            aat.prepare(model, "aat_s")
        assert list(model.state_dict()) == names
        aat.revert(model)
        aat.prepare(model.bert, "aat_m")
        with pytest.raises(ValueError, match="in its part 'bert'"):
            aat.prepare(model)
        aat.revert(model.bert)
        aat.prepare(model)
        with pytest.raises(ValueError, match="prepared already"):
            aat.prepare(model.bert)

    def test_unknown_models(self):
        model = TINY["bert"].build()
        model.config.model_type = "sew"
        with pytest.raises(ValueError, match=r"'sew'.*add a ModelDescription row.*pass one as description"):
            aat.prepare(model)
        with pytest.raises(TypeError, match="pass one as description"):
            aat.prepare(nn.Linear(2, 2))
        with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got str"):
            aat.prepare("bert")
        assert all(p.requires_grad for p in model.parameters())

    def test_description_that_does_not_fit(self):
        model = TINY["whisper"].build()
        wrong = copy.copy(models.MODELS["whisper"])
        object.__setattr__(wrong, "layer_mlp", ("fc1", "fc3"))
        with pytest.raises(ValueError, match=r"layer 0 does not fit the description: .*fc3"):
            aat.prepare(model, description=wrong)

    def test_methods_that_a_model_cannot_have(self):
        with pytest.raises(ValueError, match=r"'prompt' needs layers.*wav2vec2-bert do not"):
            aat.prepare(build("wav2vec2-bert"), "prompt")
        with pytest.raises(ValueError, match="'head' needs a head"):
            aat.prepare(build("bert"), "head")
        with pytest.raises(ValueError, match="'prompt' needs all layers of wavlm"):
            aat.prepare(build("wavlm"), "prompt", layers=[0])
        with pytest.raises(ValueError, match="'lora' needs projections that are called; wavlm"):
            aat.prepare(build("wavlm"), "lora")

    def test_names_that_are_taken(self, model):
        layer = models.get_layers(models.find_encoder(model))[2]
        layer.adapter_mlp = nn.Identity()
        with pytest.raises(ValueError, match="an attribute 'adapter_mlp' already"):
            aat.prepare(model)
        assert not [name for name, _ in model.named_modules() if "adapter_attention" in name]

    def test_lora_without_peft(self, model, monkeypatch):
        monkeypatch.setitem(sys.modules, "peft", None)
        with pytest.raises(ImportError, match="pip install peft"):
            aat.prepare(model, "lora")

    def test_not_prepared(self, model):
        with pytest.raises(ValueError, match="is not prepared"):
            aat.revert(model)


def test_lora():
    model = build("audio-spectrogram-transformer")
    keys, expected = list(model.state_dict()), encode(model)
    handle = aat.prepare(model, "lora", rank=2)
    assert handle.trainable_parameters == 4 * 2 * (2 * 16 + 16 * 2)
    torch.testing.assert_close(encode(model), expected)
    perturb(model)
    assert gradients(model).keys() == set(handle.trainable)
    handle.revert()
    assert list(model.state_dict()) == keys
    assert not hasattr(model, "peft_config")
    assert torch.equal(encode(model), expected)


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


DEEP_NORM = models.ModelDescription(
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
    handle = aat.prepare(model, description=DEEP_NORM, backend="reference", rewrite=rewrite)
    assert handle.rewritten == (("attention", "mlp") if rewrite else ())
    assert {"predictor.weight", "encoder.layers.1.adapter_mlp.up_bias"} < set(handle.trainable)
    perturb(model)
    layer = model.encoder.layers[0]
    h = plain.self_attn_layer_norm(plain.alpha * x + serial(layer.adapter_attention, plain.attend(x)[0]))
    mlp = plain.fc2(F.gelu(plain.fc1(h))) + bottleneck(layer.adapter_mlp, h)
    torch.testing.assert_close(layer(x)[0], plain.final_layer_norm(plain.alpha * h + mlp))
    assert model(x).shape == (5, 2, 3)
    handle.revert()
    with pytest.raises(ValueError, match="'prompt' needs layers"):
        aat.prepare(model, "prompt", description=DEEP_NORM)
