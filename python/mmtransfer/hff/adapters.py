"""An encoder with trainable bottleneck adapters in its layers (HFF + adapters, arXiv 2211.02712)."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from mmkernels.nn import Adapter
from mmtransfer import models

from .encoder import Edit, Tap, TappedEncoder, resolve_layers


class AdaptedEncoder(TappedEncoder):
    """Run an encoder with a residual adapter at the output of its layers, up to its last tap.

    The output h of an adapted layer becomes `h + up(act(down(LN(h))))`; that is what the next layer sees and
    what a tap of the layer reads. The last layer's output is adapted before a final norm. Adapters start as
    the identity, so the features start as those of a `FrozenEncoder`, which has the same call and result; see
    `TappedEncoder` for the arguments of both, for what a tap is and for padding. The taps are packed in the
    same way: one `(N, L, C)` buffer of the layers' dtype, each slot written in place, no copy for autograd.

    Gradients reach the adapters, and go through the frozen layers above the lowest adapter; the encoder's
    weights and the inputs get none, even if they ask for it. Layers below the lowest adapter (that has a
    parameter to train) record no graph, and with gradients disabled none do. Like the rest of the encoder
    the adapters stay in eval mode, in which they are no different.

    Adapters are on the devices of their layers, in float32, or float64 for an encoder in float64; in half
    precision their products run in the dtype of the layer's output, or in that of autocast.

    With C = 1024 and a bottleneck of 128 an adapter has 265,344 parameters; in all 24 layers 6,368,256.

    Args:
        model, taps, dtype: as for `TappedEncoder`; `dtype` is that of the encoder, not of the adapters.
        bottleneck: width of the adapters' hidden layer; 128, 256 or 512 in the paper.
        layers: which layers get one, indices as for taps; None for all up to the last tap.
        activation: "relu", "gelu", "gelu_tanh", "silu" or "none".
        norm: layer norm with gain and shift in front (the paper's parameter counts have one).
        backend: passed to `mmkernels.adapter`.

    Attributes:
        adapters: `{str(layer): mmkernels.nn.Adapter}`, all that can be trained.
        layers: the adapted layers, ascending.

    Raises:
        TypeError, ValueError: as for `TappedEncoder`; no such layer, one twice, or one past the last tap,
            which nothing would train; a bottleneck below 1; an activation that is not offered. The model is
            untouched.
    """

    kind = "adapted"

    def __init__(
        self,
        model: nn.Module,
        taps: Sequence[Tap],
        *,
        bottleneck: int = 128,
        layers: Sequence[int] | None = None,
        activation: str = "relu",
        norm: bool = True,
        backend: str = "auto",
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(model, taps, dtype=dtype)
        if type(bottleneck) is not int:
            raise TypeError(f"bottleneck must be an int, got {type(bottleneck).__name__}")
        self.layers = self._adapted_layers(layers)
        self.options = {
            "bottleneck": bottleneck,
            "layers": list(self.layers),
            "activation": activation,
            "norm": norm,
        }
        self.adapters = nn.ModuleDict(
            {
                str(layer): Adapter(
                    self.hidden_size, bottleneck, activation=activation, norm=norm, backend=backend
                )
                for layer in self.layers
            }
        )
        self._freeze(dtype)
        self._place_adapters()

    def _adapted_layers(self, layers: Sequence[int] | None) -> tuple[int, ...]:
        deepest = max((tap for tap in self.taps if tap != "embeddings"), default=-1)
        if deepest < 0:
            raise ValueError("taps must have a layer for adapters to be in, got the embeddings only")
        if layers is None:
            return tuple(range(deepest + 1))
        resolved: tuple[int, ...] = resolve_layers("layers", layers, self.num_layers)
        if max(resolved) > deepest:
            raise ValueError(
                f"layers must not lie past the last tap, layer {deepest}, where adapters have no effect, "
                f"got {max(resolved)}"
            )
        return tuple(sorted(resolved))

    def _place_adapters(self) -> None:
        # Half precision would lose the small steps of an optimiser.
        dtype = torch.promote_types(self.dtype, torch.float32)
        layers = models.get_layers(self.encoder)
        for index in self.layers:
            self.adapters[str(index)].to(next(layers[index].parameters()).device, dtype)

    @contextlib.contextmanager
    def _running(self) -> Iterator[list[Edit]]:
        grad = torch.is_grad_enabled()
        layers = models.get_layers(self.encoder)
        with torch.no_grad(), _constant(self.encoder) if grad else contextlib.nullcontext():
            yield [
                (layers[index], functools.partial(_adapt, self.adapters[str(index)], grad))
                for index in self.layers
            ]


def _adapt(adapter: nn.Module, grad: bool, state: torch.Tensor) -> torch.Tensor:
    # From the lowest adapter on, until the `no_grad` of `_running` ends and sets back what was before it.
    torch.set_grad_enabled(grad)
    return adapter(state)


@contextlib.contextmanager
def _constant(module: nn.Module) -> Iterator[None]:
    """Record no gradient of the parameters, if somebody who shares them has thawed them."""
    thawed = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in thawed:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in thawed:
            parameter.requires_grad_(True)
