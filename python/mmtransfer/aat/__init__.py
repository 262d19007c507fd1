"""AAT: adapters for audio transformers, and the methods it is compared with (Liang et al., arXiv 2401.10544).

`prepare` freezes a model and adds what one method trains; `save_adapters` and `load_adapters` keep that part
alone.
"""

from __future__ import annotations

from .methods import METHODS
from .prepare import Prepared, get_prepared, prepare, revert
from .saving import load_adapters, save_adapters

__all__ = ["METHODS", "Prepared", "get_prepared", "load_adapters", "prepare", "revert", "save_adapters"]
