"""Things that are done to a prepared model before its training, and would train it wrongly without a word."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
import transformers
from classifiers import build_classifier, logits
from prepared_models import complete, exactly, impossible, perturb
from tiny_encoders import TINY, make_input
from torch import nn

import mmtransfer
from mmtransfer import AdaptedModel, prepare, registry
from mmtransfer.method import EditMethod
from mmtransfer.tasks import Classification

EDITS = [name for name, each in registry.methods().items() if issubclass(each, EditMethod)]
REENTRANT = {"use_reentrant": True}


def steady(model_type: str) -> nn.Module:
    """The model of a type with a head, in training mode and float64."""
    if model_type in ("wav2vec2", "whisper", "bert"):
        return build_classifier(model_type).double().train()
    options = TINY[model_type].options
    changes = {name: 0.0 for name in ("layerdrop", "mask_time_prob") if name in options}
    return TINY[model_type].build(head=True, **changes).double().train()


def gradients(model: nn.Module, model_type: str) -> dict[str, torch.Tensor]:
    model.zero_grad()
    # Masks of SpecAugment are numpy's.
    transformers.set_seed(2)
    call(model, model_type).logits.square().sum().backward()
    return {name: each.grad for name, each in model.named_parameters() if each.grad is not None}


def call(model: nn.Module, model_type: str) -> Any:
    inputs = make_input(model_type)
    return model(inputs.double() if inputs.is_floating_point() else inputs)


def assert_trained_as(model: nn.Module, model_type: str, expected: dict[str, torch.Tensor]) -> None:
    found = gradients(model, model_type)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


class TestReentrantCheckpointing:
    """The input of a frozen layer asks for no gradient, so that none comes out of a reentrant checkpoint."""

    @pytest.mark.parametrize("model_type", TINY)
    @pytest.mark.parametrize("method", ["aat-ms", "houlsby", "lora", "prompt", "partial", "bitfit", "full"])
    def test_gradients_are_right_or_the_first_forward_says_so(self, method, model_type):
        if model_type == "wavlm" and method in ("bitfit", "full"):
            pytest.skip(
                "its layers share a trained bias, with or without this package: backward does not end"
            )
        model = steady(model_type)
        if method in impossible(model_type):
            pytest.skip("a method that the type cannot have")
        prepare(model, complete(method, **exactly(method)))
        perturb(model)
        expected = gradients(model, model_type)
        model.gradient_checkpointing_enable(REENTRANT)
        # transformers lets the embeddings of text models ask for a gradient.
        if method in ("bitfit", "full") or not make_input(model_type).is_floating_point():
            assert_trained_as(model, model_type, expected)
        else:
            with pytest.raises(ValueError, match="use_reentrant=False is needed"):
                call(model, model_type)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        assert_trained_as(model, model_type, expected)

    @pytest.mark.parametrize("layers", [[0], [3], [1, 2]])
    def test_upper_layers(self, layers):
        model = build_classifier().train()
        prepare(model, "aat-m", layers=layers)
        model.gradient_checkpointing_enable(REENTRANT)
        with pytest.raises(ValueError, match="use_reentrant=False is needed"):
            logits(model)

    def test_where_nothing_is_lost(self):
        model = steady("wav2vec2")
        prepare(model, "aat-m", backend="reference")
        perturb(model)
        expected = gradients(model, "wav2vec2")
        model.gradient_checkpointing_enable(REENTRANT)
        with torch.no_grad():
            call(model, "wav2vec2")
        call(model.eval(), "wav2vec2")
        # An input that asks for a gradient leads one through every layer.
        model.train().zero_grad()
        model.wav2vec2.feature_extractor._requires_grad = True
        assert_trained_as(model, "wav2vec2", expected)
        model.wav2vec2.feature_extractor._requires_grad = False
        mmtransfer.revert(model)
        call(model, "wav2vec2")
        assert not any(module._forward_pre_hooks for module in model.modules())

    def test_a_copy(self):
        model = build_classifier("whisper").train()
        prepare(model, "aat-m")
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            copied.gradient_checkpointing_enable(REENTRANT)
            with pytest.raises(ValueError, match="use_reentrant=False is needed"):
                logits(copied, "whisper")
            mmtransfer.revert(copied)
            assert not any(module._forward_pre_hooks for module in copied.modules())
        logits(model, "whisper")


class TestPrecision:
    @pytest.mark.parametrize("method", ["aat-ms", "lora", "full", "head"])
    def test_half_after_prepare(self, method):
        model = build_classifier()
        prepare(model, complete(method))
        model.half()
        # Inference is allowed.
        assert model(make_input("wav2vec2").half()).logits.dtype == torch.float16
        with torch.no_grad():
            model.train()(make_input("wav2vec2").half())
        with pytest.raises(ValueError, match=r"would be trained in float16; load the model with"):
            model(make_input("wav2vec2").half())
        model.float()
        logits(model).sum().backward()
        model.half()
        with pytest.raises(ValueError, match=r"would be trained in float16"):
            model(make_input("wav2vec2").half())

    def test_moved_after_prepare(self):
        model = build_classifier()
        prepare(model, "aat-ms", backend="reference")
        perturb(model)
        expected = logits(model)
        for dtype in (torch.bfloat16, torch.float64):
            other = copy.deepcopy(model).to(dtype)
            found = other.train()(make_input("wav2vec2").to(dtype)).logits
            torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.1)
            mmtransfer.revert(other)
            assert not any("adapter" in name for name, _ in other.named_parameters())


class TestFrozenAfterPrepare:
    @pytest.mark.parametrize("method", EDITS)
    def test_freeze_base_model(self, method):
        model = build_classifier().train()
        prepare(model, complete(method))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            logits(model)
        model.freeze_base_model()
        with pytest.warns(
            UserWarning, match=r"frozen since prepare \(freeze_base_model\(\) freezes adapters"
        ):
            logits(model)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            logits(model)
            logits(model.eval())

    def test_parts_may_be_frozen(self):
        model = build_classifier().train()
        prepare(model, "full")
        model.freeze_feature_encoder()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            logits(model)


class TestThawedAfterPrepare:
    @pytest.mark.parametrize("method", ["aat-ms", "head", "lora", "partial"])
    def test_saved_and_loaded(self, method, tmp_path):
        model = build_classifier()
        prepare(model, complete(method))
        name = "wav2vec2.encoder.layers.0.attention.k_proj.weight"
        model.get_parameter(name).requires_grad_(True)
        perturb(model)
        with torch.no_grad():
            model.get_parameter(name).add_(0.5)
        mmtransfer.save(model, tmp_path)
        other = build_classifier()
        mmtransfer.load_prepared(other, tmp_path)
        torch.testing.assert_close(logits(other), logits(model))
        assert other.get_parameter(name).requires_grad
        mmtransfer.revert(other)
        prepare(other, complete(method))
        assert not other.get_parameter(name).requires_grad
        mmtransfer.load_prepared(other, tmp_path)
        torch.testing.assert_close(logits(other), logits(model))
        assert other.get_parameter(name).requires_grad

    def test_a_model_that_lacks_the_parameter(self, tmp_path):
        model = build_classifier()
        prepare(model, "aat-m", layers=[0])
        model.extra = nn.Linear(2, 2)
        mmtransfer.save(model, tmp_path)
        other = build_classifier()
        with pytest.raises(ValueError, match=r"has trained a parameter that the model lacks .*extra"):
            mmtransfer.load_prepared(other, tmp_path)
        assert not any("adapter" in name for name, _ in other.named_parameters())
        assert all(each.requires_grad for each in other.parameters())

    @pytest.mark.parametrize("method", ["aat-ms", "hff-b+aat-ms"])
    def test_an_adapted_model(self, method, tmp_path):
        model = AdaptedModel(TINY["bert"].build(), complete(method), Classification(num_labels=3)).eval()
        weight = model.encoder.model.encoder.layer[0].intermediate.dense.weight
        weight.requires_grad_(True)
        with torch.no_grad():
            weight.add_(0.5)
        model.save_pretrained(tmp_path)
        other = mmtransfer.load(tmp_path, TINY["bert"].build())
        inputs = make_input("bert")
        assert torch.equal(other(input_ids=inputs).logits, model(input_ids=inputs).logits)

    def test_a_frozen_encoder_records_no_graph(self):
        model = AdaptedModel(TINY["bert"].build(), "hff-b", Classification(num_labels=3))
        model.encoder.model.encoder.layer[0].requires_grad_(True)
        with pytest.raises(ValueError, match=r"encoder\.model\.encoder\.layer\.0\.\S+ asks for a gradient"):
            model(input_ids=make_input("bert"), labels=torch.tensor([0, 1, 2]))
        model.eval()(input_ids=make_input("bert"))


def test_data_parallel_copies_are_refused():
    model = build_classifier().train()
    prepare(model, "aat-ms")
    replica = model.wav2vec2._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match="cannot run in DataParallel"):
        replica(make_input("wav2vec2"))


def test_layers_compile_in_one_graph_when_watched():
    model = build_classifier("bert").train()
    prepare(model, "aat-ms")
    perturb(model)
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(logits(compiled, "bert"), logits(model, "bert"))
