"""Passages of plain text, a line each, for training on text alone."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from mmtransfer.data import DataError


class Passages:
    """The lines of a file that are not empty. It is read when it is first needed: loading a checkpoint to
    predict needs none.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    @functools.cached_property
    def lines(self) -> list[str]:
        """DataError for a file that cannot be read, or has no text."""
        try:
            text = Path(self.path).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"the text {self.path} cannot be read ({error}); give a file in UTF-8") from error
        lines = [line.strip() for line in text.splitlines()]
        if not any(lines):
            raise DataError(f"the text {self.path} is empty; it needs a passage a line")
        return [line for line in lines if line]

    def draw(self, count: int) -> list[str]:
        """Lines drawn by torch's generator, so that a seed repeats them."""
        return [self.lines[index] for index in torch.randint(len(self.lines), (count,)).tolist()]
