"""s3prl's ``Featurizer`` (both of its interfaces, and forks of them): the sum inside ``_weighted_sum``."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mmkernels.nn.layer_mix import softmax_layer_mix
from mmkernels.patch.layer_sum import check_instance, mixable
from mmkernels.patch.recogniser import Recogniser, Unsupported


class S3prlFeaturizer(Recogniser):
    """A class named ``Featurizer`` with ``weights``, ``normalize`` and a method ``_weighted_sum``.

    The method takes the layers, or the layers and their lengths (then it also returns the first lengths). It
    is replaced whole, so method and replacement are compared: they must agree on random layers and weights,
    with and without normalisation.
    """

    what = "stacked weighted sum of Featurizer -> layer_mix"

    def claims(self, module: nn.Module) -> bool:
        cls = type(module)
        return hasattr(cls, "_weighted_sum") and any(base.__name__ == "Featurizer" for base in cls.__mro__)

    def check(self, module: nn.Module) -> None:
        weights = getattr(module, "weights", None)
        if not isinstance(weights, Tensor):
            raise Unsupported("it has no weights: a single layer is passed through")
        if not isinstance(getattr(module, "normalize", None), bool):
            raise Unsupported("unknown layout: it has no attribute normalize that is True or False")
        check_instance(module, "_weighted_sum", weights)
        _prove(module, self.methods(type(module))["_weighted_sum"])

    def methods(self, cls: type[Any]) -> dict[str, Callable[..., Any]]:
        original = cls._weighted_sum
        arity = len(inspect.signature(original).parameters) - 1
        if arity not in (1, 2):
            raise Unsupported(
                f"unknown layout: _weighted_sum takes {arity} arguments, not layers or layers and lengths"
            )
        return {"_weighted_sum": (_sum_of_layers if arity == 1 else _sum_with_lengths)(original)}


def _sum_of_layers(original: Callable[..., Any]) -> Callable[..., Any]:
    def _weighted_sum(self: Any, layers: Sequence[Tensor]) -> Tensor:
        if mixable(layers, self.weights):
            return softmax_layer_mix(layers, self.weights, norm=self.normalize)
        return original(self, layers)

    return _weighted_sum


def _sum_with_lengths(original: Callable[..., Any]) -> Callable[..., Any]:
    def _weighted_sum(
        self: Any, layers: Sequence[Tensor], lengths: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        if len(layers) == len(lengths) and mixable(layers, self.weights):
            return softmax_layer_mix(layers, self.weights, norm=self.normalize), lengths[0]
        return original(self, layers, lengths)

    return _weighted_sum


def _prove(module: Any, replacement: Callable[..., Any]) -> None:
    """Raise ``Unsupported`` unless the module's method and the replacement agree on random input."""
    generator = torch.Generator().manual_seed(0)
    num_layers = module.weights.numel()
    twin = copy.copy(module)
    twin._parameters = {"weights": nn.Parameter(torch.randn(num_layers, generator=generator))}
    layers = [torch.randn(2, 3, 8, generator=generator) for _ in range(num_layers)]
    lengths = [torch.tensor([3, 2])] * num_layers
    arguments = (layers, lengths)[: len(inspect.signature(replacement).parameters) - 1]
    for normalize in (False, True):
        twin.normalize = normalize
        try:
            with torch.no_grad():
                torch.testing.assert_close(
                    replacement(twin, *arguments),
                    type(module)._weighted_sum(twin, *arguments),
                )
        except Exception as error:
            raise Unsupported(
                f"unknown layout: _weighted_sum(normalize={normalize}) is another computation"
            ) from error
