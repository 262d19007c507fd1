"""The CTC head of a pretrained model of transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mmtransfer.encoders.encoder import Encoder

from .vocabulary import Alphabet, find_alphabet


@dataclass(frozen=True)
class OwnHead:
    """A head, and the norm in front of it where the encoder's last layer is tapped before one.

    Attributes:
        alphabet: of its logits.
        normed: whether there is a norm.
        tensors: by their names in the head of the task ctc.
    """

    alphabet: Alphabet
    normed: bool
    tensors: Mapping[str, torch.Tensor]


def find_own_head(model: nn.Module, source: str) -> OwnHead:
    """The head of Wav2Vec2ForCTC and its relatives.

    ValueError, naming `source`, for a model without one, with layers between encoder and head, or whose
    tokenizer cannot be read.
    """
    linear = getattr(model, "lm_head", None)
    if not isinstance(linear, nn.Linear) or linear.bias is None:
        raise ValueError(f"{source} has no CTC head to keep ({type(model).__name__})")
    parts = Encoder(model)
    config: Any = parts.model.config
    if getattr(config, "add_adapter", False) or linear.in_features != parts.hidden_size:
        raise ValueError(f"{source} has layers between its encoder and its CTC head, which cannot be kept")
    tensors = {"classifier.weight": linear.weight, "classifier.bias": linear.bias}
    norm = None if parts.description.last_state_normed else parts.final_norm
    if norm is not None:
        # The head of the task has torch's default.
        if not isinstance(norm, nn.LayerNorm) or norm.eps != nn.LayerNorm(1).eps:
            raise ValueError(f"{source} has another norm in front of its CTC head, which cannot be kept")
        tensors |= {"norm.weight": norm.weight, "norm.bias": norm.bias}
    alphabet = find_alphabet(source, linear.out_features, getattr(config, "pad_token_id", None))
    return OwnHead(alphabet, norm is not None, {name: tensor.detach() for name, tensor in tensors.items()})
