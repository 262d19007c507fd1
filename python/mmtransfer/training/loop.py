"""Training and evaluation of an adapted model on cached features, on cached inputs or on clips.

transformers' Trainer brings several GPUs (`torchrun`, `accelerate launch`), mixed precision, schedules and
checkpoints of a run. This file adds packed batches without padding, batches of clips of like length, the
methods' parameter groups, and evaluation by the task.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler, Subset
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations import TensorBoardCallback, is_tensorboard_available
from transformers.trainer import TRAINER_STATE_NAME

from mmtransfer.checkpoint import load_trained, save_trained
from mmtransfer.data import DataError
from mmtransfer.encoders.precision import check_trained
from mmtransfer.method import Compressor
from mmtransfer.model import AdaptedModel
from mmtransfer.tokens import UtteranceError

from .batches import LengthBatches, example_lengths
from .caching import CachedFeatures, CachedInputs, example_name
from .clock import SECONDS, Clock, OnStep, Point, curve, seconds_per_epoch
from .finite import NotFiniteError, check_loss, check_rate, check_weights
from .settings import Training
from .worker_errors import plain_errors

_PREFIX = "eval_"
#: In a checkpoint of a run that was written to its end.
_WHOLE = "whole"


@dataclass(frozen=True)
class TrainResult:
    """The outcome of a run.

    Attributes:
        loss: mean training loss of the last epoch, or of the steps behind a state within it.
        seconds_per_epoch: median of the whole epochs; of a run that ends within the first, in proportion.
        seconds: of training in all, evaluations and checkpoints excluded.
        steps: of the optimiser.
        curve: the evaluations.
        stopped: whether it ended early, as nothing improved any more.
        best: the scores of the weights that were kept, with `Evaluation.keep_best`.
    """

    loss: float
    seconds_per_epoch: float
    seconds: float
    steps: int
    curve: list[Point]
    stopped: bool = False
    best: dict[str, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Scores of the model while it trains.

    Attributes:
        examples, collate: as for `predict`.
        targets: the task's, one an example.
        every: steps from one to the next; None: after each epoch.
        first: the weights before the first step are scored too.
        keep_best: the model ends with the weights of the best score, not the last.
        patience: evaluations without a better score after which training ends; None: never.
        on_scores: called after each with the steps done and the scores.
    """

    examples: Dataset[Any]
    collate: Callable[[Any], dict[str, torch.Tensor]]
    targets: Sequence[Any]
    every: int | None = None
    first: bool = False
    keep_best: bool = False
    patience: int | None = None
    on_scores: Callable[[int, dict[str, float]], None] | None = None


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """States of a run on disk, from which it goes on after an interruption.

    Attributes:
        folder: of the run; the states are `checkpoint-<steps>` in it.
        resume: go on from the latest that is whole, if there is one.
        log: a folder for TensorBoard, where that is installed; or None.
    """

    folder: Path
    resume: bool = False
    log: Path | None = None


def check_trains(model: AdaptedModel) -> None:
    """ValueError for a model in which nothing is trained."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            f"no parameter of {model.method.name} with these options asks for a gradient, so there is "
            "nothing to train; thaw one, or leave out options that freeze"
        )


@plain_errors()
def train(
    model: AdaptedModel,
    examples: Dataset[Any],
    collate: Callable[[Any], dict[str, torch.Tensor]],
    settings: Training,
    *,
    on_step: OnStep | None = None,
    evaluation: Evaluation | None = None,
    checkpoints: Checkpoints | None = None,
) -> TrainResult:
    """Train the parameters of `model` that ask for gradients, on batches that `collate` makes of examples.

    The same settings and seed give the same weights on the same machine, given a model built after
    `transformers.set_seed(settings.seed)`, also where the run was interrupted and resumed.

    Raises:
        ValueError: no examples, nothing to train, or float16 weights that ask for gradients.
        NotFiniteError: features, the loss of an epoch, or a trained tensor at the end are not finite.
    """
    if not len(examples):  # type: ignore[arg-type]
        raise ValueError("examples are empty; training needs at least one")
    check_trained(model.named_parameters())
    check_trains(model)
    if isinstance(examples, CachedFeatures):
        examples.check()
    with contextlib.ExitStack() as stack:
        folder = (
            Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mmtransfer-")))
            if checkpoints is None
            else checkpoints.folder
        )
        trainer = _Trainer.of(model, examples, collate, settings, evaluation, checkpoints, folder, on_step)
        start = _latest_state(folder) if checkpoints is not None and checkpoints.resume else None
        if start is not None and _is_over(start):
            trainer.take_over(start)
            loss = math.nan
        else:
            trainer.args.restore_callback_states_from_checkpoint = start is not None
            loss = float(trainer.train(resume_from_checkpoint=start).training_loss)
    check_weights(model)
    state = trainer.state
    points = curve(state.log_history, _PREFIX)
    # Of the history, which a run that is resumed has too.
    losses = [float(entry["loss"]) for entry in state.log_history if "loss" in entry]
    best = next((point.scores for point in points if point.steps == state.best_global_step), None)
    return TrainResult(
        loss=losses[-1] if losses else loss,
        seconds_per_epoch=seconds_per_epoch(state.log_history),
        seconds=trainer.clock.seconds,
        steps=state.global_step,
        curve=points,
        stopped=state.global_step < state.max_steps,
        best=best if evaluation is not None and evaluation.keep_best else None,
    )


@plain_errors()
@torch.no_grad()
def predict(
    model: AdaptedModel,
    examples: Dataset[Any],
    collate: Callable[[Any], dict[str, torch.Tensor]],
    settings: Training,
) -> list[Any]:
    """The task's prediction for each example, in their order; every process has all of them.

    Raises:
        ValueError: a model without a task.
        DataError: an example that the model cannot take.
        NotFiniteError: features or logits are not finite; the first such example is named.
    """
    if model.task is None:
        raise ValueError("model has no task, which makes predictions of its output; build it with one")
    if isinstance(examples, CachedFeatures):
        examples.check()
    state = PartialState()
    order = list(range(len(examples)))  # type: ignore[arg-type]
    if isinstance(examples, CachedInputs) or model.task.by_length:
        order.sort(key=example_lengths(examples, collate).__getitem__)
    device = main_device(settings.cpu)
    model.to(device).eval()
    mine = order[state.process_index :: state.num_processes]
    found: list[Any] = []
    sound: list[bool] = []
    loader: DataLoader[Any] = DataLoader(
        Subset(examples, mine),
        settings.batch_size,
        collate_fn=collate,
        num_workers=_workers(examples, settings),
        # An iterator draws a number, which is not to be that of a training run.
        generator=torch.Generator(),
    )
    half = torch.float16 if settings.fp16 else torch.bfloat16
    needs_text = isinstance(model.readout, Compressor) and model.readout.needs_text
    for number, batch in enumerate(loader):
        # The target has no part in a prediction, nor has its loss.
        labels = batch.pop("labels", None)
        if needs_text:
            batch["text"] = labels
        with torch.autocast(device.type, half, enabled=settings.bf16 or settings.fp16):
            try:
                output = model(**{name: tensor.to(device) for name, tensor in batch.items()})
            except UtteranceError as error:
                name = example_name(examples, mine[number * settings.batch_size + error.row])
                raise DataError(f"{name} {error.reason}") from error
        sound += model.task.sound(output.logits, output.lengths)
        found += model.task.decode(output.logits, output.lengths)
    # Gathered first: a process that raised alone would leave the others waiting.
    rows = sorted(gather_object(list(zip(mine, sound, found, strict=True))), key=lambda row: row[0])
    for index, is_sound, _ in rows:
        if not is_sound:
            raise NotFiniteError(f"the logits of {example_name(examples, index)} are not finite")
    return [prediction for _, _, prediction in rows]


def main_device(cpu: bool) -> torch.device:
    """The device of the work: this process's CUDA device unless there is none or `cpu` is asked for."""
    if cpu or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


class _Trainer(Trainer):
    """The Trainer with the methods' parameter groups, batches of like length, and scores by the task."""

    settings: Training
    evaluation: Evaluation | None
    clock: Clock
    last_loss: torch.Tensor | None = None

    @classmethod
    def of(
        cls,
        model: AdaptedModel,
        examples: Dataset[Any],
        collate: Callable[[Any], dict[str, torch.Tensor]],
        settings: Training,
        evaluation: Evaluation | None,
        checkpoints: Checkpoints | None,
        folder: Path,
        on_step: OnStep | None,
    ) -> _Trainer:
        arguments = _arguments(model, examples, settings, evaluation, checkpoints, folder)
        clock = Clock(on_step)
        callbacks: list[TrainerCallback] = [clock, *_log(checkpoints)]
        if evaluation is not None and evaluation.patience is not None:
            callbacks.append(EarlyStoppingCallback(evaluation.patience))
        trainer = cls(
            model=model,
            args=arguments,
            data_collator=collate,
            train_dataset=examples,
            # The Trainer asks for one where it evaluates; `evaluate` takes those of `evaluation`.
            eval_dataset=None if evaluation is None else evaluation.examples,
            callbacks=callbacks,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.settings, trainer.evaluation, trainer.clock = settings, evaluation, clock
        if evaluation is not None and evaluation.first:
            trainer.add_callback(_FirstEvaluation(trainer))
        return trainer

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            trained: Any = self.model if model is None else model
            groups = parameter_groups(trained, self.settings)
            for group in groups:
                check_rate(group["lr"])
            self.optimizer = torch.optim.AdamW(groups, betas=(0.9, self.settings.beta2))
        return self.optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        model: Any = self.model
        if model.task is None or not model.task.by_length:
            return super()._get_train_sampler(train_dataset)
        lengths = example_lengths(self.train_dataset, self.data_collator)
        sampler = LengthBatches(lengths, self.settings.batch_size, self.settings.seed)
        self.add_callback(_Epochs(sampler))
        return sampler

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Keeps the loss for `evaluate`, where NaN would show in the logits of a clip."""
        self.last_loss = super().training_step(*args, **kwargs)
        return self.last_loss

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """The task's scores; the clock stands still, and the random state is as before."""
        evaluation, model = self.evaluation, self.model
        assert evaluation is not None
        assert isinstance(model, AdaptedModel)
        assert model.task is not None
        with self.clock.stopped():
            if self.last_loss is not None:
                check_loss(float(self.last_loss), max(math.ceil(self.state.epoch or 0), 1))
            try:
                predictions = predict(model, evaluation.examples, evaluation.collate, self.settings)
            except NotFiniteError as error:
                raise NotFiniteError(
                    f"{error} after {self.state.global_step} steps of training; lower the learning rate, or "
                    "look for NaN in the model's weights"
                ) from error
            scores = model.task.score(predictions, evaluation.targets)
            metrics = {f"{_PREFIX}{name}": float(value) for name, value in scores.items()}
            self.log(dict(metrics))
        if evaluation.on_scores is not None:
            evaluation.on_scores(self.state.global_step, {key: float(value) for key, value in scores.items()})
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Each entry of the run's history has the time of training."""
        super().log({**logs, SECONDS: self.clock.seconds}, start_time)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        with self.clock.stopped():
            super()._save_checkpoint(model, trial)
            if self.args.should_save:
                (_state_folder(self.args.output_dir, self.state.global_step) / _WHOLE).touch()
                self._remove_states()

    def _remove_states(self) -> None:
        """Keep the latest state and the best. The Trainer would remove others before the new one is whole."""
        kept = {
            _state_folder(self.args.output_dir, step)
            for step in (self.state.global_step, self.state.best_global_step)
        }
        for folder in _states(Path(self.args.output_dir or ".")):
            if folder not in kept:
                shutil.rmtree(folder)

    def take_over(self, start: str) -> None:
        """The outcome of a run that had come to its end when it wrote a state."""
        assert isinstance(self.model, AdaptedModel)
        self.state = TrainerState.load_from_json(str(Path(start) / TRAINER_STATE_NAME))
        self.clock.resume(self.state.log_history)
        if self.args.load_best_model_at_end:
            self._load_best_model()
        else:
            load_trained(self.model, Path(start))

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """What training changes; the pretrained weights are the user's."""
        assert isinstance(self.model, AdaptedModel)
        save_trained(self.model, Path(output_dir or self.args.output_dir or "."))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        assert isinstance(self.model, AdaptedModel)
        load_trained(self.model, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        assert isinstance(self.model, AdaptedModel)
        # Not the path in the state, which is that of the folder when the state was written.
        load_trained(self.model, _state_folder(self.args.output_dir, self.state.best_global_step))


def parameter_groups(model: AdaptedModel, settings: Training) -> list[dict[str, Any]]:
    """The trainable parameters as AdamW's groups: matrices, vectors, and the groups of the method."""
    special = model.parameter_groups()
    taken = {id(parameter) for group in special.values() for parameter in group.parameters}
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in taken:
            (matrices if _is_matrix(name, parameter) else vectors).append(parameter)
    rate, decay = settings.learning_rate, settings.weight_decay
    groups: list[dict[str, Any]] = [
        {"params": matrices, "lr": rate, "weight_decay": decay},
        {"params": vectors, "lr": rate, "weight_decay": 0.0},
    ]
    for group in special.values():
        trained = [parameter for parameter in group.parameters if parameter.requires_grad]
        own = group.learning_rate if settings.group_rates else rate
        groups.append({"params": trained, "lr": own, "weight_decay": 0.0})
    return [group for group in groups if group["params"]]


def _is_matrix(name: str, parameter: nn.Parameter) -> bool:
    # By name too: the biases and norms of stacked projections are (L, C).
    leaf = name.rpartition(".")[2]
    return parameter.dim() > 1 and leaf.endswith("weight") and "norm" not in leaf


def _workers(examples: Any, settings: Training) -> int:
    """What is cached needs no process to make it."""
    return 0 if isinstance(examples, (CachedFeatures, CachedInputs)) else settings.workers


def _arguments(
    model: AdaptedModel,
    examples: Any,
    settings: Training,
    evaluation: Evaluation | None,
    checkpoints: Checkpoints | None,
    folder: Path,
) -> TrainingArguments:
    keeps = checkpoints is not None or (evaluation is not None and evaluation.keep_best)
    strategy: dict[str, Any] = {}
    if evaluation is not None:
        assert model.task is not None
        metric = model.task.metric
        when = "epoch" if evaluation.every is None else "steps"
        strategy = {
            "eval_strategy": when,
            "eval_steps": evaluation.every,
            "save_strategy": when if keeps else "no",
            "save_steps": evaluation.every or 500,
            "load_best_model_at_end": evaluation.keep_best,
            "metric_for_best_model": metric.name,
            "greater_is_better": metric.higher_is_better,
        }
    elif keeps:
        strategy = {"save_strategy": "epoch"}
    else:
        strategy = {"save_strategy": "no"}
    steps = settings.steps(len(examples))
    ends_early = steps < replace(settings, max_steps=None).steps(len(examples))
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=settings.epochs,
        max_steps=steps if ends_early else -1,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulate,
        learning_rate=settings.learning_rate,
        # The first step of a warm-up has the rate 0, and would be the only one.
        warmup_steps=0 if steps == 1 else 0.1 if settings.warmup_steps is None else settings.warmup_steps,
        max_grad_norm=settings.clip,
        **_schedule(settings),
        seed=settings.seed,
        bf16=settings.bf16,
        fp16=settings.fp16,
        use_cpu=settings.cpu or not torch.cuda.is_available(),
        logging_strategy="epoch",
        # The filter would leave NaN out of the logged loss.
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_num_workers=_workers(examples, settings),
        # A last layer that is tapped before its norm, an embedding of masked frames: not all that is trained
        # takes part in a step through the encoder.
        ddp_find_unused_parameters=not model.edit_is_empty,
        label_names=["labels"],
        **strategy,
    )
    # One process drives one device: DataParallel would cut packed features at the wrong frames.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _schedule(settings: Training) -> dict[str, Any]:
    if settings.schedule == "linear":
        return {}
    return {
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": settings.final_share},
    }


def _latest_state(folder: Path) -> str | None:
    """The latest checkpoint of a run that was written to its end; later ones, cut short, are removed."""
    for path in reversed(_states(folder)):
        if (path / _WHOLE).exists():
            return str(path)
        shutil.rmtree(path)
    return None


def _states(folder: Path) -> list[Path]:
    """The folders of states, whole or not, in the order of their steps."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def _is_over(start: str) -> bool:
    """Whether the run that wrote a state ended there, by its number of steps or for want of patience."""
    state = json.loads((Path(start) / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    return bool(state["stateful_callbacks"]["TrainerControl"]["args"]["should_training_stop"])


def _log(checkpoints: Checkpoints | None) -> list[TrainerCallback]:
    """The writer of a log for TensorBoard, where one is asked for and the package is there."""
    if checkpoints is None or checkpoints.log is None or not is_tensorboard_available():
        return []
    callback = TensorBoardCallback()
    callback.logging_dir = str(checkpoints.log)
    return [callback]


def _state_folder(folder: str | Path | None, step: int | None) -> Path:
    return Path(folder or ".") / f"checkpoint-{step}"


class _Epochs(TrainerCallback):
    """Tells the sampler its epoch; accelerate 1.3 does not where a run is resumed within one."""

    def __init__(self, sampler: LengthBatches) -> None:
        self.sampler = sampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.sampler.set_epoch(int(state.epoch or 0))


class _FirstEvaluation(TrainerCallback):
    """Scores the weights before the first step."""

    def __init__(self, trainer: _Trainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self.trainer.evaluate()
