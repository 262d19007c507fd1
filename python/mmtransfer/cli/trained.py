"""A trained model for the commands that use one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

if TYPE_CHECKING:
    from mmtransfer.model import AdaptedModel

ModelName = Annotated[str | None, tyro.conf.arg(metavar="NAME")]


def load_trained(
    folder: Path, model: str | None, *, language_model: str | None = None, cpu: bool
) -> AdaptedModel:
    """The model of a folder, on the device of the work.

    DataError if it has no task, or does not know how audio becomes its input; ValueError and OSError as in
    `mmtransfer.load`.
    """
    from mmtransfer import checkpoint
    from mmtransfer.data import DataError
    from mmtransfer.encoders.loading import quiet_transformers
    from mmtransfer.training.loop import main_device

    with quiet_transformers():
        found = checkpoint.load(folder.expanduser(), model, language_model=language_model)
    if found.task is None or found.audio is None:
        raise DataError(f"{folder} has no task or no feature extractor; save it by mmtransfer finetune")
    return found.to(main_device(cpu))
