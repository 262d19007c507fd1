"""The releases that this package needs of others; an earlier one is reported in a sentence."""

from __future__ import annotations

import importlib.metadata
import re

#: The first release of each package that works, as in pyproject.toml. peft serves LoRA alone.
FLOORS = {
    "torch": "2.11",
    "transformers": "5.9",
    "accelerate": "1.3",
    "peft": "0.18",
    "numpy": "1.26",
    "safetensors": "0.4.3",
    "typeguard": "4",
    "tyro": "1.0",
}


def check() -> None:
    """ImportError with a sentence on each package that is too old."""
    problem = find_problem()
    if problem:
        raise ImportError(problem)


def find_problem() -> str | None:
    """A sentence on the packages that are too old; those that are missing are left to their import."""
    old = {}
    for name, floor in FLOORS.items():
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        # An install whose metadata cannot be read has the version None.
        if installed and _numbers(installed) < _numbers(floor):
            old[name] = installed
    if not old:
        return None
    needed = ", ".join(
        f"{name} {FLOORS[name]} or later (installed: {version})" for name, version in old.items()
    )
    upgrade = " ".join(f"'{name}>={FLOORS[name]}'" for name in old)
    return f"mmtransfer needs {needed}; install with: pip install --upgrade {upgrade}"


def _numbers(version: str) -> tuple[int, ...]:
    """The release numbers; trailing zeros do not count, so that 5.9.0 is 5.9."""
    numbers = [int(number) for number in re.findall(r"\d+", re.split(r"[^\d.]", version)[0])]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)
