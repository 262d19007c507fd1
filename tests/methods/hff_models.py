"""Small adapted models with the fusions of HFF, for its tests."""

from __future__ import annotations

from typing import Any

import torch
from tiny_encoders import TINY
from torch import nn

from mmtransfer import AdaptedModel
from mmtransfer.tasks import Classification

LENGTHS = torch.tensor([120, 77, 50])
LABELS = torch.tensor([0, 2, 1])
FUSIONS = ("weighted-sum", "weighted-sum-norm", "lff", "hff-b", "hff-ub")
WITH_ADAPTERS = "hff-b+hff-adapters"


def make_model(
    method: str = "hff-b",
    model_type: str = "wav2vec2",
    *,
    model: nn.Module | None = None,
    num_labels: int | None = 4,
    seed: int = 1,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> AdaptedModel:
    """A fusion of four layers; adapters, which start as the identity, are perturbed."""
    options = {"taps": (0, 1, 2, 3), "out_dim": 6, **options}
    if "+" in method:
        options.setdefault("bottleneck", 4)
    model = model or TINY[model_type].build()
    torch.manual_seed(seed)
    task = None if num_labels is None else Classification(num_labels=num_labels)
    adapted = AdaptedModel(model, method, task, dtype=dtype, **options)
    with torch.no_grad():
        for parameter in adapted.encoder.edit.parameters:
            parameter.add_(0.3 * torch.randn(parameter.shape).to(parameter))
    return adapted
