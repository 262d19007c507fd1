"""The first stage: vectors of speech are drawn to the embeddings of the transcript's tokens."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

import mmkernels
from mmtransfer.encoders.taps import Taps
from mmtransfer.tokens import PADDING, TokenLabels

from .vectors import NOT_FINITE, check_finite, check_width, find_sound

#: Numbers in a block of scores, and in a block of the table: 64 MB in float32.
_BLOCK = 1 << 24


class EmbeddingHead(nn.Module):
    """The embedding table of a language model, frozen: a loss towards its rows, and the nearest row.

    Args:
        dim: of the vectors, the table's width.
        table: `(V, H)`. It is a buffer, which checkpoints do not have; casts of the model cast it too.
        cosine_weight: of the loss.
    """

    table: torch.Tensor

    def __init__(self, dim: int, table: torch.Tensor, *, cosine_weight: float = 5.0) -> None:
        super().__init__()
        check_width(dim, table.shape[1])
        self.cosine_weight = cosine_weight
        self.register_buffer("table", table.detach(), persistent=False)

    def loss(self, frames: torch.Tensor, taps: Taps, labels: torch.Tensor) -> torch.Tensor:
        """`mmkernels.distill_loss` of the vectors against their tokens.

        Args:
            frames: `(N, H)` vectors of all utterances.
            taps: whose lengths are the vectors of each utterance: one for each token.
            labels: of `Text.collate`.

        Raises:
            NotFiniteError: on the CPU, for NaN or infinity in a vector.
            ValueError: on the CPU, where an utterance has more vectors than tokens or the reverse.
        """
        check_finite(frames, taps)
        ids, counts = _align(taps, labels)
        return mmkernels.distill_loss(
            taps.scatter(frames), self.table, ids, counts=counts, cosine_weight=self.cosine_weight
        )

    def quality(
        self, frames: torch.Tensor, taps: Taps, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each vector, `(N,)` float32: the cosine with its token's embedding, and the squared distance."""
        ids, _ = _align(taps, labels)
        inside = torch.arange(taps.steps, device=ids.device) < taps.lengths[:, None]
        rows = self.table[ids[inside]].float()
        vectors = frames.float()
        return F.cosine_similarity(vectors, rows, dim=-1), (vectors - rows).square().sum(-1)

    @torch.no_grad()
    def forward(self, frames: torch.Tensor, taps: Taps) -> torch.Tensor:
        """The tokens `(B, T)` whose embeddings have the largest cosine, behind them `PADDING`.

        An utterance with a vector that is not finite has `NOT_FINITE` alone.
        """
        found = taps.scatter(self._nearest(frames)[:, None]).squeeze(-1)
        behind = torch.arange(taps.steps, device=found.device) >= taps.lengths[:, None]
        return found.masked_fill(~find_sound(frames, taps)[:, None], NOT_FINITE).masked_fill(behind, PADDING)

    def trained_tensors(self) -> dict[str, torch.Tensor]:
        """None: the table is the language model's."""
        return {}

    def _nearest(self, frames: torch.Tensor) -> torch.Tensor:
        """`(N,)` rows of the table, from blocks of scores: all would be N times the vocabulary."""
        rows, width = self.table.shape
        table_step = max(1, _BLOCK // max(width, 1))
        step = max(1, _BLOCK // min(table_step, max(rows, 1)))
        best = torch.zeros(len(frames), dtype=torch.int64, device=frames.device)
        score = torch.full((len(frames),), -torch.inf, device=frames.device)
        # Autocast would round the scores, of which many are close.
        with torch.autocast(frames.device.type, enabled=False):
            for start in range(0, rows, table_step):
                block = F.normalize(self.table[start : start + table_step].float(), dim=-1)
                for first in range(0, len(frames), step):
                    part = slice(first, first + step)
                    # The length of a vector scales all its scores, so its direction alone decides.
                    value, row = (frames[part].float() @ block.T).max(dim=-1)
                    better = value > score[part]
                    best[part] = torch.where(better, row + start, best[part])
                    score[part] = torch.where(better, value, score[part])
        return best


def _align(taps: Taps, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The ids `(B, T)` and the tokens `(B,)` of a batch of vectors."""
    tokens = TokenLabels.unpack(labels)
    counts = tokens.counts
    if not counts.is_cuda and not torch.equal(counts, taps.lengths):
        row = int((counts != taps.lengths).nonzero()[0])
        raise ValueError(
            f"utterance {row} of the batch: {int(taps.lengths[row])} vectors and {int(counts[row])} tokens; "
            "the first stage needs one vector for each token"
        )
    missing = max(taps.steps - tokens.ids.shape[1], 0)
    ids = F.pad(tokens.ids, (0, missing), value=PADDING)[:, : taps.steps].clamp(min=0)
    return ids, torch.minimum(counts, taps.lengths)
