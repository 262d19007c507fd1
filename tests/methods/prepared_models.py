"""Tiny models for the tests of `mmtransfer.aat`, with adapters that are not zero."""

from __future__ import annotations

import copy
from typing import Any

import torch
from tiny_encoders import TINY, make_input
from torch import nn

from mmtransfer import aat
from mmtransfer.encoders import descriptions as models


def build(model_type: str, **changes: Any) -> nn.Module:
    """A float64 encoder of this type in eval mode."""
    return models.find_encoder(TINY[model_type].build(**changes)).double().eval()


def encode(encoder: nn.Module, inputs: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
    if inputs is None:
        inputs = make_input(models.describe(encoder).model_type)
    if inputs.is_floating_point():
        inputs = inputs.double()
    return encoder(inputs, **kwargs).last_hidden_state


def perturb(model: nn.Module) -> None:
    """Give all new parameters values that show; the up-projections start at zero."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name in aat.get_prepared(model).trainable:
            parameter = model.get_parameter(name)
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(parameter))


def prepared(model: nn.Module, method: str = "aat_ms", **options: Any) -> nn.Module:
    """A prepared, perturbed copy; two of one model and method have the same parameters."""
    model = copy.deepcopy(model)
    torch.manual_seed(4)
    aat.prepare(model, method, **{"backend": "reference", **options})
    perturb(model)
    return model


def weigh(output: torch.Tensor) -> torch.Tensor:
    """A loss in which every output counts differently."""
    return (output * torch.randn(output.shape, generator=torch.Generator().manual_seed(7)).to(output)).sum()


def gradients(model: nn.Module, **kwargs: Any) -> dict[str, torch.Tensor]:
    """Gradients of `weigh`, by parameter."""
    model.zero_grad()
    weigh(encode(model, **kwargs)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
