"""Transfer of speech and audio transformers: rebuilds of published methods on the ops of `mmkernels`.

    from mmtransfer import aat        # adapters in a frozen encoder, and other ways to tune a few parameters
    from mmtransfer import hff        # hierarchical feature fusion over a frozen encoder
    from mmtransfer import data       # labelled recordings, real and generated

Submodules are imported when they are first used. Command line: ``mmtransfer --help``.
"""

from __future__ import annotations

import importlib
from types import ModuleType

_SUBMODULES = ("aat", "compare", "data", "hff", "models", "report", "train")

__all__ = list(_SUBMODULES)


def __getattr__(name: str) -> ModuleType:
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_SUBMODULES])
