"""L-MAM: attention merged with a learnt share of a source, trained with the target (arXiv 2312.14378)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from mmkernels.backends import BACKENDS
from mmkernels.nn.merge import CONSTRAINTS, check_start, start_value
from mmtransfer.encoders.edit import Edit, restoring
from mmtransfer.encoders.encoder import Encoder
from mmtransfer.encoders.precision import find_dtype
from mmtransfer.method import Group, LayerEditMethod, option
from mmtransfer.training.settings import Training, check_number

from . import learnable
from .learnable import CHILD, LayerMerge, MergedLayer, Merging
from .merging import fit
from .projections import PARTS, Projection, check_parts, find_projections
from .sources import Noise, Pair, check_shared, describe_source, find_pairs

if TYPE_CHECKING:
    from mmtransfer.model import AdaptedModel


@dataclass(frozen=True, kw_only=True)
class LMAM(LayerEditMethod):
    """Full fine-tuning of an encoder whose queries, keys and values are merged with those of a source, by a
    learnt share for each layer.

    A projection computes with `(1 - lam) * W + lam * W_source`. Its own W and lam are trained together; the
    source is frozen, and only the matrices that are merged are kept, in the checkpoint too, which needs no
    source to be loaded. All layers are merged at once, when a step of the optimiser has changed something;
    values that are written through `.data` elsewhere count after the next `train()` or `eval()` that changes
    the mode.
    `mmtransfer.mam.fold(model)` writes the merged weights into the model when training is over.

    Attributes:
        source: folder or hub name of a model as wide as the encoder, "N(0,1)" or "N(target)" for noise; in
            Python also a model, `Encoder(model, description)` or `mam.Noise`. Has to be given.
        layers: those that are merged; None for all up to the last tap.
        per: "layer" or "matrix" (each layer or projection has its own share), or "global" (all have one).
        constraint: "none", "clamp" or "sigmoid", as in `mmkernels.nn.Merge`.
        initial: share of the source at the start.
        lambda_rate: learning rate of the shares, which have no weight decay, in `finetune` and `compare`; an
            optimiser of yours needs a group for them (docs/methods.md).
        train_target: train the whole encoder, as full fine-tuning does; false trains the shares alone.
        projections: those that are merged, of "q", "k" and "v".
        bias: merge the target's biases too.
        layer_map: the source layer of each of the encoder's, where the two have different depths.
        match_rms: scale each source matrix to the root mean square of the encoder's first.
        source_dtype: "float32" or "bfloat16", of the source's matrices that are kept.
        folded: the merged weights have been written into the encoder; nothing is merged any more.
        backend: of `mmkernels.merge`.
    """

    name: ClassVar[str] = "l-mam"
    title: ClassVar[str] = "L-MAM"
    paper: ClassVar[str] = "arXiv 2312.14378"
    training: ClassVar[Training] = Training(epochs=5, batch_size=16, learning_rate=1e-4)

    source: str | Path | nn.Module | Encoder | Noise | None = None
    per: str = option("layer", choices=("layer", "matrix", "global"))
    constraint: str = option("none", choices=CONSTRAINTS)
    initial: float = 0.05
    lambda_rate: float = 1e-2
    train_target: bool = True
    projections: tuple[str, ...] = PARTS
    bias: bool = False
    layer_map: tuple[int, ...] | None = None
    match_rms: bool = False
    source_dtype: str = option("float32", choices=("float32", "bfloat16"))
    folded: bool = False
    backend: str = option("auto", choices=BACKENDS, runtime=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_parts(self.projections)
        check_number("lambda_rate", self.lambda_rate)
        check_start(f"{self.name}: initial", self.initial, self.constraint)

    def __deepcopy__(self, memo: dict[int, Any]) -> LMAM:
        return self  # a copy of a trained model does not copy a source that is in memory

    def saved_fields(self) -> dict[str, Any]:
        source = None if self.source is None else describe_source(self.source)
        return {**super().saved_fields(), "source": source}

    def check(self, encoder: Encoder, layers: list[nn.Module]) -> None:
        if self.source is None and not self.folded:
            raise ValueError(
                f"method {self.name!r} needs a source to merge with: source=..., the folder or hub name of a "
                f'model of width {encoder.hidden_size}, or "N(target)" for noise'
            )

    def change(self, edit: Edit, encoder: Encoder, layers: list[nn.Module]) -> None:
        if self.train_target or self.folded:
            # A folded encoder is trained, so that checkpoints have it.
            edit.train(encoder.without_idle(encoder.root.parameters()))
        if self.folded:
            return
        indices = [index for index, layer in enumerate(encoder.all_layers) if layer in layers]
        projections = find_projections(encoder, indices, self.projections, bias=self.bias)
        check_shared(dict.fromkeys(projections), alike=False)
        learnable.check_projections(encoder, projections)
        pairs = [*self._pairs(encoder, indices)]
        merged: list[MergedLayer] = []
        for index in indices:
            own = [pair for pair in pairs if pair.target.layer == index]
            merged.append(self._add(edit, encoder.all_layers[index], own, merged))
        merging = Merging(merged, self.constraint, self.backend)
        for each in merged:
            each.own.merging = merging
        learnable.install(edit, encoder, merging)

    def parameter_groups(self, model: AdaptedModel) -> dict[str, Group]:
        lam = [each.lam for each in model.encoder.modules() if isinstance(each, LayerMerge)]
        trained = [each for each in lam if each is not None]
        return {"lambda": Group(trained, self.lambda_rate)} if trained else {}

    def insights(self, model: AdaptedModel) -> dict[str, dict[str, float]]:
        return {"lambda": shares(model)} if learnable.find_merging(model.encoder) else {}

    def baseline(self, model: AdaptedModel) -> AdaptedModel | None:
        """A copy that merges in every call, by the expression of the paper's equation 3."""
        twin = model.copy()
        merging = learnable.find_merging(twin.encoder)
        if merging is None:
            return None
        merging.as_published = True
        return twin

    def _pairs(self, encoder: Encoder, indices: list[int]) -> Iterator[Pair]:
        """Those of these layers; without values where a checkpoint brings them."""
        if restoring.get():
            for each in find_projections(encoder, indices, self.projections, bias=self.bias):
                yield Pair(each, torch.empty_like(each.view))
            return
        assert self.source is not None
        yield from find_pairs(
            encoder,
            self.source,
            layers=indices,
            layer_map=self.layer_map,
            parts=self.projections,
            bias=self.bias,
            match_rms=self.match_rms,
        ).pairs

    def _add(self, edit: Edit, layer: nn.Module, pairs: list[Pair], below: list[MergedLayer]) -> MergedLayer:
        """The share and the source's matrices of a layer, as a child of it."""
        names = [_buffer_name(pair.target) for pair in pairs]
        kept = find_dtype(self.source_dtype)
        sources = {
            name: fit(pair.source.detach().to(kept), pair.target.view).clone(
                memory_format=torch.contiguous_format
            )
            for name, pair in zip(names, pairs, strict=True)
        }
        groups = range(len(pairs)) if self.per == "matrix" else [0] * len(pairs)
        lam = None
        if self.per != "global" or not below:
            start = start_value(self.initial, self.constraint)
            lam = torch.full((max(groups) + 1,), start, **edit.place(layer))
        own = edit.add(layer, CHILD, LayerMerge(sources, lam))
        owner = below[0].own if self.per == "global" and below else own
        return MergedLayer(own, owner, tuple(pair.target for pair in pairs), tuple(names), tuple(groups))


def shares(model: nn.Module) -> dict[str, float]:
    """The shares of the source that a model with L-MAM has learnt: `{"layer 0": 0.08}`.

    ValueError if it has no L-MAM in force.
    """
    merging = learnable.find_merging(model)
    if merging is None:
        raise ValueError(f"{type(model).__name__} has no learnt merging in force; prepare it with l-mam")
    found: dict[str, float] = {}
    for layer, values in merging.shares():
        numbers = values.float().tolist()
        index = layer.projections[0].layer
        if len(numbers) > 1:
            names = [f"layer {index} {_short_name(each)}" for each in layer.projections]
        else:
            names = [f"layer {index}"]
        found |= dict(zip(names, numbers, strict=True))
    if len(found) == 1 and len(merging.layers) > 1:
        return {"all layers": next(iter(found.values()))}
    return found


def _buffer_name(projection: Projection) -> str:
    return f"source_{projection.part}_{projection.kind}"


def _short_name(projection: Projection) -> str:
    return projection.part if projection.kind == "weight" else f"{projection.part} bias"
