"""Tiny models that are prepared with a method, with new parameters that are not zero."""

from __future__ import annotations

import copy
from typing import Any

import torch
from tiny_encoders import TINY, make_input
from torch import nn

import mmtransfer
from mmtransfer import registry
from mmtransfer.encoders import DESCRIPTIONS, Encoder, describe
from mmtransfer.method import Method


def build(model_type: str, **changes: Any) -> nn.Module:
    """A float64 encoder of this type in eval mode."""
    return Encoder(TINY[model_type].build(**changes)).model.double().eval()


def layers_of(model: nn.Module) -> list[nn.Module]:
    return Encoder(model).all_layers


def encode(encoder: nn.Module, inputs: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
    if inputs is None:
        inputs = make_input(describe(encoder).model_type)
    if inputs.is_floating_point():
        inputs = inputs.double()
    return encoder(inputs, **kwargs).last_hidden_state


def perturb(model: nn.Module) -> None:
    """Give all new parameters values that show; the up-projections start at zero."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name in mmtransfer.get_prepared(model).trainable:
            parameter = model.get_parameter(name)
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(parameter))


def complete(method: str | Method, **options: Any) -> Method:
    """A method with its options, and with those that have to be given."""
    found = registry.find(method)
    needed = {"source": "N(target)"} if registry.has_option(found, "source") else {}
    return registry.find(found, **{**needed, **options})


def exactly(method: str) -> dict[str, str]:
    """The option that computes a method in float64, for methods that have it."""
    return {"backend": "reference"} if registry.has_option(registry.find(method), "backend") else {}


def prepared(model: nn.Module, method: str = "aat-ms", **options: Any) -> nn.Module:
    """A prepared, perturbed copy; two of one model and method have the same parameters."""
    model = copy.deepcopy(model)
    torch.manual_seed(4)
    mmtransfer.prepare(model, complete(method, **{**exactly(method), **options}))
    perturb(model)
    return model


def rewritten(model: nn.Module) -> tuple[str, ...]:
    """The adapters of AAT that a prepared model computes inside the frozen products."""
    found = mmtransfer.get_prepared(model)
    method: Any = found.method
    return method.rewritten(found.edit.encoder, found.edit.encoder.layers) if method.rewrite else ()


def impossible(model_type: str) -> set[str]:
    """Edits that a model of this type cannot have."""
    row = DESCRIPTIONS[model_type]
    separate = row.calls_projections and row.fused is None
    return (set() if row.attention_alone_mixes else {"prompt"}) | (set() if separate else {"lora"})


def weigh(output: torch.Tensor) -> torch.Tensor:
    """A loss in which every output counts differently."""
    return (output * torch.randn(output.shape, generator=torch.Generator().manual_seed(7)).to(output)).sum()


def gradients(model: nn.Module, **kwargs: Any) -> dict[str, torch.Tensor]:
    """Gradients of `weigh`, by parameter."""
    model.zero_grad()
    weigh(encode(model, **kwargs)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
