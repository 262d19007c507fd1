"""Whisper's encoder on inputs shorter than its 30 seconds."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F
from transformers.masking_utils import create_bidirectional_mask


def window_length(encoder: Any) -> int:
    """The one number of mel frames that `WhisperEncoder.forward` accepts."""
    return encoder.config.max_source_positions * encoder.conv1.stride[0] * encoder.conv2.stride[0]


def encode_short(encoder: Any, mel: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
    """`WhisperEncoder.forward` with the position embeddings cut to the input, and with padding masked.

    Args:
        encoder: a `WhisperEncoder`.
        mel: `(B, num_mel_bins, S)`, S at most `window_length(encoder)`.
        lengths: `(B,)` mel frames per utterance, or None for S each. What lies past them has no influence.

    Returns the last hidden state `(B, (S + 1) // 2, d_model)`.
    """
    valid = None if lengths is None else torch.arange(mel.shape[2], device=mel.device) < lengths.unsqueeze(1)
    hidden = F.gelu(encoder.conv1(_zero_padding(mel, valid)))
    # Past the end the second convolution must see zeros, as it does alone, and not the first one's bias.
    hidden = F.gelu(encoder.conv2(_zero_padding(hidden, valid))).transpose(1, 2)
    hidden = hidden + encoder.embed_positions.weight[: hidden.shape[1]]
    mask = None
    if valid is not None:
        # Frame t comes from mel frames around 2t, so it is valid if 2t is.
        mask = create_bidirectional_mask(encoder.config, hidden, attention_mask=valid[:, ::2])
    for layer in encoder.layers:
        hidden = layer(hidden, mask)
    return encoder.layer_norm(hidden)


def _zero_padding(x: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    return x if valid is None else x.masked_fill(~valid.unsqueeze(1), 0.0)
