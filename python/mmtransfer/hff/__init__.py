"""HFF: hierarchical feature fusion over a frozen encoder (Huo et al., ICASSP 2023, arXiv 2211.02712).

`mmtransfer.AdaptedModel(model, "hff-b", task)` is the method as a whole. Its modules can be used alone: an
`mmtransfer.TappedEncoder` returns the outputs of chosen layers, and a fusion (`HFFb`, `HFFub`, `LFF`,
`WeightedSum`) makes one sequence of them. `eager` has the fusions as the paper's code would have them.
"""

from __future__ import annotations

from .fusions import LFF, Fusion, HFFb, HFFub, WeightedSum
from .methods import (
    HFFAdapters,
    HFFbMethod,
    HFFubMethod,
    LFFMethod,
    WeightedSumMethod,
    WeightedSumNormMethod,
)

METHODS = (WeightedSumMethod, WeightedSumNormMethod, LFFMethod, HFFbMethod, HFFubMethod, HFFAdapters)
COMPARED = ("weighted-sum", "weighted-sum-norm", "lff", "hff-b", "hff-b+hff-adapters")

__all__ = ["COMPARED", "LFF", "METHODS", "Fusion", "HFFb", "HFFub", "WeightedSum"]
