"""Methods without a result: the reason in one sentence, and the check of their figures."""

from __future__ import annotations

import math
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmtransfer.training.finite import NotFiniteError

_LONGEST = 300


def failure_reason(error: Exception) -> str:
    """One line: the message, and for an error that is not ours its type and the place that raised it."""
    message = " ".join(str(error).split())
    if len(message) > _LONGEST:
        message = f"{message[:_LONGEST]} ..."
    if isinstance(error, NotFiniteError):
        return message
    return f"{type(error).__name__}{_place(error)}{': ' if message else ''}{message}"


def finite_numbers(what: str, figures: Mapping[Any, Any]) -> dict[str, float]:
    """Figures as plain numbers by name; NotFiniteError for one that is NaN or infinite."""
    found = {str(name): float(value) for name, value in figures.items()}
    for name, value in found.items():
        if not math.isfinite(value):
            raise NotFiniteError(f"{what} {name!r} is {value}")
    return found


def _place(error: Exception) -> str:
    """The innermost line of code outside installed packages, for the author of a method."""
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__) if "site-packages" not in frame.filename
    ]
    return f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
