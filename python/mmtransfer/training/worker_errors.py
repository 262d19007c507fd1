"""Errors of the processes that decode clips, as the main process would raise them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from mmtransfer.data import DataError

_NAME = f"{DataError.__module__}.{DataError.__qualname__}: "


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """A DataError of a worker has its own message, without the traceback that torch makes a part of it."""
    try:
        yield
    except DataError as error:
        _, traceback, sentence = str(error).rpartition(_NAME)
        if not traceback:
            raise
        raise DataError(sentence.strip()) from error
