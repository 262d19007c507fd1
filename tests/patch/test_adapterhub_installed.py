"""``accelerate`` on the adapters library itself, where it is installed: random configurations, values and
gradients against the unchanged model."""

from __future__ import annotations

import copy
from typing import Any

import pytest

pytest.importorskip("adapters", exc_type=ImportError)

import adapters
import torch
from adapters.composition import Fuse, Parallel, Stack
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import BertConfig, BertModel, WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperModel

import mmkernels
from mmkernels.patch import bottleneck

WIDTH = 16


def bert() -> tuple[nn.Module, dict[str, Tensor]]:
    config = BertConfig(
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        vocab_size=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertModel(config), {"input_ids": torch.arange(12).view(2, 6)}


def whisper() -> tuple[nn.Module, dict[str, Tensor]]:
    config = WhisperConfig(
        d_model=WIDTH,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        num_mel_bins=8,
        max_source_positions=20,
        vocab_size=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        dropout=0.0,
    )
    features = torch.randn(2, 8, 40, generator=torch.Generator().manual_seed(0))
    return WhisperModel(config), {
        "input_features": features,
        "decoder_input_ids": torch.arange(8).view(2, 4),
    }


@st.composite
def configurations(draw: Any) -> dict[str, Any]:
    kind = draw(st.sampled_from(["seq_bn", "double_seq_bn", "par_bn"]))
    return {
        "kind": kind,
        "options": {
            "reduction_factor": draw(st.sampled_from([2, 4])),
            "non_linearity": draw(st.sampled_from(["relu", "gelu", "swish", "gelu_new", "tanh"])),
            "ln_before": draw(st.booleans()),
            "ln_after": draw(st.sampled_from([False, False, False, True])),
            "scaling": draw(st.sampled_from([1.0, 0.5, "learned", "channel"])),
            "dropout": draw(st.sampled_from([0.0, 0.0, 0.3])),
            "use_gating": draw(st.sampled_from([False, False, False, True])),
            "residual_before_ln": draw(st.sampled_from([True, False])) if kind == "seq_bn" else True,
        },
        "model": draw(st.sampled_from([bert, whisper])),
        "train": draw(st.booleans()),
        "setup": draw(st.sampled_from(["one", "stack", "fuse", "parallel"])),
        "late": draw(st.booleans()),
        "seed": draw(st.integers(0, 9)),
    }


def build(case: dict[str, Any]) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(case["seed"])
    model, inputs = case["model"]()
    adapters.init(model)
    config = adapters.AdapterConfig.load(case["kind"], **case["options"])
    for name in "ab":
        model.add_adapter(name, config=config)
    if case["setup"] == "fuse":
        model.add_adapter_fusion(Fuse("a", "b"))
    setup = {"one": "a", "stack": Stack("a", "b"), "fuse": Fuse("a", "b"), "parallel": Parallel("a", "b")}
    model.set_active_adapters(setup[case["setup"]])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.train(case["train"]), inputs


def run(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    torch.manual_seed(3)
    output = model(**inputs).last_hidden_state
    output.square().mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"output": output.detach(), **gradients}


def outcome(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor] | str:
    try:
        return run(model, inputs)
    except Exception as error:  # The library's own, of any class.
        return f"{type(error).__name__}: {error}"


@settings(max_examples=60, deadline=None, derandomize=True)
@given(case=configurations())
def test_agrees(case: dict[str, Any]) -> None:
    model, inputs = build(case)
    twin = copy.deepcopy(model)
    keys = list(model.state_dict())
    report = mmkernels.accelerate(model)
    options = case["options"]
    served = not (options["ln_after"] or options["use_gating"] or options["non_linearity"] == "tanh")
    assert bool(report.replaced) == served
    if case["late"]:
        model.eval()
        twin.eval()
    got, expected = outcome(model, inputs), outcome(twin, inputs)
    if isinstance(expected, str):
        assert got == expected
        return
    assert isinstance(got, dict)
    assert list(model.state_dict()) == keys
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            got[name], value, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_the_op_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    op = bottleneck.adapter
    monkeypatch.setattr(bottleneck, "adapter", lambda *a, **k: calls.append(1) or op(*a, **k))
    model, inputs = bert()
    adapters.init(model)
    model.add_adapter("a", config="double_seq_bn")
    model.set_active_adapters("a")
    mmkernels.accelerate(model)
    model(**inputs)
    assert len(calls) == 4
