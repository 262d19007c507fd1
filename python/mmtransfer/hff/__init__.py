"""HFF: hierarchical feature fusion over a frozen encoder (Huo et al., ICASSP 2023, arXiv 2211.02712).

`FrozenEncoder` hands out the outputs of chosen layers, `AdaptedEncoder` does with trainable adapters in the
layers, a fusion (`HFFb`, `HFFub`, `LFF`, `WeightedSum`) makes one sequence of them, `HFF` is the two with a
head, saving and loading. `reference` has the fusions in plain PyTorch, as the paper's code would have them.
"""

from __future__ import annotations

from .adapters import AdaptedEncoder
from .encoder import FrozenEncoder, Tap, TappedEncoder
from .fusion import FUSIONS, LFF, Fusion, HFFb, HFFub, WeightedSum, make_fusion
from .model import HFF, FusedOutput, SequenceClassificationHead
from .taps import Taps

__all__ = [
    "FUSIONS",
    "HFF",
    "LFF",
    "AdaptedEncoder",
    "FrozenEncoder",
    "FusedOutput",
    "Fusion",
    "HFFb",
    "HFFub",
    "SequenceClassificationHead",
    "Tap",
    "TappedEncoder",
    "Taps",
    "WeightedSum",
    "make_fusion",
]
