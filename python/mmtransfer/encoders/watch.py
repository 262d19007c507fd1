"""Watch the training of a prepared model: what was done to it since, and would train it wrongly, is said."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .edit import Edit
from .encoder import Encoder
from .precision import check_trained


class Watch:
    """Hooks of an encoder and of its lowest trained layer, in force as long as the edit.

    They act in training mode with gradients, and not under `torch.compile`.

    Args:
        inside: the trained parameters of the encoder.
        outside: those of the head.
    """

    def __init__(self, inside: Sequence[nn.Parameter], outside: Sequence[nn.Parameter]) -> None:
        self.inside, self.trained = list(inside), [*inside, *outside]
        self._seen: tuple[Any, ...] | None = None
        self._recording = False

    def before_encoder(self, encoder: nn.Module, _inputs: tuple[Any, ...]) -> None:
        """Raise or warn unless the trained parameters can be trained, whenever they have changed."""
        if torch.compiler.is_compiling():
            return
        self._recording = encoder.training and torch.is_grad_enabled()
        if not self._recording:
            return
        if getattr(encoder, "_is_replica", False):
            raise RuntimeError(
                "a prepared model cannot run in DataParallel, whose copies would call the layers of the "
                "original; use DistributedDataParallel, or one device"
            )
        state = tuple((each.dtype, each.requires_grad) for each in self.trained)
        if state != self._seen:
            self._check()
            self._seen = state

    def before_layer(self, _layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Raise if the layer runs inside a checkpoint that drops the gradients of its parameters."""
        if torch.compiler.is_compiling() or not self._recording or torch.is_grad_enabled():
            return
        if not any(isinstance(each, torch.Tensor) and each.requires_grad for each in inputs):
            raise ValueError(
                "reentrant gradient checkpointing would drop the gradients of the trained parameters, as the "
                "input of a frozen layer asks for none; use_reentrant=False is needed: "
                'model.gradient_checkpointing_enable({"use_reentrant": False})'
            )

    def _check(self) -> None:
        check_trained((f"trained parameter {index}", each) for index, each in enumerate(self.trained))
        if self.inside and not any(each.requires_grad for each in self.inside):
            warnings.warn(
                f"all {len(self.inside)} parameters that the method trains in the encoder have been frozen "
                "since prepare (freeze_base_model() freezes adapters too); they are not trained now. Freeze "
                "before prepare, or call requires_grad_(True) on them",
                stacklevel=2,
            )


def add_watch(edit: Edit, encoder: Encoder, head: Sequence[nn.Parameter]) -> None:
    """Watch the training of the edit's parameters, and of the head's; comes after all other changes."""
    own = {id(parameter) for parameter in encoder.model.parameters()}
    watch = Watch([parameter for parameter in edit.parameters if id(parameter) in own], head)
    edit.hook(encoder.model, watch.before_encoder)
    for layer in encoder.all_layers:
        if any(parameter.requires_grad for parameter in layer.parameters()):
            edit.hook(layer, watch.before_layer)
            break
