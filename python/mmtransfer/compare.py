"""Methods of layer aggregation on one task: trained with the same data, seeds and epochs, measured alike."""

from __future__ import annotations

import copy
import importlib.metadata
import os
import platform
import statistics
import time
from collections import Counter
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
from mmtransfer.data import DataError
from mmtransfer.data.features import Collator
from mmtransfer.hff import (
    HFF,
    LFF,
    FrozenEncoder,
    SequenceClassificationHead,
    Taps,
    WeightedSum,
    make_fusion,
    reference,
)
from mmtransfer.hff.encoder import Tap
from mmtransfer.measure import StepComparison, compare_step
from mmtransfer.tasks import Task, default_taps, main_device
from mmtransfer.train import (
    CachedFeatures,
    EncoderCollator,
    TrainSettings,
    cache_features,
    collate_features,
    predict,
    train,
)


@dataclass(frozen=True)
class Method:
    """A way to make one sequence of an encoder's layers.

    Attributes:
        title: for tables and figures.
        fusion: kind of the fusion in `mmtransfer.hff.FUSIONS`.
        learning_rate: peak rate. It and all of `TrainSettings` were chosen on speed-changed copies (x 0.85,
            1.15, 1.3) of the demo's training clips, never on a test clip.
        options: of the fusion.
        last_only: use the encoder's last layer alone.
        projects: whether the fusion has an output width of its own.
        eager: its twin in plain PyTorch; None where there is nothing to fuse.
    """

    title: str
    fusion: str
    learning_rate: float
    options: dict[str, Any] = field(default_factory=dict)
    last_only: bool = False
    projects: bool = False
    eager: type[nn.Module] | None = None


METHODS: dict[str, Method] = {
    "last": Method("Last layer", "weighted_sum", 1e-2, last_only=True),
    "weighted-sum": Method("Weighted sum", "weighted_sum", 1e-2, eager=reference.EagerWeightedSum),
    "weighted-sum-norm": Method(
        "Weighted sum + norm", "weighted_sum", 1e-2, {"norm": True}, eager=reference.EagerWeightedSum
    ),
    "lff": Method("LFF", "lff", 3e-3, projects=True, eager=reference.EagerLFF),
    "hff-b": Method("HFF-b", "hff_b", 3e-3, projects=True, eager=reference.EagerHFFb),
    "hff-ub": Method("HFF-ub", "hff_ub", 3e-3, projects=True, eager=reference.EagerHFFub),
}
DEFAULT_METHODS = ("last", "weighted-sum", "weighted-sum-norm", "lff", "hff-b")


@dataclass(frozen=True)
class CompareSettings:
    """What to compare and how.

    Attributes:
        methods: keys of `METHODS`.
        seeds: each method is trained once with each.
        taps: layers as for `FrozenEncoder`; None for `mmtransfer.tasks.default_taps`.
        width: output width of LFF and HFF; None for 5/8 of the encoder's, as the paper's 640 of 1024.
        cache: run the encoder once over all clips and train on its stored outputs.
        training: epochs, batch size, precision and device of every run; its seed and learning rate are set
            per run.
        learning_rate: for all methods instead of their own.
        save: folder for the trained parts, one subfolder per run; None keeps none.
    """

    methods: tuple[str, ...] = DEFAULT_METHODS
    seeds: tuple[int, ...] = (0, 1, 2)
    taps: tuple[Tap, ...] | None = None
    width: int | None = None
    cache: bool = True
    training: TrainSettings = field(default_factory=TrainSettings)
    learning_rate: float | None = None
    save: Path | None = None


@dataclass(frozen=True)
class Run:
    """One training run: test accuracy and training loss of the last epoch."""

    seed: int
    accuracy: float
    loss: float
    seconds_per_epoch: float
    tap_weights: list[float] | None


@dataclass(frozen=True)
class MethodResult:
    """All runs of one method, and the cost of its training step.

    Attributes:
        tap_weights_kind: what the runs' `tap_weights` are: "softmax" (a weighted sum's weights), "norm" (the
            Frobenius norm of each tap's part of LFF's first matrix, as in figure 4 of the paper), or None.
    """

    name: str
    title: str
    trainable_parameters: int
    learning_rate: float
    tap_names: list[str]
    tap_weights_kind: str | None
    runs: list[Run]
    step: StepComparison

    @property
    def accuracy(self) -> float:
        return statistics.fmean(run.accuracy for run in self.runs)

    @property
    def spread(self) -> float | None:
        """Sample standard deviation over the seeds; None for a single one."""
        return statistics.stdev(run.accuracy for run in self.runs) if len(self.runs) > 1 else None

    @property
    def seconds_per_epoch(self) -> float:
        return statistics.median(run.seconds_per_epoch for run in self.runs)


@dataclass(frozen=True)
class Comparison:
    """Everything that a report says."""

    task: dict[str, Any]
    settings: dict[str, Any]
    machine: dict[str, Any]
    methods: list[MethodResult]
    feature_seconds: float | None
    total_seconds: float


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
    """One comparison in progress: the features, made once, and one run after the other."""

    def __init__(self, task: Task, settings: CompareSettings, progress: Progress) -> None:
        self.task, self.settings, self.progress = task, settings, progress
        self.device = main_device(settings.training.cpu)
        self.methods = {name: _method(name) for name in settings.methods}
        chosen = default_taps(task.model) if settings.taps is None else list(settings.taps)
        self.encoder = _make_encoder(task, self._with_last(chosen))
        self.taps = self.encoder.taps[: len(chosen)]
        self.width = settings.width or max(self.encoder.hidden_size * 5 // 8, 1)
        self.train_set: Dataset[Any] = task.recordings.train  # type: ignore[assignment]
        self.test_set: Dataset[Any] = task.recordings.test  # type: ignore[assignment]
        self.collator = Collator(task.recordings, task.extractor, max_seconds=task.max_seconds)
        self.feature_seconds: float | None = None
        for method in self.methods.values():
            self._build(method)

    def prepare(self) -> None:
        """Cache the features of all clips, if that is wanted."""
        if not self.settings.cache:
            return
        began = time.perf_counter()
        self.encoder.to(self.device)
        clips = {"train": self.task.recordings.train, "test": self.task.recordings.test}
        bar = self.progress.add_task("Features", total=sum(map(len, clips.values())), detail="")
        collate = EncoderCollator(self.collator, self.encoder)
        cached = {
            split: cache_features(
                self.encoder, part, collate, on_clips=lambda count: self.progress.advance(bar, count)
            )
            for split, part in clips.items()
        }
        self.train_set, self.test_set = cached["train"], cached["test"]
        self.feature_seconds = time.perf_counter() - began
        self._log(f"Features of {sum(map(len, clips.values()))} clips: {self.feature_seconds:.0f} s")

    def run_method(self, name: str) -> MethodResult:
        method = self.methods[name]
        epochs = self.settings.training.epochs
        bar = self.progress.add_task(method.title, total=len(self.settings.seeds) * epochs, detail="")
        runs = [self._train(name, seed, bar) for seed in self.settings.seeds]
        self.progress.update(bar, detail="measuring a step")
        model = self._build(method)
        step = self._measure(method, model)
        accuracy = statistics.fmean(run.accuracy for run in runs)
        self.progress.update(bar, detail=f"test accuracy {accuracy:.1%}")
        self._log(f"{method.title}: test accuracy {accuracy:.1%}")
        return MethodResult(
            name=name,
            title=method.title,
            trainable_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
            learning_rate=self._training(method, 0).learning_rate,
            tap_names=[str(tap) for tap in model.encoder.taps],
            tap_weights_kind=_tap_weights(model)[0],
            runs=runs,
            step=step,
        )

    def _train(self, name: str, seed: int, bar: TaskID) -> Run:
        method = self.methods[name]
        training = self._training(method, seed)
        set_seed(seed)
        model = self._build(method)

        def on_epoch(_: int, loss: float) -> None:
            self.progress.update(bar, advance=1, detail=f"seed {seed}, training loss {loss:.3f}")

        train_set, collate = self._examples(self.train_set, model)
        result = train(model, train_set, collate, training, on_epoch=on_epoch)
        test_set, collate = self._examples(self.test_set, model)
        logits, labels = predict(model, test_set, collate, training)
        if self.settings.save is not None and is_main_process():
            model.save_pretrained(self.settings.save / f"{name}-seed{seed}")
        return Run(
            seed=seed,
            accuracy=float((logits.argmax(1) == labels).float().mean()),
            loss=result.loss,
            seconds_per_epoch=result.seconds_per_epoch,
            tap_weights=_tap_weights(model)[1],
        )

    def _log(self, text: str) -> None:
        """A line for a log file, where no bar can move."""
        if not self.progress.console.is_terminal:
            self.progress.console.print(text)

    def _build(self, method: Method) -> HFF:
        """An untrained model; its encoder is the task's, frozen and shared."""
        taps = [-1] if method.last_only else list(self.taps)
        encoder = FrozenEncoder(self.task.model, taps)
        options = dict(method.options)
        if method.projects:
            options["out_dim"] = self.width
        try:
            fusion = make_fusion(method.fusion, taps=len(taps), dim=encoder.hidden_size, **options)
        except ValueError as error:
            raise DataError(f"{method.title} cannot be used here: {error}") from error
        if method.last_only:
            # The softmax of one weight is 1 whatever the weight.
            fusion.requires_grad_(False)
        return HFF(encoder, fusion, SequenceClassificationHead(fusion.out_dim, self._classes))

    @property
    def _classes(self) -> int:
        return len(self.task.recordings.classes)

    def _with_last(self, taps: list[Tap]) -> list[Tap]:
        """The taps, and the last layer behind them if a method needs it and they lack it."""
        if not any(method.last_only for method in self.methods.values()):
            return taps
        (last,) = _make_encoder(self.task, [-1]).taps
        return taps if last in _make_encoder(self.task, taps).taps else [*taps, last]

    def _examples(self, examples: Dataset[Any], model: HFF) -> tuple[Dataset[Any], Any]:
        """A data set and its collate function as `model` needs them."""
        if isinstance(examples, CachedFeatures):
            slots = [self.encoder.taps.index(tap) for tap in model.encoder.taps]
            return examples.select(slots), collate_features
        return examples, EncoderCollator(self.collator, model.encoder)

    def _measure(self, method: Method, model: HFF) -> StepComparison:
        """A training step on the first clips, their features already there."""
        examples, collate = self._examples(self.train_set, model)
        count = min(self.settings.training.batch_size, len(self.task.recordings.train))
        batch = collate([examples[index] for index in range(count)])
        batch = {name: tensor.to(self.device) for name, tensor in batch.items()}
        labels = batch.pop("labels")
        model = model.to(self.device)
        taps = model.encoder(**batch) if "features" not in batch else Taps.pack(**batch)
        head = model.head
        assert head is not None
        eager = None
        if method.eager is not None:
            options = {key: value for key, value in model.fusion.options.items() if key != "backend"}
            eager = method.eager(**options).to(self.device)
        return compare_step(copy.deepcopy(model.fusion), eager, head, taps, labels)

    def _training(self, method: Method, seed: int) -> TrainSettings:
        rate = self.settings.learning_rate or method.learning_rate
        return replace(self.settings.training, seed=seed, learning_rate=rate)


def is_main_process() -> bool:
    """Whether this process prints and writes, under `torchrun` and `accelerate launch` too."""
    return int(os.environ.get("RANK", "0")) == 0


def _method(name: str) -> Method:
    if name not in METHODS:
        raise DataError(f"no method is called {name!r}; choose from {', '.join(METHODS)}")
    return METHODS[name]


def _make_encoder(task: Task, taps: list[Tap]) -> FrozenEncoder:
    try:
        return FrozenEncoder(task.model, taps)
    except ValueError as error:
        raise DataError(f"{task.model_name} cannot be tapped like this: {error}") from error


@torch.no_grad()
def _tap_weights(model: HFF) -> tuple[str | None, list[float] | None]:
    """What a trained fusion makes of its taps, where that is one number per tap."""
    fusion = model.fusion
    if fusion.taps == 1:
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


def _describe_settings(settings: CompareSettings, session: _Session) -> dict[str, Any]:
    training = asdict(settings.training)
    for set_per_run in ("seed", "learning_rate"):
        training.pop(set_per_run)
    return {
        "taps": [str(tap) for tap in session.taps],
        "width": session.width,
        "seeds": list(settings.seeds),
        "cached_features": settings.cache,
        **training,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
