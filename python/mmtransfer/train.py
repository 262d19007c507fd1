"""Training of a model on cached features, on cached inputs or on clips, with transformers' Trainer.

The Trainer brings what a training loop needs beyond the loop: several GPUs (`torchrun`, `accelerate launch`),
mixed precision, schedules. What is ours: packed batches without padding, and a rate of its own
for the mixing weights.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, Subset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from mmtransfer.caching import CachedInputs

#: Called by `train` with the epochs done and the training loss of the last one.
OnEpoch = Callable[[int, float], None]


@dataclass(frozen=True)
class TrainSettings:
    """One training run: AdamW, linear warm-up over a tenth of the steps, then linear decay.

    Attributes:
        epochs: passes over the training clips.
        batch_size: clips per step and device.
        learning_rate: peak rate of all parameters but the mixing weights.
        mixing_learning_rate: peak rate of the mixing weights of a weighted sum. They are few, pass through a
            softmax and start equal, and so need a larger rate than matrices to get anywhere in as many steps.
        weight_decay: of matrices; biases, norms and mixing weights have none.
        seed: of the initial weights and of the order of the clips.
        bf16: train under bfloat16 autocast.
        cpu: stay on the CPU even if there is a GPU.
    """

    epochs: int = 30
    batch_size: int = 32
    learning_rate: float = 1e-3
    mixing_learning_rate: float = 3e-2
    weight_decay: float = 1e-2
    seed: int = 0
    bf16: bool = False
    cpu: bool = False


@dataclass(frozen=True)
class TrainResult:
    """Mean training loss of the last epoch, and the median of the seconds per epoch."""

    loss: float
    seconds_per_epoch: float


def train(
    model: nn.Module,
    examples: Dataset[Any],
    collate: Callable[[Any], dict[str, torch.Tensor]],
    settings: TrainSettings,
    *,
    on_epoch: OnEpoch | None = None,
) -> TrainResult:
    """Train in place what of `model` asks for gradients, on items that `collate` makes batches of.

    The model returns a loss and logits, as transformers' models with a head do. The same settings and seed
    give the same weights on the same machine, given a model built after
    `transformers.set_seed(settings.seed)`.
    """
    clock = _EpochClock(on_epoch)
    with tempfile.TemporaryDirectory(prefix="mmtransfer-") as folder:
        trainer = _make_trainer(model, examples, collate, settings, folder, [clock])
        loss = float(trainer.train().training_loss)
    return TrainResult(clock.loss if clock.loss is not None else loss, statistics.median(clock.seconds))


def predict(
    model: nn.Module,
    examples: Dataset[Any],
    collate: Callable[[Any], dict[str, torch.Tensor]],
    settings: TrainSettings,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits `(B, classes)` and labels `(B,)` of all examples, in their order; gathered over processes."""
    order = torch.arange(len(examples))  # type: ignore[arg-type]
    if isinstance(examples, CachedInputs):
        order = torch.tensor(examples.lengths).argsort()
        examples = Subset(examples, order.tolist())
    with tempfile.TemporaryDirectory(prefix="mmtransfer-") as folder:
        output = _make_trainer(model, None, collate, settings, folder, []).predict(examples)
    back = order.argsort()
    return torch.from_numpy(output.predictions).float()[back], torch.from_numpy(output.label_ids)[back]


class _Trainer(Trainer):
    """The Trainer with parameter groups of our own."""

    def __init__(self, settings: TrainSettings, **options: Any) -> None:
        self.settings = settings
        super().__init__(**options)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            trained: Any = self.model if model is None else model
            self.optimizer = torch.optim.AdamW(parameter_groups(trained, self.settings))
        return self.optimizer


# What is a matrix by the names of this package's and of torch's modules.
_MATRICES = ("weight", "down_weight", "up_weight")


def parameter_groups(model: nn.Module, settings: TrainSettings) -> list[dict[str, Any]]:
    """The trainable parameters as AdamW's groups: matrices, vectors, mixing weights."""
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    mixing: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.endswith("fusion.weights"):
            mixing.append(parameter)
        elif name.rpartition(".")[2] in _MATRICES and parameter.dim() > 1:
            matrices.append(parameter)
        else:
            # By name and not by shape alone: the biases and norms of stacked projections are (L, C).
            vectors.append(parameter)
    rate, decay = settings.learning_rate, settings.weight_decay
    groups = [
        {"params": matrices, "lr": rate, "weight_decay": decay},
        {"params": vectors, "lr": rate, "weight_decay": 0.0},
        {"params": mixing, "lr": settings.mixing_learning_rate, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _make_trainer(
    model: nn.Module,
    examples: Dataset[Any] | None,
    collate: Callable[[Any], dict[str, torch.Tensor]],
    settings: TrainSettings,
    folder: str,
    callbacks: list[TrainerCallback],
) -> _Trainer:
    arguments = TrainingArguments(
        output_dir=folder,
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        warmup_steps=0.1,
        seed=settings.seed,
        bf16=settings.bf16,
        use_cpu=settings.cpu or not torch.cuda.is_available(),
        logging_strategy="epoch",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        ddp_find_unused_parameters=getattr(model, "may_leave_unused", False),
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
            if self.on_epoch is not None:
                self.on_epoch(len(self.seconds), self.loss)
