"""CTC models: those that were trained here, and those of transformers."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import AutoModelForCTC

from mmtransfer import checkpoint
from mmtransfer.data import DataError
from mmtransfer.data.features import load_feature_extractor
from mmtransfer.data.inputs import AudioInput
from mmtransfer.encoders.loading import load_model, quiet_transformers
from mmtransfer.model import AdaptedModel
from mmtransfer.tasks.ctc import CTC


def load_ctc(source: str | Path, encoder: str | Path | None = None) -> AdaptedModel:
    """A model for an `Aligner`, from a folder that `mmtransfer finetune` wrote, or as `pretrained_ctc`.

    Args:
        source: the folder, or the folder or hub name of a CTC model of transformers.
        encoder: the pretrained model that was finetuned, where it is not where it was.

    DataError, ValueError or OSError, naming the source, for what is no CTC model.
    """
    folder = Path(source).expanduser()
    if not _trained_here(folder):
        if encoder is not None:
            raise DataError(f"{source} is no model that was finetuned here, so there is no encoder to give")
        return pretrained_ctc(source)
    with quiet_transformers():
        model = checkpoint.load(folder, encoder)
    if not isinstance(model.task, CTC):
        raise DataError(f"{folder} is a model of {model.task.name if model.task else 'no task'}, not of ctc")
    if model.audio is None:
        raise DataError(f"{folder} has no feature extractor; save it by mmtransfer finetune")
    return model


def pretrained_ctc(source: str | Path) -> AdaptedModel:
    """Wav2Vec2ForCTC and its relatives, with their own head and alphabet.

    Args:
        source: folder or hub name.

    DataError for a model that cannot be loaded, that has no CTC head or another form of it.
    """
    model = load_model(source, kind=AutoModelForCTC)
    try:
        task, head = CTC.of_own_head(model, str(source))
    except ValueError as error:
        raise DataError(str(error)) from error
    adapted = AdaptedModel(model, "head", task)
    assert adapted.head is not None
    adapted.head.load_state_dict(dict(head))
    adapted.audio = AudioInput(load_feature_extractor(source))
    return adapted.eval()


def _trained_here(folder: Path) -> bool:
    try:
        config = json.loads((folder / checkpoint.CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("format") == checkpoint.FORMAT
