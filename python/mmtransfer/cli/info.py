"""`mmtransfer info` and `mmtransfer methods`."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from .imports import import_files
from .options import describe_options

if TYPE_CHECKING:
    from mmtransfer.method import Method

#: Files of methods and tasks, for commands that know methods.
Imports = Annotated[tuple[Path, ...], tyro.conf.UseAppendAction, tyro.conf.arg(name="import", metavar="FILE")]
_WIDTH = 100


def info() -> None:
    """Print versions, devices, and which backend runs each kernel here."""
    from mmkernels._info import collect, render

    print(render(collect()))


def methods(import_: Imports = ()) -> None:
    """Print the methods, their papers and their options (`--set option=value`).

    Args:
        import_: Python file that registers methods of yours.
    """
    import_files(import_)
    from mmtransfer import registry

    kinds: dict[str, str] = {}
    for method in registry.methods().values():
        found = method()
        kinds["edit" if found.has_edit else "readout"] = found.name
        print("\n".join(_lines(found)))
    print(f"\nA readout + an edit is a method too: {kinds['readout']}+{kinds['edit']}; so are several edits")


def _lines(method: Method) -> Iterator[str]:
    kind = "edit" if method.has_edit else "readout"
    yield from _wrap(f"{method.name:18} {kind:8} {method.about()}", 28)
    for each in describe_options(method):
        meaning = f"; {each.meaning}" if each.meaning else ""
        yield from _wrap(f"    {each.name}={each.default}  ({each.allowed}){meaning}", 8)


def _wrap(text: str, indent: int) -> list[str]:
    return textwrap.wrap(text, _WIDTH, subsequent_indent=" " * indent, break_long_words=False)
