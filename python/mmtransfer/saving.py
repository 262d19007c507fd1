"""`save_pretrained` of transformers' models while a method has parameters in them.

`from_pretrained` would read what transformers writes into a model without these parameters, and only log that
they were left over. The Trainer calls `save_pretrained` for its checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmtransfer.encoders.edit import Edit

_NAME, _LEFT_OUT = "save_pretrained", "_keys_to_ignore_on_save"


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


class SaveByOwnNames:
    """Called in place of the method of a model whose own weights alone are trained.

    Some models (AST, ViT) are written under the names of an earlier release. `from_pretrained` reads both;
    the Trainer loads its best checkpoint untranslated, and leaves weights of other names as they are.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, save_directory: str | Path, *args: Any, **options: Any) -> None:
        save = getattr(type(self.model), _NAME)
        save(self.model, save_directory, *args, **{"save_original_format": False, **options})


class Refusal:
    """Called in place of the method of a part of a model."""

    def __init__(self, method: str) -> None:
        self.method = method

    def __call__(self, *_: Any, **__: Any) -> None:
        raise ValueError(
            f"this part of a model has parameters of method {self.method!r}, which from_pretrained would "
            "drop; save the whole with mmtransfer.save(model, folder)"
        )


def install(edit: Edit, saved: Iterable[str] | None = None) -> None:
    """Replace the method of each model with added parameters, or of a model that is trained without any.

    `saved` are the names of the root's tensors that its checkpoints have; None if it cannot be saved.
    """
    root = edit.encoder.root
    if saved is not None and hasattr(type(root), _NAME) and not edit.adds_to(root):
        root.__dict__[_NAME] = SaveByOwnNames(root)
        return
    for module in root.modules():
        if hasattr(type(module), _NAME) and edit.adds_to(module):
            whole = module is root and saved is not None
            module.__dict__[_NAME] = SavePretrained(module) if whole else Refusal(edit.name)
    if saved is not None and _NAME in root.__dict__:
        # The Trainer warns of any other tensor that the checkpoint it loads lacks. Reverting the edit gives
        # the model its own list back.
        edit.note(root, _LEFT_OUT)
        root.__dict__[_LEFT_OUT] = sorted(root.state_dict().keys() - set(saved))


def remove(edit: Edit) -> None:
    """Give the methods back."""
    for module in edit.encoder.root.modules():
        if isinstance(module.__dict__.get(_NAME), (SavePretrained, SaveByOwnNames, Refusal)):
            del module.__dict__[_NAME]
