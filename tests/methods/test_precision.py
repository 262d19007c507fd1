"""Weights in half precision: loaded in float32, trained in float32 or bfloat16, never in float16."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from prepared_models import complete
from tiny_encoders import TINY, make_input
from torch import nn
from transformers import AutoModelForAudioClassification, Wav2Vec2Config, set_seed

import mmtransfer
from mmtransfer import AdaptedModel, registry
from mmtransfer.compare import step as measure
from mmtransfer.compare.step import Step
from mmtransfer.encoders.loading import load_model
from mmtransfer.encoders.precision import check_trained
from mmtransfer.tasks import Classification
from mmtransfer.training.caching import CachedFeatures
from mmtransfer.training.loop import predict, train
from mmtransfer.training.settings import Training

METHODS = [*registry.methods(), "hff-b+aat-ms"]
#: Methods that train weights of the encoder, which have its dtype.
INSIDE = ("full", "partial", "bitfit", "l-mam")
HALVES = (torch.float16, torch.bfloat16)
TASK = Classification(num_labels=3)


def build(method: str, dtype: torch.dtype) -> AdaptedModel:
    set_seed(0)
    return AdaptedModel(TINY["whisper"].build().to(dtype), complete(method), TASK)


def batch_of() -> dict[str, torch.Tensor]:
    return {
        "input_features": make_input("whisper"),
        "lengths": torch.tensor([60, 40, 24]),
        "labels": torch.tensor([0, 2, 1]),
    }


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_a_step_of_every_method(method: str, dtype: torch.dtype, autocast: bool) -> None:
    if dtype == torch.float16 and method in INSIDE:
        with pytest.raises(ValueError, match=r"would be trained in float16; load the model with dtype="):
            build(method, dtype)
        return
    model, batch = build(method, dtype), batch_of()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    expected = {torch.float32, dtype} if method in INSIDE else {torch.float32}
    assert {parameter.dtype for parameter in trained} == expected
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    losses = []
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = model(**batch)
        losses.append(output.loss.item())
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(map(torch.isfinite, map(torch.tensor, losses)))
    assert losses[-1] < losses[0]
    assert all(bool(parameter.isfinite().all()) for parameter in trained)
    assert bool(model(**batch).logits.isfinite().all())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_the_eager_twin_of_a_half_precision_encoder(method: str, dtype: torch.dtype) -> None:
    if dtype == torch.float16 and method in INSIDE:
        return
    model = build(method, dtype)
    twin = model.method.baseline(model)
    if twin is None:
        return
    twin.load_state_dict(model.state_dict())
    batch = batch_of()
    if model.edit_is_empty:
        taps = model.encoder(batch["input_features"], batch["lengths"])
        batch = {"features": taps.features, "lengths": taps.lengths, "labels": batch["labels"]}
    ours, theirs = Step(model, batch), Step(twin, batch)
    bound = measure._TOLERANCE + 2 * measure._rounding(theirs)
    assert measure._difference(ours, theirs) <= bound < 0.5
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad and p.dim() > 1).mul_(3)
        model.head.classifier.weight.mul_(3)
    assert measure._difference(ours, theirs) > bound


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_half_precision_folder_is_loaded_in_float32_unless_asked(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    TINY["wav2vec2"].build().to(dtype).save_pretrained(tmp_path)
    assert {p.dtype for p in load_model(tmp_path).parameters()} == {torch.float32}
    for asked in (dtype, str(dtype).removeprefix("torch.")):
        assert {p.dtype for p in load_model(tmp_path, dtype=asked).parameters()} == {dtype}


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, "float8", None, "", torch.float8_e4m3fn])
def test_dtypes_that_no_model_is_loaded_in(dtype, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, float16, float64, got"):
        load_model(tmp_path, dtype=dtype)


def classifier(dtype: torch.dtype) -> nn.Module:
    options = {**TINY["wav2vec2"].options, "num_labels": 3, "classifier_proj_size": 8, "layerdrop": 0.0}
    set_seed(0)
    model = AutoModelForAudioClassification.from_config(Wav2Vec2Config(**options))
    return model.to(dtype)


class TestPrepare:
    @pytest.mark.parametrize("method", ["aat-ms", "head", "full", "bitfit", "prompt"])
    def test_float16_is_refused_and_the_model_is_as_before(self, method: str) -> None:
        model = classifier(torch.float16)
        before = {name: p.requires_grad for name, p in model.named_parameters()}
        with pytest.raises(ValueError, match=r"would be trained in float16; load the model with dtype=torch"):
            mmtransfer.prepare(model, method)
        assert {name: p.requires_grad for name, p in model.named_parameters()} == before
        assert not model.__dict__.get("_mmtransfer_prepared")
        mmtransfer.prepare(model.float(), method)

    def test_the_parameter_is_named(self) -> None:
        with pytest.raises(ValueError, match=r"^projector\.weight would be trained in float16"):
            mmtransfer.prepare(classifier(torch.float16), "aat-ms")

    @pytest.mark.parametrize("method", ["aat-ms", "full"])
    def test_bfloat16_is_trained(self, method: str) -> None:
        model = classifier(torch.bfloat16).train()
        mmtransfer.prepare(model, method)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        for _ in range(3):
            loss = model(make_input("wav2vec2").bfloat16(), labels=torch.tensor([0, 1, 2])).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            assert bool(loss.isfinite())
        assert all(bool(p.isfinite().all()) for p in model.parameters())


class TestTraining:
    def examples(self, dtype: torch.dtype) -> CachedFeatures:
        lengths = torch.tensor([3, 2, 4, 3])
        features = torch.randn(12, 1, 16).to(dtype)
        return CachedFeatures(features, lengths, [0, 1, 2, 0], TASK)

    @pytest.mark.parametrize("bf16", [False, True])
    @pytest.mark.parametrize("dtype", HALVES, ids=str)
    def test_features_in_half_precision(self, dtype: torch.dtype, bf16: bool) -> None:
        settings = Training(epochs=2, batch_size=2, cpu=True, bf16=bf16)
        model, examples = build("head", dtype), self.examples(dtype)
        result = train(model, examples, examples.collate, settings)
        assert 0 < result.loss < 100
        assert len(predict(model, examples, examples.collate, settings)) == 4

    def test_a_head_that_was_halved_later_is_refused(self) -> None:
        model, examples = build("head", torch.float32), self.examples(torch.float32)
        model.head.half()
        with pytest.raises(ValueError, match=r"head\.classifier\.weight would be trained in float16"):
            train(model, examples, examples.collate, Training(cpu=True))


def test_what_is_frozen_may_be_in_any_precision() -> None:
    frozen = nn.Parameter(torch.ones(2).half(), requires_grad=False)
    check_trained([("frozen", frozen), ("wide", nn.Parameter(torch.ones(2)))])
    with pytest.raises(ValueError, match="narrow would be trained in float8"):
        check_trained([("narrow", nn.Parameter(torch.ones(2).to(torch.float8_e5m2)))])


class TestCheckpoints:
    def saved(self, method: str, dtype: torch.dtype, folder: Path) -> AdaptedModel:
        model = build(method, dtype).eval()
        model.save_pretrained(folder)
        return model

    @pytest.mark.parametrize("method", ["aat-ms", "hff-b", "lora"])
    @pytest.mark.parametrize(("saved", "loaded"), [HALVES, HALVES[::-1], (torch.float32, torch.bfloat16)])
    def test_new_parameters_are_the_same_in_any_encoder(self, method, saved, loaded, tmp_path: Path) -> None:
        model = self.saved(method, saved, tmp_path)
        other = AdaptedModel.from_pretrained(tmp_path, TINY["whisper"].build().to(loaded))
        for name, tensor in model.trained_tensors().items():
            assert torch.equal(other.trained_tensors()[name], tensor)

    def test_weights_are_widened(self, tmp_path: Path) -> None:
        model = self.saved("full", torch.bfloat16, tmp_path)
        other = AdaptedModel.from_pretrained(tmp_path, TINY["whisper"].build())
        for name, tensor in model.trained_tensors().items():
            assert torch.equal(other.trained_tensors()[name], tensor.float())

    def test_weights_are_never_rounded(self, tmp_path: Path) -> None:
        self.saved("full", torch.float32, tmp_path)
        model = TINY["whisper"].build().bfloat16()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(ValueError, match=r"was saved in torch.float32 and would be rounded to torch.bf"):
            AdaptedModel.from_pretrained(tmp_path, model)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_the_encoder_by_name_is_as_it_was_trained(self, dtype: torch.dtype, tmp_path: Path) -> None:
        """The folder of the encoder has another dtype than the encoder that was trained."""
        other = torch.bfloat16 if dtype == torch.float32 else torch.float32
        TINY["whisper"].build().to(other).save_pretrained(tmp_path / "encoder")
        model = AdaptedModel(load_model(tmp_path / "encoder", dtype=dtype), "aat-ms", TASK).eval()
        model.save_pretrained(tmp_path / "saved")
        loaded = AdaptedModel.from_pretrained(tmp_path / "saved")
        assert loaded.encoder.dtype == dtype
        assert torch.equal(loaded(**batch_of()).logits, model(**batch_of()).logits)
