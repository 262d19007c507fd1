"""A comparison of methods on one task: every method trained with the same data and seeds, and measured."""

from __future__ import annotations

import copy
import importlib.metadata
import os
import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, TaskID
from torch import nn
from torch.utils.data import Dataset
from transformers import set_seed

import mmkernels
from mmtransfer import models
from mmtransfer.caching import (
    CachedFeatures,
    CachedInputs,
    EncoderCollator,
    OnClips,
    cache_features,
    cache_inputs,
    collate_features,
)
from mmtransfer.data import DataError
from mmtransfer.data.features import Collator
from mmtransfer.hff import HFF, LFF, FrozenEncoder, Taps, WeightedSum
from mmtransfer.hff.encoder import Tap
from mmtransfer.measure import Step, StepComparison, compare_steps
from mmtransfer.methods import DEFAULT_METHODS, EncoderMethod, FusionMethod, Job, Method, find_method
from mmtransfer.results import Comparison, MethodResult, Run
from mmtransfer.tasks import Task, default_taps, main_device
from mmtransfer.train import OnEpoch, TrainResult, TrainSettings, predict, train

#: How the methods that train through the encoder go on from what was trained on its features. An epoch costs
#: a hundred times that of a fusion on cached features, so there are few, of smaller batches.
TUNING = TrainSettings(epochs=5, batch_size=16)


@dataclass(frozen=True)
class CompareSettings:
    """What to compare and how.

    Attributes:
        methods: keys of `mmtransfer.methods.METHODS`.
        seeds: each method on the frozen encoder is trained once with each.
        taps: layers as for `FrozenEncoder`; None for `mmtransfer.tasks.default_taps`.
        width: output width of LFF and HFF; None for 5/8 of the encoder's, as the paper's 640 of 1024.
        cache: run the frozen encoder once over all clips and train on its stored outputs, and keep the inputs
            of a trained encoder.
        training: epochs, batch size, precision and device of every run on the frozen encoder; its seed and
            learning rate are set per run.
        tuning: the same for runs that train through the encoder.
        tuning_seeds: seeds of those.
        learning_rate: for all methods instead of their own.
        save: folder for the trained parts, one subfolder per run; None keeps none.
    """

    methods: tuple[str, ...] = DEFAULT_METHODS
    seeds: tuple[int, ...] = (0, 1, 2)
    taps: tuple[Tap, ...] | None = None
    width: int | None = None
    cache: bool = True
    training: TrainSettings = field(default_factory=TrainSettings)
    tuning: TrainSettings = TUNING
    tuning_seeds: tuple[int, ...] = (0,)
    learning_rate: float | None = None
    save: Path | None = None


def compare(
    task: Task, settings: CompareSettings | None = None, *, progress: Progress | None = None
) -> Comparison:
    """Train and measure every method on `task`.

    Raises:
        DataError: an unknown method, a tap that the encoder lacks, or a fusion that cannot work on it.
    """
    settings = settings or CompareSettings()
    began = time.perf_counter()
    session = _Session(task, settings, progress or Progress(disable=True, console=Console(quiet=True)))
    session.prepare()
    methods = [session.run_method(name) for name in settings.methods]
    return Comparison(
        task=_describe_task(task, session),
        settings=_describe_settings(settings, session),
        machine=describe_machine(session.device),
        methods=methods,
        feature_seconds=session.feature_seconds,
        total_seconds=time.perf_counter() - began,
    )


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Processor, threads and versions; nothing that names the host."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "accelerate")}
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "python": platform.python_version(),
        "mmkernels": mmkernels.__version__,
        **versions,
    }


class _Session:
    """One comparison in progress: what is cached of the clips, and one run after the other."""

    def __init__(self, task: Task, settings: CompareSettings, progress: Progress) -> None:
        self.task, self.settings, self.progress = task, settings, progress
        self.device = main_device(settings.training.cpu)
        self.methods = {name: find_method(name) for name in settings.methods}
        chosen = default_taps(task.model) if settings.taps is None else list(settings.taps)
        self.encoder = _make_encoder(task, self._with_last(chosen))
        self.width = settings.width or max(self.encoder.hidden_size * 5 // 8, 1)
        self.taps = self.encoder.taps[: len(chosen)]
        self.job = Job(task.model, self.taps, self.width, len(task.recordings.classes))
        self.collate = EncoderCollator(
            Collator(task.recordings, task.extractor, max_seconds=task.max_seconds), self.encoder
        )
        self.clips: dict[str, Any] = {"train": task.recordings.train, "test": task.recordings.test}
        self.features: dict[str, CachedFeatures] = {}
        self.inputs: dict[str, CachedInputs] = {}
        self.feature_seconds: float | None = None
        self.starts: dict[tuple[str, int], HFF] = {}
        for method in self.methods.values():
            self._build(method)

    def prepare(self) -> None:
        """Cache what the methods read in every epoch, if that is wanted."""
        if not self.settings.cache:
            return
        began = time.perf_counter()
        self.encoder.to(self.device)
        self.features = self._cache("Features", self._cache_features)
        self.feature_seconds = time.perf_counter() - began
        clips = sum(map(len, self.clips.values()))
        self._log(f"Features of {clips} clips: {self.feature_seconds:.0f} s")
        if any(method.through_encoder for method in self.methods.values()):
            self.inputs = self._cache("Inputs", self._cache_inputs)

    def _cache(self, title: str, make: Callable[[Any, OnClips], Any]) -> dict[str, Any]:
        bar = self.progress.add_task(title, total=sum(map(len, self.clips.values())), detail="")
        return {
            split: make(clips, lambda count: self.progress.advance(bar, count))
            for split, clips in self.clips.items()
        }

    def _cache_features(self, clips: Any, on_clips: OnClips) -> CachedFeatures:
        return cache_features(self.encoder, clips, self.collate, on_clips=on_clips)

    def _cache_inputs(self, clips: Any, on_clips: OnClips) -> CachedInputs:
        return cache_inputs(clips, self.collate, on_clips=on_clips)

    def run_method(self, name: str) -> MethodResult:
        method = self.methods[name]
        training, seeds = self._training(method)
        bar = self.progress.add_task(method.title, total=len(seeds) * training.epochs, detail="")
        runs = [self._run(name, replace(training, seed=seed), bar) for seed in seeds]
        self.progress.update(bar, detail="measuring a step")
        model = self._build(method)
        parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
        step = self._measure(method, model)
        accuracy = statistics.fmean(run.accuracy for run in runs)
        self.progress.update(bar, detail=f"test accuracy {accuracy:.1%}")
        self._log(f"{method.title}: test accuracy {accuracy:.1%}")
        return MethodResult(
            name=name,
            title=method.title,
            through_encoder=method.through_encoder,
            trainable_parameters=parameters,
            learning_rate=training.learning_rate,
            epochs=training.epochs,
            batch_size=training.batch_size,
            tap_names=[str(tap) for tap in model.encoder.taps],
            tap_weights_kind=_tap_weights(model)[0],
            runs=runs,
            step=step,
        )

    def _run(self, name: str, training: TrainSettings, bar: TaskID) -> Run:
        method = self.methods[name]

        def on_epoch(_: int, loss: float) -> None:
            self.progress.update(bar, advance=1, detail=f"seed {training.seed}, training loss {loss:.3f}")

        start = self._trained_start(method, training.seed) if isinstance(method, EncoderMethod) else None
        model, result = self._train(method, training, on_epoch, start)
        if isinstance(method, FusionMethod):
            self.starts[method.title, training.seed] = model
        logits, labels = predict(model, *self._examples("test", model), training)
        if self.settings.save is not None and is_main_process():
            model.save_pretrained(self.settings.save / f"{name}-seed{training.seed}")
        return Run(
            seed=training.seed,
            accuracy=float((logits.argmax(1) == labels).float().mean()),
            loss=result.loss,
            seconds_per_epoch=result.seconds_per_epoch,
            tap_weights=_tap_weights(model)[1],
        )

    def _train(
        self,
        method: Method,
        training: TrainSettings,
        on_epoch: OnEpoch | None = None,
        start: HFF | None = None,
    ) -> tuple[Any, TrainResult]:
        set_seed(training.seed)
        model = self._build(method)
        if start is not None:
            EncoderMethod.begin(model, start)
        return model, train(model, *self._examples("train", model), training, on_epoch=on_epoch)

    def _trained_start(self, method: EncoderMethod, seed: int) -> HFF:
        """What the method begins with, as the comparison has trained it, or would."""
        key = method.start.title, seed
        if key not in self.starts:
            training, _ = self._training(method.start)
            self.starts[key], _ = self._train(method.start, replace(training, seed=seed))
        return self.starts[key]

    def _log(self, text: str) -> None:
        """A line for a log file, where no bar can move."""
        if not self.progress.console.is_terminal:
            self.progress.console.print(text)

    def _build(self, method: Method) -> Any:
        """An untrained model."""
        try:
            return method.build(self.job)
        except (ValueError, ImportError) as error:
            raise DataError(f"{method.title} cannot be used here: {error}") from error

    def _with_last(self, taps: list[Tap]) -> list[Tap]:
        """The taps, and the last layer behind them if a method needs it and they lack it."""
        frozen = [m.start if isinstance(m, EncoderMethod) else m for m in self.methods.values()]
        if not any(isinstance(method, FusionMethod) and method.last_only for method in frozen):
            return taps
        (last,) = _make_encoder(self.task, [-1]).taps
        return taps if last in _make_encoder(self.task, taps).taps else [*taps, last]

    def _examples(self, split: str, model: nn.Module) -> tuple[Dataset[Any], Any]:
        """A data set and its collate function as `model` needs them."""
        encoder: Any = model.encoder
        if not self.settings.cache:
            return self.clips[split], self.collate
        if not isinstance(encoder, FrozenEncoder):
            return self.inputs[split], self.inputs[split].collate
        slots = [self.encoder.taps.index(tap) for tap in encoder.taps]
        return self.features[split].select(slots), collate_features

    def _measure(self, method: Method, model: Any) -> StepComparison:
        """A training step on the first clips, what is cached of them already there."""
        examples: Any
        examples, collate = self._examples("train", model)
        count = min(self._training(method)[0].batch_size, len(self.clips["train"]))
        batch = collate([examples[index] for index in range(count)])
        batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
        labels = batch.pop("labels")
        model.to(self.device)
        if isinstance(method, FusionMethod):
            taps = Taps.pack(**batch) if "features" in batch else model.encoder(**batch)
            eager = method.build_eager(model.fusion)
            parts = [(model.fusion, copy.deepcopy(model.head)), (eager, copy.deepcopy(model.head))]
            steps = [_fusion_step(fusion, head, taps, labels) for fusion, head in parts if fusion is not None]
        else:
            assert isinstance(method, EncoderMethod)
            _perturb(model)
            steps = [
                Step(each.to(self.device), lambda each: each(**batch).logits, labels)
                for each in (model, method.build_eager(self.job))
                if each is not None
            ]
        return compare_steps(*steps)

    def _training(self, method: Method) -> tuple[TrainSettings, tuple[int, ...]]:
        """Settings, but for the seed, and seeds of a method's runs."""
        settings = self.settings
        rate = settings.learning_rate or method.learning_rate
        if method.through_encoder:
            return replace(settings.tuning, learning_rate=rate), settings.tuning_seeds
        return replace(settings.training, learning_rate=rate), settings.seeds


def _fusion_step(fusion: nn.Module, head: nn.Module, taps: Taps, labels: torch.Tensor) -> Step:
    parts = nn.ModuleDict({"fusion": fusion, "head": head}).to(labels.device)
    return Step(parts, lambda _: parts["head"](taps, parts["fusion"](taps.features)), labels)


@torch.no_grad()
def _perturb(model: nn.Module) -> None:
    """Give what starts as zero a value: gradients that are all zero could not differ."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dim() > 1 and not parameter.any():
            nn.init.trunc_normal_(parameter, std=0.02)


def is_main_process() -> bool:
    """Whether this process prints and writes, under `torchrun` and `accelerate launch` too."""
    return int(os.environ.get("RANK", "0")) == 0


def _make_encoder(task: Task, taps: list[Tap]) -> FrozenEncoder:
    try:
        return FrozenEncoder(task.model, taps)
    except ValueError as error:
        raise DataError(f"{task.model_name} cannot be tapped like this: {error}") from error


@torch.no_grad()
def _tap_weights(model: nn.Module) -> tuple[str | None, list[float] | None]:
    """What a trained fusion makes of its taps, where that is one number per tap."""
    fusion = model.fusion if isinstance(model, HFF) else None
    if fusion is None or fusion.taps == 1:
        return None, None
    if isinstance(fusion, WeightedSum):
        return "softmax", fusion.weights.softmax(0).tolist()
    if isinstance(fusion, LFF):
        weight = next(fusion.projector.parameters())
        parts = weight.view(-1, fusion.taps, fusion.dim)
        return "norm", parts.norm(dim=(0, 2)).tolist()
    return None, None


def _describe_task(task: Task, session: _Session) -> dict[str, Any]:
    recordings = task.recordings
    return {
        "data": recordings.name,
        "synthetic": recordings.synthetic,
        "note": task.note,
        "classes": len(recordings.classes),
        "train_clips": len(recordings.train),
        "test_clips": len(recordings.test),
        "train_seconds": sum(clip.seconds for clip in recordings.train),
        "test_seconds": sum(clip.seconds for clip in recordings.test),
        "max_seconds": task.max_seconds,
        "chance": max(Counter(clip.label for clip in recordings.test).values()) / len(recordings.test),
        "model": task.model_name,
        "model_type": models.describe(task.model).model_type,
        "layers": session.encoder.num_layers,
        "hidden_size": session.encoder.hidden_size,
    }


_SET_PER_RUN = ("seed", "learning_rate")


def _describe_settings(settings: CompareSettings, session: _Session) -> dict[str, Any]:
    def shared(training: TrainSettings) -> dict[str, Any]:
        return {key: value for key, value in asdict(training).items() if key not in _SET_PER_RUN}

    return {
        "taps": [str(tap) for tap in session.taps],
        "width": session.width,
        "seeds": list(settings.seeds),
        "cached_inputs": settings.cache,
        "cached_features": session.feature_seconds is not None,
        **shared(settings.training),
        "tuning": {**shared(settings.tuning), "seeds": list(settings.tuning_seeds)},
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
