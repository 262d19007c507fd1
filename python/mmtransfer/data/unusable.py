"""Clips that cannot be used: left out, counted and named, or refused."""

from __future__ import annotations

import logging

from .errors import DataError, counted, first

_logger = logging.getLogger(__name__)
_SHOWN = 3


class Unusable:
    """Broken or too short audio, and transcripts without text.

    Args:
        strict: whether the first such clip is an error.
    """

    def __init__(self, strict: bool) -> None:
        self._strict = strict
        self._names: list[str] = []
        self._reasons: list[str] = []

    def add(self, name: str, reason: str) -> None:
        """Leave the clip called `name` out; DataError with the `reason`, a whole sentence, if strict."""
        if self._strict:
            raise DataError(reason)
        self._names.append(name)
        self._reasons.append(reason)

    def ignored(self, source: str, total: int) -> list[str]:
        """The part of `Recordings.ignored`, which is logged with the reasons.

        DataError if more than half of the `total` clips of `source` cannot be used: then all of them are
        probably meant otherwise.
        """
        if not self._names:
            return []
        if 2 * len(self._names) > total:
            raise DataError(
                f"{source} has {counted(total, 'clip')}, of which {len(self._names)} cannot be used, "
                f"the first for this: {self._reasons[0]}"
            )
        _logger.warning(
            "%s: left out %s: %s",
            source,
            counted(len(self._names), "clip that cannot be used", "clips that cannot be used"),
            "; ".join(self._reasons[:_SHOWN]) + ("; ..." if len(self._reasons) > _SHOWN else ""),
        )
        return [first(self._names, "unusable clip", "unusable clips", _SHOWN)]
