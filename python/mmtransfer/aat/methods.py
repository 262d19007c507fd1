"""AAT: an S adapter after the attention and an M adapter next to the MLP of each layer (arXiv 2401.10544)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import nn

from mmkernels.activations import ACTIVATIONS, TRANSFORMERS_NAMES
from mmkernels.backends import BACKENDS
from mmkernels.nn import Adapter
from mmtransfer.encoders.adapters import add_adapter, append_adapter
from mmtransfer.encoders.edit import Edit, check_layers
from mmtransfer.encoders.encoder import Encoder
from mmtransfer.method import LayerEditMethod, option

from . import parallel, rewrite

if TYPE_CHECKING:
    from mmtransfer.model import AdaptedModel


@dataclass(frozen=True, kw_only=True)
class AAT(LayerEditMethod):
    """Both adapters: S is `x + (A + Adapter(A))`, M is `x + MLP(h) + Adapter(h)`.

    A is the output of a layer's attention, projected, and h the input of its MLP. The adapters join where the
    model makes these, so that dropout, residual, norm (before or after) and a conformer's halving of its MLP
    are the model's. An adapter has no norm and starts as zero. At 768 / 192 it has 295,872 parameters, AAT^MS
    in twelve layers 7,100,928.

    Attributes:
        bottleneck: hidden width of the adapters; None for `ratio` times the width of the model.
        ratio: of the two widths, where no bottleneck is given.
        activation: a name in `mmkernels.activations.ACTIVATIONS`.
        scale: constant factor of the adapters' outputs.
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

    bottleneck: int | None = option(None, least=1)
    ratio: float = option(0.25, least=0)
    activation: str = option("gelu", choices=ACTIVATIONS)
    scale: float = 1.0
    rewrite: bool = option(False, runtime=True)
    backend: str = option("auto", choices=BACKENDS, runtime=True)

    def check(self, encoder: Encoder, layers: list[nn.Module]) -> None:
        check_layers(encoder, layers)
        if self._bottleneck(encoder) < 1:
            raise ValueError(
                f"{self.name}: a ratio of {self.ratio} leaves no bottleneck of {encoder.hidden_size}"
            )
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

    def _bottleneck(self, encoder: Encoder) -> int:
        return int(encoder.hidden_size * self.ratio) if self.bottleneck is None else self.bottleneck

    def _adapter(self, encoder: Encoder, *, residual: bool) -> Adapter:
        adapter = Adapter(
            encoder.hidden_size,
            self._bottleneck(encoder),
            self.activation,
            scale=self.scale,
            residual=residual,
            backend=self.backend,
        )
        nn.init.trunc_normal_(adapter.down_weight, std=0.02)
        return adapter

    def _adapt_attention(self, edit: Edit, encoder: Encoder, layer: nn.Module, rewritten: bool) -> None:
        description = encoder.description
        adapter = self._adapter(encoder, residual=True)
        if rewritten:
            add_adapter(edit, layer, "adapter_attention", adapter)
            projection = layer.get_submodule(description.layer_attention_output)
            assert isinstance(projection, nn.Linear)
            edit.override(projection, rewrite.SerialRewritten(projection, adapter))
            return
        calls = description.calls_projections
        path = description.layer_attention_output if calls else description.layer_attention
        append_adapter(edit, layer, "adapter_attention", layer.get_submodule(path), adapter)

    def _adapt_mlp(self, edit: Edit, encoder: Encoder, layer: nn.Module, rewritten: bool) -> None:
        # The MLP's output is what the M adapter is added to.
        adapter = add_adapter(edit, layer, "adapter_mlp", self._adapter(encoder, residual=False))
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
    """The M adapter alone; options as `AAT`."""

    name: ClassVar[str] = "aat-m"
    title: ClassVar[str] = "AAT^M"
    places: ClassVar[tuple[str, ...]] = ("mlp",)


@dataclass(frozen=True, kw_only=True)
class AATS(AAT):
    """The S adapter alone; options as `AAT`."""

    name: ClassVar[str] = "aat-s"
    title: ClassVar[str] = "AAT^S"
    places: ClassVar[tuple[str, ...]] = ("attention",)
