"""Weights that do not fit the configuration of their model: the reason, in one sentence."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from .encoder import Encoder


def find_misfit(encoder: Encoder, model: nn.Module, report: Mapping[str, Any]) -> str | None:
    """A sentence on weights that do not fit the configuration, from the report of transformers, or None."""
    mismatched = sorted(report.get("mismatched_keys", ()))
    if mismatched:
        shown = "; ".join(
            f"{name} has shape {tuple(stored)}, the configuration says {tuple(wanted)}"
            for name, stored, wanted in mismatched[:2]
        )
        more = f" and {len(mismatched) - 2} more" if len(mismatched) > 2 else ""
        return f"its weights do not fit its configuration: {shown}{more}"
    layers = encoder.description.layers
    path = next(
        name for name, module in model.named_modules() if module is encoder.model.get_submodule(layers)
    )
    pattern = re.compile(rf"(?:^|\.){re.escape(path)}\.(\d+)\.")
    found = [pattern.search(key) for key in report.get("unexpected_keys", ())]
    highest = max((int(match[1]) for match in found if match), default=-1)
    if highest >= encoder.num_layers:
        return f"it has weights of {highest + 1} layers, and its configuration says {encoder.num_layers}"
    return None
