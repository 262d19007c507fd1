"""Alignments as files that other programs read."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from .aligner import AlignedText, Word

#: Characters and seconds of a subtitle.
_CUE_CHARACTERS, _CUE_SECONDS = 84, 7.0
_SENTENCE_END = re.compile(r"[.!?…。！？]['\"”’»)\]]*$")


@dataclass(frozen=True)
class Format:
    """A format: the suffix of its files, and their text for an alignment and the name of its recording."""

    suffix: str
    write: Callable[[AlignedText, str], str]


def textgrid(found: AlignedText, name: str) -> str:
    """Praat's TextGrid, long format: a tier of words, and one of tokens."""
    tiers = [
        ("words", _with_durations(found.words)),
        ("tokens", [(token.start, token.end, token.text) for token in found.tokens]),
    ]
    lines = ['File type = "ooTextFile"', 'Object class = "TextGrid"', ""]
    lines += [
        "xmin = 0",
        f"xmax = {_number(found.seconds)}",
        "tiers? <exists>",
        f"size = {len(tiers)}",
        "item []:",
    ]
    for number, (tier, rows) in enumerate(tiers, start=1):
        intervals = list(_without_gaps(rows, found.seconds))
        lines += [
            f"    item [{number}]:",
            '        class = "IntervalTier"',
            f"        name = {_quoted(tier)}",
        ]
        lines += ["        xmin = 0", f"        xmax = {_number(found.seconds)}"]
        lines.append(f"        intervals: size = {len(intervals)}")
        for place, (start, end, text) in enumerate(intervals, start=1):
            lines += [f"        intervals [{place}]:", f"            xmin = {_number(start)}"]
            lines += [f"            xmax = {_number(end)}", f"            text = {_quoted(text)}"]
    return "\n".join(lines) + "\n"


def ctm(found: AlignedText, name: str) -> str:
    """NIST's CTM: recording, channel, start, duration, word, confidence (NA where there is none)."""
    recording = re.sub(r"\s+", "_", name)
    # Punctuation alone is no word of a CTM.
    return "".join(
        f"{recording} 1 {word.start:.3f} {word.end - word.start:.3f} {word.text} "
        f"{'NA' if word.score is None else f'{word.score:.4f}'}\n"
        for word in found.words
        if word.end > word.start
    )


def table(found: AlignedText, name: str) -> str:
    """CSV: start, end, word, score, exact, line."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["start", "end", "word", "score", "exact", "line"])
    for word in found.words:
        score = "" if word.score is None else f"{word.score:.4f}"
        exact = "true" if word.exact else "false"
        writer.writerow([f"{word.start:.3f}", f"{word.end:.3f}", word.text, score, exact, word.line + 1])
    return text.getvalue()


def as_json(found: AlignedText, name: str) -> str:
    """JSON: all that is known, times and scores rounded to 0.1 ms and 0.0001."""
    record = {
        # A name that is not UTF-8 would make the file none.
        "audio": name.encode("utf-8", "surrogateescape").decode("utf-8", "replace"),
        "seconds": round(found.seconds, 4),
        "score": round(found.score, 4),
        "words": [
            {
                "text": word.text,
                "start": round(word.start, 4),
                "end": round(word.end, 4),
                "score": None if word.score is None else round(word.score, 4),
                "exact": word.exact,
                "line": word.line + 1,
            }
            for word in found.words
        ],
        "tokens": [
            {
                "text": token.text,
                "start": round(token.start, 4),
                "end": round(token.end, 4),
                "score": round(token.score, 4),
                "word": token.word,
            }
            for token in found.tokens
        ],
    }
    return json.dumps(record, ensure_ascii=False, indent=1) + "\n"


def srt(found: AlignedText, name: str) -> str:
    """SubRip: a subtitle for each line of the text, or part of a long one."""
    blocks = []
    for number, words in enumerate(_cues(found.words), start=1):
        times = f"{_clock(words[0].start)} --> {_clock(words[-1].end)}"
        blocks.append(f"{number}\n{times}\n{' '.join(word.text for word in words)}\n")
    return "\n".join(blocks)


#: By the names of `--formats`.
FORMATS = {
    "textgrid": Format(".TextGrid", textgrid),
    "ctm": Format(".ctm", ctm),
    "csv": Format(".csv", table),
    "json": Format(".json", as_json),
    "srt": Format(".srt", srt),
}


def _with_durations(words: Sequence[Word]) -> list[tuple[float, float, str]]:
    """The words; those of punctuation alone, which last no time, go to the one before, else to the next."""
    rows: list[tuple[float, float, str]] = []
    waiting = ""
    for word in words:
        if word.end > word.start:
            rows.append((word.start, word.end, waiting + word.text))
            waiting = ""
        elif rows:
            start, end, text = rows[-1]
            rows[-1] = start, end, f"{text} {word.text}"
        else:
            waiting += f"{word.text} "
    return rows


def _without_gaps(
    rows: Sequence[tuple[float, float, str]], seconds: float
) -> Iterator[tuple[float, float, str]]:
    """The rows and the silences between them, which a tier must cover too."""
    reached = 0.0
    for begin, end, text in rows:
        # As they are written: a silence that rounds to nothing is none.
        start = max(round(begin, 6), reached)
        if start > reached:
            yield reached, start, ""
        reached = round(end, 6)
        yield start, reached, text
    if round(seconds, 6) > reached:
        yield reached, seconds, ""


def _number(seconds: float) -> str:
    return f"{seconds:.6f}".rstrip("0").rstrip(".")


def _quoted(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'


def _cues(words: Sequence[Word]) -> Iterator[list[Word]]:
    cue: list[Word] = []
    for word in words:
        if cue and not _fits(cue, word):
            yield cue
            cue = []
        cue.append(word)
    if cue:
        yield cue


def _fits(cue: list[Word], word: Word) -> bool:
    characters = sum(len(each.text) + 1 for each in cue) + len(word.text)
    return (
        word.line == cue[0].line
        and characters <= _CUE_CHARACTERS
        and word.end - cue[0].start <= _CUE_SECONDS
        and not _SENTENCE_END.search(cue[-1].text)
    )


def _clock(seconds: float) -> str:
    milliseconds = round(seconds * 1000)
    minutes, rest = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02}:{minutes % 60:02}:{rest // 1000:02},{rest % 1000:03}"
