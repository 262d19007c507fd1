"""s3prl's ``Featurizer`` (both of its interfaces, and forks of them): the sum inside ``_weighted_sum``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mmkernels.nn.layer_mix import softmax_layer_mix
from mmkernels.patch.layer_sum import check_instance, mixable
from mmkernels.patch.recogniser import Recogniser, Unsupported
from mmkernels.patch.rewrite import Rewrite


class S3prlFeaturizer(Recogniser):
    """A class named ``Featurizer`` whose ``_weighted_sum`` holds the sum as s3prl writes it.

    A fork may do more before and after these statements, which stay as they are. A sum that is written in
    another way (dropout or a temperature on the weights, say) is left alone.
    """

    what = "stacked weighted sum of Featurizer -> layer_mix"
    method = "_weighted_sum"

    def claims(self, module: nn.Module) -> bool:
        cls = type(module)
        return hasattr(cls, self.method) and any(base.__name__ == "Featurizer" for base in cls.__mro__)

    def check(self, module: nn.Module) -> None:
        weights = getattr(module, "weights", None)
        if not isinstance(weights, Tensor):
            raise Unsupported("it has no weights: a single layer is passed through")
        check_instance(module, self.method, weights)

    def override(self, cls: type[Any]) -> Callable[..., Any]:
        reasons = []
        for statements in (LAYERS_WITH_LENGTHS, PADDED_LAYERS):
            try:
                return statements.apply(cls._weighted_sum)
            except Unsupported as reason:
                reasons.append(str(reason))
        raise Unsupported(reasons[0])


def _mix(layers: list[Tensor], logits: Tensor, normalize: object) -> Tensor:
    return softmax_layer_mix(layers, logits, norm=bool(normalize))


def _mixable(layers: Any, logits: Any, count: object) -> bool:
    return mixable(layers, logits) and len(layers) == count


def _stacked_sum(count: str) -> Rewrite:
    """The statements of an interface, whose number of layers is ``count``."""
    return Rewrite(
        pattern=f"""
            STACKED = torch.stack(LAYERS, dim=0)
            if self.normalize:
                STACKED = F.layer_norm(STACKED, (STACKED.shape[-1],))
            FIRST, *SHAPE = STACKED.shape
            STACKED = STACKED.view({count}, -1)
            WEIGHTS = F.softmax(self.weights, dim=-1)
            MIXED = (WEIGHTS.unsqueeze(-1) * STACKED).sum(dim=0)
            MIXED = MIXED.view(*SHAPE)
        """,
        meanings={"torch": torch, "F": nn.functional},
        condition=f"_mmkernels_mixable(LAYERS, self.weights, {count})",
        replacement="MIXED = _mmkernels_mix(LAYERS, self.weights, self.normalize)",
        helpers={"_mmkernels_mixable": _mixable, "_mmkernels_mix": _mix},
    )


#: ``s3prl.nn.Featurizer``.
LAYERS_WITH_LENGTHS = _stacked_sum("len(self.layer_selections)")
#: ``s3prl.upstream.interfaces.Featurizer``.
PADDED_LAYERS = _stacked_sum("self.layer_num")
