"""An error at any step of preparing, adapting, loading or accelerating a model leaves the model as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from classifiers import build_classifier
from encoder_cases import model_state
from prepared_models import complete
from steps import BrokenStepError, Changes, Steps
from torch import nn
from transformers.utils import logging as transformers_logging

import mmkernels
import mmtransfer
from mmtransfer import AdaptedModel, TappedEncoder, prepare, registry
from mmtransfer.encoders.edit import restoring
from mmtransfer.method import EditMethod
from mmtransfer.tasks import Classification

METHODS = registry.methods()
EDITS = [name for name, each in METHODS.items() if issubclass(each, EditMethod)]
SMALL = {"hff-adapters": {"bottleneck": 4}, "prompt": {"prompt_tokens": 2}, "lora": {"rank": 2}}
#: One of each kind: an edit, a trained part of the model, neither.
LINES = ("aat-m", "partial", "head")
TASK = Classification(num_labels=3)
Change = Callable[[nn.Module], Any]


def build(model_type: str = "whisper") -> nn.Module:
    """A small classifier, in which flags and modes differ from part to part."""
    layers = {"encoder_layers": 2} if model_type == "whisper" else {"num_hidden_layers": 2}
    model = build_classifier(model_type, **layers).train()
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 3 > 0)
    next(model.children()).eval()
    return model


def process_state() -> tuple[Any, ...]:
    """What a change of one model could leave behind for all others."""
    bars, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    return restoring.get(), torch.is_grad_enabled(), torch.get_num_threads(), bars, verbosity


def check_every_change(model: nn.Module, change: Change, undo: Callable[[Any], None]) -> None:
    """Raise before and after each call that changes something; compare the model each time."""
    undo(change(model))
    before, process = model_state(model), process_state()
    with Changes() as changes:
        done = change(model)
    undo(done)
    assert changes.count >= 3
    assert model_state(model) == before
    for number in changes.each():
        for after in (False, True):
            with pytest.raises(BrokenStepError), Changes(number, after=after):
                change(model)
            assert model_state(model) == before, (number, after)
            assert process_state() == process, (number, after)
    undo(change(model))
    assert model_state(model) == before


def check_every_line(model: nn.Module, change: Change, undo: Callable[[Any], None]) -> None:
    undo(change(model))
    before, process = model_state(model), process_state()
    with Steps() as steps:
        done = change(model)
    undo(done)
    assert len(steps.each()) > 3
    for broken in steps.each():
        with pytest.raises(BrokenStepError), Steps(broken):
            change(model)
        assert model_state(model) == before, broken
        assert process_state() == process, broken
    undo(change(model))
    assert model_state(model) == before


CHECKS = pytest.mark.parametrize("check", [check_every_change, check_every_line])


def revert(done: Any) -> None:
    done.revert()


@CHECKS
@pytest.mark.parametrize("name", [*EDITS, "head"])
def test_prepare(name, check):
    if check is check_every_line and name not in LINES:
        pytest.skip("the lines of all methods are in test_edit.py; here those around them")
    options = {**SMALL.get(name, {}), **({"recompute": "selective"} if name in EDITS else {})}
    check(build(), lambda model: prepare(model, complete(name), **options), revert)


@CHECKS
@pytest.mark.parametrize("name", METHODS)
def test_adapted_model(name, check):
    if check is check_every_line and name not in LINES:
        pytest.skip("the lines of all methods are in test_edit.py; here those around them")

    def undo(adapted: AdaptedModel) -> None:
        adapted.revert()
        # The encoder stays in eval mode, as documented.
        for module, mode in modes:
            module.training = mode

    model = build("bert")
    modes = [(module, module.training) for module in model.modules()]
    check(model, lambda model: AdaptedModel(model, complete(name), TASK, **SMALL.get(name, {})), undo)


@CHECKS
def test_tapped_encoder(check):
    def undo(encoder: TappedEncoder) -> None:
        encoder.revert()
        for module, mode in modes:
            module.training = mode

    model = build("bert")
    modes = [(module, module.training) for module in model.modules()]
    check(model, lambda model: TappedEncoder(model, (0,)), undo)


@CHECKS
@pytest.mark.parametrize("name", ["aat-m", "partial"])
def test_loading(name, check, tmp_path):
    trained = build_classifier(encoder_layers=2, model_type="whisper")
    prepare(trained, complete(name), head=[])
    mmtransfer.save(trained, tmp_path)
    check(build(), lambda model: mmtransfer.load_prepared(model, tmp_path), revert)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = build("whisper")
        self.second = build("wav2vec2")
        self.config = self.first.config
        self.adapter = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 8))


def test_accelerate():
    check_every_change(Pair(), lambda model: mmkernels.accelerate(model, adapters=["adapter"]), revert)


def test_a_class_that_cannot_be_exchanged():
    """The second of two; the first has its class back."""

    class Fixed(nn.Sequential):
        def __setattr__(self, name: str, value: Any) -> None:
            if name == "__class__":
                raise TypeError("object layout differs")
            super().__setattr__(name, value)

    def adapter(cls: type[nn.Sequential]) -> nn.Sequential:
        return cls(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 8))

    model = nn.ModuleList([adapter(nn.Sequential), adapter(Fixed)])
    with pytest.raises((TypeError, ValueError)):
        mmkernels.accelerate(model, adapters=["0", "1"])
    assert [type(module) for module in model] == [nn.Sequential, Fixed]
    assert model[0](torch.zeros(2, 8)).shape == (2, 8)
