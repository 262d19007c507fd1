"""Pretrained encoders: where their parts are, how layers are read, how they are edited and restored."""

from __future__ import annotations

from .descriptions import DESCRIPTIONS, ModelDescription
from .edit import Edit
from .encoder import Encoder, Tap, default_taps, describe
from .tapped import TappedEncoder
from .taps import Taps

__all__ = [
    "DESCRIPTIONS",
    "Edit",
    "Encoder",
    "ModelDescription",
    "Tap",
    "TappedEncoder",
    "Taps",
    "default_taps",
    "describe",
]
