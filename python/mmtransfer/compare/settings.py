"""The settings of a comparison; imports no torch, so that flags and help appear at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tyro

from mmtransfer.training.settings import Training


@dataclass(frozen=True, kw_only=True)
class CompareSettings:
    """The methods and their training. None leaves the choice to each method.

    Attributes:
        methods: names of methods and pairs ("a+b"), separated by spaces; without any, a selection of every
            paper. `mmtransfer methods` lists the names.
        options: of the methods, by field; one goes to every method that has it, and must have an owner. Those
            under the name of a method are for that method alone.
        task: the purpose that the models are trained for.
        seeds: runs of each method on the frozen encoder, with seeds 0, 1, ...
        epochs: on the frozen encoder.
        batch_size: clips per step and device, on the frozen encoder.
        tuning_seeds: runs of each method that trains through the encoder.
        tuning_epochs: through the encoder.
        tuning_batch_size: clips per step and device, through the encoder.
        learning_rate: for all methods.
        bf16: train under bfloat16 autocast.
        cpu: use no GPU.
        cache: store the features of the frozen encoder and the inputs of a trained one; --no-cache makes them
            in every step.
        save: folder for the trained parts, one subfolder per run; None keeps none.

    ValueError for a value out of range.
    """

    methods: tuple[str, ...] = ()
    options: tyro.conf.Suppress[dict[str, Any]] = field(default_factory=dict)
    task: str = "classification"
    seeds: int = 3
    epochs: int | None = None
    batch_size: int | None = None
    tuning_seeds: int = 1
    tuning_epochs: int | None = None
    tuning_batch_size: int | None = None
    learning_rate: float | None = None
    bf16: bool = False
    cpu: bool = False
    cache: bool = True
    save: tyro.conf.Suppress[Path | None] = None

    def __post_init__(self) -> None:
        counts = ("seeds", "epochs", "batch_size")
        for name in (*counts, *(f"tuning_{count}" for count in counts)):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        # Training checks the rate.
        self.training(Training(), frozen=True)

    def training(self, method: Training, *, frozen: bool) -> Training:
        """A method's training with the values given here."""
        epochs = self.epochs if frozen else self.tuning_epochs
        batch_size = self.batch_size if frozen else self.tuning_batch_size
        rate = self.learning_rate
        return Training(
            epochs=method.epochs if epochs is None else epochs,
            batch_size=method.batch_size if batch_size is None else batch_size,
            learning_rate=method.learning_rate if rate is None else rate,
            weight_decay=method.weight_decay,
            bf16=self.bf16,
            cpu=self.cpu,
        )
