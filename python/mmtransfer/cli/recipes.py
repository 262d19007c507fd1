"""Recipes: YAML files of options, read as if they stood in front of those on the command line."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from mmtransfer.compare.settings import CompareSettings

from . import values
from .compare import Input, Result

_PACKAGE = Path(__file__).resolve().parents[1]
#: The options of `mmtransfer compare` that have a flag, with their defaults.
_DEFAULTS: dict[str, Any] = {
    each.name: each.default
    for kind in (Input, CompareSettings, Result)
    for each in dataclasses.fields(kind)
    if each.name not in ("options", "save")
} | {"set": ()}


def expand(arguments: list[str]) -> list[str]:
    """The arguments with `--recipe NAME` replaced by the recipe's options.

    Those on the command line win; `--set` adds to a recipe's. NAME is a file, or `<paper>/<recipe>` for one
    that the package has. Exits with status 2 if it cannot be read, or has an option that there is not.
    """
    place = next((i for i, each in enumerate(arguments) if each.partition("=")[0] == "--recipe"), None)
    if place is None:
        return arguments
    name, count = arguments[place].partition("=")[2], 1
    if "=" not in arguments[place]:
        name, count = (arguments[place + 1], 2) if place + 1 < len(arguments) else ("", 1)
    if not name:
        _fail("--recipe needs the name of a file")
    rest = arguments[:place] + arguments[place + count :]
    path, content = _read(name)
    given = {_field(argument) for argument in rest if argument.startswith("--")} - {"set"}
    chosen = [word for field, words in _options(path, content) if field not in given for word in words]
    # Behind the name of the command.
    return [*rest[:1], *chosen, *rest[1:]]


def _field(flag: str) -> str:
    """The option that a flag on the command line sets: `cache` for `--no-cache`."""
    name = flag.partition("=")[0].removeprefix("--").replace("-", "_")
    return name if name in _DEFAULTS else name.removeprefix("no_")


def _read(name: str) -> tuple[Path, dict[str, Any]]:
    paper, _, recipe = name.partition("/")
    candidates = [Path(name).expanduser(), _PACKAGE / paper / "recipes" / f"{recipe}.yaml"]
    path = next((each for each in candidates if each.is_file()), None)
    if path is None:
        known = sorted(f"{each.parents[1].name}/{each.stem}" for each in _PACKAGE.glob("*/recipes/*.yaml"))
        _fail(f"no recipe {name!r}: give a YAML file, or one of {', '.join(known)}")
    try:
        content = values.parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        _fail(f"{path} cannot be read as YAML ({error})")
    if not isinstance(content, dict):
        _fail(f"{path} must hold options, one `name: value` a line")
    return path, content


def _options(path: Path, content: dict[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """Each field with the words that set it on a command line."""
    for name, value in content.items():
        field = str(name).replace("-", "_")
        if field not in _DEFAULTS:
            known = ", ".join(sorted(each.replace("_", "-") for each in _DEFAULTS))
            _fail(f"{path} has an option {name!r}, which is none of {known}")
        flag, default = f"--{field.replace('_', '-')}", _DEFAULTS[field]
        if isinstance(default, bool):
            if not isinstance(value, bool):
                _fail(f"{path}: {name} must be true or false, got {value!r}")
            if value != default:
                yield field, [flag if value else f"--no-{flag[2:]}"]
        elif field == "set" and isinstance(value, dict):
            yield field, [flag, *(f"{key}={json.dumps(item)}" for key, item in value.items())]
        elif isinstance(value, dict) or (isinstance(value, list) and not isinstance(default, tuple)):
            kind = "a list" if isinstance(default, tuple) else "one value"
            _fail(f"{path}: {name} must be {kind}, got {value!r}")
        else:
            yield field, [flag, *(str(item) for item in (value if isinstance(value, list) else [value]))]


def _fail(message: str) -> NoReturn:
    print(f"mmtransfer: {message}", file=sys.stderr)
    sys.exit(2)
