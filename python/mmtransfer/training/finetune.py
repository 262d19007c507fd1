"""Train one method on a user's recordings: evaluated on the way, saved, and resumed after an interruption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import nn
from transformers import SequenceFeatureExtractor

from mmtransfer import checkpoint, registry
from mmtransfer.data import DataError, Recordings, from_manifest, load_data
from mmtransfer.method import Method, check_predicts

from .clock import Point
from .finetune_settings import FinetuneSettings
from .loop import main_device
from .run import FinetuneResult, Run, chosen_task
from .run_folder import RunFolder
from .selection import Findings


def finetune(
    model: nn.Module | str | Path,
    method: str | Method,
    data: Any,
    output: str | Path,
    settings: FinetuneSettings | None = None,
    *,
    extractor: SequenceFeatureExtractor | str | Path | None = None,
    dtype: torch.dtype | str = torch.float32,
    test_fraction: float = 0.2,
    resume: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> FinetuneResult:
    """Train a method on recordings, and save the model with the best score on the validation part.

    The same arguments give the same weights on the same machine, with one process on the CPU, also where the
    run was killed at any point and resumed. `torchrun` and `accelerate launch` run it on several GPUs.

    Args:
        model: a pretrained speech model, its folder or its hub name. A module is edited in place.
        method: its name, or a `Method`.
        data: `Recordings`, or what `mmtransfer.data.load_data` reads.
        output: folder of the checkpoint, and of the states of training until that has ended.
        settings: by default those of the method.
        extractor: the feature extractor of the model, or where it is; None: where the model is.
        dtype: of the weights of a model that is loaded.
        test_fraction: of `data` without a test part.
        resume: go on with the run in `output`, if there is one; one that has ended is not repeated.
        force: begin though other files, or another run, are in `output`.
        progress: for bars and messages.

    Raises:
        DataError: recordings, a model or a folder that cannot be used; with `settings.strict` also clips and
            characters that would be left out.
        ValueError: an unknown method, option or task, or settings that exclude each other.
        NotFiniteError: features, the loss or trained weights that are not finite.
    """
    settings = FinetuneSettings() if settings is None else settings
    progress = Progress(disable=True, console=Console(quiet=True)) if progress is None else progress
    found = _find_method(method, settings)
    _check(settings, found)
    folder = RunFolder(output, resume=resume, force=force)
    if (results := folder.results()) is not None:
        return _earlier(folder, results)
    if not isinstance(data, Recordings):
        data = _read(data, settings, test_fraction)

    def tell(sentence: str) -> None:
        progress.console.print(sentence, markup=False, highlight=False, soft_wrap=True)

    tell(data.describe())
    run = Run(settings, found, folder, Findings(strict=settings.strict, tell=tell), progress)
    run.load(model, extractor, dtype)
    run.prepare(data)
    return run.finish(*run.train())


def _find_method(method: str | Method, settings: FinetuneSettings) -> Method:
    """The method with the options that are given, and with those of the model that the run begins with."""
    task = chosen_task(settings)
    options = settings.method_options(None if task is None else task.name)
    if settings.begin_with is None:
        return registry.find(method, **options)
    config = checkpoint.read_config(settings.begin_with.expanduser())
    found = registry.find(method)
    if found.name != config["method"]:
        raise ValueError(
            f"{settings.begin_with} was trained by {config['method']}; {found.name} cannot begin with it"
        )
    found = registry.find(registry.find(found, **config["options"]), **options)
    for name in (name for part in found.parts() for name in part.weights_from()):
        raise ValueError(
            f"{name} and begin_with exclude each other: {settings.begin_with} has such weights, with which "
            "the run begins"
        )
    return found


def _check(settings: FinetuneSettings, method: Method) -> None:
    """ValueError for settings that cannot be met, before anything is loaded."""
    task = chosen_task(settings)
    check_predicts(method, texts=task is not None and task.reads_language_model)
    if settings.keep_head and task is not None and task.reads_language_model:
        raise ValueError(f"keep_head is for a head that the model has, and the task {task.name} has another")
    if settings.tokenizer is not None and task is not None and task.reads_language_model:
        raise ValueError(f"tokenizer is for the task ctc; the task {task.name} has the language model's")
    if settings.keep_head and method.has_readout:
        raise ValueError(f"keep_head needs the last layer alone, and {method.name} has a readout of its own")
    if settings.fp16 and main_device(settings.cpu).type == "cpu":
        raise ValueError("fp16 needs a GPU; use bf16, or neither")


def _read(data: Any, settings: FinetuneSettings, test_fraction: float) -> Recordings:
    """The recordings; without a task, a manifest says itself whether it has labels or transcripts."""
    options: dict[str, Any] = {"test_fraction": test_fraction, "strict": settings.strict}
    if (task := chosen_task(settings)) is not None:
        return load_data(data, kind=task.kind, **options)
    if isinstance(data, (str, Path)) and Path(data).expanduser().is_file():
        return from_manifest(data, **options)
    try:
        return load_data(data, kind="label", **options)
    except DataError as error:
        if isinstance(data, (str, Path)) and any(Path(data).expanduser().rglob("*.txt")):
            raise DataError(f"{error}; where its text files are transcripts, the task is ctc") from error
        raise


def _earlier(folder: RunFolder, results: dict[str, Any]) -> FinetuneResult:
    """The results of a run that has ended."""
    return FinetuneResult(
        output=folder.path,
        test=results["test"],
        validation=results["validation"],
        curve=[Point(**point) for point in results["curve"]],
        steps=results["steps"],
        seconds=results["seconds"],
        loss=results["loss"],
        stopped=results["stopped"],
        notes=results["notes"],
        metric=results["task"]["metric"],
        earlier=True,
    )
