"""The run behind `finetune`: model, task and clips, then the training of the start and of the method."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from rich.progress import Progress, TaskID
from torch import nn
from transformers import AutoModelForCTC, SequenceFeatureExtractor, set_seed

from mmtransfer import checkpoint
from mmtransfer.data import DataError, Recordings
from mmtransfer.data.errors import first
from mmtransfer.data.features import Collator, load_feature_extractor
from mmtransfer.data.inputs import AudioInput
from mmtransfer.data.recordings import Clip
from mmtransfer.encoders.loading import load_model
from mmtransfer.method import Compressor, Method
from mmtransfer.model import AdaptedModel
from mmtransfer.tasks import Task, default_task, find_task, language_model_task

from .batches import drop_infeasible
from .caching import EncoderCollator, NoRoomError, cache_features, cache_inputs, examples_for
from .clock import Point
from .finetune_settings import FinetuneSettings
from .loop import Checkpoints, Evaluation, TrainResult, check_trains, main_device, predict, train
from .machine import describe_machine, is_main_process, process_count
from .run_folder import FORMAT, LOG, RunFolder
from .selection import Findings, digest, hold_out, select
from .starting import find_start

#: Examples, and the function that makes a batch of them.
Examples = tuple[Any, Callable[[Any], dict[str, torch.Tensor]]]
#: Settings that do not change the result, and those that `_describe` has in another form.
_NO_PART_OF_A_RUN = ("workers", "options", "tokenizer", "task")


def chosen_task(settings: FinetuneSettings) -> type[Task] | None:
    """The task that the settings name, or that takes the language model that they name."""
    if settings.task is not None:
        return find_task(settings.task)
    return None if settings.language_model is None and settings.stage is None else language_model_task()


def _task_options(settings: FinetuneSettings, task: type[Task]) -> dict[str, Any]:
    """The fields of the task that the user gives: `--language-model`, `--stage`, and `--set` by its name."""
    given = {name: getattr(settings, name) for name in ("language_model", "stage")}
    named = {name: value for name, value in given.items() if value is not None}
    if named and not task.reads_language_model:
        raise ValueError(f"the task {task.name} takes no {' and no '.join(named)}")
    return {**named, **settings.task_options(task.name)}


def _task_of(task: type[Task], recordings: Recordings, options: Mapping[str, Any]) -> Task:
    fields = {each.name for each in dataclasses.fields(task)}
    if unknown := sorted(options.keys() - fields):
        known = ", ".join(sorted(fields)) or "none"
        raise ValueError(f"the task {task.name} has no option {unknown[0]!r}; it has {known}")
    return task.of(recordings, **options)


@dataclass(frozen=True)
class FinetuneResult:
    """A trained model; it is in `output`, from where `mmtransfer.load` loads it.

    Attributes:
        test: scores of the test part.
        validation: scores of the validation part with the weights that were kept; None without such a part,
            and for a task that keeps the last weights.
        metric: name of the score that counts.
        curve: the evaluations during training.
        steps, seconds: of training; evaluations take no part in the seconds.
        loss: mean training loss of the last epoch, or of the steps behind a state within it.
        stopped: whether training ended early.
        notes: sentences on what was left out.
        earlier: whether the folder had this result already, and nothing was done.
    """

    output: Path
    test: dict[str, float]
    validation: dict[str, float] | None
    metric: str
    curve: list[Point]
    steps: int
    seconds: float
    loss: float
    stopped: bool
    notes: list[str]
    earlier: bool = False


class Run:
    """One run. Its methods are called in their order.

    Args:
        settings, method: of the training.
        folder: for the states and the result.
        findings: for what is left out.
        progress: for bars.
    """

    model: nn.Module
    extractor: SequenceFeatureExtractor
    source: str
    recordings: Recordings
    task: Task
    test: Examples

    def __init__(
        self,
        settings: FinetuneSettings,
        method: Method,
        folder: RunFolder,
        findings: Findings,
        progress: Progress,
    ) -> None:
        self.settings, self.method, self.folder = settings, method, folder
        self.findings, self.progress = findings, progress
        self.device = main_device(settings.cpu)
        # The state dict of a head that the pretrained model has already.
        self.head: Mapping[str, torch.Tensor] | None = None

    def load(
        self,
        model: nn.Module | str | Path,
        extractor: SequenceFeatureExtractor | str | Path | None,
        dtype: torch.dtype | str,
    ) -> None:
        """The pretrained model and its feature extractor."""
        if isinstance(model, nn.Module):
            if extractor is None:
                raise ValueError("extractor must be given with a model that is loaded already")
            self.model = model
            self.source = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "the model")
        else:
            self.source = str(model)
            self.model = self._load(dtype)
        self.extractor = load_feature_extractor(self.source if extractor is None else extractor)

    def _load(self, dtype: torch.dtype | str) -> nn.Module:
        if not self.settings.keep_head:
            return load_model(self.source, dtype=dtype)
        try:
            return load_model(self.source, dtype=dtype, kind=AutoModelForCTC)
        except DataError as error:
            raise DataError(f"keep_head needs a model with a CTC head: {error}") from error

    def prepare(self, recordings: Recordings) -> None:
        """The task, and the clips that can be used; the run is then described in its folder."""
        settings = self.settings
        self.task = self._make_task(recordings)
        parts = hold_out(recordings, settings.validation_fraction, settings.seed, self.findings)
        if not parts.validation and (settings.patience or settings.evaluate_every):
            raise DataError("patience and evaluate_every need a validation part")
        if settings.patience and not self.task.keeps_best:
            raise DataError(
                f"patience needs a score that tells when to stop, and {self.task.name} in its first "
                "stage has none; give epochs or max_steps"
            )
        self.recordings = select(
            parts,
            self.task,
            max_seconds=settings.max_seconds,
            window=AudioInput(self.extractor).longest,
            findings=self.findings,
        )
        # The others look at the folder before there is a run in it.
        self._wait()
        if is_main_process():
            self.folder.begin(self._describe(recordings))
        self._wait()

    def train(self) -> tuple[AdaptedModel, TrainResult]:
        """The model with the weights that are kept, and how it came to them."""
        start = self._trained_start()
        training = self.settings.training(self.method.training)
        model = self._build(self.method)
        # Here too, before features are made.
        check_trains(model)
        if self.head is not None:
            assert model.head is not None
            model.head.load_state_dict(self.head)
        if self.settings.begin_with is not None:
            checkpoint.begin_with(model, self.settings.begin_with)
        if start is not None:
            model.begin_with(start)
        if isinstance(model.readout, Compressor) and model.readout.needs_text:
            self.findings.add(
                "scores are of speech whose segments are known from the transcript", fault=False
            )
        if self.settings.recompute:
            model.gradient_checkpointing_enable()
        examples, collate = self._examples(model, self.recordings.train, "Training clips")
        examples = self._feasible(model, examples, collate, self.findings)
        bar = self.progress.add_task(self.method.title, total=training.steps(len(examples)), detail="")
        evaluation = self._evaluation(model, bar)
        # Made before training: a clip that cannot be read must not be found at its end.
        self.test = self._examples(model, self.recordings.test, "Test clips")

        def on_step(step: int, steps: int, loss: float | None) -> None:
            self.progress.update(bar, completed=step, total=steps)

        result = train(
            model,
            examples,
            collate,
            training,
            on_step=on_step,
            evaluation=evaluation,
            checkpoints=Checkpoints(folder=self.folder.states, resume=True, log=self.folder.path / LOG),
        )
        return model, result

    def finish(self, model: AdaptedModel, result: TrainResult) -> FinetuneResult:
        """Save the model, score the test part once, and write the results, after which the run is over."""
        if is_main_process():
            checkpoint.save(model, self.folder.path)
        training = self.settings.training(self.method.training)
        test = self.recordings.test
        predictions = predict(model, *self.test, training)
        scores = self.task.score(predictions, [self.task.target(clip) for clip in test])
        done = FinetuneResult(
            output=self.folder.path,
            test={name: float(value) for name, value in scores.items()},
            validation=result.best,
            metric=self.task.metric.name,
            curve=result.curve,
            steps=result.steps,
            seconds=result.seconds,
            loss=result.loss,
            stopped=result.stopped,
            notes=self.findings.notes,
        )
        if is_main_process():
            self.folder.end(self._results(done))
        self._wait()
        return done

    def _wait(self) -> None:
        """For the other processes."""
        if process_count() > 1:
            PartialState(cpu=self.settings.cpu).wait_for_everyone()

    def _make_task(self, recordings: Recordings) -> Task:
        settings = self.settings
        kind = "text" if recordings.transcribed else "label"
        task = chosen_task(settings) or default_task(kind)
        if options := _task_options(settings, task):
            return _task_of(task, recordings, options)
        if settings.keep_head:
            made, self.head = task.of_own_head(self.model, self.source)
            return made
        if settings.tokenizer is not None:
            return task.of_tokenizer_file(settings.tokenizer)
        return task.of(recordings)

    def _trained_start(self) -> AdaptedModel | None:
        """The model that the method begins with: trained, or read from the states of an interrupted run."""
        if self.method.starts_from is None or self.settings.start_epochs == 0 or self.head is not None:
            return None
        if self.settings.begin_with is not None:
            return None  # its readout is trained, and a start would replace it
        method = find_start(self.method)
        model = self._build(method)
        saved = self.folder.states / "start"
        if (saved / checkpoint.WEIGHTS).exists():
            checkpoint.load_trained(model, saved)
        else:
            self._train_start(model, method)
            if is_main_process():
                checkpoint.save_trained(model, saved)
        model.revert()
        return model

    def _train_start(self, model: AdaptedModel, method: Method) -> None:
        clips = self.recordings.train
        examples, collate = self._examples(model, clips, "Features to start")
        training = self.settings.start(method.training, stored=examples is not clips)
        # They are named where the method itself is trained.
        examples = self._feasible(model, examples, collate, None)
        bar = self.progress.add_task(f"{method.title} to start", total=None, detail="")
        train(
            model,
            examples,
            collate,
            training,
            on_step=lambda step, steps, _: self.progress.update(bar, completed=step, total=steps),
        )

    def _build(self, method: Method) -> AdaptedModel:
        set_seed(self.settings.seed)
        # A start that trains the encoder leaves the pretrained weights alone.
        is_start = method is not self.method
        encoder = copy.deepcopy(self.model) if is_start and method.has_edit else self.model
        model = AdaptedModel(encoder, method, self.task)
        model.audio = AudioInput(self.extractor, self._crop())
        return model

    def _feasible(self, model: AdaptedModel, examples: Any, collate: Any, findings: Findings | None) -> Any:
        """The examples that have enough frames for their targets."""
        kept, dropped = drop_infeasible(examples, collate, model.encoder, self.task, model.readout)
        if dropped and findings is not None:
            clips = first(dropped, "training clip", "training clips")
            their = "its text and is" if len(dropped) == 1 else "their text and are"
            findings.add(f"{clips} cannot hold {their} left out")
        if not len(kept):
            raise DataError(f"{self.recordings.name} has no training clip that can be used")
        return kept

    def _examples(self, model: AdaptedModel, clips: Sequence[Clip], title: str) -> Examples:
        """Clips as examples of the model: stored, if that is wanted and there is room."""
        collator = Collator(self.recordings, self.extractor, max_seconds=self._crop())
        collate = EncoderCollator(collator, model.encoder, self.task)
        if not self.settings.cache:
            return clips, collate
        bar = self.progress.add_task(title, total=len(clips), detail="")

        def on_clips(count: int) -> None:
            self.progress.advance(bar, count)

        workers = self.settings.training(self.method.training).workers
        try:
            if not model.edit_is_empty:
                inputs = cache_inputs(clips, collate, workers=workers, on_clips=on_clips)
                return examples_for(model, clips, collate, inputs=inputs)
            model.to(self.device)
            features = cache_features(model.encoder, clips, collate, workers=workers, on_clips=on_clips)
            return examples_for(model, clips, collate, features=features, taps=model.encoder.taps)
        except NoRoomError as error:
            self.progress.remove_task(bar)
            self.findings.add(f"{error.reason}: they are made in every step", fault=False)
            return clips, collate

    def _crop(self) -> float | None:
        """Seconds that clips are cropped to."""
        return None if self.task.whole_clips else self.settings.max_seconds

    def _evaluation(self, model: AdaptedModel, bar: TaskID) -> Evaluation | None:
        """Scores of the validation part on the way, shown behind a bar."""
        clips = self.recordings.validation
        if not clips:
            return None
        metric = self.task.metric

        def on_scores(step: int, scores: dict[str, float]) -> None:
            text = f"{metric.title.lower()} {scores[metric.name]:.1%} after {step} steps"
            self.progress.update(bar, detail=f"validation {text}")
            if not self.progress.console.is_terminal:
                self.progress.console.print(f"Validation: {text}", markup=False, highlight=False)

        examples, collate = self._examples(model, clips, "Validation clips")
        return Evaluation(
            examples=examples,
            collate=collate,
            targets=[self.task.target(clip) for clip in clips],
            every=self.settings.evaluate_every,
            keep_best=self.task.keeps_best,
            patience=self.settings.patience,
            on_scores=on_scores,
        )

    def _describe(self, recordings: Recordings) -> dict[str, Any]:
        """All that decides on the result, for a run that is resumed."""
        settings = dataclasses.asdict(self.settings)
        for name in _NO_PART_OF_A_RUN:
            del settings[name]
        begin_with = self.settings.begin_with
        settings["begin_with"] = None if begin_with is None else str(begin_with)
        return {
            "format": FORMAT,
            "method": self.method.name,
            "options": self.method.options(),
            "model": self.source,
            "dtype": str(next(self.model.parameters()).dtype).removeprefix("torch."),
            "data": {"name": recordings.name, "digest": digest(recordings)},
            # Behind the data, on which the alphabet depends.
            "task": {"name": self.task.name, "options": self.task.options()},
            **settings,
        }

    def _results(self, done: FinetuneResult) -> dict[str, Any]:
        recordings, metric = self.recordings, self.task.metric
        record = dataclasses.asdict(done)
        for name in ("output", "earlier", "metric"):
            del record[name]
        return {
            "format": FORMAT,
            "version": 1,
            "method": {"name": self.method.name, "options": self.method.options()},
            "task": {"name": self.task.name, "metric": metric.name, "title": metric.title},
            "model": self.source,
            "data": {
                "name": recordings.name,
                "clips": {name: len(getattr(recordings, name)) for name in ("train", "validation", "test")},
                "ignored": list(recordings.ignored),
            },
            "training": dataclasses.asdict(self.settings.training(self.method.training)),
            **record,
            "machine": describe_machine(self.device),
        }
