"""The options of a method in words: default, allowed values and meaning, from its fields and docstrings."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import types
import typing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmtransfer.method import Method

_SIMPLE = {bool: "true or false", int: "an integer", float: "a number", str: "text", type(None): "null"}


@dataclass(frozen=True)
class OptionHelp:
    """One option: its name, its default as `--set` takes it, the values allowed, and its meaning."""

    name: str
    default: str
    allowed: str
    meaning: str


def describe_options(method: Method) -> list[OptionHelp]:
    """The options of a method, in the order of its fields."""
    hints = typing.get_type_hints(type(method))
    meanings = _meanings(type(method))
    return [
        OptionHelp(
            each.name,
            _text(getattr(method, each.name)),
            _allowed(hints[each.name], each.metadata),
            meanings.get(each.name, ""),
        )
        for each in dataclasses.fields(method)
    ]


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value)
    except TypeError:
        return str(value)


def _allowed(hint: Any, metadata: typing.Mapping[str, Any]) -> str:
    if metadata.get("choices"):
        return f"one of {', '.join(metadata['choices'])}"
    least = metadata.get("least")
    return _type(hint) + ("" if least is None else f", at least {least}")


def _type(hint: Any) -> str:
    """A type hint as YAML has its values."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type(part) for part in parts)
    if origin is typing.Literal:
        return " or ".join(map(_text, parts))
    if origin in (tuple, list):
        return f"[{', '.join(_type(part) for part in parts if part is not Ellipsis)}, ...]"
    return _SIMPLE.get(hint, getattr(hint, "__name__", str(hint)))


def _meanings(kind: type) -> dict[str, str]:
    """The entries of the "Attributes:" sections of a class and its bases; the class itself wins."""
    found: dict[str, str] = {}
    for each in reversed(kind.__mro__):
        _, _, section = inspect.cleandoc(each.__dict__.get("__doc__") or "").partition("Attributes:\n")
        entries = re.findall(r"^    (\w+(?:, \w+)*): (.*(?:\n {8}.*)*)", section, re.MULTILINE)
        for names, text in entries:
            found |= dict.fromkeys(names.split(", "), " ".join(text.split()))
    return found
