"""`prepare` with every method: it freezes, trains, names heads, refuses, and can be taken back."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
import transformers
from prepared_models import build, complete, encode, impossible, layers_of, prepared
from tiny_encoders import TINY, make_input
from torch import nn
from written_adapters import first

import mmtransfer
from mmtransfer import registry
from mmtransfer.encoders import DESCRIPTIONS
from mmtransfer.method import EditMethod

EDITS = [name for name, method in registry.methods().items() if issubclass(method, EditMethod)]


@pytest.mark.parametrize("model_type", TINY)
def test_reverting_restores_everything(model_type):
    model = build(model_type)
    keys, expected = list(model.state_dict()), encode(model)
    next(model.parameters()).requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    attributes = {name: set(module.__dict__) for name, module in model.named_modules()}
    for method in EDITS:
        if method in impossible(model_type):
            continue
        handle = mmtransfer.prepare(model, complete(method), recompute="selective")
        handle.revert()
        assert list(model.state_dict()) == keys
        assert [p.requires_grad for p in model.parameters()] == flags
        assert not any("forward" in module.__dict__ for module in model.modules())
        assert {name: set(module.__dict__) for name, module in model.named_modules()} == attributes
        assert torch.equal(encode(model), expected)
    with pytest.raises(ValueError, match="reverted before"):
        handle.revert()


class TestTrainable:
    def test_heads(self):
        model = TINY["audio-spectrogram-transformer"].build(head=True)
        heads = {"classifier.layernorm.weight", "classifier.layernorm.bias"}
        heads |= {"classifier.dense.weight", "classifier.dense.bias"}
        assert set(mmtransfer.prepare(model, "head").trainable) == heads
        mmtransfer.revert(model)
        assert set(mmtransfer.prepare(model, "head", head="classifier.dense").trainable) < heads
        mmtransfer.revert(model)
        assert (
            mmtransfer.prepare(model, "aat-m", head=[], layers=[-1])
            .trainable[0]
            .startswith("audio_spectrogram_transformer.layers.3.adapter_mlp.")
        )

    def test_parameters_shared_with_the_encoder_stay_frozen(self):
        """A masked language model's decoder is the encoder's embedding table."""
        model = TINY["bert"].build(head=True)
        assert not any("word_embeddings" in name for name in mmtransfer.prepare(model, "head").trainable)
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
            names = mmtransfer.prepare(getattr(transformers, head)(config), "head").trainable
            assert {name.partition(".")[0] for name in names} == {"layer_weights", "projector", "classifier"}

    def test_a_decoder_is_no_head(self):
        names = mmtransfer.prepare(TINY["whisper"].build(head=True), "aat-s").trainable
        assert all("adapter_attention" in name for name in names)


def graphs_of(model: nn.Module, call) -> list[bool]:
    """Whether each layer's output has a graph, in a call in training mode."""
    outputs: list[bool] = []
    for layer in layers_of(model):
        layer.register_forward_hook(lambda _layer, _args, output: outputs.append(first(output).requires_grad))
    call(model.train())
    return outputs


@pytest.mark.parametrize("model_type", ["audio-spectrogram-transformer", "wav2vec2"])
@pytest.mark.parametrize("method", ["aat-ms", "prompt", "lora", "houlsby", "hff-adapters", "partial"])
def test_no_graph_below_the_lowest_trained_layer(method, model_type):
    changes = {"layerdrop": 0.0, "mask_time_prob": 0.0} if model_type == "wav2vec2" else {}
    model = prepared(build(model_type, **changes), method, layers=[2, 3])
    assert graphs_of(model, encode) == [False, False, True, True]


def test_no_graph_below_a_head():
    tiny = TINY["wav2vec2"]
    config = transformers.Wav2Vec2Config(
        **{**tiny.options, "layerdrop": 0.0, "mask_time_prob": 0.0, "classifier_proj_size": 8}
    )
    model = transformers.Wav2Vec2ForSequenceClassification(config)
    mmtransfer.prepare(model, "head")
    assert graphs_of(model, lambda model: model(make_input("wav2vec2"))) == [False] * 4
    mmtransfer.revert(model)
    assert graphs_of(model, lambda model: model(make_input("wav2vec2"))) == [True] * 4


class TestErrors:
    @pytest.fixture
    def model(self):
        return TINY["audio-spectrogram-transformer"].build(head=True)

    @pytest.fixture(autouse=True)
    def untouched(self, model):
        def state():
            flags = {name: p.requires_grad for name, p in model.named_parameters()}
            attributes = {name: set(module.__dict__) for name, module in model.named_modules()}
            return flags, attributes, list(model.state_dict())

        before = state()
        yield
        assert state() == before

    @pytest.mark.parametrize(
        ("method", "options", "message"),
        [
            ("aat", {}, "no method is called 'aat'; choose from head, .*did you mean 'aat-"),
            ("aat-ms", {"bottleneck": 0}, "aat-ms: bottleneck must be at least 1, got 0"),
            ("aat-ms", {"bottleneck": -4}, "bottleneck .*-4"),
            ("aat-ms", {"bottleneck": 2.5}, r"bottleneck must be int \| None, got 2.5"),
            ("aat-ms", {"bottleneck": True}, "bottleneck must be .*, got True"),
            ("aat-ms", {"activation": "tanh"}, "activation must be one of"),
            ("aat-ms", {"recompute": "all"}, "recompute must be one of none, selective, full"),
            ("aat-ms", {"backend": "cuda"}, "backend must be one of"),
            ("aat-ms", {"scale": "half"}, "scale must be float, got 'half'"),
            ("aat-ms", {"head": "nothing"}, "head 'nothing' has no parameters .* children are .*classifier"),
            ("aat-ms", {"layers": [4]}, r"layers must be layer indices in \[-4, 3\], got 4"),
            ("aat-ms", {"layers": []}, "layers must be layer indices .* at least one"),
            ("partial", {"layers": [1, -3]}, "layers must be distinct, got layer 1 twice"),
            ("prompt", {"prompt_tokens": 0}, "prompt_tokens must be at least 1"),
            ("lora", {"rank": 0}, "rank must be at least 1"),
            ("houlsby", {"rewrite": True}, "houlsby has no option 'rewrite'; it has activation, "),
            ("bitfit", {"bottleneck": 3}, "bitfit has no option 'bottleneck'; it has recompute"),
            ("aat-m", {"rewrite": True, "activation": "relu"}, "nothing to rewrite: .*'gelu'"),
            ("hff-b", {}, "hff-b has a readout"),
            ("hff-b+aat-ms", {}, r"hff-b\+aat-ms has a readout"),
            ("aat-ms+hff-b", {}, "must be one method, or a readout"),
        ],
    )
    def test_options(self, model, method, options, message):
        with pytest.raises(ValueError, match=message):
            mmtransfer.prepare(model, method, **options)

    def test_twice(self):
        model = TINY["bert"].build(head=True)
        mmtransfer.prepare(model, "aat-m")
        names = list(model.state_dict())
        with pytest.raises(ValueError, match=r"prepared already, with .aat-m."):
            mmtransfer.prepare(model, "aat-s")
        assert list(model.state_dict()) == names
        mmtransfer.revert(model)
        mmtransfer.prepare(model.bert, "aat-m")
        with pytest.raises(ValueError, match=r"by method 'aat-m' in its part 'bert'"):
            mmtransfer.prepare(model, "aat-ms")
        mmtransfer.revert(model.bert)
        for method in ("aat-ms", "head"):
            mmtransfer.prepare(model, method)
            with pytest.raises(ValueError, match=f"edited already, by method '{method}'"):
                mmtransfer.prepare(model.bert, "aat-s")
            mmtransfer.revert(model)

    def test_a_prepared_model_is_not_adapted_again(self):
        model = TINY["bert"].build(head=True)
        mmtransfer.prepare(model, "aat-m")
        trainable = [p.requires_grad for p in model.parameters()]
        with pytest.raises(ValueError, match="edited already, by method 'aat-m'"):
            mmtransfer.AdaptedModel(model, "aat-s")
        assert [p.requires_grad for p in model.parameters()] == trainable

    def test_an_edit_that_fails_half_way(self, model):
        @dataclass(frozen=True, kw_only=True)
        class Failing(EditMethod):
            name: ClassVar[str] = "failing"

            def change(self, edit, encoder, layers):
                edit.add(layers[0], "scale", nn.Parameter(torch.ones(1)))
                edit.override(layers[1], layers[1].forward)
                edit.train(layers[2].parameters())
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            mmtransfer.prepare(model, Failing())

    def test_unknown_models(self):
        model = TINY["bert"].build()
        model.config.model_type = "sew"
        with pytest.raises(ValueError, match=r"'sew' is not in .*DESCRIPTIONS.*ModelDescription.* as descr"):
            mmtransfer.prepare(model, "aat-ms")
        with pytest.raises(TypeError, match="or pass its description"):
            mmtransfer.prepare(nn.Linear(2, 2), "aat-ms")
        with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got str"):
            mmtransfer.prepare("bert", "aat-ms")
        assert all(p.requires_grad for p in model.parameters())

    @pytest.mark.parametrize("method", ["aat-ms", "houlsby", "lora"])
    def test_description_that_does_not_fit(self, method):
        model = TINY["whisper"].build()
        flags = [p.requires_grad for p in model.parameters()]
        wrong = replace(DESCRIPTIONS["whisper"], layer_mlp=("fc1", "fc3"))
        with pytest.raises(ValueError, match=r"layer 0 does not fit the description: .*fc3"):
            mmtransfer.prepare(model, method, description=wrong)
        assert [p.requires_grad for p in model.parameters()] == flags

    def test_methods_that_a_model_cannot_have(self):
        with pytest.raises(ValueError, match=r"'prompt' needs layers.*wav2vec2-bert do not"):
            mmtransfer.prepare(build("wav2vec2-bert"), "prompt")
        with pytest.raises(
            ValueError, match="'head' trains no part of the encoder, and the model has no head"
        ):
            mmtransfer.prepare(build("bert"), "head")
        with pytest.raises(ValueError, match="'prompt' needs all layers of wavlm"):
            mmtransfer.prepare(build("wavlm"), "prompt", layers=[0])
        with pytest.raises(ValueError, match="'lora' needs projections that are called; wavlm"):
            mmtransfer.prepare(build("wavlm"), "lora")

    def test_names_that_are_taken(self, model):
        layer = layers_of(model)[2]
        layer.adapter_mlp = nn.Identity()
        with pytest.raises(ValueError, match="an attribute 'adapter_mlp' already"):
            mmtransfer.prepare(model, "aat-ms")
        assert not [name for name, _ in model.named_modules() if "adapter_attention" in name]
        del layer.adapter_mlp

    def test_lora_without_peft(self, model, monkeypatch):
        monkeypatch.setitem(sys.modules, "peft", None)
        with pytest.raises(ImportError, match="pip install peft"):
            mmtransfer.prepare(model, "lora")

    def test_not_prepared(self, model):
        with pytest.raises(ValueError, match="is not prepared"):
            mmtransfer.revert(model)
