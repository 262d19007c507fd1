"""`save_pretrained` of transformers' models while a method has parameters in them.

`from_pretrained` would read what transformers writes into a model without these parameters, and only log that
they were left over. The Trainer calls `save_pretrained` for its checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmtransfer.encoders.edit import Edit

_NAME = "save_pretrained"


class SavePretrained:
    """Called in place of the method of a prepared model: writes the checkpoint of `mmtransfer.save`.

    An object, so that a deep copy of the model saves the copy.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        **options: Any,
    ) -> None:
        from mmtransfer import checkpoint

        if push_to_hub:
            raise ValueError(
                "a prepared model is saved first and uploaded then: mmtransfer.save(model, folder), "
                "huggingface_hub.upload_folder(...)"
            )
        if is_main_process:
            checkpoint.save(self.model, save_directory, state_dict=state_dict)


class Refusal:
    """Called in place of the method of a part of a model."""

    def __init__(self, method: str) -> None:
        self.method = method

    def __call__(self, *_: Any, **__: Any) -> None:
        raise ValueError(
            f"this part of a model has parameters of method {self.method!r}, which from_pretrained would "
            "drop; save the whole with mmtransfer.save(model, folder)"
        )


def install(edit: Edit, whole: nn.Module | None) -> None:
    """Replace the method of each model with added parameters; `whole` is the one that can be saved."""
    for module in edit.encoder.root.modules():
        if hasattr(type(module), _NAME) and edit.adds_to(module):
            module.__dict__[_NAME] = SavePretrained(module) if module is whole else Refusal(edit.name)


def remove(edit: Edit) -> None:
    """Give the methods back."""
    for module in edit.encoder.root.modules():
        if isinstance(module.__dict__.get(_NAME), (SavePretrained, Refusal)):
            del module.__dict__[_NAME]
