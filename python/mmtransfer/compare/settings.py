"""The settings of a comparison; imports no torch, so that flags and help appear at once."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from mmtransfer.training.settings import Training, check_flags, check_integer

#: Options of the training of one method, under its name: `--set full.learning_rate=3e-4`.
TRAINING_OPTIONS = ("epochs", "max_steps", "batch_size", "accumulate", "learning_rate", "weight_decay")
_Count = Annotated[int | None, tyro.conf.arg(metavar="INT")]


@dataclass(frozen=True, kw_only=True)
class CompareSettings:
    """The methods and their training. None leaves the choice to each method.

    Attributes:
        methods: names of methods, or combinations joined by "+", separated by spaces; None is a selection of
            every paper. `mmtransfer methods` lists the names.
        options: of the methods, by field; one goes to every method that has it, and must have an owner. Those
            under the name of a method are for that method alone, and may also be of its training:
            `TRAINING_OPTIONS`.
        task: the purpose that the models are trained for: classification, ctc; None is what the data allows.
        seeds: runs of each method on the frozen encoder, with seeds 0, 1, ...
        epochs: on the frozen encoder.
        batch_size: clips per step and device, on the frozen encoder.
        tuning_seeds: runs of each method that trains through the encoder.
        tuning_epochs: through the encoder.
        tuning_steps: through the encoder; training ends after so many if not earlier.
        tuning_batch_size: clips per step and device, through the encoder.
        learning_rate: of all methods, but for parameters with a rate among the method's options; 0 trains
            nothing at all.
        evaluations: scores on the way, on at most 100 test clips, for the figure of score against time.
        bf16: train under bfloat16 autocast.
        cpu: use no GPU.
        workers: processes that decode clips; None is one less than there are cores, at most 4.
        cache: store the features of the frozen encoder and the inputs of a trained one; --no-cache makes them
            in every step.
        save: folder for the trained parts, one subfolder per run; None keeps none.

    ValueError for a value out of range.
    """

    methods: Annotated[tuple[str, ...] | None, tyro.conf.arg(metavar="NAME [NAME ...]")] = None
    options: tyro.conf.Suppress[dict[str, Any]] = field(default_factory=dict)
    task: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    seeds: int = 3
    epochs: _Count = None
    batch_size: _Count = None
    tuning_seeds: int = 1
    tuning_epochs: _Count = None
    tuning_steps: _Count = None
    tuning_batch_size: _Count = None
    learning_rate: Annotated[float | None, tyro.conf.arg(metavar="FLOAT")] = None
    evaluations: int = 5
    bf16: bool = False
    cpu: bool = False
    workers: _Count = None
    cache: bool = True
    save: tyro.conf.Suppress[Path | None] = None

    def __post_init__(self) -> None:
        if isinstance(self.methods, str) or (self.methods is not None and not self.methods):
            raise ValueError(f"methods must be a list of names, at least one, or None, got {self.methods!r}")
        if self.save is not None:
            object.__setattr__(self, "save", Path(self.save))
        check_flags(self, "bf16", "cpu", "cache")
        for name in ("seeds", "epochs", "batch_size"):
            for field_name in (name, f"tuning_{name}"):
                value = getattr(self, field_name)
                if value is not None or name == "seeds":
                    check_integer(field_name, value)
        if self.tuning_steps is not None:
            check_integer("tuning_steps", self.tuning_steps)
        check_integer("evaluations", self.evaluations, least=0)
        if self.workers is not None:
            check_integer("workers", self.workers, least=0)
        # Training checks the rate.
        self.training(Training(), frozen=True)

    def own_training(self, name: str) -> dict[str, Any]:
        """The options of the training of the method of this name."""
        own = self.options.get(name)
        if not isinstance(own, dict):
            return {}
        return {key: value for key, value in own.items() if key in TRAINING_OPTIONS}

    def training(self, method: Training, *, frozen: bool, name: str | None = None) -> Training:
        """A method's training with the values given here; those under its name win."""
        epochs = self.epochs if frozen else self.tuning_epochs
        batch_size = self.batch_size if frozen else self.tuning_batch_size
        rate = self.learning_rate
        found = Training(
            epochs=method.epochs if epochs is None else epochs,
            max_steps=None if frozen else self.tuning_steps,
            batch_size=method.batch_size if batch_size is None else batch_size,
            learning_rate=method.learning_rate if rate is None else rate,
            weight_decay=method.weight_decay,
            # Asked to train nothing, a method's own rates train nothing either.
            group_rates=rate != 0,
            bf16=self.bf16,
            cpu=self.cpu,
            workers=self.process_count,
        )
        return found if name is None else replace(found, **self.own_training(name))

    @property
    def process_count(self) -> int:
        """The processes that decode clips."""
        return min((os.cpu_count() or 1) - 1, 4) if self.workers is None else self.workers
