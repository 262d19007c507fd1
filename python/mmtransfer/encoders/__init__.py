"""Pretrained encoders: where their parts are, how layers are read, how they are edited and restored."""

from __future__ import annotations

# ruff: noqa: E402
from mmtransfer import versions

# Before transformers is imported, whose earlier releases lack names that are imported below.
versions.check()

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
