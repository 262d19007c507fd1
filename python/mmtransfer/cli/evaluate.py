"""`mmtransfer evaluate`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from .imports import import_files
from .info import Imports
from .messages import fail
from .scores import describe_scores
from .trained import ModelName, load_trained

if TYPE_CHECKING:
    from mmtransfer.data import Recordings
    from mmtransfer.data.recordings import Clip
    from mmtransfer.model import AdaptedModel
    from mmtransfer.training.settings import Training


def evaluate(
    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")],
    data: Annotated[str, tyro.conf.arg(metavar="PATH")],
    split: Literal["test", "validation", "train", "all"] = "test",
    model: ModelName = None,
    language_model: ModelName = None,
    output: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None,
    json_: Annotated[bool, tyro.conf.arg(name="json")] = False,
    test_fraction: float = 0.2,
    batch_size: int = 16,
    workers: int = 0,
    cpu: bool = False,
    strict: bool = False,
    import_: Imports = (),
) -> None:
    """Score a model that was trained here on recordings.

    Args:
        folder: of the trained model, as `mmtransfer finetune --output` says.
        data: as for `mmtransfer finetune`.
        split: the part that is scored; all: everything there is.
        model: folder or hub name of the pretrained model, where it is not where it was.
        language_model: the same of a language model that reads the speech.
        output: file for a JSON line a clip: path, reference, prediction and its own scores.
        json_: print the scores as JSON.
        test_fraction: of --data, where it has no split.
        batch_size: clips at a time.
        workers: processes that decode clips; 0: this one.
        cpu: use no GPU.
        strict: stop at clips that cannot be used, instead of leaving them out.
        import_: Python file that registers methods or tasks of yours.
    """
    if output is not None and not output.expanduser().parent.is_dir():
        fail(f"--output {output} is in a folder that does not exist")
    import_files(import_)
    from mmtransfer.data import DataError, load_data
    from mmtransfer.training.finite import NotFiniteError
    from mmtransfer.training.settings import Training

    try:
        training = Training(batch_size=batch_size, workers=workers, cpu=cpu)
        loaded = load_trained(folder, model, language_model=language_model, cpu=cpu)
        assert loaded.task is not None
        recordings = load_data(data, kind=loaded.task.kind, test_fraction=test_fraction, strict=strict)
        clips = _of_classes(loaded, recordings, _choose(recordings, split))
        _check_lengths(loaded, clips, strict=strict)
        references, predictions = _predict(loaded, recordings, clips, training)
        scores = loaded.task.score(predictions, references)
        if output is not None:
            _write(output.expanduser(), loaded, clips, references, predictions)
    except (DataError, NotFiniteError, OSError, ValueError) as error:
        fail(" ".join(str(error).split()))
    if json_:
        print(json.dumps({"split": split, "clips": len(clips), **scores}))
    else:
        print(f"{recordings.name}, {split}, {len(clips)} clips: {describe_scores(scores)}")


def _choose(recordings: Recordings, split: str) -> list[Clip]:
    """The clips of a part, or of all. DataError if there are none."""
    from mmtransfer.data import DataError

    parts = ("train", "validation", "test") if split == "all" else (split,)
    clips = [clip for part in parts for clip in getattr(recordings, part)]
    if not clips:
        raise DataError(f"{recordings.name} has no {split} clip")
    return clips


def _of_classes(model: AdaptedModel, recordings: Recordings, clips: Sequence[Clip]) -> list[Clip]:
    """The clips with the indices that the model has for their classes; DataError for a class of others."""
    from mmtransfer.data import DataError

    known = getattr(model.task, "labels", None)
    if recordings.transcribed or known is None:
        return list(clips)
    names = [recordings.classes[clip.label] for clip in clips if clip.label is not None]
    if others := sorted(set(names) - set(known)):
        raise DataError(
            f"{recordings.name} has the class {others[0]!r}, and the model was trained for {', '.join(known)}"
        )
    return [replace(clip, label=known.index(name)) for clip, name in zip(clips, names, strict=True)]


def _check_lengths(model: AdaptedModel, clips: Sequence[Clip], *, strict: bool) -> None:
    """Say which transcribed clips are longer than the model takes; DataError if strict."""
    from mmtransfer.data import DataError
    from mmtransfer.training.selection import describe_cut

    assert model.task is not None
    assert model.audio is not None
    sentence = describe_cut(clips, model.audio.longest) if model.task.whole_clips else None
    if sentence and strict:
        raise DataError(sentence)
    if sentence:
        print(f"mmtransfer: {sentence}", file=sys.stderr)


def _predict(
    model: AdaptedModel, recordings: Recordings, clips: Sequence[Clip], training: Training
) -> tuple[list[Any], list[Any]]:
    """The targets of the clips, and the predictions."""
    from mmtransfer.data.features import Collator
    from mmtransfer.training.caching import EncoderCollator
    from mmtransfer.training.loop import predict

    assert model.task is not None
    assert model.audio is not None
    collator = Collator(recordings, model.audio.extractor, max_seconds=model.audio.max_seconds)
    collate = EncoderCollator(collator, model.encoder, model.task)
    return collate.targets(clips), predict(model, clips, collate, training)  # type: ignore[arg-type]


def _write(
    path: Path,
    model: AdaptedModel,
    clips: Sequence[Clip],
    references: Sequence[Any],
    predictions: Sequence[Any],
) -> None:
    """A JSON line for each clip."""
    from mmtransfer.training.caching import clip_name

    assert model.task is not None
    task = model.task
    # Names that are not UTF-8, as JSON escapes them.
    with path.open("w", encoding="utf-8", errors="backslashreplace") as file:
        for clip, reference, prediction in zip(clips, references, predictions, strict=True):
            shown = {"reference": reference, "prediction": prediction}
            named = {name: task.name_predictions([value])[0] for name, value in shown.items()}
            # An empty reference has no error rate.
            scores = {} if reference == "" else task.score([prediction], [reference])
            record = {"path": clip_name(clip), **named, **scores}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
