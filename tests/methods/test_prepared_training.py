"""Prepared models as people train them: copied, pickled, compiled, checkpointed, in Trainer."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from prepared_models import build, encode, gradients, layers_of, perturb, prepared, weigh
from tiny_encoders import TINY, make_input
from torch import nn
from transformers import Trainer, TrainingArguments

import mmtransfer

AST = "audio-spectrogram-transformer"
RUNTIMES = (
    {},
    {"rewrite": True},
    {"recompute": "selective"},
    {"recompute": "full"},
    {"recompute": "selective", "rewrite": True},
)


@pytest.fixture(params=RUNTIMES, ids=str)
def runtime(request):
    return request.param


def break_off(model: nn.Module) -> None:
    """A training step that ends in the middle of a layer."""

    def fail(*_):
        raise KeyboardInterrupt

    hook = layers_of(model)[1].get_submodule("fc2").register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        encode(model)
    hook.remove()


@pytest.mark.parametrize("broken", [False, True])
def test_a_deep_copy_is_independent(runtime, broken):
    model = prepared(build("whisper"), **runtime)
    expected, wanted = encode(model), gradients(model)
    if broken:
        break_off(model)
    other = copy.deepcopy(model)
    assert_same_gradients(gradients(other), wanted)
    perturb(other)
    assert torch.equal(encode(model), expected)
    assert not torch.allclose(encode(other), expected, atol=1e-3)
    mmtransfer.revert(other)
    assert torch.equal(encode(model), expected)
    assert not hasattr(layers_of(other)[0], "adapter_mlp")
    assert torch.equal(encode(other), encode(build("whisper")))


def test_pickled(runtime):
    model = prepared(build(AST), **runtime)
    other = pickle.loads(pickle.dumps(model))
    assert_same_gradients(gradients(other), gradients(model))
    mmtransfer.revert(other)
    assert torch.equal(encode(other), encode(build(AST)))


def test_gradient_checkpointing_of_the_model(runtime):
    model = prepared(build(AST), **runtime).train()
    wanted = gradients(model)
    model.gradient_checkpointing_enable()
    assert_same_gradients(gradients(model), wanted)


def assert_same_gradients(found, wanted):
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


@pytest.mark.parametrize("options", [{}, {"rewrite": True}])
def test_compiles_without_graph_breaks(options):
    model = prepared(build("audio-spectrogram-transformer"), **options)
    layer = layers_of(model)[1]
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))


class Clips(torch.utils.data.Dataset):
    def __init__(self) -> None:
        self.inputs = make_input(AST, batch=8)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> dict:
        return {"input_values": self.inputs[index], "labels": index % 2}


@pytest.mark.parametrize("method", ["aat-ms", "prompt", "lora", "full"])
@pytest.mark.parametrize(
    "options", [{}, {"bf16": True, "gradient_checkpointing": True}], ids=["plain", "bf16"]
)
def test_trainer(tmp_path, method, options):
    model = TINY[AST].build(head=True)
    names = mmtransfer.prepare(model, method).trainable
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    settings = TrainingArguments(
        tmp_path,
        max_steps=4,
        learning_rate=1e-2,
        per_device_train_batch_size=4,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )
    Trainer(model, settings, train_dataset=Clips()).train()
    for name, parameter in model.named_parameters():
        # Biases of keys have no influence, so the optimizer leaves them.
        assert torch.equal(parameter, before[name]) != (name in names) or "k_proj.bias" in name, name


@pytest.mark.parametrize("method", ["aat-ms", "houlsby", "prompt", "bitfit", "partial"])
def test_autocast(method):
    options = {"backend": "auto"} if method in ("aat-ms", "houlsby") else {}
    exact = prepared(build(AST), method, **options)
    model = copy.deepcopy(exact).float()
    wanted = gradients(exact)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(make_input(AST)).last_hidden_state
    weigh(output).backward()
    for name in mmtransfer.get_prepared(model).trainable:
        gradient = model.get_parameter(name).grad
        assert gradient.dtype == torch.float32
        if wanted[name].norm() > 1e-3:
            one, other = gradient.flatten(), wanted[name].flatten().float()
            cosine = nn.functional.cosine_similarity(one, other, dim=0)
            assert cosine > 0.95, name
