"""The one error that reading, fetching and converting data raises, and how messages list things."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


class DataError(RuntimeError):
    """Data cannot be fetched, read or used; the message is one sentence with the remedy."""


def first(items: Sequence[str], singular: str, plural: str, count: int = 3) -> str:
    """`5 files (a, b, c, ...)`: how many, and the first `count` of them."""
    return f"{len(items)} {singular if len(items) == 1 else plural} ({shortened(items, count)})"


def shortened(items: Iterable[str], count: int) -> str:
    """`a, b, c, ...`: the first `count` of `items`."""
    items = list(items)
    return ", ".join(items[:count]) + (", ..." if len(items) > count else "")


def counted(number: int, singular: str, plural: str | None = None) -> str:
    """`1 clip` or `2 clips`."""
    return f"{number} {singular if number == 1 else plural or singular + 's'}"


def shown(value: Any, most: int = 100) -> str:
    """A value in a message, of which some are the content of files."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."
