"""Settings of a training run; imports no torch, so that flags and recipes are parsed at once."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Training:
    """How a model is trained: AdamW, linear warm-up over a tenth of the steps, then linear decay.

    Attributes:
        epochs: passes over the training clips.
        batch_size: clips per step and device.
        learning_rate: peak rate, but for parameter groups that a method gives a rate.
        weight_decay: of matrices; biases, norms and parameter groups of a method have none.
        seed: of the initial weights and of the order of the clips.
        bf16: train under bfloat16 autocast.
        cpu: stay on the CPU even if there is a GPU.

    ValueError for a value out of range.
    """

    epochs: int = 30
    batch_size: int = 32
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    seed: int = 0
    bf16: bool = False
    cpu: bool = False

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "weight_decay"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be finite and not negative, got {value}")
