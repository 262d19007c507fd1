"""Errors of found boundaries against true ones."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

#: Shares of boundaries within so many milliseconds.
LIMITS = (50, 100)


@dataclass(frozen=True)
class Span:
    """Words of a text, `first` to `last`, whose sound is known to begin and end at these seconds.

    None: it is not known when.
    """

    first: int
    last: int
    start: float | None
    end: float | None


@dataclass(frozen=True)
class Times:
    """Seconds of a word."""

    start: float
    end: float


def signed_errors(words: Sequence[Any], spans: Sequence[Span]) -> dict[str, list[float]]:
    """Milliseconds by which found times are late: starts of the spans' first words, ends of their last.

    Args:
        words: all words of the text, with `start` and `end` in seconds.
        spans: with known times.
    """
    starts = [(words[span.first].start, span.start) for span in spans]
    ends = [(words[span.last].end, span.end) for span in spans]
    return {
        edge: [1e3 * (found - true) for found, true in pairs if true is not None]
        for edge, pairs in (("start", starts), ("end", ends))
    }


def summaries(errors: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """`summary` of each edge of words that has a known time."""
    return {edge: summary(values) for edge, values in errors.items() if values}


def summary(errors: Sequence[float]) -> dict[str, Any]:
    """What a record keeps of signed errors in milliseconds.

    `bias` is their median; `mean`, `median` and `p95` are of absolute errors, as are the shares `within_50`
    and `within_100`. `steady` is the median absolute error that is left without the bias. `percentiles` are
    those of absolute errors, from 0 to 100 in steps of 2.
    """
    signed = np.asarray(errors, dtype=np.float64)
    absolute = np.abs(signed)
    bias = float(np.median(signed))
    return {
        "count": len(signed),
        "bias": bias,
        "mean": float(absolute.mean()),
        "median": float(np.median(absolute)),
        "p95": float(np.percentile(absolute, 95)),
        **{f"within_{limit}": float((absolute <= limit).mean()) for limit in LIMITS},
        "steady": float(np.median(np.abs(signed - bias))),
        "percentiles": np.percentile(absolute, range(0, 101, 2)).tolist(),
    }


def spread_evenly(text: str, start: float, end: float) -> list[Times]:
    """The words spread from `start` to `end` by their letters; a space counts as one."""
    words = text.split()
    sizes = [len(word) for word in words]
    per_letter = (end - start) / (sum(sizes) + len(sizes) - 1)
    places = itertools.accumulate((size + 1 for size in sizes[:-1]), initial=0)
    return [
        Times(start + place * per_letter, start + (place + size) * per_letter)
        for place, size in zip(places, sizes, strict=True)
    ]
