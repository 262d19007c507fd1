"""SSR-Connector: speech as vectors of a language model, one for each token (Tan et al., arXiv 2410.00168).

`mmtransfer finetune --method ssr --task text --language-model NAME --stage 1` trains a connector towards
the embeddings of a language model, `--stage 2` the language model to read its vectors. `Connector` and the
aligners can be used alone.
"""

from __future__ import annotations

from .aligners import Aligner, CIFWeights, CTCAligner, FixedRate, Segments, UnitY2Aligner, drop_empty
from .connector import Connector
from .methods import SSRMethod
from .readout import SSRReadout

METHODS = (SSRMethod,)
#: A comparison of classifiers has no language model.
COMPARED = ()

__all__ = [
    "COMPARED",
    "METHODS",
    "Aligner",
    "CIFWeights",
    "CTCAligner",
    "Connector",
    "FixedRate",
    "SSRReadout",
    "Segments",
    "UnitY2Aligner",
    "drop_empty",
]
