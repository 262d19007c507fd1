"""HFF: readouts that fuse several layers of an encoder, and adapters at the layers' outputs (arXiv
2211.02712).
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from mmkernels.activations import ACTIVATIONS
from mmkernels.backends import BACKENDS
from mmtransfer.encoders.edit import Edit
from mmtransfer.encoders.encoder import Encoder, Tap, default_taps
from mmtransfer.encoders.tapped import tap_name
from mmtransfer.method import AdapterMethod, Group, Method, option
from mmtransfer.training.settings import Training

from . import eager, fusions

if TYPE_CHECKING:
    from mmtransfer.model import AdaptedModel


@dataclass(frozen=True, kw_only=True)
class FusionMethod(Method, abc.ABC):
    """A fusion of several layers of the encoder.

    Attributes:
        taps: the layers, counted from 0 or from the end, and "embeddings"; None for the embeddings and all
            layers, or every second layer of more than 12.
    """

    paper: ClassVar[str] = "arXiv 2211.02712"
    fusion: ClassVar[type[fusions.Fusion]]
    #: The fusion as published.
    twin: ClassVar[type[nn.Module]]

    taps: tuple[Tap, ...] | None = None

    def select_taps(self, encoder: Encoder) -> Sequence[Tap]:
        return default_taps(encoder) if self.taps is None else self.taps

    def readout(self, encoder: Encoder) -> nn.Module:
        return self.fusion(
            len(self.select_taps(encoder)),
            encoder.hidden_size,
            **self.fusion_options(encoder),
            **self.runtime(),
        )

    def baseline(self, model: AdaptedModel) -> AdaptedModel | None:
        twin = model.copy()
        own: fusions.Fusion = model.readout
        readout = self.twin(own.taps, own.dim, **self.fusion_options(model.encoder.parts))
        readout.load_state_dict(own.state_dict())
        weight = next(own.parameters())
        twin.readout = readout.to(weight.device, weight.dtype).train(own.training)
        twin.readout.out_dim = own.out_dim
        return twin

    @abc.abstractmethod
    def fusion_options(self, encoder: Encoder) -> dict[str, Any]:
        """Arguments of the fusion and of its twin."""

    def runtime(self) -> dict[str, Any]:
        """Arguments of the fusion alone."""
        return {}


@dataclass(frozen=True, kw_only=True)
class WeightedSumMethod(FusionMethod):
    """A softmax-weighted sum of the layers, as SUPERB and s3prl have it.

    Attributes:
        out_dim: width of a linear projection of the sum; None for none.
        mixing_rate: peak learning rate of the mixing weights. They are few, pass through a softmax and start
            equal: they need a larger rate than matrices to move in as many steps.
        backend: of `mmkernels.layer_mix`.
    """

    name: ClassVar[str] = "weighted-sum"
    title: ClassVar[str] = "Weighted sum"
    paper: ClassVar[str] = "arXiv 2105.01051"
    training: ClassVar[Training] = Training(learning_rate=1e-2)
    fusion: ClassVar[type[fusions.Fusion]] = fusions.WeightedSum
    twin: ClassVar[type[nn.Module]] = eager.EagerWeightedSum
    norm: ClassVar[bool] = False

    out_dim: int | None = option(None, least=1)
    mixing_rate: float = option(3e-2, least=0)
    backend: str = option("auto", choices=BACKENDS, runtime=True)

    def fusion_options(self, encoder: Encoder) -> dict[str, Any]:
        return {"out_dim": self.out_dim, "norm": self.norm}

    def runtime(self) -> dict[str, Any]:
        return {"backend": self.backend}

    def parameter_groups(self, model: AdaptedModel) -> dict[str, Group]:
        return {"mixing weights": Group([model.readout.weights], self.mixing_rate)}

    def insights(self, model: AdaptedModel) -> dict[str, dict[str, float]]:
        weights = model.readout.weights.detach().softmax(0).tolist()
        return {"Weight of each layer in the sum": _by_tap(model, weights)}


@dataclass(frozen=True, kw_only=True)
class WeightedSumNormMethod(WeightedSumMethod):
    """The weighted sum of normalised layers (a layer norm without parameters), as s3prl's `normalize`."""

    name: ClassVar[str] = "weighted-sum-norm"
    title: ClassVar[str] = "Weighted sum + norm"
    norm: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class ProjectingMethod(FusionMethod):
    """A fusion that ends in a projection.

    Attributes:
        out_dim: its width; None for 5/8 of the encoder's (the paper's 640 of 1024).
    """

    training: ClassVar[Training] = Training(learning_rate=3e-3)

    out_dim: int | None = option(None, least=1)

    def fusion_options(self, encoder: Encoder) -> dict[str, Any]:
        return {"out_dim": max(encoder.hidden_size * 5 // 8, 1) if self.out_dim is None else self.out_dim}


@dataclass(frozen=True, kw_only=True)
class LFFMethod(ProjectingMethod):
    """Linear feature fusion: the layers side by side, then linear layers. It runs no op of mmkernels.

    Attributes:
        depth: number of linear layers.
    """

    name: ClassVar[str] = "lff"
    title: ClassVar[str] = "LFF"
    fusion: ClassVar[type[fusions.Fusion]] = fusions.LFF
    twin: ClassVar[type[nn.Module]] = eager.EagerLFF

    depth: int = option(1, least=1)

    def fusion_options(self, encoder: Encoder) -> dict[str, Any]:
        return {**super().fusion_options(encoder), "depth": self.depth}

    @torch.no_grad()
    def insights(self, model: AdaptedModel) -> dict[str, dict[str, float]]:
        readout: fusions.Fusion = model.readout
        weight = next(readout.parameters()).view(-1, readout.taps, readout.dim)
        # Figure 4 of the paper.
        return {
            "Frobenius norm of each layer's part of the matrix": _by_tap(
                model, weight.norm(dim=(0, 2)).tolist()
            )
        }


@dataclass(frozen=True, kw_only=True)
class HFFbMethod(ProjectingMethod):
    """Balanced hierarchical feature fusion: neighbouring pairs are projected and concatenated, level by
    level.

    Attributes:
        norm: layer norm in front of each projection.
        activation: of the projections: a name in `mmkernels.activations.ACTIVATIONS`.
        backend: of `mmkernels.layer_project`.
    """

    name: ClassVar[str] = "hff-b"
    title: ClassVar[str] = "HFF-b"
    fusion: ClassVar[type[fusions.Fusion]] = fusions.HFFb
    twin: ClassVar[type[nn.Module]] = eager.EagerHFFb

    norm: bool = True
    activation: str = option("relu", choices=ACTIVATIONS)
    backend: str = option("auto", choices=BACKENDS, runtime=True)

    def fusion_options(self, encoder: Encoder) -> dict[str, Any]:
        return {**super().fusion_options(encoder), "norm": self.norm, "activation": self.activation}

    def runtime(self) -> dict[str, Any]:
        return {"backend": self.backend}


@dataclass(frozen=True, kw_only=True)
class HFFubMethod(HFFbMethod):
    """Unbalanced hierarchical feature fusion: one chain from the bottom upwards, one from the top
    downwards."""

    name: ClassVar[str] = "hff-ub"
    title: ClassVar[str] = "HFF-ub"
    fusion: ClassVar[type[fusions.Fusion]] = fusions.HFFub
    twin: ClassVar[type[nn.Module]] = eager.EagerHFFub


@dataclass(frozen=True, kw_only=True)
class HFFAdapters(AdapterMethod):
    """A residual adapter at the output of each layer (section 3.4): `h + up(act(down(LN(h))))`.

    The next layer and a tap of the layer read its result; the last layer is adapted before a final norm. With
    a width of 1024 and a bottleneck of 128 an adapter has 265,344 parameters; in all 24 layers 6,368,256.

    Attributes:
        bottleneck: hidden width; 128, 256 or 512 in the paper.
        norm: layer norm with gain and shift in front (the paper's parameter counts have one).
    """

    name: ClassVar[str] = "hff-adapters"
    title: ClassVar[str] = "HFF adapters"
    paper: ClassVar[str] = "arXiv 2211.02712"
    initial_std: ClassVar[float | None] = None

    bottleneck: int | None = option(128, least=1)
    activation: str = option("relu", choices=ACTIVATIONS)
    norm: bool = True

    def check(self, encoder: Encoder, layers: list[nn.Module]) -> None:
        """Any encoder with layers will do."""

    def change(self, edit: Edit, encoder: Encoder, layers: list[nn.Module]) -> None:
        for layer in layers:
            self.append(edit, encoder, layer, "adapter_output", layer, norm=self.norm)


def _by_tap(model: AdaptedModel, values: Sequence[float]) -> dict[str, float]:
    return dict(zip(map(tap_name, model.encoder.taps), values, strict=True))
