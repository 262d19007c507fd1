"""Values of options in recipes and of `--set`: YAML, with numbers as people write them."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any, ClassVar

import yaml


class _Loader(yaml.SafeLoader):
    """YAML without what surprises: 010 is ten, 1e-3 a number, 1:30 and 2024-01-01 are text.

    PyYAML reads these as eight, text, ninety and a date. A name that is given twice is refused.
    """

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        names = [key.value for key, _ in node.value]
        for name in names:
            if names.count(name) > 1:
                raise yaml.constructor.ConstructorError(problem=f"{name!r} is given twice")
        return super().construct_mapping(node, deep)


def _integer(_: _Loader, node: yaml.ScalarNode) -> int:
    text = node.value.replace("_", "")
    return int(text, 0) if re.match(r"[-+]?0[xo]", text) else int(text)


_RULES = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"(?i:true|false|yes|no|on|off)", list("tTfFyYnNoO")),
    "int": (r"[-+]?(?:0x[0-9a-fA-F]+|0o[0-7]+|[0-9]+(?:_[0-9]+)*)", list("-+0123456789")),
    "float": (
        r"[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(?i:inf))"
        r"|\.(?i:nan)",
        list("-+0123456789."),
    ),
}
for _kind, (_pattern, _first) in _RULES.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(rf"^(?:{_pattern})$"), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _integer)


class _TextLoader(_Loader):
    """YAML in which every plain value is text: 007, yes and 1.50 are what was written."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}


def parse_texts(text: str) -> Any:
    """As `parse`, with text for every value that is no list and no mapping."""
    return _parse(text, _TextLoader)


def parse(text: str) -> Any:
    """The value that a text stands for. ValueError, in one line, if it is no YAML."""
    return _parse(text, _Loader)


def _parse(text: str, loader: type[_Loader]) -> Any:
    try:
        return yaml.load(text, loader)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
