"""What people give an encoder by mistake: each mistake has its sentence, for every type of model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from encoder_cases import MASKED
from tiny_encoders import TINY, make_input

from mmtransfer import AdaptedModel, TappedEncoder
from mmtransfer.encoders import DESCRIPTIONS
from mmtransfer.tasks import Classification

WAVEFORMS = [
    name for name, row in DESCRIPTIONS.items() if row.main_input == "input_values" and row.input_dims == 2
]
TEXTS = [name for name, row in DESCRIPTIONS.items() if row.main_input == "input_ids"]
SIZED = [name for name, row in DESCRIPTIONS.items() if row.input_sizes]


@pytest.fixture(scope="module")
def encoders() -> dict[str, TappedEncoder]:
    return {name: TappedEncoder(TINY[name].build(), (0, 3)) for name in TINY}


def refused(encoder: TappedEncoder, inputs: Any, message: str, kind: type = ValueError, **more: Any) -> None:
    model = AdaptedModel(encoder.model, "hff-b", Classification(num_labels=2), taps=[0, 3])
    name = encoder.description.main_input
    with pytest.raises(kind, match=message):
        encoder(inputs, **more)
    with pytest.raises(kind, match=message):
        model(**{name: inputs}, **more)


@pytest.mark.parametrize("model_type", TINY)
class TestEveryType:
    def test_dtype(self, encoders, model_type):
        inputs, name = make_input(model_type), f"of {model_type}"
        if model_type in TEXTS:
            for wrong in (inputs.float(), inputs.bool()):
                refused(encoders[model_type], wrong, f"{name} must be integers", TypeError)
            encoders[model_type](inputs.int())
            return
        sample = (1000 * inputs).to(torch.int16)
        refused(encoders[model_type], sample, f"{name} must be floating.*divide int16 by 32768", TypeError)
        refused(encoders[model_type], sample.int(), "divide int32 by 2147483648", TypeError)
        refused(encoders[model_type], sample.long(), r"must be floating, got torch\.int64$", TypeError)
        refused(encoders[model_type], inputs.to(torch.complex64), "must be floating", TypeError)
        encoders[model_type](inputs.double())
        encoders[model_type](inputs.half())

    def test_rank(self, encoders, model_type):
        inputs = make_input(model_type)
        message = rf"must have {inputs.dim()} dimensions, \(batch, .*got shape"
        refused(encoders[model_type], inputs[0], message + r".*unsqueeze\(0\)")
        refused(encoders[model_type], inputs.unsqueeze(1), message + ".*squeeze")
        refused(encoders[model_type], inputs.flatten()[0], message)
        refused(encoders[model_type], inputs.tolist(), "must be a tensor, got list", TypeError)
        refused(encoders[model_type], inputs.numpy(), "must be a tensor, got ndarray", TypeError)

    def test_empty_batch(self, encoders, model_type):
        refused(encoders[model_type], make_input(model_type)[:0], "must have at least one example")

    def test_no_time(self, encoders, model_type):
        inputs = make_input(model_type)
        time = DESCRIPTIONS[model_type].time_dim
        refused(encoders[model_type], inputs.narrow(time, 0, 0), r"at least \d+ long|no dimension of \d+")


@pytest.mark.parametrize("model_type", SIZED)
def test_sizes_that_the_configuration_does_not_have(encoders, model_type):
    inputs = make_input(model_type)
    for dim, attribute in DESCRIPTIONS[model_type].input_sizes:
        size = inputs.shape[dim]
        for wrong in (inputs.narrow(dim, 0, size - 1), torch.cat([inputs, inputs], dim)):
            refused(encoders[model_type], wrong, rf"must be \(batch, .*no dimension of {size} in its place$")
        assert getattr(encoders[model_type].model.config, attribute) == size


def test_mel_bins_of_whisper(encoders):
    message = r"input_features of whisper must be \(batch, 6, time\), got shape \(1, 10, 60\)"
    refused(encoders["whisper"], torch.zeros(1, 10, 60), message)
    refused(
        encoders["whisper"], torch.zeros(1, 60, 6), r"got shape \(1, 60, 6\).*it looks transposed: transp"
    )


@pytest.mark.parametrize("model_type", ["audio-spectrogram-transformer", "wav2vec2-bert", "whisper"])
def test_transposed(encoders, model_type):
    refused(
        encoders[model_type], make_input(model_type).transpose(1, 2), r"looks transposed: transpose\(1, 2\)"
    )


@pytest.mark.parametrize("model_type", WAVEFORMS)
def test_a_transposed_waveform(encoders, model_type):
    refused(
        encoders[model_type], torch.zeros(9000, 1), r"at least 16 long .* got 1 \(shape \(9000, 1\), time is"
    )


@pytest.mark.parametrize("model_type", TEXTS)
def test_too_long(encoders, model_type):
    most = 38 if model_type.endswith("roberta") else 40
    encoders[model_type](make_input(model_type, size=most))
    refused(
        encoders[model_type], make_input(model_type, size=most + 1), f"at most {most} long, got {most + 1}"
    )


@pytest.mark.parametrize("model_type", MASKED)
def test_attention_masks(encoders, model_type):
    inputs = make_input(model_type)
    size = inputs.shape[DESCRIPTIONS[model_type].time_dim]
    right = torch.ones(3, size, dtype=torch.long)
    for wrong in (right[:2], right[:, :-1], right[0], right.unsqueeze(1), right.unsqueeze(2)):
        message = rf"attention_mask must be \(3, {size}\), got shape"
        refused(encoders[model_type], inputs, message, attention_mask=wrong)
    refused(encoders[model_type], inputs, "must be a tensor, got list", TypeError, attention_mask=[[1]])
    left = right.clone()
    left[0, 0] = 0
    refused(encoders[model_type], inputs, "must be right-padded", attention_mask=left)
    additive = torch.zeros(3, size)
    additive[1, -3:] = -1e9
    refused(encoders[model_type], inputs, "must be 1 for valid positions and 0", attention_mask=additive)
    encoders[model_type](inputs, attention_mask=right.float())


@pytest.mark.parametrize("model_type", MASKED)
def test_lengths(encoders, model_type):
    inputs = make_input(model_type)
    for wrong, kind, message in (
        ([1, 2, 3], TypeError, "lengths must be a tensor, got list"),
        (torch.tensor([1.0, 2.0, 3.0]), TypeError, "integer dtype"),
        (torch.tensor([[1], [2], [3]]), ValueError, r"lengths must be \(B,\)"),
        (torch.tensor([5, 5]), ValueError, r"one entry per utterance \(3\), got 2"),
        (torch.tensor([5, 5, 9999]), ValueError, "lengths must be within"),
    ):
        refused(encoders[model_type], inputs, message, kind, lengths=wrong)
