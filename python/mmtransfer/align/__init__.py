"""Forced alignment: when each word of a text is spoken in a recording of it, by any CTC model.

    from mmtransfer.align import Aligner, load_ctc

    for word in Aligner(load_ctc("runs/ctc")).align("speech.wav", text).words:
        print(word.start, word.end, word.text, word.score)

The command is `mmtransfer align`. Names are imported when they are first used: help needs no torch.
"""

from __future__ import annotations

import importlib
from typing import Any

_NAMES = {
    "AlignedText": "aligner",
    "Aligner": "aligner",
    "Emissions": "emissions",
    "Normalizer": "text",
    "Posteriors": "aligner",
    "TextWord": "text",
    "Token": "aligner",
    "Word": "aligner",
    "load_ctc": "models",
    "pretrained_ctc": "models",
}

__all__ = [*_NAMES]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(f"{__name__}.{_NAMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
