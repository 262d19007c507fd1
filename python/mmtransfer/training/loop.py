"""Training and evaluation of an adapted model on cached features, on cached inputs or on clips.

transformers' Trainer brings several GPUs (`torchrun`, `accelerate launch`), mixed precision and schedules.
This file adds packed batches without padding, and the methods' parameter groups.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from mmtransfer.encoders.precision import check_trained
from mmtransfer.model import AdaptedModel

from .caching import CachedFeatures, CachedInputs, example_name
from .finite import NotFiniteError, check_loss, check_rate, check_weights
from .settings import Training

#: Called by `train` with the epochs done and the training loss of the last one.
OnEpoch = Callable[[int, float], None]


@dataclass(frozen=True)
class TrainResult:
    """Mean training loss of the last epoch, and the median of the seconds per epoch."""

    loss: float
    seconds_per_epoch: float


def train(
    model: AdaptedModel,
    examples: Dataset[Any],
    collate: Callable[[Any], dict[str, torch.Tensor]],
    settings: Training,
    *,
    on_epoch: OnEpoch | None = None,
) -> TrainResult:
    """Train the parameters of `model` that ask for gradients, on batches that `collate` makes of examples.

    The same settings and seed give the same weights on the same machine, given a model built after
    `transformers.set_seed(settings.seed)`.

    Raises:
        ValueError: no examples, or float16 weights that ask for gradients.
        NotFiniteError: features, the loss of an epoch, or a trained tensor at the end are not finite.
    """
    if not len(examples):  # type: ignore[arg-type]
        raise ValueError("examples are empty; training needs at least one")
    check_trained(model.named_parameters())
    if isinstance(examples, CachedFeatures):
        examples.check()
    clock = _EpochClock(on_epoch)
    with tempfile.TemporaryDirectory(prefix="mmtransfer-") as folder:
        trainer = _make_trainer(model, examples, collate, settings, folder, [clock])
        loss = float(trainer.train().training_loss)
    check_weights(model)
    return TrainResult(clock.loss if clock.loss is not None else loss, statistics.median(clock.seconds))


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
        NotFiniteError: features or logits are not finite; the first such example is named.
    """
    if model.task is None:
        raise ValueError("model has no task, which makes predictions of its output; build it with one")
    if isinstance(examples, CachedFeatures):
        examples.check()
    state = PartialState()
    order = list(range(len(examples)))  # type: ignore[arg-type]
    if isinstance(examples, CachedInputs):
        order.sort(key=examples.lengths.__getitem__)
    device = main_device(settings.cpu)
    model.to(device).eval()
    mine = order[state.process_index :: state.num_processes]
    found: list[Any] = []
    sound: list[bool] = []
    for batch in DataLoader(Subset(examples, mine), settings.batch_size, collate_fn=collate):
        with torch.autocast(device.type, torch.bfloat16, enabled=settings.bf16):
            output = model(**{name: tensor.to(device) for name, tensor in batch.items()})
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
    """The Trainer with parameter groups of our own."""

    def __init__(self, settings: Training, **options: Any) -> None:
        self.settings = settings
        super().__init__(**options)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            trained: Any = self.model if model is None else model
            groups = parameter_groups(trained, self.settings)
            for group in groups:
                check_rate(group["lr"])
            self.optimizer = torch.optim.AdamW(groups)
        return self.optimizer


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


def _make_trainer(
    model: AdaptedModel,
    examples: Dataset[Any],
    collate: Callable[[Any], dict[str, torch.Tensor]],
    settings: Training,
    folder: str,
    callbacks: list[TrainerCallback],
) -> _Trainer:
    arguments = TrainingArguments(
        output_dir=folder,
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        # The first step of a warm-up has the rate 0, and would be the only one.
        warmup_steps=0.1 if settings.epochs > 1 or len(examples) > settings.batch_size else 0,  # type: ignore[arg-type]
        seed=settings.seed,
        bf16=settings.bf16,
        use_cpu=settings.cpu or not torch.cuda.is_available(),
        logging_strategy="epoch",
        # The filter would leave NaN out of the logged loss.
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        # A last layer that is tapped before its norm, an embedding of masked frames: not all that is trained
        # takes part in a step through the encoder.
        ddp_find_unused_parameters=not model.edit_is_empty,
        label_names=["labels"],
    )
    # One process drives one device: DataParallel would cut packed features at the wrong frames.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    trainer = _Trainer(
        settings,
        model=model,
        args=arguments,
        data_collator=collate,
        train_dataset=examples,
        callbacks=callbacks,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


class _EpochClock(TrainerCallback):
    """Seconds and training loss of each epoch."""

    def __init__(self, on_epoch: OnEpoch | None) -> None:
        self.on_epoch = on_epoch
        self.seconds: list[float] = []
        self.loss: float | None = None
        self._start = 0.0

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        self._start = time.perf_counter()

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._start)

    def on_log(self, *_: Any, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if "loss" in logs:
            self.loss = float(logs["loss"])
            check_loss(self.loss, len(self.seconds))
            if self.on_epoch is not None:
                self.on_epoch(len(self.seconds), self.loss)
