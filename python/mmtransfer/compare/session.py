"""A comparison: every method trained with the same data and seeds, evaluated, and measured."""

from __future__ import annotations

import copy
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, TaskID
from torch import nn
from transformers import set_seed

from mmtransfer import registry
from mmtransfer.data import DataError
from mmtransfer.data.features import Collator
from mmtransfer.data.inputs import AudioInput
from mmtransfer.encoders.encoder import Encoder
from mmtransfer.encoders.tapped import TappedEncoder, tap_name
from mmtransfer.method import Method, check_predicts
from mmtransfer.model import AdaptedModel
from mmtransfer.tasks import Task, default_task, find_task
from mmtransfer.training.caching import EncoderCollator, clip_name
from mmtransfer.training.clock import OnStep, Point
from mmtransfer.training.finite import NotFiniteError
from mmtransfer.training.loop import Evaluation, TrainResult, main_device, predict, train
from mmtransfer.training.machine import describe_machine, is_main_process, process_count
from mmtransfer.training.settings import Training
from mmtransfer.training.starting import find_start

from .experiment import Experiment
from .failures import failure_reason, finite_numbers
from .results import Comparison, Example, FailedMethod, MethodResult, Run
from .settings import CompareSettings
from .step import Step, StepComparison, StepCost, compare_steps
from .store import WHOLE_STEP_CLIPS, Store, evenly

#: Test clips whose predictions are in the report.
EXAMPLES = 6


def compare(
    experiment: Experiment, settings: CompareSettings | None = None, *, progress: Progress | None = None
) -> Comparison:
    """Train and measure every method on `experiment`.

    A method that fails in training, or whose numbers are not finite, is among `Comparison.failed`; the others
    go on.

    Raises:
        DataError: an unknown method, option or task, a method that the encoder cannot have, or recordings
            that cannot be read.
    """
    if settings is None:
        settings = CompareSettings()
    if progress is None:
        progress = Progress(disable=True, console=Console(quiet=True))
    began = time.perf_counter()
    session = _Session(experiment, settings, progress)
    try:
        session.prepare()
        found = [session.run_method(method) for method in session.methods]
    finally:
        session.close()
    return Comparison(
        task=session.describe_task(),
        settings=session.describe_settings(),
        machine=describe_machine(session.device),
        methods=[result for result in found if isinstance(result, MethodResult)],
        failed=[result for result in found if isinstance(result, FailedMethod)],
        examples=session.examples(),
        feature_seconds=session.feature_seconds,
        total_seconds=time.perf_counter() - began,
    )


class _Session:
    """One comparison in progress: the caches of the clips, and one run after the other."""

    def __init__(self, experiment: Experiment, settings: CompareSettings, progress: Progress) -> None:
        self.experiment, self.settings, self.progress = experiment, settings, progress
        self.device = main_device(settings.cpu)
        self.recordings = experiment.recordings
        try:
            kind = "text" if self.recordings.transcribed else "label"
            task = default_task(kind) if settings.task is None else find_task(settings.task)
            self.task = task.of(self.recordings)
            self.methods = find_methods(settings)
            # Those that the methods start from are trained too.
            starts = [find_start(each) for each in self.methods if each.starts_from is not None]
        except ValueError as error:
            raise DataError(str(error)) from error
        known = {each.name: each for each in self.methods}
        self.starts = {start.name: known.get(start.name, start) for start in starts}
        parts = Encoder(Encoder(experiment.model).model)
        self.through_encoder = {
            method.name: self._trains_encoder(method) for method in (*self.methods, *self.starts.values())
        }
        self.encoder = self._shared_encoder(parts)
        self.collate = EncoderCollator(
            Collator(self.recordings, experiment.extractor, max_seconds=experiment.max_seconds),
            self.encoder,
            self.task,
        )
        self.store = Store(self.recordings, self.encoder, self.collate, settings.process_count)
        self.feature_seconds: float | None = None
        self.trained: dict[tuple[str, int], AdaptedModel] = {}
        # Of training, that of the method it starts from included.
        self.seconds: dict[tuple[str, int], float] = {}
        self.predictions: dict[str, list[Any]] = {}

    def prepare(self) -> None:
        """Cache the features and inputs that every epoch reads, if that is wanted."""
        if self.settings.cache:
            began = time.perf_counter()
            self.encoder.to(self.device)
            self.store.cache_features(self.progress)
            self.feature_seconds = time.perf_counter() - began
            clips = sum(map(len, self.store.clips.values()))
            self._log(f"Features of {clips} clips: {self.feature_seconds:.0f} s")
            if any(self.through_encoder.values()):
                self.store.cache_inputs(self.progress)
        self.store.drop_infeasible()
        if dropped := self.store.infeasible:
            self._log(f"Left out, too short for their text: {len(dropped)} clips, such as {dropped[0]}")
        if not len(self.store.clips["train"]):
            raise DataError(f"{self.recordings.name} has no training clip that can hold its text")

    def close(self) -> None:
        """Give the experiment's model back as it was."""
        for model in self.trained.values():
            model.revert()
        self.encoder.revert()

    def run_method(self, method: Method) -> MethodResult | FailedMethod:
        """All runs of a method, and its step; or the reason why there is no result."""
        training, seeds = self._training(method)
        steps = len(seeds) * training.steps(len(self.store.clips["train"]))
        bar = self.progress.add_task(method.title, total=steps, detail="")
        runs: list[Run] = []
        place = ""
        try:
            for seed in seeds:
                place = f"seed {seed}: " if len(seeds) > 1 else ""
                run = self._run(method, replace(training, seed=seed), bar)
                runs.append(run)
            place = ""
            self.progress.update(bar, detail="measuring a step")
            return self._result(method, training, runs, bar)
        except DataError:
            raise
        except Exception as error:
            # The other processes may not have failed, and would wait for this one.
            if process_count() > 1 and not isinstance(error, NotFiniteError):
                raise
            reason = place + failure_reason(error)
        self._report(method, bar, f"failed, {reason}")
        return FailedMethod(
            name=method.name,
            title=method.title,
            about=method.about(),
            through_encoder=self.through_encoder[method.name],
            options=method.options(),
            reason=reason,
            runs=runs,
        )

    def _result(self, method: Method, training: Training, runs: list[Run], bar: TaskID) -> MethodResult:
        model = self._build(method)
        clips = len(self.store.clips["train"])
        steps = training.steps(clips)
        step, step_clips = self._measure(method, model)
        result = MethodResult(
            name=method.name,
            title=method.title,
            about=method.about(),
            through_encoder=self.through_encoder[method.name],
            trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
            learning_rate=training.learning_rate,
            epochs=steps / replace(training, epochs=1, max_steps=None).steps(clips),
            steps=steps,
            batch_size=training.batch_size,
            options=method.options(),
            taps=[tap_name(tap) for tap in model.encoder.taps],
            runs=runs,
            step=step,
            step_clips=step_clips,
            whole_step=self._measure_whole(model),
        )
        spread = "" if result.spread is None else f" ± {result.spread:.1%}"
        self._report(
            method,
            bar,
            f"test {self.task.metric.title.lower()} {result.score:.1%}{spread}, "
            f"{result.seconds:.0f} s of training",
        )
        return result

    def _report(self, method: Method, bar: TaskID, text: str) -> None:
        self.progress.update(bar, detail=text)
        self._log(f"{method.title}: {text}")

    def describe_task(self) -> dict[str, Any]:
        recordings, metric = self.recordings, self.task.metric
        return {
            "name": self.task.name,
            "metric": {
                "name": metric.name,
                "title": metric.title,
                "higher_is_better": metric.higher_is_better,
            },
            "further": {each.name: each.title for each in self.task.further},
            "infeasible": self.store.infeasible,
            "whole_step_clips": min(WHOLE_STEP_CLIPS, len(self.store.clips["train"])),
            "data": recordings.name,
            "synthetic": recordings.synthetic,
            "note": self.experiment.note,
            "classes": len(recordings.classes),
            "labels": list(recordings.classes),
            "ignored": list(recordings.ignored),
            "train_clips": len(recordings.train),
            "test_clips": len(recordings.test),
            "train_seconds": sum(clip.seconds for clip in recordings.train),
            "test_seconds": sum(clip.seconds for clip in recordings.test),
            "max_seconds": self.experiment.max_seconds,
            "chance": self.task.chance(recordings),
            "model": self.experiment.model_name,
            "model_path": getattr(self.encoder.model.config, "_name_or_path", None) or None,
            "model_type": self.encoder.description.model_type,
            "dtype": str(self.encoder.dtype).removeprefix("torch."),
            "sampling_rate": self.experiment.extractor.sampling_rate,
            "layers": self.encoder.num_layers,
            "hidden_size": self.encoder.hidden_size,
        }

    def describe_settings(self) -> dict[str, Any]:
        return {
            "cached_inputs": self.settings.cache,
            "cached_features": self.feature_seconds is not None,
            "weight_decay": self._training(self.methods[0])[0].weight_decay,
            "bf16": self.settings.bf16,
        }

    def _run(self, method: Method, training: Training, bar: TaskID) -> Run:
        def on_step(_: int, __: int, loss: float | None) -> None:
            text = "" if loss is None else f", training loss {loss:.3f}"
            self.progress.update(bar, advance=1, detail=f"seed {training.seed}{text}")

        model, result = self._train(method, training, on_step)
        self.trained[method.name, training.seed] = model
        predictions = predict(model, *self.store.examples("test", model), training)
        targets = self.collate.targets(self.recordings.test)
        scores = finite_numbers("score", self.task.score(predictions, targets))
        self.predictions.setdefault(method.name, predictions)
        insights = {
            title: finite_numbers(title, figures) for title, figures in method.insights(model).items()
        }
        if self.settings.save is not None and is_main_process():
            model.save_pretrained(self.settings.save / f"{method.name}-seed{training.seed}")
        if self.through_encoder[method.name]:
            # Nothing starts from it, and it holds a copy of the encoder.
            del self.trained[method.name, training.seed]
        return Run(
            seed=training.seed,
            score=scores[self.task.metric.name],
            scores=scores,
            loss=result.loss,
            seconds_per_epoch=result.seconds_per_epoch,
            seconds=self.seconds[method.name, training.seed],
            curve=self._curve(result, predictions, targets, self.seconds[method.name, training.seed]),
            insights=insights,
        )

    def _curve(
        self, result: TrainResult, predictions: list[Any], targets: list[Any], seconds: float
    ) -> list[Point]:
        """The scores on the way and at the end, on the same clips, by all seconds of training."""
        chosen = self.store.curve_clips()
        last = self.task.score(*([values[index] for index in chosen] for values in (predictions, targets)))
        before = seconds - result.seconds
        points = [
            Point(point.steps, before + point.seconds, finite_numbers("score", point.scores))
            for point in result.curve
            if point.steps < result.steps
        ]
        return [*points, Point(result.steps, seconds, finite_numbers("score", last))]

    def _train(
        self, method: Method, training: Training, on_step: OnStep | None = None
    ) -> tuple[AdaptedModel, TrainResult]:
        start, before = None, 0.0
        if method.starts_from is not None:
            first = self.starts[method.starts_from]
            start = self._trained_start(first, training.seed)
            before = self.seconds[first.name, training.seed]
        set_seed(training.seed)
        model = self._build(method)
        if start is not None:
            model.begin_with(start)
        result = train(
            model,
            *self.store.examples("train", model),
            training,
            on_step=on_step,
            evaluation=self._evaluation(model, training, first=start is not None),
        )
        self.seconds[method.name, training.seed] = before + result.seconds
        return model, result

    def _evaluation(self, model: AdaptedModel, training: Training, *, first: bool) -> Evaluation | None:
        """Scores on the way, for the figure; they decide nothing."""
        count = self.settings.evaluations
        if not count:
            return None
        examples, collate = self.store.curve_examples(model)
        targets = self.collate.targets(self.recordings.test)
        steps = training.steps(len(self.store.clips["train"]))
        return Evaluation(
            examples=examples,
            collate=collate,
            targets=[targets[index] for index in self.store.curve_clips()],
            every=max(steps // count, 1),
            first=first,
        )

    def _trained_start(self, method: Method, seed: int) -> AdaptedModel:
        """The model that others begin with, as the comparison has trained it, or would."""
        key = method.name, seed
        if key not in self.trained:
            training, _ = self._training(method)
            try:
                self.trained[key], _ = self._train(method, replace(training, seed=seed))
            except NotFiniteError as error:
                raise NotFiniteError(f"{method.title}, which it starts from, failed: {error}") from error
        return self.trained[key]

    def _build(self, method: Method) -> AdaptedModel:
        """An untrained model; what trains through the encoder gets a copy of it."""
        encoder: nn.Module = self.encoder.model
        if self.through_encoder[method.name]:
            encoder = copy.deepcopy(encoder)
        model = AdaptedModel(encoder, method, self.task)
        model.audio = AudioInput(self.experiment.extractor, self.experiment.max_seconds)
        return model

    def _trains_encoder(self, method: Method) -> bool:
        """Asked of the method itself, by building it once. DataError if the encoder cannot have it."""
        try:
            model = AdaptedModel(self.experiment.model, method, self.task)
        except Exception as error:
            plain = isinstance(error, (TypeError, ValueError, ImportError))
            reason = str(error) if plain else failure_reason(error)
            raise DataError(f"{method.title} cannot be used here: {reason}") from error
        found = not model.edit_is_empty
        model.revert()
        return found

    def _shared_encoder(self, parts: Encoder) -> TappedEncoder:
        """The frozen encoder, with the taps of all methods that read its features."""
        frozen = [
            method
            for method in (*self.methods, *self.starts.values())
            if not self.through_encoder[method.name]
        ]
        taps: dict[Any, None] = {}
        for method in frozen:
            taps |= dict.fromkeys(TappedEncoder(parts.model, method.select_taps(parts)).taps)
        # In the order of the layers, so that most methods read neighbouring slots, which is a view.
        ordered = sorted(taps, key=lambda tap: -1 if tap == "embeddings" else tap)
        return TappedEncoder(parts.model, ordered or [-1])

    def _measure(self, method: Method, model: AdaptedModel) -> tuple[StepComparison, int]:
        """A training step on the first clips, with their features or inputs in memory; how many they are."""
        if not model.edit_is_empty and self.task.by_length:
            # That of the whole step: with eager's side a batch of many frames would take minutes.
            batch = self.store.whole_step_batch()
            return self._compare(method, model, batch), len(batch["labels"])
        examples, collate = self.store.examples("train", model)
        count = min(self._training(method)[0].batch_size, len(self.store.clips["train"]))
        return self._compare(method, model, collate([examples[index] for index in range(count)])), count

    def _compare(self, method: Method, model: AdaptedModel, batch: dict[str, torch.Tensor]) -> StepComparison:
        batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
        model.to(self.device)
        if model.edit_is_empty and "features" not in batch:
            labels = batch.pop("labels")
            taps = model.encoder(**batch)
            batch = {"features": taps.features, "lengths": taps.lengths, "labels": labels}
        if not model.edit_is_empty:
            _perturb(model)
        twin = method.baseline(model)
        return compare_steps(
            *(Step(each.to(self.device), batch) for each in (model, twin) if each is not None)
        )

    def _measure_whole(self, model: AdaptedModel) -> StepCost:
        """A training step with the encoder in the loop, on the same clips for every method."""
        batch = {name: tensor.to(self.device) for name, tensor in self.store.whole_step_batch().items()}
        return compare_steps(Step(model.to(self.device), batch)).mmkernels

    def examples(self) -> list[Example]:
        """A few test clips of all lengths with the predictions of every method."""
        targets = self.collate.targets(self.recordings.test)
        return [
            Example(
                # Without its folder: a report is passed on.
                clip=Path(clip_name(self.recordings.test[index], index)).name,
                target=_plain(self.task, targets[index]),
                predictions={
                    name: _plain(self.task, found[index]) for name, found in self.predictions.items()
                },
            )
            for index in evenly(self.recordings.test, EXAMPLES)
        ]

    def _training(self, method: Method) -> tuple[Training, tuple[int, ...]]:
        """Settings, but for the seed, and seeds of a method's runs."""
        frozen = not self.through_encoder[method.name]
        count = self.settings.seeds if frozen else self.settings.tuning_seeds
        training = self.settings.training(method.training, frozen=frozen, name=method.name)
        return training, tuple(range(count))

    def _log(self, text: str) -> None:
        """A line for a log file, where no bar can move."""
        if not self.progress.console.is_terminal:
            self.progress.console.print(text, markup=False, highlight=False, soft_wrap=True)


def find_methods(settings: CompareSettings) -> list[Method]:
    """The methods of a comparison, with the options that are theirs.

    ValueError for an unknown method, an option that none of them has, or a task with a language model.
    """
    if settings.task is not None and find_task(settings.task).reads_language_model:
        raise ValueError(
            f"the task {settings.task} has a language model and stages, which a comparison has not; train by "
            "finetune"
        )
    names = dict.fromkeys(registry.default_names() if settings.methods is None else settings.methods)
    found = [registry.find(name) for name in names]
    for key, value in registry.in_order(_of_methods(settings, found)):
        owners = [index for index, method in enumerate(found) if registry.has_option(method, key)]
        changes = {key: value}
        if not owners and isinstance(value, dict):
            # Those of a combination, under its name.
            owners, changes = [index for index, method in enumerate(found) if method.name == key], value
        if not owners:
            raise ValueError(f"none of the methods {', '.join(names)} has an option {key!r}")
        for index in owners:
            found[index] = registry.find(found[index], **changes)
    for method in found:
        check_predicts(method)
    return found


def _of_methods(settings: CompareSettings, methods: list[Method]) -> dict[str, Any]:
    """The options without those of the training of a method; ValueError for a wrong one of these."""
    options = dict(settings.options)
    for method in methods:
        own = settings.own_training(method.name)
        if not own:
            continue
        try:
            replace(method.training, **own)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{method.name}: {error}") from error
        rest = {key: value for key, value in options[method.name].items() if key not in own}
        options = {key: value for key, value in options.items() if key != method.name}
        if rest:
            options[method.name] = rest
    return options


def _plain(task: Task, prediction: Any) -> str:
    return str(task.name_predictions([prediction])[0])


@torch.no_grad()
def _perturb(model: nn.Module) -> None:
    """Give what starts as zero a value: gradients that are all zero could not differ."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dim() > 1 and not parameter.any():
            nn.init.trunc_normal_(parameter, std=0.02)
