"""Every transformers class with a weighted sum of hidden states, accelerated against its unchanged twin."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch
from agreement import assert_within_rule
from tiny_models import BATCH, CLASS_NAMES, HIDDEN, LAYERS, make_inputs, make_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import mmkernels

FAMILIES = {
    "Data2VecAudio",
    "Hubert",
    "SEW",
    "SEWD",
    "UniSpeech",
    "UniSpeechSat",
    "Wav2Vec2",
    "Wav2Vec2Bert",
    "Wav2Vec2Conformer",
    "WavLM",
    "Whisper",
}
every_class = pytest.mark.parametrize("class_name", CLASS_NAMES)


def run(model: nn.Module, class_name: str, autocast: bool) -> dict[str, Tensor]:
    """Loss, logits and all gradients (as one vector, since some of them are zero but for rounding)."""
    dtype = next(model.parameters()).dtype
    context = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    model.train()
    with context:
        outputs = model(**make_inputs(class_name, dtype))
    outputs.loss.backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return {
        "loss": outputs.loss.detach(),
        "logits": outputs.logits.detach(),
        "layer_weights.grad": model.layer_weights.grad,
        "gradients": torch.cat(gradients),
    }


class LayerStacks(TorchDispatchMode):
    """Counts calls that get all hidden states as one list, and results that hold all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.stack, torch.ops.aten.cat):
            self.count += len(args[0]) == LAYERS and args[0][0].shape[-1] == HIDDEN
        if isinstance(result, Tensor):
            self.count += result.dim() == 4 and sorted(result.shape[:2]) == [BATCH, LAYERS]
        return result


def test_the_table_covers_the_families_that_the_docs_name() -> None:
    assert {name.split("For")[0] for name in CLASS_NAMES} == FAMILIES
    assert "WhisperForAudioClassification" in CLASS_NAMES


@every_class
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_agrees_with_the_unchanged_model(class_name: str, autocast: bool) -> None:
    accelerated = make_model(class_name)
    report = mmkernels.accelerate(accelerated)
    assert [(r.name, r.class_name) for r in report.replaced] == [("", class_name)]
    assert report.skipped == []
    actual = run(accelerated, class_name, autocast)
    eager = run(make_model(class_name), class_name, autocast)
    exact = run(make_model(class_name).double(), class_name, autocast=False)
    for name in actual:
        eps = torch.finfo(torch.bfloat16 if autocast else torch.float32).eps
        assert_within_rule(actual[name], eager[name], exact[name], eps)


@every_class
def test_makes_no_stacked_copy(class_name: str) -> None:
    counts = []
    for patched in (False, True):
        model = make_model(class_name)
        if patched:
            mmkernels.accelerate(model)
        with LayerStacks() as stacks:
            model(**make_inputs(class_name)).loss.backward()
        counts.append(stacks.count)
    assert counts[0] > 0
    assert counts[1] == 0


@every_class
def test_is_skipped_where_the_model_does_not_sum_layers(class_name: str) -> None:
    model = make_model(class_name, use_weighted_layer_sum=False)
    report = mmkernels.accelerate(model)
    assert report.replaced == []
    assert [s.reason for s in report.skipped] == ["config.use_weighted_layer_sum is False"]


@pytest.mark.parametrize("return_dict", [True, False])
def test_decorators_keep_working(return_dict: bool) -> None:
    model, twin = (make_model("WavLMForSequenceClassification").eval() for _ in range(2))
    mmkernels.accelerate(model)
    inputs = make_inputs("WavLMForSequenceClassification")
    for extra in ({}, {"output_hidden_states": True}, {"output_attentions": True}):
        got, expected = (m(**inputs, **extra, return_dict=return_dict) for m in (model, twin))
        assert type(got) is type(expected)
        assert len(got) == len(expected)
        if return_dict:
            assert list(got) == list(expected)


def test_given_encoder_outputs() -> None:
    name = "WhisperForAudioClassification"
    model, twin = make_model(name).eval(), make_model(name).eval()
    mmkernels.accelerate(model)
    features = make_inputs(name)["input_features"]
    outputs = twin.encoder(features, output_hidden_states=True)
    with torch.no_grad():
        torch.testing.assert_close(
            model(None, encoder_outputs=outputs).logits, twin(None, encoder_outputs=outputs).logits
        )


@pytest.mark.parametrize(
    ("class_name", "option"),
    [
        ("HubertForSequenceClassification", "layerdrop"),
        ("WhisperForAudioClassification", "encoder_layerdrop"),
    ],
)
def test_layer_drop_is_named_in_the_report(class_name: str, option: str) -> None:
    report = mmkernels.accelerate(make_model(class_name, **{option: 0.1}))
    assert len(report.replaced) == 1
    assert [note.name for note in report.notes] == [""]
    assert f"config.{option} is 0.1: " in report.notes[0].text
    assert f"set config.{option} = 0" in str(report)
    assert mmkernels.accelerate(make_model(class_name, **{option: 0.0})).notes == []


def test_dropped_layers_fail_as_in_the_class_itself() -> None:
    name = "WavLMForSequenceClassification"
    messages = []
    for patched in (False, True):
        model = make_model(name).train()
        if patched:
            mmkernels.accelerate(model)
        model.wavlm.encoder.layers = model.wavlm.encoder.layers[:1]
        with pytest.raises(RuntimeError) as caught:
            model(**make_inputs(name))
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_trains_like_the_unchanged_model() -> None:
    name = "HubertForSequenceClassification"
    curves = []
    for patched in (False, True):
        model = make_model(name).train()
        if patched:
            mmkernels.accelerate(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        curve = []
        for _ in range(10):
            loss = model(**make_inputs(name)).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        curves.append(torch.tensor(curve))
    assert curves[1][-1] < 0.7 * curves[1][0]
    torch.testing.assert_close(curves[1], curves[0], rtol=1e-3, atol=1e-4)


def test_save_pretrained_knows_nothing_of_it(tmp_path: Any) -> None:
    name = "WavLMForSequenceClassification"
    model = make_model(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    mmkernels.accelerate(model)
    assert list(model.state_dict()) == list(before)
    model.save_pretrained(tmp_path)
    loaded = type(make_model(name)).from_pretrained(tmp_path)
    assert loaded.config.architectures == [name]
    for key, value in loaded.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0)


def test_compiles() -> None:
    name = "WavLMForSequenceClassification"
    model, twin = make_model(name).eval(), make_model(name).eval()
    mmkernels.accelerate(model)
    inputs = make_inputs(name)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(**inputs).logits, twin(**inputs).logits)
