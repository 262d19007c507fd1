"""A folder of results: checked before the work, files written whole."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

from mmtransfer.checkpoint import replace_file
from mmtransfer.data.audio import read_audio
from mmtransfer.data.errors import DataError, first

from .aligner import AlignedText, Aligner
from .formats import FORMATS
from .pairs import Pair, Pairs

_FIGURE = ".png"


class Results:
    """Writes the files of alignments.

    Args:
        folder: made where it is missing; `Pair.name` is relative to it.
        formats: names in `FORMATS`.
        figures: whether to draw each recording, from second `start` on.
        overwrite: replace files that are there, but for those that are read.

    OSError if the folder cannot be made.
    """

    def __init__(
        self, folder: Path, formats: Sequence[str], *, figures: bool, start: float, overwrite: bool
    ) -> None:
        self.folder, self.formats = folder, list(dict.fromkeys(formats))
        self.figures, self.start, self.overwrite = figures, start, overwrite
        folder.mkdir(parents=True, exist_ok=True)

    def check(self, found: Pairs) -> None:
        """DataError if a result would replace a file that is read, or, without `overwrite`, any other."""
        sources = {os.path.realpath(source) for source in found.sources}
        there = [
            path for pair in found.pairs if pair.name for path in self._paths(pair) if os.path.lexists(path)
        ]
        if read := [str(path) for path in there if os.path.realpath(path) in sources]:
            raise DataError(
                f"the results would replace {first(read, 'input', 'inputs')}; give another --output"
            )
        if there and not self.overwrite:
            listed = first(list(map(str, there)), "file", "files")
            raise DataError(f"{self.folder} holds {listed} already; --overwrite replaces them")

    def write(self, pair: Pair, found: AlignedText, aligner: Aligner) -> None:
        """All files of one recording."""
        paths = self._paths(pair)
        paths[0].parent.mkdir(parents=True, exist_ok=True)
        for name, path in zip(self.formats, paths, strict=False):
            content = FORMATS[name].write(found, pair.name).encode("utf-8", "surrogateescape")
            replace_file(path, partial(Path.write_bytes, data=content))
        if self.figures:
            self._draw(pair, found, aligner, paths[-1])

    def _paths(self, pair: Pair) -> list[Path]:
        """A file for each format, then the figure."""
        suffixes = [FORMATS[name].suffix for name in self.formats] + [_FIGURE] * self.figures
        base = self.folder / pair.name
        return [base.with_name(base.name + suffix) for suffix in suffixes]

    def _draw(self, pair: Pair, found: AlignedText, aligner: Aligner, path: Path) -> None:
        # Imported here: matplotlib takes a second.
        from .figure import LONGEST, draw

        if self.start > found.seconds - found.posteriors.seconds_per_frame:
            end = f"the end of {pair.audio}, {found.seconds:.1f} s"
            raise DataError(f"--figure-start {self.start:g} lies behind {end}")
        rate = aligner.sampling_rate
        samples = read_audio(pair.audio, rate, self.start + LONGEST)[round(self.start * rate) :]
        draw(found, samples, rate, path, start=self.start, title=pair.name)


def describe(pair: Pair, found: AlignedText) -> str:
    """A line about an alignment."""
    marked = sum(not word.exact for word in found.words)
    return (
        f"{pair.audio}\t{len(found.words)} words{f', {marked} marked' if marked else ''}, "
        f"{found.seconds:.1f} s, mean score {found.score:.2f}"
    )


def sentence(pair: Pair, error: Exception) -> str:
    """An error in one line that names the recording."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if str(pair.audio) in text else f"{pair.audio}: {text}"


def left_out(notes: Iterable[str]) -> str:
    """One sentence on what lies in the folders besides, "" for nothing."""
    notes = list(notes)
    return f"left out: {', '.join(notes)}" if notes else ""
