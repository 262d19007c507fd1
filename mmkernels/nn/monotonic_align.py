"""Module around ``mmkernels.monotonic_align``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmkernels.ops.monotonic_align import monotonic_align


class MonotonicAlign(nn.Module):
    """Aligns speech frames with text embeddings by their distances, as the aligner of UnitY2.

    The log-probabilities of the tokens at a frame are the softmax of ``-scale`` times the Euclidean distances
    between its features and the tokens' embeddings; the durations are those of the best monotonic path.

    Equivalent to (for a ``MonotonicAlign`` named ``module``, without lengths)::

        log_probs = torch.log_softmax(-module.scale * torch.cdist(frames, tokens), dim=-1)
        out = log_probs, mmkernels.monotonic_align(log_probs)

    Args:
        scale: factor of the distances, the inverse temperature of the softmax.
        backend: passed to ``mmkernels.monotonic_align``.

    Source: the aligner of UnitY2 in Seamless (arXiv 2312.05187), used by SSR-Connector (arXiv 2410.00168).
    Its code makes the differences of all frames and tokens; distances through a product need ``B * T * U``
    numbers.
    """

    def __init__(self, scale: float = 1.0, backend: str = "auto") -> None:
        super().__init__()
        if not scale > 0:
            raise ValueError(f"scale must be positive, got {scale}")
        self.scale, self.backend = scale, backend

    def forward(
        self,
        frames: Tensor,
        tokens: Tensor,
        frame_lengths: Tensor | None = None,
        token_lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities ``(B, T, U)`` and durations ``(B, U)`` of features ``(B, T, D)`` and embeddings
        ``(B, U, D)``. The log-probabilities, at least float32, are differentiable; those of tokens past
        ``token_lengths`` are -inf, and in a row without tokens they are uniform."""
        with torch.autocast(frames.device.type, enabled=False):
            distances = torch.cdist(_wide(frames), _wide(tokens))
            logits = -self.scale * distances
            if token_lengths is not None:
                token = torch.arange(tokens.shape[1], device=tokens.device)
                count = token_lengths[:, None, None]
                logits = logits.masked_fill((token >= count) & (count > 0), -torch.inf)
            log_probs = torch.log_softmax(logits, dim=-1)
        return log_probs, monotonic_align(log_probs, frame_lengths, token_lengths, backend=self.backend)

    def extra_repr(self) -> str:
        return f"scale={self.scale}"


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
