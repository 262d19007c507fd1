"""AAT: an S adapter after the attention and an M adapter next to the MLP of each layer (arXiv 2401.10544)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import nn

from mmkernels.activations import TRANSFORMERS_NAMES
from mmtransfer.encoders.edit import Edit
from mmtransfer.encoders.encoder import Encoder
from mmtransfer.method import AdapterMethod, option

from . import parallel, rewrite

if TYPE_CHECKING:
    from mmtransfer.model import AdaptedModel


@dataclass(frozen=True, kw_only=True)
class AAT(AdapterMethod):
    """An adapter after each attention (S: `x + (A + Adapter(A))`) and one parallel to each MLP (M: `x +
    MLP(h) + Adapter(h)`).

    A is the output of a layer's attention, projected, and h the input of its MLP. The adapters join where the
    model makes these, so that dropout, residual, norm (before or after) and a conformer's halving of its MLP
    are the model's. An adapter has no norm and starts as zero. At 768 / 192 it has 295,872 parameters, AAT^MS
    in twelve layers 7,100,928.

    Attributes:
        rewrite: compute the adapters inside the frozen products next to them, where that is exact: M where
            the MLP's activation is the adapters', S where the output projection is called as a module (not
            in WavLM). With the model's activation dropout in training, the M adapter's hidden layer is
            dropped out too.
        backend: of `mmkernels.adapter`.
    """

    name: ClassVar[str] = "aat-ms"
    title: ClassVar[str] = "AAT^MS"
    paper: ClassVar[str] = "arXiv 2401.10544"
    #: Which of the two adapters there are.
    places: ClassVar[tuple[str, ...]] = ("attention", "mlp")

    rewrite: bool = option(False, runtime=True)

    def check(self, encoder: Encoder, layers: list[nn.Module]) -> None:
        super().check(encoder, layers)
        if self.rewrite and not self.rewritten(encoder, layers):
            raise ValueError(
                f"rewrite has nothing to rewrite: {self.name} with activation {self.activation!r} in "
                f"{encoder.description.model_type}, whose MLP has {encoder.activation!r}"
            )

    def change(self, edit: Edit, encoder: Encoder, layers: list[nn.Module]) -> None:
        rewritten = self.rewritten(encoder, layers) if self.rewrite else ()
        for layer in layers:
            if "attention" in self.places:
                self._adapt_attention(edit, encoder, layer, "attention" in rewritten)
            if "mlp" in self.places:
                self._adapt_mlp(edit, encoder, layer, "mlp" in rewritten)

    def rewritten(self, encoder: Encoder, layers: list[nn.Module]) -> tuple[str, ...]:
        """The adapters that can be computed inside the frozen products: "attention", "mlp"."""
        description = encoder.description

        def plain(*paths: str) -> bool:
            return all(type(layer.get_submodule(path)) is nn.Linear for layer in layers for path in paths)

        possible = {
            "attention": description.calls_projections and plain(description.layer_attention_output),
            "mlp": TRANSFORMERS_NAMES.get(encoder.activation or "") == self.activation
            and plain(*description.layer_mlp),
        }
        return tuple(place for place in self.places if possible[place])

    def baseline(self, model: AdaptedModel) -> AdaptedModel | None:
        if not self.rewrite:
            return super().baseline(model)
        twin = model.copy()
        twin.revert()
        plain = dataclasses.replace(self, rewrite=False, backend="reference")
        twin.encoder.edit = plain.edit(twin.encoder.parts)
        return twin

    def _adapt_attention(self, edit: Edit, encoder: Encoder, layer: nn.Module, rewritten: bool) -> None:
        projection = layer.get_submodule(encoder.attention_path)
        if not rewritten:
            self.append(edit, encoder, layer, "adapter_attention", projection)
            return
        assert isinstance(projection, nn.Linear)
        adapter = self.add(edit, encoder, layer, "adapter_attention")
        edit.override(projection, rewrite.SerialRewritten(projection, adapter))

    def _adapt_mlp(self, edit: Edit, encoder: Encoder, layer: nn.Module, rewritten: bool) -> None:
        # The M adapter is added to the MLP's output.
        adapter = self.add(edit, encoder, layer, "adapter_mlp", residual=False)
        first, second = (layer.get_submodule(path) for path in encoder.description.layer_mlp)
        last = self.recompute != "none"
        if rewritten:
            assert isinstance(first, nn.Linear)
            assert isinstance(second, nn.Linear)
            edit.override(first, rewrite.EntryRewritten(first, adapter))
            edit.override(second, rewrite.ExitRewritten(second, adapter, product_last=last))
            return
        handover = parallel.Handover()
        edit.override(first, parallel.ParallelEntry(first.forward, handover))
        edit.override(second, parallel.ParallelExit(second.forward, handover, adapter, product_last=last))


@dataclass(frozen=True, kw_only=True)
class AATM(AAT):
    """The adapter parallel to each MLP alone; options as `AAT`."""

    name: ClassVar[str] = "aat-m"
    title: ClassVar[str] = "AAT^M"
    places: ClassVar[tuple[str, ...]] = ("mlp",)


@dataclass(frozen=True, kw_only=True)
class AATS(AAT):
    """The adapter after each attention alone; options as `AAT`."""

    name: ClassVar[str] = "aat-s"
    title: ClassVar[str] = "AAT^S"
    places: ClassVar[tuple[str, ...]] = ("attention",)
