"""The readout of SSR-Connector: tapped features to one vector a token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mmtransfer.encoders.taps import Taps, frame_index
from mmtransfer.method import Compressed, Compressor
from mmtransfer.tokens import TokenLabels

from .aligners import Aligner, CIFWeights, Segments
from .aligners.segments import Tokenize
from .connector import Connector

if TYPE_CHECKING:
    from mmtransfer.tasks.base import Task


class SSRReadout(Compressor):
    """Aligner and connector.

    Args:
        features: makes one frame `(N, C)` of the taps at `slots`.
        slots: of the connector's taps among those that are given.
        aligner: finds the segments, or the weights of continuous integrate-and-fire, which sum frames to
            tokens before the connector.
        aligner_slots: of its taps; None: it reads the frames that `features` makes.
        connector: makes vectors.
        textless: segments are found without the text in training too.
        loss_weight: of the aligner's own loss.
        match_scale: vectors begin with the scale of the embeddings that they are drawn to.

    Attributes:
        tokenize: makes tokens of texts, as the task has them; None where the task has no language model.
        token_each: whether the task wants a vector for each token of its text.
    """

    def __init__(
        self,
        features: nn.Module,
        slots: Sequence[int],
        aligner: Aligner | CIFWeights,
        aligner_slots: Sequence[int] | None,
        connector: Connector,
        *,
        textless: bool = False,
        loss_weight: float = 1.0,
        match_scale: bool = True,
    ) -> None:
        super().__init__()
        self.features, self.slots = features, list(slots)
        self.aligner = aligner
        self.aligner_slots = None if aligner_slots is None else list(aligner_slots)
        self.connector = connector
        self.textless, self.loss_weight, self.match_scale = textless, loss_weight, match_scale
        self.out_dim = connector.width
        self.needs_text = isinstance(aligner, Aligner) and aligner.needs_text
        self.tokenize: Tokenize | None = None
        self.token_each = False

    def frames_needed(self, target: Any) -> int:
        if self.tokenize is None or self.textless or isinstance(self.aligner, CIFWeights):
            return 0
        return self.aligner.frames_needed(target)

    def knows(self, target: Any) -> bool:
        if self.tokenize is None or self.textless or isinstance(self.aligner, CIFWeights):
            return True
        return self.aligner.knows(target)

    def attach(self, task: Task | None, head: nn.Module | None) -> None:
        if getattr(task, "language_model", None) is not None:
            assert task is not None
            self.tokenize, self.token_each = task.collate, bool(getattr(task, "token_each", False))
            if self.token_each and self.textless and not getattr(self.aligner, "finds_text", False):
                raise ValueError(
                    "textless training of a vector for each token needs the aligner ctc, which finds the "
                    "tokens of the transcript that it hears; choose it, or stage 2, or train with the text"
                )
        table = getattr(head, "table", None)
        if self.match_scale and table is not None:
            self.connector.norm.weight.data.fill_(float(table.float().square().mean().sqrt()))

    def compress(self, taps: Taps, labels: torch.Tensor | None) -> Compressed:
        tokens = None
        if labels is not None and self.tokenize is not None and not self.textless:
            tokens = TokenLabels.unpack(labels)
        frames = self.features(taps.features[:, self.slots])
        own = replace(taps, features=frames.unsqueeze(1))
        if isinstance(self.aligner, CIFWeights):
            x, counts, loss = self.aligner(own, tokens)
            vectors = self.connector(x, None, counts)
            return self._packed(vectors, Segments(counts, counts, tokens, loss), labels)
        found = self._segments(taps, own, tokens)
        vectors = self.connector(own.scatter(frames), found.ends, taps.lengths)
        return self._packed(vectors, found, labels)

    def segments(self, taps: Taps, labels: torch.Tensor | None = None) -> Segments:
        """The segments alone, with the text or without it; ValueError for continuous integrate-and-fire."""
        tokens = None if labels is None else TokenLabels.unpack(labels)
        own = replace(taps, features=self.features(taps.features[:, self.slots]).unsqueeze(1))
        return self._segments(taps, own, tokens)

    def _segments(self, taps: Taps, own: Taps, tokens: TokenLabels | None) -> Segments:
        if isinstance(self.aligner, CIFWeights):
            raise ValueError("continuous integrate-and-fire has tokens that share frames, not segments")
        if tokens is not None and not self.token_each and not self.aligner.aligns_text:
            # The segments that prediction will have; the text is aligned with nothing.
            tokens = None
        if self.aligner_slots is not None:
            own = replace(taps, features=taps.features[:, self.aligner_slots])
        return self.aligner(own, tokens, self.tokenize)

    def _packed(self, vectors: torch.Tensor, found: Segments, labels: torch.Tensor | None) -> Compressed:
        batch, steps, width = vectors.shape
        index = frame_index(found.counts, steps)
        rows = vectors.reshape(batch * steps, width)
        rows = rows if index is None else rows.index_select(0, index)
        places = Taps(rows.unsqueeze(1), found.counts, steps, index)
        # The text without the tokens that have no segment, where each token is compared with a vector.
        if labels is not None and self.token_each and found.labels is not None:
            labels = found.labels.pack()
        loss = None if found.loss is None else self.loss_weight * found.loss
        return Compressed(rows, places, labels, loss)
