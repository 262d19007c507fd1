"""The settings of a fine-tuning run; imports no torch, so that flags and help appear at once."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from .settings import Training, check_flags, check_integer, check_number

#: Settings that a method has too, where they are None here.
_OF_TRAINING = (
    "epochs",
    "max_steps",
    "batch_size",
    "learning_rate",
    "weight_decay",
    "schedule",
    "warmup_steps",
    "final_share",
    "beta2",
    "clip",
)
_Count = Annotated[int | None, tyro.conf.arg(metavar="INT")]


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings:
    """The training of one model. None leaves the choice to the method.

    Attributes:
        options: of the method, by field; under the name of the task, of the task.
        task: classification, ctc, text, or one of yours; None: text with a language model, else
            classification, but ctc for a manifest with transcripts.
        language_model: folder or hub name of a causal language model that is to read the speech.
        stage: of a task that is trained in stages; 1 if None.
        begin_with: folder of a trained model of the same method, whose readout and changes of the encoder
            training begins with, in place of a start, and whose options are those of this run where none are
            given.
        epochs: passes over the training clips.
        max_steps: the run ends after so many steps if not earlier.
        batch_size: clips per batch and device.
        accumulate: batches per step.
        learning_rate: peak rate, but for parameters with a rate among the method's options.
        weight_decay: of matrices.
        schedule: of the rate after the warm-up: linear or cosine.
        warmup_steps: with a growing rate; None: a tenth of all.
        final_share: of the rate that a cosine ends with.
        beta2: of AdamW.
        clip: the largest norm of a gradient; 0: any.
        start_epochs: epochs of the method that this one starts from, if there is one; 0 for a random start;
            None: as many as it takes itself on stored features, else 1.
        seed: of the weights, the order of the clips, and the validation part.
        validation_fraction: of the training clips, where the data has no validation part; 0: no evaluation
            during training, and the last weights are kept.
        evaluate_every: steps between evaluations on the validation part; None: each epoch.
        patience: evaluations without a better score after which training ends; None: never.
        max_seconds: clips are cropped to this; longer ones with a transcript are left out. None: whole clips.
        tokenizer: of a task with transcripts: a JSON file of the library tokenizers, or the folder of a
            tokenizer of transformers; None: the characters of the training transcripts.
        keep_head: go on with the model's CTC head and its alphabet.
        bf16: train under bfloat16 autocast.
        fp16: train under float16 autocast, on a GPU.
        recompute: layers of the encoder compute again in the backward pass, which saves memory.
        cpu: use no GPU.
        cache: store the features of a frozen encoder, or the inputs of a trained one; --no-cache makes them
            in every step.
        workers: processes that decode clips that are not stored; 0: this one; None: one a core, at most 4.
        strict: stop at clips and characters that cannot be used, instead of leaving them out.

    ValueError for a value out of range.
    """

    options: tyro.conf.Suppress[dict[str, Any]] = field(default_factory=dict)
    task: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    language_model: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    stage: _Count = None
    begin_with: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    epochs: _Count = None
    max_steps: _Count = None
    batch_size: _Count = None
    accumulate: int = 1
    learning_rate: Annotated[float | None, tyro.conf.arg(metavar="FLOAT")] = None
    weight_decay: Annotated[float | None, tyro.conf.arg(metavar="FLOAT")] = None
    schedule: Literal["linear", "cosine"] | None = None
    warmup_steps: _Count = None
    final_share: Annotated[float | None, tyro.conf.arg(metavar="FLOAT")] = None
    beta2: Annotated[float | None, tyro.conf.arg(metavar="FLOAT")] = None
    clip: Annotated[float | None, tyro.conf.arg(metavar="FLOAT")] = None
    start_epochs: _Count = None
    seed: int = 0
    validation_fraction: float = 0.1
    evaluate_every: _Count = None
    patience: _Count = None
    max_seconds: Annotated[float | None, tyro.conf.arg(metavar="FLOAT")] = 30.0
    tokenizer: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    keep_head: bool = False
    bf16: bool = False
    fp16: bool = False
    recompute: bool = False
    cpu: bool = False
    cache: bool = True
    workers: _Count = None
    strict: bool = False

    def __post_init__(self) -> None:
        check_flags(self, "keep_head", "recompute", "cache", "strict")
        for name, least in (("start_epochs", 0), ("evaluate_every", 1), ("patience", 1)):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), least=least)
        check_number("validation_fraction", self.validation_fraction)
        if self.validation_fraction >= 1:
            raise ValueError(f"validation_fraction must be below 1, got {self.validation_fraction}")
        if self.max_seconds is not None:
            check_number("max_seconds", self.max_seconds)
        if self.stage is not None:
            check_integer("stage", self.stage)
        if self.tokenizer is not None and self.keep_head:
            raise ValueError("tokenizer and keep_head exclude each other: the model's head has an alphabet")
        # Training checks the rest.
        self.training(Training())

    def training(self, method: Training) -> Training:
        """A method's training with the values given here."""
        own = {name: getattr(self, name) for name in _OF_TRAINING if getattr(self, name) is not None}
        return dataclasses.replace(
            method,
            **own,
            accumulate=self.accumulate,
            # Asked to train nothing, a method's own rates train nothing either.
            group_rates=self.learning_rate != 0,
            seed=self.seed,
            bf16=self.bf16,
            fp16=self.fp16,
            cpu=self.cpu,
            workers=min(os.cpu_count() or 1, 4) if self.workers is None else self.workers,
        )

    def task_options(self, task: str) -> dict[str, Any]:
        """The options under the name of a task."""
        found = self.options.get(task, {})
        return dict(found) if isinstance(found, dict) else {}

    def method_options(self, task: str | None) -> dict[str, Any]:
        """The others."""
        return {name: value for name, value in self.options.items() if name != task}

    def start(self, method: Training, *, stored: bool) -> Training:
        """The training of the method that this one starts from, on stored features or not."""
        return dataclasses.replace(
            self.training(method),
            epochs=self.start_epochs or (method.epochs if stored else 1),
            max_steps=None,
            learning_rate=0.0 if self.learning_rate == 0 else method.learning_rate,
        )
