"""The connector as the authors' code computes it: a dense mask, and all frames in every layer."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .connector import Connector


class EagerConnector(nn.Module):
    """The twin of `Connector`, of the same parameters; its frames past the last segment have other values."""

    def __init__(self, twin: Connector) -> None:
        super().__init__()
        self.attention, self.lookback, self.pooling = twin.attention, twin.lookback, twin.pooling
        self.width = twin.width
        self.projection, self.layers, self.norm = twin.projection, twin.layers, twin.norm

    @classmethod
    def of(cls, connector: Connector) -> EagerConnector:
        """A copy that shares nothing."""
        return cls(copy.deepcopy(connector))

    def forward(
        self, x: torch.Tensor, ends: torch.Tensor | None, lengths: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As `Connector.forward`."""
        x = self.projection(x)
        mask = self._mask(x, ends, lengths)
        for layer in self.layers:
            x = self._layer(layer, x, mask)
        x = _norm(self.norm, x)
        if ends is None:
            return x
        if self.pooling == "last":
            is_there = (ends > F.pad(ends, (1, 0))[:, :-1]).unsqueeze(2)
            index = (ends - 1).clamp(min=0).unsqueeze(2).expand(-1, -1, x.shape[2])
            return torch.where(is_there, x.gather(1, index), 0.0)
        starts = F.pad(ends, (1, 0))[:, :-1]
        frames = torch.arange(x.shape[1], device=x.device)
        inside = (frames >= starts.unsqueeze(2)) & (frames < ends.unsqueeze(2))
        weights = inside.to(x.dtype) / inside.sum(2, keepdim=True).clamp(min=1)
        return weights @ x

    def _mask(self, x: torch.Tensor, ends: torch.Tensor | None, lengths: torch.Tensor | None) -> torch.Tensor:
        """`(B, 1, T, T)`, additive."""
        steps = x.shape[1]
        frames = torch.arange(steps, device=x.device)
        sees = (frames.unsqueeze(0) <= frames.unsqueeze(1)).expand(len(x), -1, -1)
        if lengths is not None:
            sees = sees & (frames < lengths.view(-1, 1, 1))
        if ends is not None and self.attention == "segment":
            starts = torch.zeros(len(x), steps, dtype=torch.int64, device=x.device)
            for row in range(len(x)):
                for end in ends[row].tolist():
                    starts[row, end:] = end - self.lookback if end else 0
            sees = sees & (frames >= starts.unsqueeze(2))
        # A frame sees itself, so that no row of the softmax is empty.
        sees = sees | torch.eye(steps, dtype=torch.bool, device=x.device)
        return torch.zeros(sees.shape, dtype=x.dtype, device=x.device).masked_fill(~sees, -torch.inf)[:, None]

    def _layer(self, layer: Any, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        attention = layer.self_attn
        h = _norm(layer.input_layernorm, x)
        q, k, v = (
            projection(h).unflatten(2, (-1, layer.head_dim)).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        k, v = (each.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for each in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.expand(-1, q.shape[1], -1, -1))
        x = x + self._drop(layer, attention.o_proj(out.transpose(1, 2).flatten(2)))
        return x + self._drop(layer, layer.mlp(_norm(layer.post_attention_layernorm, x)))

    def _drop(self, layer: Any, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x, layer.dropout, self.training) if layer.dropout else x


def _norm(norm: Any, x: torch.Tensor) -> torch.Tensor:
    """RMSNorm as transformers writes it, in float32 at least."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)
    return norm.weight * normed.to(x.dtype)
