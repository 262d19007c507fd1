"""Recipes: YAML files of options, read as if they stood in front of those on the command line."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import yaml

_PACKAGE = Path(__file__).resolve().parents[1]


def expand(arguments: list[str]) -> list[str]:
    """The arguments with `--recipe NAME` replaced by the recipe's options, which the others override.

    NAME is a file, or `<paper>/<recipe>` for one that the package has. Exits with status 2 if it cannot be
    read.
    """
    if "--recipe" not in arguments:
        return arguments
    place = arguments.index("--recipe")
    if place + 1 == len(arguments):
        _fail("--recipe needs the name of a file")
    rest = arguments[:place] + arguments[place + 2 :]
    options = list(_options(_read(arguments[place + 1])))
    given = {argument for argument in rest if argument.startswith("--")}
    chosen = [word for flag, words in options if flag not in given for word in (flag, *words)]
    # Behind the name of the command.
    return [*rest[:1], *chosen, *rest[1:]]


def _read(name: str) -> dict[str, Any]:
    paper, _, recipe = name.partition("/")
    candidates = [Path(name).expanduser(), _PACKAGE / paper / "recipes" / f"{recipe}.yaml"]
    path = next((each for each in candidates if each.is_file()), None)
    if path is None:
        known = sorted(f"{each.parents[1].name}/{each.stem}" for each in _PACKAGE.glob("*/recipes/*.yaml"))
        _fail(f"no recipe {name!r}: give a YAML file, or one of {', '.join(known)}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        _fail(f"{path} cannot be read as YAML ({' '.join(str(error).split())})")
    if not isinstance(content, dict):
        _fail(f"{path} must hold options, one `name: value` a line")
    return content


def _options(content: dict[str, Any]) -> Iterator[tuple[str, list[str]]]:
    for name, value in content.items():
        flag = f"--{str(name).replace('_', '-')}"
        if isinstance(value, bool):
            if value:
                yield flag, []
        elif isinstance(value, dict):
            yield flag, [f"{key}={json.dumps(item)}" for key, item in value.items()]
        else:
            yield flag, [str(item) for item in (value if isinstance(value, list) else [value])]


def _fail(message: str) -> NoReturn:
    print(f"mmtransfer: {message}", file=sys.stderr)
    sys.exit(2)
