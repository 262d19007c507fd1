"""An encoder, a fusion of its layers and a head, as one trainable model (HFF, arXiv 2211.02712)."""

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
from mmtransfer import models
from mmtransfer.checkpoint import load_strictly, read_checkpoint, write_checkpoint

from .adapters import AdaptedEncoder
from .encoder import FrozenEncoder, Tap, TappedEncoder
from .fusion import Fusion, check_positive, make_fusion
from .taps import Taps

METHOD = "hff"
ENCODERS: dict[str, type[TappedEncoder]] = {kind.kind: kind for kind in (FrozenEncoder, AdaptedEncoder)}


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
    """Encoder with frozen weights, trainable fusion and head, and adapters if the encoder has them.

    No gradient enters a `FrozenEncoder`; in an `AdaptedEncoder` it goes down to the lowest adapter.

    With a head, calls return transformers' `SequenceClassifierOutput` (loss if labels are given), so that the
    transformers Trainer can train it; without one they return the fused sequence, `FusedOutput`, for the
    caller's own decoder or CTC layer.

    Features are cast to the dtype of the fusion's weights, except under autocast.

    Args:
        encoder: a `FrozenEncoder` or an `AdaptedEncoder`.
        fusion: takes as many taps of the same width.
        head: a `SequenceClassificationHead`, or None for the sequence.
    """

    def __init__(
        self, encoder: TappedEncoder, fusion: Fusion, head: SequenceClassificationHead | None = None
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
        """On a transformers model, frozen: this fusion over these taps, a classifier if `num_labels`."""
        encoder = FrozenEncoder(model, taps, dtype=dtype)
        fused = make_fusion(fusion, taps=len(encoder.taps), dim=encoder.hidden_size, **fusion_options)
        head = None if num_labels is None else SequenceClassificationHead(fused.out_dim, num_labels)
        return cls(encoder, fused, head)

    def extract(self, inputs: torch.Tensor, lengths: torch.Tensor | None = None) -> Taps:
        """The tapped features; see `TappedEncoder.forward`.

        Those of a `FrozenEncoder` may be stored; adapters change them as they learn.
        """
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
                run, so stored features train no adapters.
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
        """Write `config.json` and `model.safetensors` (adapters, fusion, head; not the model) into a folder.

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
            ValueError: another method, an unknown kind of encoder, fusion or head, a model of another type or
                size (it is untouched), or weights of other names or shapes.
        """
        config, tensors = read_checkpoint(folder, METHOD)
        described = config["encoder"]
        if model is None:
            if not described["name_or_path"]:
                raise ValueError(f"{folder} was saved from an unnamed encoder; pass it as model")
            model = AutoModel.from_pretrained(described["name_or_path"])
        encoder = _make_encoder(model, config, folder)
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


def _describe(encoder: TappedEncoder) -> dict[str, Any]:
    """The configuration's part on the encoder; a dtype only where the user chose one."""
    config: Any = encoder.encoder.config
    return {
        "name_or_path": config._name_or_path,
        **_measure(encoder.encoder),
        "dtype": str(encoder.dtype).removeprefix("torch.") if encoder.dtype_given else None,
        "kind": encoder.kind,
        "options": encoder.options,
    }


def _measure(model: nn.Module) -> dict[str, Any]:
    """What a model must have in common with the one that a checkpoint was trained on."""
    encoder = models.find_encoder(model)
    return {
        "model_type": models.describe(encoder).model_type,
        "hidden_size": models.hidden_size(encoder),
        "num_layers": len(models.get_layers(encoder)),
    }


def _make_encoder(model: nn.Module, config: dict[str, Any], folder: str | Path) -> TappedEncoder:
    described = config["encoder"]
    for name, found in _measure(model).items():
        if found != described[name]:
            raise ValueError(
                f"{folder} was trained on an encoder of {name} {described[name]!r}, got {found!r}"
            )
    # Checkpoints from before there were adapters name no kind.
    kind, options = described.get("kind", FrozenEncoder.kind), described.get("options", {})
    if kind not in ENCODERS:
        raise ValueError(f"encoder kind must be one of {', '.join(ENCODERS)}, got {kind!r}")
    dtype = None if described["dtype"] is None else getattr(torch, described["dtype"])
    return ENCODERS[kind](model, config["taps"], dtype=dtype, **options)


def _trainable(hff: HFF) -> nn.ModuleDict:
    """What is saved: the adapters, the fusion and the head."""
    parts: dict[str, nn.Module] = {"fusion": hff.fusion}
    if isinstance(hff.encoder, AdaptedEncoder):
        parts["adapters"] = hff.encoder.adapters
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
