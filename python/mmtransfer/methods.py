"""The methods that can be compared, and how a model of each is built."""

from __future__ import annotations

import abc
import copy
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from mmtransfer import models
from mmtransfer.classifier import PooledClassifier
from mmtransfer.data import DataError
from mmtransfer.hff import (
    HFF,
    AdaptedEncoder,
    FrozenEncoder,
    Fusion,
    SequenceClassificationHead,
    TappedEncoder,
    make_fusion,
    reference,
)
from mmtransfer.hff.encoder import Tap


@dataclass(frozen=True)
class Job:
    """What a model is built for.

    Attributes:
        model: a transformers model; its encoder is left as it is but for being frozen.
        taps: layers, for the methods that fuse several.
        width: output width of LFF and HFF.
        classes: number of classes.
    """

    model: nn.Module
    taps: tuple[Tap, ...]
    width: int
    classes: int


@dataclass(frozen=True)
class Method(abc.ABC):
    """A way to classify with an encoder.

    Attributes:
        title: for tables and figures.
        learning_rate: peak rate. It and all of `TrainSettings` were chosen on speed-changed copies (x 0.85,
            1.15, 1.3) of the demo's training clips, never on a test clip; for what trains through the encoder
            on those of a third of the clips, from few rates.
    """

    title: str
    learning_rate: float

    #: Whether gradients enter the encoder, so that it runs in every step.
    through_encoder: ClassVar[bool] = False

    @abc.abstractmethod
    def build(self, job: Job) -> HFF | PooledClassifier:
        """An untrained model. ValueError or ImportError if the encoder cannot have the method."""


@dataclass(frozen=True)
class FusionMethod(Method):
    """A fusion of a frozen encoder's layers, trained on stored features; the encoder is shared.

    Attributes:
        fusion: kind of the fusion in `mmtransfer.hff.FUSIONS`.
        options: of the fusion.
        last_only: use the encoder's last layer alone.
        projects: whether the fusion has an output width of its own.
        eager: its twin in plain PyTorch; None where there is nothing to fuse.
    """

    fusion: str = "weighted_sum"
    options: dict[str, Any] = field(default_factory=dict)
    last_only: bool = False
    projects: bool = False
    eager: type[nn.Module] | None = None

    def build(self, job: Job) -> HFF:
        model = self.assemble(FrozenEncoder(job.model, self.taps(job)), job)
        if self.last_only:
            # The softmax of one weight is 1 whatever the weight.
            model.fusion.requires_grad_(False)
        return model

    def taps(self, job: Job) -> list[Tap]:
        return [-1] if self.last_only else list(job.taps)

    def build_eager(self, fusion: Fusion) -> nn.Module | None:
        """The twin of a fusion of this method."""
        if self.eager is None:
            return None
        return self.eager(**{key: value for key, value in fusion.options.items() if key != "backend"})

    def assemble(self, encoder: TappedEncoder, job: Job) -> HFF:
        """The method's fusion and a head on any encoder with its taps."""
        width = {"out_dim": job.width} if self.projects else {}
        fusion = make_fusion(
            self.fusion, taps=len(encoder.taps), dim=encoder.hidden_size, **self.options, **width
        )
        return HFF(encoder, fusion, SequenceClassificationHead(fusion.out_dim, job.classes))


@dataclass(frozen=True)
class EncoderMethod(Method):
    """Trains inside the encoder; each model has a copy of it."""

    through_encoder: ClassVar[bool] = True

    @property
    @abc.abstractmethod
    def start(self) -> FusionMethod:
        """The method on the frozen encoder that is trained first: what it learned is where training begins.

        Gradients through a random classifier would disturb the encoder before the classifier is of any use.
        """

    @staticmethod
    def begin(model: nn.Module, trained: HFF) -> None:
        """Copy what `start` has learned into a model that `build` made."""
        model.get_submodule("head").load_state_dict(trained.get_submodule("head").state_dict())
        if isinstance(model, HFF):
            model.fusion.load_state_dict(trained.fusion.state_dict())

    @abc.abstractmethod
    def build_eager(self, job: Job) -> nn.Module | None:
        """The same in plain PyTorch, with the same state dict; None where there is nothing to fuse."""

    @staticmethod
    def copy_encoder(job: Job) -> nn.Module:
        return copy.deepcopy(models.find_encoder(job.model))


@dataclass(frozen=True)
class AdaptedFusionMethod(EncoderMethod):
    """A fusion of the layers of an encoder with trainable adapters (HFF's section 3.4).

    Attributes:
        fusion: the method on the frozen encoder.
        bottleneck: of the adapters.
    """

    fusion: FusionMethod
    bottleneck: int

    @property
    def start(self) -> FusionMethod:
        return self.fusion

    def build(self, job: Job) -> HFF:
        return self._build(job, backend="auto")

    def build_eager(self, job: Job) -> HFF:
        model = self._build(job, backend="reference")
        eager: Any = self.fusion.build_eager(model.fusion)
        model.fusion = eager
        return model

    def _build(self, job: Job, backend: str) -> HFF:
        taps = self.fusion.taps(job)
        encoder = AdaptedEncoder(self.copy_encoder(job), taps, bottleneck=self.bottleneck, backend=backend)
        return self.fusion.assemble(encoder, job)


@dataclass(frozen=True)
class TuningMethod(EncoderMethod):
    """A method of `mmtransfer.aat` with a linear layer on the mean of the last layer's frames.

    Attributes:
        method: a key of `mmtransfer.aat.METHODS`.
    """

    method: str

    @property
    def start(self) -> FusionMethod:
        return _LAST

    def build(self, job: Job) -> PooledClassifier:
        return self._build(job, backend="auto")

    def build_eager(self, job: Job) -> PooledClassifier | None:
        if self.method not in ("aat_ms", "aat_m", "aat_s", "houlsby"):
            return None
        return self._build(job, backend="reference")

    def _build(self, job: Job, backend: str) -> PooledClassifier:
        encoder = self.copy_encoder(job)
        options: dict[str, Any] = {"backend": backend}
        if self.method == "partial":
            # The paper's last 6 of 12; of other encoders the upper half too.
            count = len(models.get_layers(encoder))
            options["layers"] = range(count - max(count // 2, 1), count)
        return PooledClassifier(encoder, job.classes, self.method, **options)


_LAST = FusionMethod("Head (last layer)", 1e-2, last_only=True)
_HFF_B = FusionMethod("HFF-b", 3e-3, "hff_b", projects=True, eager=reference.EagerHFFb)

METHODS: dict[str, Method] = {
    "last": _LAST,
    "weighted-sum": FusionMethod("Weighted sum", 1e-2, eager=reference.EagerWeightedSum),
    "weighted-sum-norm": FusionMethod(
        "Weighted sum + norm", 1e-2, options={"norm": True}, eager=reference.EagerWeightedSum
    ),
    "lff": FusionMethod("LFF", 3e-3, "lff", projects=True, eager=reference.EagerLFF),
    "hff-b": _HFF_B,
    "hff-ub": FusionMethod("HFF-ub", 3e-3, "hff_ub", projects=True, eager=reference.EagerHFFub),
    "hff-b-adapters": AdaptedFusionMethod("HFF-b + adapters", 1e-3, _HFF_B, bottleneck=128),
    "aat-m": TuningMethod("AAT-M", 1e-3, "aat_m"),
    "aat-ms": TuningMethod("AAT-MS", 1e-3, "aat_ms"),
    "full": TuningMethod("Full fine-tuning", 1e-4, "full"),
    "aat-s": TuningMethod("AAT-S", 1e-3, "aat_s"),
    "houlsby": TuningMethod("Houlsby adapters", 1e-3, "houlsby"),
    "partial": TuningMethod("Upper half fine-tuned", 1e-4, "partial"),
    "prompt": TuningMethod("Prompts (VPT-deep)", 1e-3, "prompt"),
    "bitfit": TuningMethod("BitFit", 1e-3, "bitfit"),
    "lora": TuningMethod("LoRA", 1e-3, "lora"),
}
ALIASES = {"head": "last"}
DEFAULT_METHODS = (
    "last",
    "weighted-sum",
    "weighted-sum-norm",
    "lff",
    "hff-b",
    "hff-b-adapters",
    "aat-m",
    "aat-ms",
    "full",
)


def find_method(name: str) -> Method:
    """The method of a name. DataError if there is none."""
    if name not in METHODS:
        raise DataError(f"no method is called {name!r}; choose from {', '.join(METHODS)}")
    return METHODS[name]
