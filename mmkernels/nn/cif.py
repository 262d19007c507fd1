"""Module around ``mmkernels.cif``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmkernels.ops.cif import CIF as Tokens
from mmkernels.ops.cif import cif


class CIF(nn.Module):
    """Learns how much each frame weighs, and adds up frames to tokens by continuous integrate-and-fire.

    The weight of a frame is the sigmoid of a linear map of a convolution over frames, with a ReLU between
    them. Training adds the quantity loss ``(alpha.sum(1) / beta - target_lengths).abs()`` to that of the
    task.

    Equivalent to (for a ``CIF`` named ``module``)::

        hidden = torch.relu(module.convolution(x.mT).mT)
        alpha = torch.sigmoid(module.output(hidden)).squeeze(-1)
        out = mmkernels.cif(x, alpha, beta=module.beta, tail_threshold=module.tail_threshold), alpha

    Args:
        dim: width D of the frames.
        kernel_size: frames that the convolution sees, an odd number.
        beta: sum of the weights of a token.
        tail_threshold: share of ``beta`` from which the rest of an utterance fires a token.
        backend: passed to ``mmkernels.cif``.

    Parameters: ``convolution`` (``nn.Conv1d(D, D, kernel_size)``) and ``output`` (``nn.Linear(D, 1)``).

    Source: Dong and Xu, CIF (arXiv 1905.11235), section 3.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int = 3,
        beta: float = 1.0,
        tail_threshold: float = 0.5,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be an odd number, got {kernel_size}")
        self.beta, self.tail_threshold, self.backend = beta, tail_threshold, backend
        self.convolution = nn.Conv1d(dim, dim, kernel_size, padding=kernel_size // 2)
        self.output = nn.Linear(dim, 1)

    def forward(
        self,
        x: Tensor,
        lengths: Tensor | None = None,
        target_lengths: Tensor | None = None,
        max_length: int | None = None,
    ) -> tuple[Tokens, Tensor]:
        """Tokens of frames ``(B, T, D)``, and the weights ``(B, T)`` that the frames had before they were
        scaled to ``target_lengths``; they are 0 past ``lengths``, so that padding does not count."""
        if lengths is None:
            padding = None
        else:
            padding = torch.arange(x.shape[1], device=x.device) >= lengths[:, None]
        given = x if padding is None else x.masked_fill(padding[:, :, None], 0)
        hidden = torch.relu(self.convolution(given.mT).mT)
        alpha = torch.sigmoid(self.output(hidden)).squeeze(-1)
        if padding is not None:
            alpha = alpha.masked_fill(padding, 0)
        tokens = cif(
            x,
            alpha,
            beta=self.beta,
            lengths=lengths,
            target_lengths=target_lengths,
            tail_threshold=self.tail_threshold,
            max_length=max_length,
            backend=self.backend,
        )
        return tokens, alpha

    def extra_repr(self) -> str:
        return f"beta={self.beta}, tail_threshold={self.tail_threshold}"
