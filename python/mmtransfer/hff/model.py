"""A frozen encoder, a fusion of its layers and a head, as one trainable model (HFF, arXiv 2211.02712)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel
from transformers.modeling_outputs import ModelOutput, SequenceClassifierOutput

import mmkernels
from mmtransfer.checkpoint import load_strictly, read_checkpoint, write_checkpoint

from .encoder import FrozenEncoder, Tap
from .fusion import Fusion, check_positive, make_fusion
from .taps import Taps

METHOD = "hff"


@dataclass
class FusedOutput(ModelOutput):
    """The fused sequence.

    Attributes:
        last_hidden_state: `(B, T, out_dim)`, zero past each length.
        lengths: `(B,)` int64 valid frames.
    """

    last_hidden_state: torch.Tensor | None = None
    lengths: torch.Tensor | None = None


class SequenceClassificationHead(nn.Module):
    """Mean over the valid frames of an utterance, then a linear layer; no valid frame counts as zeros."""

    kind = "sequence_classification"

    def __init__(self, dim: int, num_labels: int) -> None:
        super().__init__()
        check_positive("num_labels", num_labels)
        self.num_labels = num_labels
        self.classifier = nn.Linear(dim, num_labels)

    def forward(self, taps: Taps, fused: torch.Tensor) -> torch.Tensor:
        """Logits `(B, num_labels)` from the fused frames `(N, dim)`."""
        pooled = taps.scatter(fused).sum(dim=1) / taps.lengths.clamp(min=1).unsqueeze(1)
        return self.classifier(pooled)


class HFF(nn.Module):
    """Frozen encoder, trainable fusion and head. No gradient enters the encoder.

    With a head, calls return transformers' `SequenceClassifierOutput` (loss if labels are given), so that the
    transformers Trainer can train it; without one they return the fused sequence, `FusedOutput`, for the
    caller's own decoder or CTC layer.

    Features are cast to the dtype of the fusion's weights, except under autocast.

    Args:
        encoder: the frozen encoder with its taps.
        fusion: takes as many taps of the same width.
        head: a `SequenceClassificationHead`, or None for the sequence.
    """

    def __init__(
        self, encoder: FrozenEncoder, fusion: Fusion, head: SequenceClassificationHead | None = None
    ) -> None:
        super().__init__()
        if (fusion.taps, fusion.dim) != (len(encoder.taps), encoder.hidden_size):
            raise ValueError(
                f"fusion takes {fusion.taps} taps of width {fusion.dim}, the encoder gives "
                f"{len(encoder.taps)} of width {encoder.hidden_size}"
            )
        if head is not None and head.classifier.in_features != fusion.out_dim:
            raise ValueError(
                f"head takes width {head.classifier.in_features}, the fusion gives {fusion.out_dim}"
            )
        self.encoder = encoder
        self.fusion = fusion
        self.head = head

    @classmethod
    def build(
        cls,
        model: nn.Module,
        taps: Sequence[Tap],
        *,
        fusion: str = "hff_b",
        num_labels: int | None = None,
        dtype: torch.dtype | None = None,
        **fusion_options: Any,
    ) -> HFF:
        """On a transformers model: a fusion of this kind over these taps, a classifier if `num_labels`."""
        encoder = FrozenEncoder(model, taps, dtype=dtype)
        fused = make_fusion(fusion, taps=len(encoder.taps), dim=encoder.hidden_size, **fusion_options)
        head = None if num_labels is None else SequenceClassificationHead(fused.out_dim, num_labels)
        return cls(encoder, fused, head)

    def extract(self, inputs: torch.Tensor, lengths: torch.Tensor | None = None) -> Taps:
        """The frozen features, for instance to be stored; see `FrozenEncoder.forward`."""
        return self.encoder(inputs, lengths)

    def fuse(self, taps: Taps) -> torch.Tensor:
        """The fused frames `(N, out_dim)` of tapped features; this is the trainable part below the head."""
        features = taps.features
        if not torch.is_autocast_enabled(features.device.type):
            features = features.to(next(self.fusion.parameters()).dtype)
        return self.fusion(features)

    def forward(
        self,
        input_values: torch.Tensor | None = None,
        input_features: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        lengths: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        features: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
    ) -> SequenceClassifierOutput | FusedOutput:
        """Fuse an input of the encoder, or stored features.

        Args:
            input_values, input_features, input_ids, pixel_values: the encoder's main input, by its name.
            attention_mask: `(B, S)`, right-padded, along the main input's time axis; it wins over `lengths`.
            lengths: `(B,)`, valid positions of the main input; with `features`, their frames per utterance.
            labels: `(B,)` class indices, for the cross-entropy loss.
            features: `(N, L, C)` valid frames of all utterances, as `extract` gives them; the encoder is not
                run.
        """
        inputs = {
            "input_values": input_values,
            "input_features": input_features,
            "input_ids": input_ids,
            "pixel_values": pixel_values,
        }
        named = {name: tensor for name, tensor in inputs.items() if tensor is not None}
        if features is not None:
            if named or attention_mask is not None or lengths is None:
                raise ValueError("features go with lengths (their frames per utterance) and with no input")
            taps = Taps.pack(features, lengths)
        else:
            taps = self.encoder(lengths=lengths, attention_mask=attention_mask, **named)
        fused = self.fuse(taps)
        if self.head is None:
            if labels is not None:
                raise ValueError("labels need a head; without one the caller computes the loss")
            return FusedOutput(last_hidden_state=taps.scatter(fused), lengths=taps.lengths)
        logits = self.head(taps, fused)
        # transformers annotates its outputs with the legacy FloatTensor.
        loss: Any = None if labels is None else F.cross_entropy(logits.float(), labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `config.json` and `model.safetensors` (fusion and head, not the encoder) into a folder.

        An earlier HFF checkpoint there is replaced; another kind of file under these names is an error
        (FileExistsError), and other files are left alone. Each file is replaced atomically.
        """
        write_checkpoint(folder, self._config(), _trainable(self).state_dict())

    @classmethod
    def from_pretrained(cls, folder: str | Path, model: nn.Module | None = None) -> HFF:
        """The model that `save_pretrained` wrote, in eval mode.

        Args:
            folder: where `config.json` and `model.safetensors` are.
            model: the transformers model with the encoder; None loads the one named in the configuration.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: another method, an unknown fusion or head, a model of another type or size, or weights
                of other names or shapes.
        """
        config, tensors = read_checkpoint(folder, METHOD)
        described = config["encoder"]
        if model is None:
            if not described["name_or_path"]:
                raise ValueError(f"{folder} was saved from an unnamed encoder; pass it as model")
            model = AutoModel.from_pretrained(described["name_or_path"])
        dtype = described["dtype"]
        encoder = FrozenEncoder(model, config["taps"], dtype=None if dtype is None else getattr(torch, dtype))
        for name, found in _describe(encoder).items():
            if name not in ("name_or_path", "dtype") and found != described[name]:
                raise ValueError(
                    f"{folder} was trained on an encoder of {name} {described[name]!r}, got {found!r}"
                )
        fusion = make_fusion(**config["fusion"])
        hff = cls(encoder, fusion, _make_head(config["head"], fusion.out_dim))
        load_strictly(_trainable(hff), tensors, folder)
        return hff.eval()

    def _config(self) -> dict[str, Any]:
        head = self.head
        return {
            "method": METHOD,
            "mmkernels_version": mmkernels.__version__,
            "encoder": _describe(self.encoder),
            "taps": list(self.encoder.taps),
            "fusion": {"kind": self.fusion.kind, **self.fusion.options},
            "head": None if head is None else {"kind": head.kind, "num_labels": head.num_labels},
        }


def _describe(encoder: FrozenEncoder) -> dict[str, Any]:
    """The configuration's part on the encoder; a dtype only where the user chose one."""
    config: Any = encoder.encoder.config
    return {
        "name_or_path": config._name_or_path,
        "model_type": encoder.description.model_type,
        "hidden_size": encoder.hidden_size,
        "num_layers": encoder.num_layers,
        "dtype": str(encoder.dtype).removeprefix("torch.") if encoder.dtype_given else None,
    }


def _trainable(hff: HFF) -> nn.ModuleDict:
    """What is saved: the fusion and the head."""
    parts: dict[str, nn.Module] = {"fusion": hff.fusion}
    if hff.head is not None:
        parts["head"] = hff.head
    return nn.ModuleDict(parts)


def _make_head(config: dict[str, Any] | None, dim: int) -> SequenceClassificationHead | None:
    if config is None:
        return None
    if config["kind"] != SequenceClassificationHead.kind:
        raise ValueError(
            f"head kind must be {SequenceClassificationHead.kind!r} or null, got {config['kind']!r}"
        )
    return SequenceClassificationHead(dim, config["num_labels"])
