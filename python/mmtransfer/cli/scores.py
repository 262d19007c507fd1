"""Scores in words."""

from __future__ import annotations

from collections.abc import Mapping


def describe_scores(scores: Mapping[str, float]) -> str:
    """`cer 12.3%, wer 40.1%`."""
    return ", ".join(f"{name} {score:.1%}" for name, score in scores.items())
