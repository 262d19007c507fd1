"""AAT: adapters for audio transformers (Liang et al., arXiv 2401.10544).

`mmtransfer.prepare(model, "aat-ms")` puts them into a model with its own training code;
`mmtransfer.AdaptedModel(model, "aat-ms", task)` into one that is trained here.
"""

from __future__ import annotations

from .methods import AAT, AATM, AATS

METHODS = (AAT, AATM, AATS)
COMPARED = ("aat-m", "aat-ms")

__all__ = ["AAT", "AATM", "AATS", "COMPARED", "METHODS"]
