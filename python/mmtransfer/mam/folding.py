"""The end of learnt merging: a model with the merged weights, and nothing that merges."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from mmtransfer.method import Method, Pair

from .learnable import find_merging
from .methods import LMAM


def fold(model: nn.Module) -> nn.Module:
    """Write the merged weights into a model with L-MAM, whose outputs stay the same, and drop source and
    shares.

    Args:
        model: that `prepare` prepared, or an `AdaptedModel`; changed in place.

    Returns:
        The prepared model inside its wrappers, as it was before `prepare`, with trained weights: its own
        class and its own names, for `save_pretrained` and transformers. If other methods are in force too it
        stays prepared with these. An `AdaptedModel` is returned itself: its encoder is plain, and all of it
        is in the checkpoints that are saved from now on.

    Optimisers refer to parameters that are gone: fold after training.

    Raises:
        ValueError: the model has no L-MAM in force.
    """
    from mmtransfer.model import AdaptedModel
    from mmtransfer.preparation import get_prepared, prepare

    if (merging := find_merging(model)) is None:
        raise ValueError(
            f"{type(model).__name__} has no learnt merging in force; fold takes a model with l-mam"
        )
    merging.write()
    adapted = next((each for each in model.modules() if isinstance(each, AdaptedModel)), None)
    if adapted is not None:
        trained = _copies(adapted.trained_tensors())
        adapted.exchange(_folded(adapted.method))
        _give_back(adapted.trained_tensors(), trained)
        return adapted
    prepared = get_prepared(model)
    root, method, head = prepared.edit.encoder.root, prepared.method, prepared.head
    trained = _copies(prepared.trained_tensors())
    description = prepared.edit.encoder.description
    prepared.revert()
    if isinstance(method, Pair):
        _give_back(
            prepare(root, _folded(method), head=head, description=description).trained_tensors(), trained
        )
    return root


def _folded(method: Method) -> Method:
    """The same method, without merging."""
    if isinstance(method, LMAM):
        return dataclasses.replace(method, folded=True)
    if isinstance(method, Pair):
        return Pair(of=tuple(_folded(part) for part in method.of))
    return method


def _copies(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


@torch.no_grad()
def _give_back(own: dict[str, torch.Tensor], values: dict[str, torch.Tensor]) -> None:
    """Other methods' parameters, which were made again, have their values back."""
    for name, tensor in own.items():
        if name in values:
            tensor.copy_(values[name])
