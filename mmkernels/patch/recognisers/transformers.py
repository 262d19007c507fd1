"""transformers' ``use_weighted_layer_sum``: stack all hidden states, multiply by softmax weights, sum."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mmkernels.nn.layer_mix import softmax_layer_mix
from mmkernels.patch.layer_sum import check_instance, mixable_sequences
from mmkernels.patch.recogniser import Recogniser, Unsupported
from mmkernels.patch.rewrite import Rewrite, innermost

STACKED_SUM = Rewrite(
    pattern="""
        HIDDEN = torch.stack(HIDDEN, dim=1)
        WEIGHTS = nn.functional.softmax(self.layer_weights, dim=-1)
        HIDDEN = (HIDDEN * WEIGHTS.view(-1, 1, 1)).sum(dim=1)
    """,
    meanings={"torch": torch, "nn": nn},
    condition="_mmkernels_mixable(HIDDEN, self.layer_weights)",
    replacement="HIDDEN = _mmkernels_mix(HIDDEN, self.layer_weights)",
    helpers={"_mmkernels_mixable": mixable_sequences, "_mmkernels_mix": softmax_layer_mix},
)


class WeightedLayerSum(Recogniser):
    """Any class whose ``forward`` holds the stacked sum as transformers writes it."""

    what = "stacked weighted sum of hidden states -> layer_mix"
    method = "forward"

    def claims(self, module: nn.Module) -> bool:
        forward = innermost(type(module).forward)
        reads_weights = forward is not None and "layer_weights" in forward.__code__.co_names
        # Not getattr: wrappers (compiled, PEFT) give the attributes of the module inside.
        return reads_weights or module._parameters.get("layer_weights") is not None

    def check(self, module: nn.Module) -> None:
        config = getattr(module, "config", None)
        if getattr(config, "use_weighted_layer_sum", True) is False:
            raise Unsupported("config.use_weighted_layer_sum is False")
        weights = getattr(module, "layer_weights", None)
        if not isinstance(weights, Tensor):
            raise Unsupported("it has no layer_weights")
        check_instance(module, "forward", weights)

    def notes(self, module: nn.Module) -> Iterable[str]:
        config = getattr(module, "config", None)
        for name in ("layerdrop", "encoder_layerdrop"):
            if getattr(config, name, 0):
                yield (
                    f"config.{name} is {getattr(config, name)}: where a layer that is dropped in training "
                    f"leaves no hidden state, the sum fails, replaced or not; set config.{name} = 0"
                )

    def override(self, cls: type[Any]) -> Callable[..., Any]:
        return STACKED_SUM.apply(cls.forward)
