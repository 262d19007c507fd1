"""An AdaptedModel in transformers' Trainer: gradient checkpointing, checkpoints and resumed runs."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_encoders import TINY, make_input
from torch import nn
from transformers import Trainer, TrainingArguments

import mmtransfer
from mmtransfer import AdaptedModel
from mmtransfer.tasks import Classification

TASK = Classification(num_labels=2)
METHODS = ("hff-b", "aat-ms", "lora", "full", "hff-b+prompt")


class Clips(torch.utils.data.Dataset):
    def __init__(self) -> None:
        self.inputs = make_input("wav2vec2", batch=8)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_values": self.inputs[index], "labels": index % 2}


def build(method: str) -> AdaptedModel:
    torch.manual_seed(3)
    return AdaptedModel(TINY["wav2vec2"].build(), method, TASK)


def train(model: nn.Module, folder: Path, steps: int, resume: bool = False, **options: Any) -> None:
    settings = TrainingArguments(
        folder,
        max_steps=steps,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        per_device_train_batch_size=4,
        save_steps=2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )
    Trainer(model, settings, train_dataset=Clips()).train(resume_from_checkpoint=resume)


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_is_resumed_ends_as_one_that_was_not(method, tmp_path):
    whole, first, second = (build(method) for _ in range(3))
    train(whole, tmp_path / "whole", 4)
    train(first, tmp_path / "parts", 2)
    train(second, tmp_path / "parts", 4, resume=True)
    expected = dict(whole.named_parameters())
    for name, parameter in second.named_parameters():
        torch.testing.assert_close(parameter, expected[name], msg=name)
    mmtransfer.save(second, tmp_path / "saved")
    loaded = mmtransfer.load(tmp_path / "saved", TINY["wav2vec2"].build())
    inputs = make_input("wav2vec2")
    if method != "full":
        assert torch.equal(loaded(inputs).logits, second.eval()(inputs).logits)


@pytest.mark.parametrize("method", METHODS)
def test_gradient_checkpointing(method, tmp_path):
    model, plain = build(method), build(method)
    train(plain, tmp_path, 2)
    train(model, tmp_path, 2, gradient_checkpointing=True)
    assert model.is_gradient_checkpointing is (method != "hff-b")
    expected = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, expected[name], msg=name)


def kept(model: AdaptedModel) -> int:
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.nbytes) or x, lambda x: x):
        model(make_input("wav2vec2"), labels=torch.tensor([0, 1, 0]))
    return sum(sizes)


def test_it_keeps_less_and_can_be_switched():
    model = build("aat-ms")
    plain = kept(model)
    model.gradient_checkpointing_enable()
    assert kept(model) < plain / 2
    assert kept(copy.deepcopy(model)) < plain / 2
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing
    assert kept(model) == plain
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert kept(model) < plain / 2
    model.revert()
    assert not model.is_gradient_checkpointing
    assert not any("forward" in module.__dict__ for module in model.encoder.modules())


@pytest.mark.parametrize(
    "options",
    [{"gradient_checkpointing_kwargs": {"use_reentrant": True}}, {"every_n_layers": 2}, {"offload": True}],
)
def test_other_kinds_are_refused(options):
    model = build("aat-m")
    with pytest.raises(ValueError, match="use_reentrant=False is needed"):
        model.gradient_checkpointing_enable(**options)
    assert not model.is_gradient_checkpointing
