"""Files of a result besides weights: the target's configuration, tokenizer and other small ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from .checkpoint import SETTINGS
from .plan import Plan
from .recipe import DTYPES

#: Indices, and states of training runs.
_LEFT = ("*.index.json", "trainer_state.json", "all_results.json", "train_results.json", "eval_results.json")


def write_settings(folder: Path, plan: Plan) -> None:
    """Copy the target's small files; the configuration says the dtype that the recipe chose."""
    for path in find_settings(plan.target.folder):
        shutil.copyfile(path, folder / path.name)
    if plan.dtype is None or "config.json" not in {path.name for path in folder.iterdir()}:
        return
    named = {code: name for name, code in DTYPES.items()}
    # transformers 4 calls it torch_dtype, and 5 dtype.
    key = "torch_dtype" if "torch_dtype" in plan.target.config else "dtype"
    config = {**plan.target.config, key: named[plan.dtype]}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def find_settings(folder: Path) -> list[Path]:
    """The files that are copied."""
    left = {path for pattern in _LEFT for path in folder.glob(pattern)}
    found = {path for pattern in SETTINGS for path in folder.glob(pattern) if path.is_file()}
    return sorted(found - left)
