"""Module around ``mmkernels.segment_pool``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmkernels.ops.segment_pool import segment_pool
from mmkernels.ops.segment_pool.schema import REDUCTIONS


class SegmentPool(nn.Module):
    """One vector for each segment of frames: of tokens or words, from the frames of a speech encoder.

    With ``reduce="attention"`` a learnable query scores the frames, and the softmax of the scores inside each
    segment weights them. Training starts from the mean of each segment.

    Equivalent to (``reduce="mean"``; ``F`` is ``torch.nn.functional``)::

        starts, frame = F.pad(ends, (1, 0))[:, :-1], torch.arange(x.shape[1])
        inside = (frame >= starts[..., None]) & (frame < ends[..., None])  # (B, M, T)
        out = inside.to(x.dtype) @ x / inside.sum(-1, keepdim=True).clamp(min=1)

    Args:
        reduce: ``"mean"``, ``"sum"``, ``"max"``, ``"last"`` or ``"attention"``.
        dim: width D of the frames; needed for ``"attention"`` only.
        backend: passed to ``mmkernels.segment_pool``.

    Parameters: ``query (D,)``, zero at first, for ``"attention"`` only.
    """

    def __init__(self, reduce: str = "mean", dim: int | None = None, backend: str = "auto") -> None:
        super().__init__()
        if reduce not in REDUCTIONS:
            raise ValueError(f"reduce must be one of {', '.join(REDUCTIONS)}, got {reduce!r}")
        if reduce == "attention" and dim is None:
            raise ValueError("reduce='attention' needs dim, the width of the frames")
        self.reduce, self.dim, self.backend = reduce, dim, backend
        attends = reduce == "attention"
        self.query = nn.Parameter(torch.empty(dim)) if attends and dim is not None else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.query is not None:
            nn.init.zeros_(self.query)

    def forward(self, x: Tensor, ends: Tensor, counts: Tensor | None = None) -> Tensor:
        """Pool frames ``x (B, T, D)`` into ``(B, M, D)``.

        ``ends (B, M)`` are the exclusive ends of each row's segments, the first ``counts (B,)`` of them
        valid. Frames in no segment are not read, but for the scores of ``"attention"``: there they must be
        finite, or the query's gradient is not.
        """
        scores = None if self.query is None else torch.matmul(x, self.query)
        return segment_pool(x, ends, reduce=self.reduce, scores=scores, counts=counts, backend=self.backend)

    def extra_repr(self) -> str:
        return f"{self.reduce!r}, dim={self.dim}"
