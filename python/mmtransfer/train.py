"""Training of a fusion and its head with transformers' Trainer, on cached features or through the encoder.

The Trainer brings what a training loop needs beyond the loop: several GPUs (`torchrun`, `accelerate launch`),
mixed precision, schedules. What is ours: packed batches without padding, the features' cache, and a rate of
its own for the mixing weights.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    WhisperFeatureExtractor,
)

from mmtransfer.data import DataError
from mmtransfer.data.features import Collator
from mmtransfer.data.recordings import Clip
from mmtransfer.hff import HFF, FrozenEncoder

#: Called by `cache_features` with the number of clips just done.
OnClips = Callable[[int], None]
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


class CachedFeatures(Dataset[dict[str, Any]]):
    """The tapped features of clips, stored once: items are `features` (T, L, C) and `label`.

    Args:
        features: `(N, L, C)`, the valid frames of all clips, one after the other.
        lengths: `(B,)` frames per clip; they sum to N.
        labels: `(B,)` class indices.
        slots: indices of the taps that items have, in this order; None for all.
    """

    def __init__(
        self,
        features: torch.Tensor,
        lengths: torch.Tensor,
        labels: torch.Tensor,
        slots: Sequence[int] | None = None,
    ) -> None:
        self.features, self.lengths, self.labels = features, lengths, labels
        self.slots = _as_slice(list(range(features.shape[1]) if slots is None else slots))
        self._ends = lengths.cumsum(0).tolist()

    def select(self, slots: Sequence[int]) -> CachedFeatures:
        """The same clips with these taps only; nothing is copied."""
        return CachedFeatures(self.features, self.lengths, self.labels, slots)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> dict[str, Any]:
        end = self._ends[index]
        frames = self.features[end - int(self.lengths[index]) : end]
        return {"features": frames[:, self.slots], "label": int(self.labels[index])}


def _as_slice(slots: list[int]) -> slice | list[int]:
    """Neighbouring slots as a slice, which is a view; others are copied out of each item."""
    first = slots[0]
    return slice(first, first + len(slots)) if slots == list(range(first, first + len(slots))) else slots


def collate_features(items: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Items of `CachedFeatures` as one batch for `HFF.forward`, packed: no frame of padding."""
    features = [item["features"] for item in items]
    # Labels first: the Trainer takes the batch size from the first tensor.
    return {
        "labels": torch.tensor([item["label"] for item in items]),
        "lengths": torch.tensor([len(frames) for frames in features]),
        "features": torch.cat(features),
    }


class EncoderCollator:
    """Clips as one batch for `HFF.forward`: the encoder's input with its valid lengths."""

    def __init__(self, collator: Collator, encoder: FrozenEncoder) -> None:
        self.collator = collator
        self.main_input = encoder.description.main_input

    def __call__(self, clips: Sequence[Clip]) -> dict[str, torch.Tensor]:
        batch = self.collator(clips)
        inputs = {"labels": batch["labels"], self.main_input: batch[self.main_input]}
        if isinstance(self.collator.extractor, WhisperFeatureExtractor):
            # The extractor's own mask is of the padded 30 seconds; a mel frame begun by a clip is valid.
            return {**inputs, "lengths": -(-batch["lengths"] // self.collator.extractor.hop_length)}
        if "attention_mask" in batch:
            return {**inputs, "attention_mask": batch["attention_mask"]}
        return {**inputs, "lengths": batch["lengths"]}


def cache_features(
    encoder: FrozenEncoder,
    clips: Sequence[Clip],
    collate: EncoderCollator,
    *,
    batch_size: int = 16,
    on_clips: OnClips | None = None,
) -> CachedFeatures:
    """Run the encoder once over `clips` and keep the tapped features of their valid frames, on the CPU.

    Clips of similar length share a batch; the result is in the order of `clips`. The encoder runs where its
    weights are. DataError, after the first batch, if all features would not fit in memory.
    """
    order = sorted(range(len(clips)), key=lambda index: clips[index].seconds)
    device = next(encoder.parameters()).device
    frames: list[torch.Tensor] = [torch.empty(0)] * len(clips)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = collate([clips[index] for index in chosen])
        batch.pop("labels")
        taps = encoder(**{name: tensor.to(device) for name, tensor in batch.items()}).to("cpu")
        for index, features in zip(chosen, taps.split(), strict=True):
            frames[index] = features
        if start == 0:
            sizes = [_relative_size(clip, encoder, collate.collator) for clip in clips]
            share = sum(sizes[index] for index in chosen) / sum(sizes)
            _check_memory(taps.features.nbytes / share)
        if on_clips is not None:
            on_clips(len(chosen))
    lengths = torch.tensor([len(features) for features in frames])
    labels = torch.tensor([clip.label for clip in clips])
    return CachedFeatures(torch.cat(frames), lengths, labels)


def _relative_size(clip: Clip, encoder: FrozenEncoder, collator: Collator) -> float:
    """What the number of a clip's frames is proportional to."""
    if encoder.description.frames == "fixed":
        return 1.0
    return clip.seconds if collator.max_seconds is None else min(clip.seconds, collator.max_seconds)


def _check_memory(nbytes: float) -> None:
    """DataError if there is no room for features of that size; not checked where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return
    available = int(dict(line.split(":", 1) for line in lines)["MemAvailable"].split()[0]) * 2**10
    # Twice: those of single clips, and the one tensor made of them.
    if 2 * nbytes > available:
        needed, free = (f"{size / 2**30:.1f} GiB" for size in (2 * nbytes, available))
        raise DataError(
            f"the cached features need {needed} of memory and {free} are free; use --no-cache, fewer --taps "
            "or fewer clips"
        )


def train(
    model: HFF,
    examples: Dataset[Any],
    collate: Callable[[Any], dict[str, torch.Tensor]],
    settings: TrainSettings,
    *,
    on_epoch: OnEpoch | None = None,
) -> TrainResult:
    """Train the fusion and the head of `model` in place on cached features or on clips.

    The same settings and seed give the same weights on the same machine, given a model built after
    `transformers.set_seed(settings.seed)`.
    """
    clock = _EpochClock(on_epoch)
    with tempfile.TemporaryDirectory(prefix="mmtransfer-") as folder:
        trainer = _make_trainer(model, examples, collate, settings, folder, [clock])
        loss = float(trainer.train().training_loss)
    return TrainResult(clock.loss if clock.loss is not None else loss, statistics.median(clock.seconds))


def predict(
    model: HFF,
    examples: Dataset[Any],
    collate: Callable[[Any], dict[str, torch.Tensor]],
    settings: TrainSettings,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits `(B, classes)` and labels `(B,)` of all examples, in their order; gathered over processes."""
    with tempfile.TemporaryDirectory(prefix="mmtransfer-") as folder:
        output = _make_trainer(model, None, collate, settings, folder, []).predict(examples)
    return torch.from_numpy(output.predictions).float(), torch.from_numpy(output.label_ids)


class _HFFTrainer(Trainer):
    """The Trainer with the mixing weights in a parameter group of their own."""

    def __init__(self, settings: TrainSettings, **options: Any) -> None:
        self.settings = settings
        super().__init__(**options)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            trained: Any = self.model if model is None else model
            self.optimizer = torch.optim.AdamW(parameter_groups(trained, self.settings))
        return self.optimizer


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
        elif name.rpartition(".")[2] == "weight":
            matrices.append(parameter)
        else:
            # By name and not by shape: the biases and norms of stacked projections are (L, C).
            vectors.append(parameter)
    rate, decay = settings.learning_rate, settings.weight_decay
    groups = [
        {"params": matrices, "lr": rate, "weight_decay": decay},
        {"params": vectors, "lr": rate, "weight_decay": 0.0},
        {"params": mixing, "lr": settings.mixing_learning_rate, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _make_trainer(
    model: HFF,
    examples: Dataset[Any] | None,
    collate: Callable[[Any], dict[str, torch.Tensor]],
    settings: TrainSettings,
    folder: str,
    callbacks: list[TrainerCallback],
) -> _HFFTrainer:
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
        ddp_find_unused_parameters=False,
        label_names=["labels"],
    )
    # One process drives one device: DataParallel would cut packed features at the wrong frames.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    trainer = _HFFTrainer(
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
