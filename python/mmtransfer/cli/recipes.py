"""Recipes: YAML files of options, read as if they stood in front of those on the command line."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmtransfer.compare.settings import CompareSettings
from mmtransfer.training.finetune_settings import FinetuneSettings
from mmtransfer.training.settings import Training

from . import values
from .compare import Input, Result
from .finetune import Source, Target
from .messages import fail

_PACKAGE = Path(__file__).resolve().parents[1]


def _defaults(*kinds: Any) -> dict[str, Any]:
    """The options that have a flag, with their defaults."""
    fields = (each for kind in kinds for each in dataclasses.fields(kind))
    return {each.name: each.default for each in fields if each.name not in ("options", "save")} | {"set": ()}


#: The options of each command that takes recipes, with their defaults.
_DEFAULTS = {
    "compare": _defaults(Input, CompareSettings, Result),
    "finetune": _defaults(Source, FinetuneSettings, Target),
}
#: Flags that bring a recipe, unless one is given.
_DEMOS = {"--demo": "demo/speech", "--demo-prompts": "demo/prompts"}
#: Options that are a list, and those that are text: YAML would read a folder 010 or 1.10 as a number.
_LISTS = ("methods", "set")
_TEXTS = (
    "model",
    "data",
    "task",
    "output",
    "dtype",
    "method",
    "methods",
    "tokenizer",
    "language_model",
    "begin_with",
)


def expand(arguments: list[str]) -> list[str]:
    """The arguments with `--recipe NAME` replaced by the recipe's options.

    Those on the command line win; `--set` adds to a recipe's. NAME is a file, or `<paper>/<recipe>` for one
    that the package has. Exits with status 2 if it cannot be read, or has an option that there is not.
    """
    if arguments[0] not in _DEFAULTS:
        return arguments
    defaults = _DEFAULTS[arguments[0]]
    places = [i for i, each in enumerate(arguments) if each.partition("=")[0] == "--recipe"]
    if len(places) > 1:
        fail("--recipe can be given once", 2)
    if places:
        name, rest = _take(arguments, places[0])
    else:
        demos = [_DEMOS[argument] for argument in arguments if argument in _DEMOS]
        if not demos:
            return arguments
        name, rest = demos[0], arguments
    path, content = _read(name)
    given = {_field(argument, defaults) for argument in rest if argument.startswith("--")} - {"set"}
    if isinstance(content.get("set"), dict) and "methods" in given:
        content = {**content, "set": _of_methods(content["set"], _words_of("--methods", rest))}
    chosen = [
        word for field, words in _options(path, content, defaults) if field not in given for word in words
    ]
    # Behind the name of the command.
    return [*rest[:1], *chosen, *rest[1:]]


def _take(arguments: list[str], place: int) -> tuple[str, list[str]]:
    """The name behind `--recipe`, which is at `place`, and the other arguments."""
    name, count = arguments[place].partition("=")[2], 1
    if "=" not in arguments[place]:
        name, count = (arguments[place + 1], 2) if place + 1 < len(arguments) else ("", 1)
    if not name:
        fail("--recipe needs the name of a file", 2)
    return name, arguments[:place] + arguments[place + count :]


def _words_of(flag: str, arguments: list[str]) -> list[str]:
    """The words behind a flag, up to the next one."""
    words, inside = [], False
    for argument in arguments:
        if argument.startswith("--"):
            name, _, value = argument.partition("=")
            inside = name == flag
            words += [value] if inside and value else []
        elif inside:
            words.append(argument)
    return words


def _of_methods(options: dict[Any, Any], methods: list[str]) -> dict[Any, Any]:
    """A recipe's options of methods without those of methods that are not among the chosen ones.

    Of a combination, the parts have options; its training is that of the whole.
    """
    parts = {part for method in methods for part in method.split("+")}
    of_training = {each.name for each in dataclasses.fields(Training)}

    def applies(key: str, value: Any) -> bool:
        name, dot, field = key.partition(".")
        if not dot and not isinstance(value, dict):
            return True
        return name in methods or (name in parts and field not in of_training)

    return {key: value for key, value in options.items() if applies(str(key), value)}


def _field(flag: str, defaults: dict[str, Any]) -> str:
    """The option that a flag on the command line sets: `cache` for `--no-cache`."""
    name = flag.partition("=")[0].removeprefix("--").replace("-", "_")
    return name if name in defaults else name.removeprefix("no_")


def _read(name: str) -> tuple[Path, dict[str, Any]]:
    paper, _, recipe = name.partition("/")
    candidates = [Path(name).expanduser(), _PACKAGE / paper / "recipes" / f"{recipe}.yaml"]
    path = next((each for each in candidates if each.is_file()), None)
    if path is None:
        known = sorted(f"{each.parents[1].name}/{each.stem}" for each in _PACKAGE.glob("*/recipes/*.yaml"))
        fail(f"no recipe {name!r}: give a YAML file, or one of {', '.join(known)}", 2)
    try:
        content = values.parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        fail(f"{path} cannot be read as YAML ({error})", 2)
    if not isinstance(content, dict):
        fail(f"{path} must hold options, one `name: value` a line", 2)
    return path, content


def _options(
    path: Path, content: dict[str, Any], defaults: dict[str, Any]
) -> Iterator[tuple[str, list[str]]]:
    """Each field with the words that set it on a command line; null leaves a field at its default."""
    for name, value in content.items():
        field = str(name).replace("-", "_")
        if field not in defaults:
            known = ", ".join(sorted(each.replace("_", "-") for each in defaults))
            fail(f"{path} has an option {name!r}, which is none of {known}", 2)
        if value is None and defaults[field] is None:
            continue
        try:
            words = _words(field, value, defaults[field])
        except (TypeError, ValueError) as error:
            fail(f"{path}: {name} {error}", 2)
        if words:
            yield field, words


def _words(field: str, value: Any, default: Any) -> list[str]:
    """The words for one field, none for a flag at its default; ValueError for a value of another kind."""
    flag = f"--{field.replace('_', '-')}"
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise ValueError(f"must be true or false, got {value!r}")
        return [] if value == default else [flag if value else f"--no-{flag[2:]}"]
    if field == "set" and isinstance(value, dict):
        return [flag, *(f"{key}={json.dumps(item)}" for key, item in value.items())]
    if value is None or isinstance(value, dict) or (isinstance(value, list) and field not in _LISTS):
        raise ValueError(f"must be {'a list' if field in _LISTS else 'one value'}, got {value!r}")
    items = value if isinstance(value, list) else [value]
    if field in _TEXTS and (wrong := [item for item in items if not isinstance(item, str)]):
        raise ValueError(f"must be text, in quotes where it looks like something else, got {wrong[0]!r}")
    return [flag, *map(str, items)]
