"""All methods by name: those of the papers' folders, those registered by users, and combinations."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mmtransfer.method import Combination, Method, check_combination

#: The folders with methods; a new paper adds its name here.
PAPERS = ("baselines", "hff", "aat", "mam", "ssr")

_registered: dict[str, type[Method]] = {}


def register(method: type[Method]) -> type[Method]:
    """Make a method known by its name, on the command line too; usable as a decorator.

    ValueError if another method has the name, or if it is not letters, digits, "-" and "_" alone. TypeError
    for what is no class of methods, or one without name, title or paper.
    """
    if not (isinstance(method, type) and issubclass(method, Method)):
        raise TypeError(f"register takes a class of methods, got {method!r}")
    for attribute in ("name", "title", "paper"):
        if not isinstance(getattr(method, attribute, None), str):
            raise TypeError(f"{method.__name__} must have a class attribute {attribute}, a text")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", method.name):
        raise ValueError(f"the name of a method must be letters, digits, '-' and '_', got {method.name!r}")
    if methods().get(method.name, method) is not method:
        raise ValueError(f"a method is called {method.name!r} already")
    _registered[method.name] = method
    return method


def unregister(name: str) -> None:
    """Forget a method that `register` made known."""
    del _registered[name]


def methods() -> dict[str, type[Method]]:
    """Every method but the combinations, by name."""
    return {**_published(), **_registered}


def default_names() -> tuple[str, ...]:
    """The methods that a comparison runs if none are named, as the papers' folders list them."""
    return tuple(name for paper in PAPERS for name in _folder(paper).COMPARED)


def find(name: str | Method, /, **options: Any) -> Method:
    """The method of a name, `"aat-ms"`, or of a readout and an edit, `"hff-b+aat-ms"`, or of several edits,
    `"l-mam+aat-ms"`.

    Args:
        name: of the method; a method itself is returned with the options changed.
        options: fields of the method. In a combination an option goes to each part that has it; a dictionary
            under the name of a part, as in checkpoints, is for that part alone, and wins.

    Raises:
        TypeError: neither a name nor a method; a class must be called first.
        ValueError: no such method, methods that do not go together, an unknown option, or a value out of
            range.
    """
    if not isinstance(name, (Method, str)):
        is_class = isinstance(name, type) and issubclass(name, Method)
        given = f"the class {name.__name__}; write {name.__name__}()" if is_class else repr(name)
        raise TypeError(f"method must be a name or a Method, got {given}")
    if isinstance(name, Method):
        parts = list(name.parts())
    else:
        parts = [_class(part)() for part in name.split("+")]
        _check_parts(parts)
    changes = _distribute(parts, options)
    changed = [
        dataclasses.replace(part, **change) if change else part
        for part, change in zip(parts, changes, strict=True)
    ]
    return changed[0] if len(changed) == 1 else Combination(of=tuple(changed))


def has_option(method: Method, key: str) -> bool:
    """Whether `find(method, **{key: ...})` knows the option: a field of a part, or the name of a part."""
    return any(key == part.name or key in _fields(part) for part in method.parts())


def _check_parts(parts: list[Method]) -> None:
    if len(parts) == 1:
        return
    try:
        check_combination(parts)
    except ValueError as error:
        known = [method() for method in methods().values()]
        readouts = ", ".join(each.name for each in known if each.has_readout)
        edits = ", ".join(each.name for each in known if each.has_edit)
        raise ValueError(
            f"{str(error).partition(';')[0]}; readouts are {readouts}; edits are {edits}"
        ) from None


def _distribute(parts: list[Method], options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The options of each part."""
    changes: list[dict[str, Any]] = [{} for _ in parts]
    for key, value in in_order(options):
        if isinstance(value, Mapping):
            owners = [(index, dict(value)) for index, part in enumerate(parts) if part.name == key]
        else:
            owners = [(index, {key: value}) for index, part in enumerate(parts) if key in _fields(part)]
        if not owners:
            raise ValueError(_no_option(parts, key))
        for index, change in owners:
            if unknown := change.keys() - _fields(parts[index]):
                raise ValueError(_no_option([parts[index]], sorted(unknown)[0]))
            # JSON and YAML have lists where a frozen dataclass needs tuples.
            changes[index] |= {
                name: tuple(item) if isinstance(item, (list, range)) else item
                for name, item in change.items()
            }
    return changes


def in_order(options: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Options for all, then those for a part alone: the later win."""
    return sorted(options.items(), key=lambda item: isinstance(item[1], Mapping))


def _no_option(parts: Sequence[Method], key: str) -> str:
    known = sorted({name for part in parts for name in _fields(part)})
    return (
        f"{'+'.join(part.name for part in parts)} has no option {key!r}; it has {', '.join(known) or 'none'}"
    )


def _fields(method: Method) -> set[str]:
    return {each.name for each in dataclasses.fields(method)}


def _class(name: str) -> type[Method]:
    known = methods()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"no method is called {name!r}; choose from {', '.join(known)}{hint} (separate names by spaces; "
            "registry.register makes your methods known)"
        )
    return known[name]


@functools.cache
def _published() -> dict[str, type[Method]]:
    return {method.name: method for paper in PAPERS for method in _folder(paper).METHODS}


def _folder(paper: str) -> Any:
    return importlib.import_module(f"mmtransfer.{paper}")
