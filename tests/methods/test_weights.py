"""Weights that are no plain floating tensors: refused where they would be trained, with nothing changed."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from classifiers import build_classifier, logits
from encoder_cases import model_state
from prepared_models import complete, perturb
from tiny_encoders import TINY, make_input
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from mmtransfer import AdaptedModel, prepare, registry
from mmtransfer.encoders import Edit, Encoder
from mmtransfer.method import EditMethod
from mmtransfer.tasks import Classification

EDITS = [name for name, each in registry.methods().items() if issubclass(each, EditMethod)]
#: Methods that train weights of the model itself.
OWN_WEIGHTS = ("full", "partial", "l-mam")
TASK = Classification(num_labels=3)


def last_layer(model: nn.Module) -> Any:
    return Encoder(model).all_layers[-1]


class Int8Params(nn.Parameter):
    """As bitsandbytes has it."""

    def __new__(cls, data: torch.Tensor, requires_grad: bool = False) -> Any:
        return torch.Tensor._make_subclass(cls, data, requires_grad)


class Quantised(torch.Tensor):
    """As torchao has it: a floating dtype, the numbers elsewhere."""

    def __new__(cls, data: torch.Tensor) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=data.dtype)

    def __init__(self, data: torch.Tensor) -> None:
        self.scale = data.abs().max() / 127
        self.numbers = (data / self.scale).round().to(torch.int8)

    def __repr__(self, **_: Any) -> str:
        return "Quantised"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return Quantised(args[0].numbers * args[0].scale)
        plain = [each.numbers * each.scale if isinstance(each, Quantised) else each for each in args]
        return func(*plain, **(kwargs or {}))


KINDS = {
    "int8": lambda weight: nn.Parameter((100 * weight).to(torch.int8), requires_grad=False),
    "uint8": lambda weight: nn.Parameter((100 * weight).abs().to(torch.uint8), requires_grad=False),
    "bitsandbytes": lambda weight: Int8Params((100 * weight).to(torch.int8)),
    "packed in a floating dtype": lambda weight: Int8Params(weight.to(torch.bfloat16)),
    "torchao": lambda weight: nn.Parameter(Quantised(weight), requires_grad=False),
    "float8": lambda weight: nn.Parameter(weight.to(torch.float8_e4m3fn), requires_grad=False),
    "sparse": lambda weight: nn.Parameter(weight.to_sparse(), requires_grad=False),
    "compressed rows": lambda weight: nn.Parameter(weight.to_sparse_csr(), requires_grad=False),
    "complex": lambda weight: nn.Parameter(weight.to(torch.complex64), requires_grad=False),
}


def with_weight(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    model = build_classifier().to(dtype)
    linear = last_layer(model).attention.q_proj
    weight = linear.weight.detach()
    del linear.weight
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        linear.weight = KINDS[kind](weight)
    return model


def flags(model: nn.Module) -> Any:
    return (
        {name: each.requires_grad for name, each in model.named_parameters()},
        {name: {*module.__dict__} for name, module in model.named_modules()},
    )


@pytest.mark.parametrize("kind", KINDS)
class TestParameters:
    @pytest.mark.parametrize("method", OWN_WEIGHTS)
    def test_are_not_trained(self, kind, method):
        model = with_weight(kind)
        before = flags(model)
        dtype = last_layer(model).attention.q_proj.weight.dtype
        message = rf"layers\.3\.attention\.q_proj\.weight cannot be trained: .*{dtype}"
        for change in (prepare, lambda *of: AdaptedModel(*of, TASK), self.edit):
            with pytest.raises(ValueError, match=message):
                change(model, complete(method))
            assert flags(model) == before
        # It is not stuck.
        prepare(model, "aat-m")

    @staticmethod
    def edit(model: nn.Module, method: str) -> None:
        complete(method).edit(Encoder(model))

    @pytest.mark.parametrize("method", sorted({*EDITS, "head"} - {*OWN_WEIGHTS, "lora"}))
    def test_stay_frozen_next_to_what_is_trained(self, kind, method):
        model = with_weight(kind)
        before = flags(model)
        found = prepare(model, complete(method))
        assert not last_layer(model).attention.q_proj.weight.requires_grad
        new = {model.get_parameter(name).dtype for name in found.trainable}
        assert new == {torch.float32}
        found.revert()
        assert flags(model) == before

    def test_in_the_head(self, kind):
        model = build_classifier()
        weight = model.classifier.weight.detach()
        del model.classifier.weight
        model.classifier.weight = KINDS[kind](weight)
        before = flags(model)
        with pytest.raises(ValueError, match=r"classifier\.weight cannot be trained"):
            prepare(model, "aat-ms")
        assert flags(model) == before
        prepare(model, "aat-ms", head=["projector", "layer_weights"])


def test_a_trained_adapter_over_weights_of_torchao() -> None:
    model, plain = with_weight("torchao", dtype=torch.float64), build_classifier().double()
    weight: Any = last_layer(model).attention.q_proj.weight
    with torch.no_grad():
        last_layer(plain).attention.q_proj.weight.copy_(weight.numbers * weight.scale)
    for each in (model, plain):
        torch.manual_seed(3)
        prepare(each, "aat-ms", backend="reference")
        perturb(each)
        each(make_input("wav2vec2").double()).logits.sum().backward()
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad)


def quantised(model: nn.Module, *names: str) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(model, set(names) or {nn.Linear}, dtype=torch.qint8)


class TestDynamicallyQuantised:
    """torch.ao.quantization: the weights are no parameters, and no gradient comes out of the modules."""

    @pytest.mark.parametrize("method", EDITS)
    def test_no_method_trains_inside(self, method):
        model = quantised(build_classifier("bert"), "bert.encoder.layer.3.output.dense")
        before = flags(model)
        match = r"encoder\.layer\.3\.output\.dense is quantised \(torch\.ao\.nn\.quant.*no gradient passes"
        for change in (prepare, lambda *of: AdaptedModel(*of, TASK)):
            with pytest.raises(ValueError, match=match):
                change(model, method)
            assert flags(model) == before

    def test_a_head_on_top(self):
        model = quantised(build_classifier("bert"), "bert.encoder")
        found = prepare(model, "head")
        logits(model, "bert").sum().backward()
        assert all(model.get_parameter(name).grad is not None for name in found.trainable)
        readout = AdaptedModel(quantised(TINY["bert"].build()), "hff-b", TASK)
        readout(input_ids=make_input("bert"), labels=torch.tensor([0, 1, 2])).loss.backward()

    def test_a_head_that_is_quantised_itself(self):
        model = quantised(build_classifier("wav2vec2"))
        before = flags(model)
        with pytest.raises(ValueError, match=r"projector is quantised .* cannot be trained"):
            prepare(model, "head")
        with pytest.raises(ValueError, match=r"classifier is quantised .* cannot be trained"):
            prepare(model, "head", head=["layer_weights", "classifier"])
        assert flags(model) == before
        assert prepare(model, "head", head="layer_weights").trainable == ("layer_weights",)


class TestMeta:
    def test_partly(self):
        """As after loading with offloading to the disk."""
        model = build_classifier()
        last_layer(model).to("meta")
        before = flags(model)
        for change in (prepare, lambda *of: AdaptedModel(*of, TASK)):
            with pytest.raises(ValueError, match="on the meta device"):
                change(model, "aat-ms")
        assert flags(model) == before

    @pytest.mark.parametrize("options", [{}, {"rewrite": True}, {"recompute": "selective"}], ids=str)
    def test_shapes_of_a_whole_model(self, options):
        model = build_classifier("whisper").to("meta")
        found = prepare(model, "aat-ms", backend="reference", **options)
        assert all(model.get_parameter(name).is_meta for name in found.trainable)
        assert model(make_input("whisper").to("meta")).logits.shape == (3, 3)


def test_a_model_that_is_not_initialised():
    model = build_classifier()
    last_layer(model).attention.q_proj.weight = nn.UninitializedParameter()
    for method in ("head", "aat-m", "full"):
        for change in (prepare, lambda *of: AdaptedModel(*of, TASK), TestParameters.edit):
            with pytest.raises(ValueError, match=r"attention\.q_proj\.weight is not initialised"):
                change(model, method)
    assert model.classifier.weight.requires_grad


class TestShared:
    def test_one_module_as_two_layers(self):
        model = build_classifier()
        layers = model.wav2vec2.encoder.layers
        layers[2] = layers[0]
        before = model_state(model)
        for method in EDITS:
            with pytest.raises(ValueError, match="layers 0 and 2 of the model are one module"):
                prepare(model, complete(method))
        assert model_state(model) == before

    def test_tied_weights_are_trained_once(self):
        model = build_classifier()
        first, last = model.wav2vec2.encoder.layers[2], model.wav2vec2.encoder.layers[3]
        first.attention.q_proj.weight = last.attention.q_proj.weight
        for method in ("full", "partial"):
            edit = complete(method).edit(Encoder(model))
            assert len(edit.parameters) == len({id(each) for each in edit.parameters})
            edit.revert()
        with pytest.raises(ValueError, match="layers 2 and 3 of the target share"):
            complete("l-mam").edit(Encoder(model))

    def test_a_parameter_that_is_given_twice(self):
        encoder = Encoder(build_classifier())
        with Edit(encoder, "twice") as edit:
            edit.train(encoder.layers[0].parameters())
            edit.train(encoder.layers[0].parameters())
        assert len(edit.parameters) == len([*encoder.layers[0].parameters()])


class Shifted(nn.Module):
    def forward(self, bias: torch.Tensor) -> torch.Tensor:
        return bias + 1


class TestParametrised:
    def build(self) -> Any:
        model = build_classifier()
        for layer in model.wav2vec2.encoder.layers:
            parametrizations.weight_norm(layer.feed_forward.output_dense)
            parametrize.register_parametrization(layer.attention.q_proj, "bias", Shifted())
        return model

    @pytest.mark.parametrize("method", EDITS)
    def test_trained_saved_and_reverted(self, method, tmp_path):
        import mmtransfer

        if method == "lora":
            pytest.skip("peft has no parametrised layers")
        model = self.build()
        expected = logits(model)
        before = flags(model)
        found = prepare(model, complete(method))
        if method != "prompt":
            torch.testing.assert_close(logits(model), expected)
        perturb(model)
        logits(model).sum().backward()
        idle = ("masked_spec_embed", "encoder.layer_norm")
        used = [name for name in found.trainable if not name.removeprefix("wav2vec2.").startswith(idle)]
        assert all(model.get_parameter(name).grad is not None for name in used)
        mmtransfer.save(model, tmp_path)
        other = self.build()
        mmtransfer.load_prepared(other, tmp_path)
        torch.testing.assert_close(logits(other), logits(model))
        found.revert()
        assert flags(model) == before

    def test_bitfit_trains_parametrised_biases(self):
        names = prepare(self.build(), "bitfit").trainable
        assert sum("q_proj.parametrizations.bias.original" in name for name in names) == 4
