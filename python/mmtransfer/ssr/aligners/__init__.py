"""Aligners: the segment of speech that belongs to each token of a text."""

from __future__ import annotations

from .cif import CIFWeights
from .ctc import CTCAligner
from .fixed import FixedRate
from .segments import Aligner, Segments, drop_empty
from .unity2 import UnitY2Aligner

__all__ = ["Aligner", "CIFWeights", "CTCAligner", "FixedRate", "Segments", "UnitY2Aligner", "drop_empty"]
