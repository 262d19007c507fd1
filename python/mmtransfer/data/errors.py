"""The one error that reading, fetching and converting data raises."""

from __future__ import annotations


class DataError(RuntimeError):
    """Data cannot be fetched, read or used; the message is one sentence with the remedy."""
