"""The connector: speech frames of an encoder to one vector a segment, in the space of a language model."""

from __future__ import annotations

import torch
from torch import nn
from transformers.models.llama.configuration_llama import LlamaConfig

from mmkernels import segment_pool

from .decoder import RMSNorm, SegmentDecoderLayer

ATTENTION = ("segment", "causal")
POOLING = ("last", "mean")


class Connector(nn.Module):
    """A linear layer, causal decoder layers of Llama's shape, a final RMSNorm, and one frame a segment.

    The last layer computes queries, output projection and feed-forward for the last frames of segments alone:
    the others are read by nothing.

    Args:
        dim: width of the frames.
        width: of the vectors: the language model's.
        layers: of the decoder.
        heads, key_heads: of its attention; a head's size `width / heads` is a multiple of 8.
        hidden: width of its feed-forward parts.
        attention: "segment": a frame sees its segment and `lookback` frames before it; "causal": all frames
            before it.
        lookback: 0 or 1: the frame before a segment is the last of the segment before.
        pooling: "last": the output at the last frame of a segment is its vector; "mean": that of its frames.
        dropout: of the outputs of attention and feed-forward, in training.
        eps: of the norms.
        backend: of `mmkernels.segment_attention`.

    Raises:
        ValueError: sizes that do not divide, or an option out of range.

    Source: Tan et al., SSR-Connector (arXiv 2410.00168). Attention has no dropout, as the kernel holds no
    weights.
    """

    def __init__(
        self,
        dim: int,
        width: int,
        *,
        layers: int = 4,
        heads: int = 32,
        key_heads: int = 8,
        hidden: int = 14336,
        attention: str = "segment",
        lookback: int = 1,
        pooling: str = "last",
        dropout: float = 0.0,
        eps: float = 1e-5,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        _check(width, layers, heads, key_heads, lookback, attention, pooling)
        config = LlamaConfig(
            hidden_size=width,
            intermediate_size=hidden,
            num_attention_heads=heads,
            num_key_value_heads=key_heads,
            head_dim=width // heads,
            rms_norm_eps=eps,
            attention_bias=False,
            mlp_bias=False,
        )
        self.attention, self.lookback, self.pooling = attention, lookback, pooling
        self.width = width
        self.projection = nn.Linear(dim, width, bias=False)
        self.layers = nn.ModuleList(
            SegmentDecoderLayer(config, lookback=lookback, dropout=dropout, backend=backend)
            for _ in range(layers)
        )
        self.norm = RMSNorm(width, eps)

    def forward(
        self, x: torch.Tensor, ends: torch.Tensor | None, lengths: torch.Tensor | None = None
    ) -> torch.Tensor:
        """One vector for each segment of `x` `(B, T, dim)`.

        Args:
            x: frames.
            ends: `(B, M)` int64 exclusive ends of the segments, non-decreasing; an empty segment, as in the
                padding behind the last one, has a vector of zeros. None: every frame is a segment, and sees
                all before it.
            lengths: `(B,)` valid frames, for "causal" attention; all if None.

        Returns:
            `(B, M, width)`.

        Gradients flow to `x` and to the parameters. ValueError for frames of another shape, or as
        `mmkernels.segment_attention`.
        """
        if x.dim() != 3 or x.shape[2] != self.projection.in_features:
            raise ValueError(
                f"x must be frames (B, T, {self.projection.in_features}), got shape {tuple(x.shape)}"
            )
        x = self.projection(x)
        inside = ends
        if inside is None or self.attention == "causal":
            whole = x.new_full((len(x),), x.shape[1], dtype=torch.int64) if lengths is None else lengths
            inside = whole.unsqueeze(1)
        rows = ends if self.pooling == "last" else None
        for layer in self.layers[:-1]:
            x = layer(x, inside)
        x = self.norm(self.layers[-1](x, inside, rows))
        if ends is None or rows is not None:
            return x
        return segment_pool(x, ends, reduce="mean")


def _check(
    width: int, layers: int, heads: int, key_heads: int, lookback: int, attention: str, pooling: str
) -> None:
    if layers < 1:
        raise ValueError(f"layers must be at least 1, got {layers}")
    if heads < 1 or width % heads or width // heads % 8:
        raise ValueError(f"heads must divide width into multiples of 8, got {heads} of {width}")
    if key_heads < 1 or heads % key_heads:
        raise ValueError(f"key_heads must divide heads, got {key_heads} of {heads}")
    if lookback not in (0, 1):
        raise ValueError(
            f"lookback must be 0 or 1, got {lookback}: a segment may have one frame, and further back is "
            "another segment"
        )
    if attention not in ATTENTION:
        raise ValueError(f"attention must be one of {', '.join(ATTENTION)}, got {attention!r}")
    if pooling not in POOLING:
        raise ValueError(f"pooling must be one of {', '.join(POOLING)}, got {pooling!r}")
