"""Transfer of speech and audio transformers: published methods, re-implemented on the ops of `mmkernels`.

    from mmtransfer import prepare, AdaptedModel             # adapt a model for your training code, or here
    from mmtransfer import TappedEncoder, hff                # read the layers of a frozen encoder; fuse them
    from mmtransfer import mam                               # merge the attention of two models
    from mmtransfer import align                             # times of words in recordings
    from mmtransfer import Edit, EditMethod, Method, registry   # write a method

Names are imported when they are first used. Command line: ``mmtransfer --help``.
"""

from __future__ import annotations

import importlib
from typing import Any

_MODULES = (
    "aat",
    "align",
    "baselines",
    "compare",
    "data",
    "encoders",
    "hff",
    "mam",
    "registry",
    "tasks",
    "training",
)
_NAMES = {
    "AdaptedModel": "model",
    "Edit": "encoders",
    "EditMethod": "method",
    "Encoder": "encoders",
    "Group": "method",
    "Method": "method",
    "Prepared": "preparation",
    "FinetuneResult": "training.run",
    "FinetuneSettings": "training.finetune_settings",
    "TappedEncoder": "encoders",
    "Taps": "encoders",
    "finetune": "training.finetune",
    "get_prepared": "preparation",
    "load": "checkpoint",
    "load_prepared": "checkpoint",
    "prepare": "preparation",
    "recognize": "recognition",
    "revert": "preparation",
    "save": "checkpoint",
}

__all__ = [*_MODULES, *_NAMES]


def __getattr__(name: str) -> Any:
    if name in __all__:
        versions = importlib.import_module(f"{__name__}.versions")
        versions.check()
    if name in _NAMES:
        return getattr(importlib.import_module(f"{__name__}.{_NAMES[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
