"""The error for results that are NaN or infinite, and the checks of a trained model."""

from __future__ import annotations

import math

import torch

from mmtransfer.model import AdaptedModel


class NotFiniteError(FloatingPointError):
    """Features, a loss, weights, logits or a score are NaN or infinite: the run has no result."""


def check_rate(rate: float) -> None:
    """NotFiniteError for a rate that AdamW's first step, ten times larger, would make infinite."""
    if 10 * rate > torch.finfo(torch.float32).max:
        raise NotFiniteError(f"a learning rate of {rate:g} overflows float32")


def check_loss(loss: float, epoch: int) -> None:
    """NotFiniteError unless the mean loss of an epoch is a number."""
    if not math.isfinite(loss):
        raise NotFiniteError(
            f"the training loss is {loss} in epoch {epoch}; lower the learning rate, or look for NaN in the "
            "model's weights"
        )


def check_weights(model: AdaptedModel) -> None:
    """NotFiniteError, with the tensor's name, unless all that training changes is finite."""
    for name, tensor in model.trained_tensors().items():
        if not bool(tensor.isfinite().all()):
            raise NotFiniteError(
                f"{name} is not finite after training; lower the learning rate, or look for NaN in the "
                "model's weights"
            )
