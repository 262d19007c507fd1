"""Shared by the tests of encoders: variants of the tiny models, ragged lengths, the state of a model, HFF's
adapters, a log of operators.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tiny_encoders import BASE_VARIANT, TINY, make_input
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mmtransfer import registry
from mmtransfer.encoders import DESCRIPTIONS, Encoder, TappedEncoder

ALL_TAPS = ("embeddings", 0, 1, 2, 3)
MASKED = [name for name, row in DESCRIPTIONS.items() if row.takes_mask]
VARIANTS: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in TINY] + [
    (name, BASE_VARIANT) for name in ("wav2vec2", "hubert", "wavlm", "unispeech", "unispeech-sat")
]


def ragged_lengths(model_type: str) -> torch.Tensor:
    """Lengths for the default input: full, odd, short."""
    size = make_input(model_type).shape[DESCRIPTIONS[model_type].time_dim]
    return torch.tensor([size, size - size // 3, size // 2 + 1])


def length_mask(lengths: torch.Tensor) -> torch.Tensor:
    return (torch.arange(int(lengths.max())) < lengths.unsqueeze(1)).long()


def model_state(model: nn.Module) -> dict[str, Any]:
    """All that an edit could change: objects by identity, tensors by their place, type and bits."""
    found: dict[str, Any] = {"config": model.config.to_dict()}
    for name, module in model.named_modules():
        found[name] = {
            key: [(k, id(v)) for k, v in value.items()] if isinstance(value, dict) else id(value)
            for key, value in module.__dict__.items()
        }
        found[name]["module"] = id(module), type(module), module.training
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        bits = tensor.detach().contiguous().flatten().view(torch.uint8)
        found[f"tensor {name}"] = (
            tensor.data_ptr(),
            tensor.dtype,
            tensor.requires_grad,
            bytes(bits.numpy()),
        )
    return found


def run(model: nn.Module) -> torch.Tensor:
    encoder = Encoder(model)
    with torch.no_grad():
        return encoder.model(make_input(encoder.description.model_type)).last_hidden_state


def adapters(encoder: TappedEncoder) -> dict[int, Any]:
    layers = enumerate(encoder.parts.all_layers)
    return {index: layer.adapter_output for index, layer in layers if hasattr(layer, "adapter_output")}


def add_adapters(encoder: TappedEncoder, **options: Any) -> TappedEncoder:
    """HFF's adapters; they start as the identity, which hides almost every mistake, so they are perturbed."""
    torch.manual_seed(1)
    encoder.edit = registry.find("hff-adapters", **{"bottleneck": 4, **options}).edit(encoder.parts)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in encoder.edit.parameters:
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return encoder


def make_adapted(
    model_type: str = "wav2vec2",
    taps: Sequence[Any] = (0, 1, 2, 3),
    *,
    model: nn.Module | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> TappedEncoder:
    return add_adapters(TappedEncoder(model or TINY[model_type].build(), taps, dtype=dtype), **options)


class OpLog(TorchDispatchMode):
    """Operators that computed something, with the shape of their result."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not func.is_view:
            self.calls.append((str(func), tuple(result.shape)))
        return result
