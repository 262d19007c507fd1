"""SSR-Connector: a readout with one vector for each token of speech (arXiv 2410.00168)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from mmkernels.backends import BACKENDS
from mmtransfer.encoders.encoder import Encoder, Tap, resolve_layers
from mmtransfer.method import LastLayer, Method, option
from mmtransfer.training.settings import Training

from .aligners import Aligner, CIFWeights, FixedRate, UnitY2Aligner
from .connector import ATTENTION, POOLING, Connector
from .eager import EagerConnector
from .models import CTCDescription, describe_ctc
from .readout import SSRReadout

if TYPE_CHECKING:
    from mmtransfer.model import AdaptedModel
    from mmtransfer.tasks.base import Task

ALIGNERS = ("ctc", "unity2", "cif", "fixed")


@dataclass(frozen=True, kw_only=True)
class SSRMethod(Method):
    """Speech is cut where tokens of its text end, and each piece becomes one vector of a language model;
    options as in the paper.

    Attributes:
        aligner: "ctc": `aligner_model`; "unity2": learnt embeddings and monotonic alignment, needs the text;
            "cif": continuous integrate-and-fire; "fixed": equal segments. None: ctc with a model, else cif.
        aligner_model: folder of a model that was trained for the task ctc on the same encoder, frozen.
        aligner_description: of that model, in checkpoints.
        frames_per_token: of fixed segments.
        layer: of the encoder whose frames are compressed.
        fusion: a method with a readout, such as a fusion of several layers, that makes the frames instead of
            `layer`; it is trained with the connector.
        width: of the vectors; None: that of the language model, without one that of the encoder.
        depth: layers of the connector's decoder.
        heads: of its attention; None: as the language model.
        key_heads: heads of keys and values; None: as the language model.
        hidden: width of its feed-forward parts; None: as the language model.
        attention: "segment": frames see their segment and `lookback` frames before it; "causal": all before.
        lookback: 0 or 1.
        pooling: "last": the vector of a segment is the output at its last frame; "mean": over its frames.
        dropout: of the outputs of attention and feed-forward; the paper has 0.1.
        aligner_width: of the embeddings of unity2.
        aligner_weight: of the loss of unity2, or of the count of cif.
        alphabet: the characters that unity2 embeds; None: those of the task.
        match_scale: the connector's last norm begins with the scale of the language model's embeddings; the
            paper begins with 1, which hundreds of thousands of steps have the time to correct.
        textless: training finds segments as prediction does, without the text.
        frozen: aligner and connector are not trained.
        backend: of `mmkernels.segment_attention`.
    """

    name: ClassVar[str] = "ssr"
    title: ClassVar[str] = "SSR-Connector"
    paper: ClassVar[str] = "arXiv 2410.00168"
    training: ClassVar[Training] = Training(epochs=10, batch_size=16, learning_rate=1e-3)

    aligner: str | None = option(None, choices=ALIGNERS)
    aligner_model: str | None = option(None, runtime=True)
    aligner_description: str | None = None
    frames_per_token: float = option(8.0, least=1)
    layer: Tap = -1
    fusion: str | None = None
    width: int | None = option(None, least=8)
    depth: int = option(4, least=1)
    heads: int | None = option(None, least=1)
    key_heads: int | None = option(None, least=1)
    hidden: int | None = option(None, least=1)
    attention: str = option("segment", choices=ATTENTION)
    lookback: int = option(1, least=0)
    pooling: str = option("last", choices=POOLING)
    dropout: float = option(0.0, least=0)
    aligner_width: int = option(256, least=1)
    aligner_weight: float = option(1.0, least=0)
    alphabet: str | None = None
    match_scale: bool = True
    textless: bool = False
    frozen: bool = False
    backend: str = option("auto", choices=BACKENDS, runtime=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.aligner_model is not None:
            description = describe_ctc(Path(self.aligner_model).expanduser())
            object.__setattr__(self, "aligner_description", description.to_json())
        self._description()
        if self.aligner == "ctc" and self.aligner_description is None:
            raise ValueError(
                "ssr: the aligner ctc needs aligner_model, the folder of a model that `mmtransfer finetune "
                "--task ctc` trained on the same encoder"
            )
        if self.lookback > 1:
            raise ValueError(
                f"ssr: lookback must be 0 or 1, got {self.lookback}: a segment may have one frame, and "
                "further back is another segment"
            )
        if not self.dropout < 1:
            raise ValueError(f"ssr: dropout must be below 1, got {self.dropout}")

    @property
    def aligned_by(self) -> str:
        """The aligner, also where it was left to the method."""
        if self.aligner is not None:
            return self.aligner
        return "cif" if self.aligner_description is None else "ctc"

    def fit(self, task: Task | None) -> SSRMethod:
        """With the sizes of the task's language model where there is no value of one's own."""
        shape = getattr(task, "shape", None) or {}
        own = {name: shape[name] for name in ("width", "heads", "key_heads", "hidden") if name in shape}
        if self.aligned_by == "unity2":
            own["alphabet"] = getattr(task, "alphabet", "")
        missing = {name: value for name, value in own.items() if getattr(self, name) is None}
        return dataclasses.replace(self, **missing) if missing else self

    def weights_from(self) -> tuple[str, ...]:
        return () if self.aligner_model is None else ("aligner_model",)

    def needs_target(self) -> str | None:
        if self.aligned_by != "unity2":
            return None
        return "the aligner unity2 finds no segments without the text; choose ctc, cif or fixed"

    def select_taps(self, encoder: Encoder) -> Sequence[Tap]:
        return self._taps(encoder)[0]

    def readout(self, encoder: Encoder) -> nn.Module:
        _, slots, aligner_slots = self._taps(encoder)
        features: Any = LastLayer(encoder.hidden_size)
        if (fusion := self._fusion()) is not None:
            features = fusion.readout(encoder)
        width = encoder.hidden_size if self.width is None else self.width
        heads = max(width // 64, 1) if self.heads is None else self.heads
        readout = SSRReadout(
            features,
            slots,
            self._aligner(encoder, features.out_dim),
            aligner_slots,
            Connector(
                features.out_dim,
                width,
                layers=self.depth,
                heads=heads,
                key_heads=heads if self.key_heads is None else self.key_heads,
                hidden=4 * width if self.hidden is None else self.hidden,
                attention=self.attention,
                lookback=self.lookback,
                pooling=self.pooling,
                dropout=self.dropout,
                backend=self.backend,
            ),
            textless=self.textless,
            loss_weight=self.aligner_weight,
            match_scale=self.match_scale,
        )
        return readout.requires_grad_(False) if self.frozen else readout

    def baseline(self, model: AdaptedModel) -> AdaptedModel | None:
        twin = super().baseline(model)
        assert twin is not None
        twin.readout.connector = EagerConnector.of(model.readout.connector)
        return twin

    def _fusion(self) -> Method | None:
        if self.fusion is None:
            return None
        from mmtransfer import registry

        found = registry.find(self.fusion)
        if found.has_edit or not found.has_readout or isinstance(found, SSRMethod):
            raise ValueError(f"ssr: fusion must be a method with a readout alone, got {self.fusion!r}")
        return found

    def _description(self) -> CTCDescription | None:
        if self.aligned_by != "ctc" or self.aligner_description is None:
            return None
        return CTCDescription.from_json(self.aligner_description)

    def _taps(self, encoder: Encoder) -> tuple[list[Tap], list[int], list[int] | None]:
        """The taps, and which of them the connector and the aligner read."""
        fusion, description = self._fusion(), self._description()
        own = (self.layer,) if fusion is None else fusion.select_taps(encoder)
        theirs = () if description is None else description.method().select_taps(encoder)
        first, second = (
            resolve_layers("taps", taps, encoder.num_layers, embeddings=True) if taps else ()
            for taps in (own, theirs)
        )
        taps = [*first, *(tap for tap in second if tap not in first)]
        return (
            taps,
            [taps.index(tap) for tap in first],
            [taps.index(tap) for tap in second] if description is not None else None,
        )

    def _aligner(self, encoder: Encoder, dim: int) -> Aligner | CIFWeights:
        if self.aligned_by == "cif":
            return CIFWeights(dim)
        if self.aligned_by == "fixed":
            return FixedRate(self.frames_per_token)
        if self.aligned_by == "unity2":
            return UnitY2Aligner(dim, self.alphabet or "", self.aligner_width)
        description = self._description()
        assert description is not None
        source = None if self.aligner_model is None else Path(self.aligner_model).expanduser()
        return description.build(encoder, source)
