"""torch's autocast, also asked about devices that have none, such as meta."""

from __future__ import annotations

import contextlib
from typing import Any

import torch


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that autocast casts to on the device, or None if it is off or the device has no autocast."""
    if not torch.amp.is_autocast_available(device_type) or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def autocast_takes(features: torch.Tensor) -> bool:
    """Whether autocast is on and casts features of this dtype; it takes no float16 if its own is another."""
    dtype = autocast_dtype(features.device.type)
    return dtype is not None and (features.dtype != torch.float16 or dtype == torch.float16)


def without_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """Autocast off in the body."""
    if not torch.amp.is_autocast_available(device_type):
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)
