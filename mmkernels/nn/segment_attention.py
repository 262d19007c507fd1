"""Module around ``mmkernels.segment_attention``."""

from __future__ import annotations

from torch import Tensor, nn

from mmkernels.ops.segment_attention import segment_attention


class SegmentAttention(nn.Module):
    """Self-attention of a decoder layer, causal inside segments and ``lookback`` frames before them.

    Equivalent to::

        heads = lambda p: p(x).unflatten(2, (-1, module.head_dim)).transpose(1, 2)
        q, k, v = map(heads, (module.q_proj, module.k_proj, module.v_proj))
        out = mmkernels.segment_attention(q, k, v, ends, lookback=module.lookback)
        out = module.o_proj(out.transpose(1, 2).flatten(2))

    Args:
        dim: width of the frames.
        heads: heads of queries; they divide ``dim``, and a head's size ``dim / heads`` is a multiple of 8.
        key_heads: heads of keys and values, each shared by ``heads / key_heads`` heads of queries; ``heads``
            if None.
        lookback: how many frames before its segment a frame sees.
        bias: whether the projections have biases.
        backend: passed to ``mmkernels.segment_attention``.

    Parameters: those of the linear layers ``q_proj``, ``k_proj``, ``v_proj`` and ``o_proj``, named as in
    transformers' Llama. There is no encoding of positions.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        key_heads: int | None = None,
        *,
        lookback: int = 1,
        bias: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        key_heads = heads if key_heads is None else key_heads
        if heads < 1 or dim % heads != 0 or dim // heads % 8 != 0:
            raise ValueError(f"heads must divide dim into multiples of 8, got {heads} of {dim}")
        if key_heads < 1 or heads % key_heads != 0:
            raise ValueError(f"key_heads must divide heads, got {key_heads} of {heads}")
        if lookback < 0:
            raise ValueError(f"lookback must not be negative, got {lookback}")
        self.heads, self.key_heads, self.head_dim = heads, key_heads, dim // heads
        self.lookback, self.backend = lookback, backend
        self.q_proj = nn.Linear(dim, dim, bias=bias)
        self.k_proj = nn.Linear(dim, key_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(dim, key_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(dim, dim, bias=bias)

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """Attend among the frames ``x (B, T, dim)`` inside the segments that end at ``ends (B, M)``."""
        q, k, v = (
            projection(x).unflatten(2, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = segment_attention(q, k, v, ends, lookback=self.lookback, backend=self.backend)
        projected: Tensor = self.o_proj(out.transpose(1, 2).flatten(2))
        return projected

    def extra_repr(self) -> str:
        return f"heads={self.heads}, key_heads={self.key_heads}, lookback={self.lookback}"
