"""MAM and L-MAM: attention of a text or image model merged into a speech or audio model (Sundar et al., arXiv
2312.14378).

Names are imported when they are first used: the package itself imports no torch.
"""

from __future__ import annotations

import importlib
from typing import Any

_NAMES = {
    "LMAM": "methods",
    "Merged": "merging",
    "Noise": "sources",
    "Projection": "projections",
    "Similarity": "layer_similarity",
    "find_projections": "projections",
    "fold": "folding",
    "merge": "merging",
    "shares": "methods",
    "similarity": "layer_similarity",
    "sweep": "merging",
}
#: The method needs a source, so a comparison that names no methods has none of this folder.
COMPARED = ()

__all__ = ["COMPARED", "METHODS", *_NAMES]


def __getattr__(name: str) -> Any:
    if name == "METHODS":
        return (importlib.import_module(f"{__name__}.methods").LMAM,)
    if name in _NAMES:
        return getattr(importlib.import_module(f"{__name__}.{_NAMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
