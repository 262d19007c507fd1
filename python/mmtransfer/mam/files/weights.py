"""The weights of a linear merge for each tensor: a number, a list over the layers, or filters on names."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

#: The component of a name that lists layers, and the index behind it.
_LAYER = re.compile(r"(?:^|.*?\.)(?:layers?|h|blocks?)\.(\d+)\.")


@dataclass(frozen=True)
class Weights:
    """The weight of one model for each tensor.

    Attributes:
        rules: texts, each with a list of values; the first text that a tensor's name contains counts (None:
            any name). A list of several values runs from the first layer to the last, linear in between.
    """

    rules: tuple[tuple[str | None, tuple[float, ...]], ...]

    def find(self, name: str, depth: float) -> float | None:
        """The weight of a tensor at a depth of 0 (first layer, or no layer) to 1; None if no rule has one."""
        for text, values in self.rules:
            if text is None or text in name:
                return _interpolate(values, depth)
        return None


def read_weights(where: str, value: Any) -> Weights:
    """The weights that a recipe gives under `where`; ValueError names those allowed."""
    value = [value] if isinstance(value, dict) else value
    if isinstance(value, list) and value and all(isinstance(each, dict) for each in value):
        return Weights(tuple(_read_filter(f"{where}[{i}]", each) for i, each in enumerate(value)))
    return Weights(((None, _read_values(where, value)),))


def _read_filter(where: str, rule: dict[str, Any]) -> tuple[str | None, tuple[float, ...]]:
    if "value" not in rule or rule.keys() - {"filter", "value"}:
        raise ValueError(
            f"{where} must have filter and value, or value alone, got {', '.join(map(str, rule))}"
        )
    text = rule.get("filter")
    if text is not None and (not isinstance(text, str) or not text):
        raise ValueError(f"{where}.filter must be a part of the names of tensors, got {text!r}")
    return None if text == "*" else text, _read_values(f"{where}.value", rule["value"])


def _read_values(where: str, value: Any) -> tuple[float, ...]:
    values = value if isinstance(value, list) else [value]
    if not values or not all(is_number(each) for each in values):
        raise ValueError(
            f"{where} must be a number, a list of numbers over the layers, or a list of filter and value, "
            f"got {value!r}"
        )
    return tuple(map(float, values))


def is_number(value: Any) -> bool:
    """Whether a value of a recipe is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _interpolate(values: Sequence[float], depth: float) -> float:
    place = depth * (len(values) - 1)
    before = min(int(place), len(values) - 2)
    if before < 0:
        return values[0]
    part = place - before
    return (1 - part) * values[before] + part * values[before + 1]


def find_depths(names: Iterable[str]) -> dict[str, float]:
    """The depth of each tensor: 0 in the first layer to 1 in the last of its list (1 if it is the only one),
    0 outside of layers."""
    depths = dict.fromkeys(names, 0.0)
    places = {
        name: (name[: match.start(1)], int(match[1])) for name in depths if (match := _LAYER.match(name))
    }
    deepest: dict[str, int] = {}
    for stack, index in places.values():
        deepest[stack] = max(index, deepest.get(stack, 0))
    for name, (stack, index) in places.items():
        depths[name] = index / deepest[stack] if deepest[stack] else 1.0
    return depths
