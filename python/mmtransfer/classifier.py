"""A speech encoder that is trained itself, with a linear layer on the mean of its last layer's frames."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_outputs import SequenceClassifierOutput

from mmtransfer import aat
from mmtransfer.hff import SequenceClassificationHead, TappedEncoder
from mmtransfer.hff.encoder import Edit


class TunedEncoder(TappedEncoder):
    """The last layer of an encoder whose parameters may be trained: those that ask for a gradient get one.

    The constructor freezes all of them; `mmtransfer.aat.prepare` then says what is trained. See
    `TappedEncoder` for the call and its result.
    """

    kind = "tuned"

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, [-1])
        self._freeze(None)

    def _running(self) -> contextlib.AbstractContextManager[list[Edit]]:
        return contextlib.nullcontext([])


class PooledClassifier(nn.Module):
    """An encoder prepared with a method of `mmtransfer.aat`, and a linear layer on the mean of its frames.

    The classifier, the pooled frames (the valid ones of the last layer) and their padding are those of
    `mmtransfer.hff.HFF` on the last layer, so that the two differ in what is trained alone. Like there, the
    encoder has no dropout and no augmentation.

    Args:
        model: a transformers model, changed in place: its encoder is frozen, then prepared.
        num_labels: number of classes.
        method: of `mmtransfer.aat.METHODS`.
        options: of `mmtransfer.aat.prepare`.

    Raises:
        TypeError, ValueError, ImportError: as `TappedEncoder` and `mmtransfer.aat.prepare` do.
    """

    # DDP must know: the norm after a last layer that is tapped before it, an embedding of masked frames.
    may_leave_unused = True

    def __init__(self, model: nn.Module, num_labels: int, method: str, **options: Any) -> None:
        super().__init__()
        self.encoder = TunedEncoder(model)
        self.head = SequenceClassificationHead(self.encoder.hidden_size, num_labels)
        self._description = replace(self.encoder.description, encoder=("encoder.encoder",))
        self.prepared = aat.prepare(self, method, head="head", description=self._description, **options)

    def forward(
        self,
        input_values: torch.Tensor | None = None,
        input_features: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        lengths: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> SequenceClassifierOutput:
        """Logits, and the cross-entropy loss if there are labels; arguments as for `mmtransfer.hff.HFF`."""
        inputs = {"input_values": input_values, "input_features": input_features}
        named = {name: tensor for name, tensor in inputs.items() if tensor is not None}
        taps = self.encoder(lengths=lengths, attention_mask=attention_mask, **named)
        logits = self.head(taps, taps.features.squeeze(1))
        # transformers annotates its outputs with the legacy FloatTensor.
        loss: Any = None if labels is None else F.cross_entropy(logits.float(), labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write what is trained, the head with it, by `mmtransfer.aat.save_adapters`."""
        aat.save_adapters(self, folder)

    def load_adapters(self, folder: str | Path) -> None:
        """Load what `save_pretrained` wrote from a classifier of the same method; see `aat.load_adapters`."""
        aat.load_adapters(self, folder)
