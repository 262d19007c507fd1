"""Decoder layers of Llama's shape whose attention stays inside segments, without encoding of positions."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm

from mmkernels import segment_attention, segment_pool


class RMSNorm(LlamaRMSNorm):
    """Llama's, which keeps its input alone for the backward pass, and computes in float64 for such an input.

    Half precision is computed as transformers does it.
    """

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        x = hidden_states
        if x.dtype != self.weight.dtype or x.dtype not in (torch.float32, torch.float64):
            return super().forward(x)
        return _Normed.apply(x, self.weight, self.variance_epsilon)


class _Normed(torch.autograd.Function):
    """`weight * (x * r)` with `r = 1 / sqrt(mean(x^2) + eps)` of each row."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        r = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return weight * (x * r)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        r = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + ctx.eps)
        y = x * r
        needs_x, needs_weight, _ = ctx.needs_input_grad
        d_weight = (grad * y).flatten(0, -2).sum(0) if needs_weight else None
        if not needs_x:
            return None, d_weight, None
        d_y = grad * weight
        return r * (d_y - y * (d_y * y).mean(-1, keepdim=True)), d_weight, None


class SegmentDecoderLayer(LlamaDecoderLayer):
    """RMSNorm, grouped-query attention inside segments, RMSNorm, SwiGLU; each of the two with a residual.

    Modules and parameters are those of `LlamaDecoderLayer`: a layer of a language model can be loaded.

    Args:
        config: sizes, heads and eps.
        lookback: frames before its segment that a frame sees.
        dropout: of the outputs of attention and feed-forward, in training.
        backend: of `mmkernels.segment_attention`.
    """

    def __init__(
        self, config: LlamaConfig, *, lookback: int = 1, dropout: float = 0.0, backend: str = "auto"
    ) -> None:
        super().__init__(config, 0)
        self.input_layernorm: Any = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm: Any = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lookback, self.dropout, self.backend = lookback, dropout, backend
        self.head_dim: int = self.self_attn.head_dim

    def forward(  # type: ignore[override]
        self, x: torch.Tensor, ends: torch.Tensor, rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The layer's output for frames `x` `(B, T, H)`.

        Args:
            x: frames.
            ends: `(B, M)` exclusive ends of the segments; see `mmkernels.segment_attention`.
            rows: `(B, R)`, non-decreasing: compute the outputs of the frames `rows - 1` alone, each where it
                is larger than the one before it, and zeros elsewhere. Keys and values are of all frames.

        Returns:
            `(B, T, H)`, or `(B, R, H)`.
        """
        attention = self.self_attn
        h = self.input_layernorm(x)
        k, v = (self._heads(projection(h)) for projection in (attention.k_proj, attention.v_proj))
        if rows is None:
            q = attention.q_proj(h)
        else:
            q = place_last(attention.q_proj(take_last(h, rows)), rows, x.shape[1])
            x = take_last(x, rows)
        out = segment_attention(self._heads(q), k, v, ends, lookback=self.lookback, backend=self.backend)
        out = out.transpose(1, 2).flatten(2)
        x = x + self._drop(attention.o_proj(out if rows is None else take_last(out, rows)))
        return x + self._drop(self._feed_forward(self.post_attention_layernorm(x)))

    def _feed_forward(self, x: torch.Tensor) -> torch.Tensor:
        mlp = self.mlp
        return _GatedProjection.apply(mlp.gate_proj(x), mlp.up_proj(x), mlp.down_proj.weight)

    def _heads(self, projected: torch.Tensor) -> torch.Tensor:
        return projected.unflatten(2, (-1, self.head_dim)).transpose(1, 2)

    def _drop(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


class _GatedProjection(torch.autograd.Function):
    """`(silu(gate) * up) @ weight.T`, which keeps gate and up alone for the backward pass.

    Autograd would keep silu(gate) and the product too: as much again, and half of all that a layer keeps.
    """

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up, weight)
        # As autocast has it: products in the dtype of the activations.
        return F.linear(F.silu(gate) * up, weight.to(gate.dtype))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate, up, weight = ctx.saved_tensors
        needs_gate, needs_up, needs_weight = ctx.needs_input_grad
        silu = F.silu(gate)
        d_weight = None
        if needs_weight:
            d_weight = (grad.flatten(0, -2).T @ (silu * up).flatten(0, -2)).to(weight.dtype)
        if not (needs_gate or needs_up):
            return None, None, d_weight
        d_product = grad @ weight.to(grad.dtype)
        d_up = d_product * silu
        if torch.is_grad_enabled():
            # The backward pass is to be differentiated itself.
            sigmoid = gate.sigmoid()
            return d_product * up * (sigmoid + silu * (1 - sigmoid)), d_up, d_weight
        # In place: these are the largest tensors of the backward pass.
        del silu
        return torch.ops.aten.silu_backward(d_product.mul_(up), gate), d_up, d_weight


def take_last(x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """The last frame of each segment of `x` `(B, T, D)`: `(B, M, D)`, zeros for an empty segment."""
    return segment_pool(x, ends, reduce="last")


def place_last(rows: torch.Tensor, ends: torch.Tensor, steps: int) -> torch.Tensor:
    """Put rows `(B, M, D)` at the last frames of their segments in `(B, steps, D)`, zeros elsewhere."""
    batch, _, width = rows.shape
    is_there = ends > F.pad(ends, (1, 0))[:, :-1]
    first = torch.arange(batch, device=ends.device).unsqueeze(1) * steps
    # Rows of empty segments go behind the grid.
    index = torch.where(is_there, first + ends - 1, batch * steps)
    placed = rows.new_zeros(batch * steps + 1, width).index_copy(0, index.flatten(), rows.flatten(0, 1))
    return placed[:-1].view(batch, steps, width)
