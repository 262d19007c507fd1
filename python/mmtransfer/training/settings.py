"""Settings of a training run; imports no torch, so that flags and recipes are parsed at once."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass

SCHEDULES = ("linear", "cosine")


@dataclass(frozen=True)
class Training:
    """How a model is trained: AdamW, a linear warm-up, then a decay of the rate.

    Attributes:
        epochs: passes over the training clips.
        max_steps: the run ends after so many steps if not earlier, and its rate decays to 0 by then.
        batch_size: clips per batch and device.
        accumulate: batches per step.
        learning_rate: peak rate, but for parameter groups that a method gives a rate.
        weight_decay: of matrices; biases, norms and parameter groups of a method have none.
        schedule: of the rate after the warm-up: "linear" or "cosine".
        warmup_steps: of the optimiser; None: a tenth of all.
        final_share: of the peak rate at the end of a cosine.
        beta2: of AdamW: how long squared gradients are remembered.
        clip: the largest norm of a gradient; longer ones are shortened to it. 0: they are not.
        group_rates: whether those groups have their rate; False gives them the run's.
        seed: of the initial weights and of the order of the clips.
        bf16: train under bfloat16 autocast.
        fp16: train under float16 autocast, with a scaled loss; on a GPU alone.
        cpu: stay on the CPU even if there is a GPU.
        workers: processes that decode clips that are not cached; 0 for this one.

    ValueError for a value out of range.
    """

    epochs: int = 30
    max_steps: int | None = None
    batch_size: int = 32
    accumulate: int = 1
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    schedule: str = "linear"
    warmup_steps: int | None = None
    final_share: float = 0.0
    beta2: float = 0.999
    clip: float = 1.0
    group_rates: bool = True
    seed: int = 0
    bf16: bool = False
    fp16: bool = False
    cpu: bool = False
    workers: int = 0

    def __post_init__(self) -> None:
        check_integer("epochs", self.epochs)
        check_integer("batch_size", self.batch_size)
        check_integer("accumulate", self.accumulate)
        check_integer("workers", self.workers, least=0)
        if self.max_steps is not None:
            check_integer("max_steps", self.max_steps)
        # numpy's generator, which is seeded too, takes 32 bits.
        check_integer("seed", self.seed, least=0, most=2**32 - 1)
        check_number("learning_rate", self.learning_rate)
        check_number("weight_decay", self.weight_decay)
        check_number("clip", self.clip)
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {self.schedule!r}")
        if self.warmup_steps is not None:
            check_integer("warmup_steps", self.warmup_steps, least=0)
        for name in ("final_share", "beta2"):
            check_number(name, getattr(self, name))
            if getattr(self, name) >= 1:
                raise ValueError(f"{name} must be below 1, got {getattr(self, name)}")
        if self.final_share and self.schedule != "cosine":
            raise ValueError(f"final_share is for the schedule cosine, got {self.schedule!r}")
        check_flags(self, "group_rates", "bf16", "fp16", "cpu")
        if self.bf16 and self.fp16:
            raise ValueError("bf16 and fp16 exclude each other")

    def steps(self, clips: int) -> int:
        """The optimiser's steps of a run on so many clips, in one process."""
        in_epoch = math.ceil(math.ceil(clips / self.batch_size) / self.accumulate)
        steps = self.epochs * in_epoch
        return steps if self.max_steps is None else min(steps, self.max_steps)


def check_integer(name: str, value: object, *, least: int = 1, most: int | None = None) -> None:
    """ValueError, with the argument's name, unless `value` is an integer within the bounds."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ValueError(f"{name} must be an integer, got {value!r}")
    if int(value) < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    if most is not None and int(value) > most:
        raise ValueError(f"{name} must be at most {most}, got {value}")


def check_number(name: str, value: object) -> None:
    """ValueError, with the argument's name, unless `value` is a finite number that is not negative."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ValueError(f"{name} must be a number, got {value!r}")
    if not (math.isfinite(value) and float(value) >= 0):
        raise ValueError(f"{name} must be finite and not negative, got {value}")


def check_flags(settings: object, *names: str) -> None:
    """ValueError, with the field's name, unless these fields are True or False: "no" would count as true."""
    for name in names:
        value = getattr(settings, name)
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, got {value!r}")
