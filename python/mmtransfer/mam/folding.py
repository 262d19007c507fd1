"""The end of learnt merging: a model with the merged weights, and nothing that merges."""

from __future__ import annotations

import dataclasses

from torch import nn

from mmtransfer.method import Combination, Method

from .learnable import find_merging
from .methods import LMAM


def fold(model: nn.Module) -> nn.Module:
    """Write the merged weights into a model with L-MAM, whose outputs stay the same, and drop source and
    shares.

    Args:
        model: that `prepare` prepared, or an `AdaptedModel`; changed in place.

    Returns:
        The prepared model inside its wrappers, as it was before `prepare`, with trained weights: its own
        class and its own names, for `save_pretrained` and transformers. An `AdaptedModel` is returned
        itself: its encoder is plain, but for further edits such as adapters, and all of it is in the
        checkpoints that are saved from now on.

    Optimisers refer to parameters that are gone: fold after training.

    Raises:
        ValueError: the model has no L-MAM in force, or is prepared with further edits.
    """
    from mmtransfer.model import AdaptedModel
    from mmtransfer.preparation import get_prepared

    if (merging := find_merging(model)) is None:
        raise ValueError(
            f"{type(model).__name__} has no learnt merging in force; fold takes a model with l-mam"
        )
    adapted = next((each for each in model.modules() if isinstance(each, AdaptedModel)), None)
    if adapted is not None:
        merging.write()
        adapted.exchange(_folded(adapted.method))
        return adapted
    prepared = get_prepared(model)
    others = [part.name for part in prepared.method.parts() if not isinstance(part, LMAM)]
    if others:
        raise ValueError(
            f"the model has {others[0]} too, which folding would take out with the merging; save it by "
            "mmtransfer.save, or fold an AdaptedModel, which keeps it"
        )
    merging.write()
    prepared.revert()
    return prepared.edit.encoder.root


def _folded(method: Method) -> Method:
    """The same method, without merging."""
    if isinstance(method, LMAM):
        return dataclasses.replace(method, folded=True)
    if isinstance(method, Combination):
        return Combination(of=tuple(_folded(part) for part in method.parts()))
    return method
