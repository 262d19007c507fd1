"""MAM and L-MAM: attention of a text or image model merged into a speech or audio model (Sundar et al., arXiv
2312.14378).

Names are imported when they are first used: the package itself imports no torch.
"""

from __future__ import annotations

import importlib
from typing import Any

_NAMES = {
    "PARTS": "projections",
    "Projection": "projections",
    "find_projections": "projections",
    "num_heads": "projections",
}

__all__ = [*_NAMES]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(f"{__name__}.{_NAMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
