"""The files of alignments, read back."""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
from pathlib import Path

import pytest
import torch
from tone_model import RATE, ToneModel, speak

from mmtransfer.align import AlignedText, Aligner, Posteriors, Token, Word
from mmtransfer.align.figure import draw
from mmtransfer.align.formats import FORMATS

NONE = Posteriors(torch.zeros(0, 1), ("",), torch.zeros(0, dtype=torch.int64), (), 0.02)


def word(text: str, start: float, end: float, line: int = 0, score: float | None = 0.5) -> Word:
    return Word(text, start, end, score, score is not None, line)


def aligned(*words: Word, seconds: float = 10.0) -> AlignedText:
    tokens = tuple(Token(each.text[0], each.start, each.end, 0.5, i) for i, each in enumerate(words))
    return AlignedText(words, tokens, seconds, NONE)


def read_textgrid(text: str) -> dict[str, list[tuple[float, float, str]]]:
    """The interval tiers of the long format, read by its keys as Praat does."""
    assert text.startswith('File type = "ooTextFile"\nObject class = "TextGrid"\n\nxmin = 0\n')
    tiers = {}
    for block in re.split(r"    item \[\d+\]:\n", text)[1:]:
        name = re.search(r'name = "(\w+)"', block)[1]
        rows = re.findall(
            r'intervals \[\d+\]:\n +xmin = (\S+)\n +xmax = (\S+)\n +text = "((?:[^"]|"")*)"', block
        )
        assert int(re.search(r"intervals: size = (\d+)", block)[1]) == len(rows)
        tiers[name] = [(float(a), float(b), label.replace('""', '"')) for a, b, label in rows]
    assert int(re.search(r"\nsize = (\d+)", text)[1]) == len(tiers)
    return tiers


def test_textgrid_covers_the_recording() -> None:
    third = 0.1 + 0.2  # not 0.3
    found = aligned(
        word('„Říkal"', 0.5, 0.9), word("b", 0.9, 1 + third), word("c", 1.3, 9.99999999999), seconds=10.0
    )
    tiers = read_textgrid(FORMATS["textgrid"].write(found, "x"))
    assert [text for _, _, text in tiers["words"]] == ["", '„Říkal"', "b", "c"]
    for rows in tiers.values():
        assert rows[0][0] == 0
        assert rows[-1][1] == 10
        for (_, end, _), (start, _, _) in itertools.pairwise(rows):
            assert end == start
        assert all(start < end for start, end, _ in rows)


def test_ctm() -> None:
    found = aligned(word("Dobrý", 0.5, 0.9, score=0.98765), word("25%", 0.9, 1.25, score=None))
    assert FORMATS["ctm"].write(found, "a clip") == (
        "a_clip 1 0.500 0.400 Dobrý 0.9877\na_clip 1 0.900 0.350 25% NA\n"
    )


def test_csv_and_json() -> None:
    found = aligned(word('a,"b"', 0.5, 0.9), word("25%", 0.9, 1.25, 3, None))
    rows = list(csv.DictReader(io.StringIO(FORMATS["csv"].write(found, "x"))))
    assert rows[0] == {
        "start": "0.500",
        "end": "0.900",
        "word": 'a,"b"',
        "score": "0.5000",
        "exact": "true",
        "line": "1",
    }
    assert (rows[1]["score"], rows[1]["exact"], rows[1]["line"]) == ("", "false", "4")
    record = json.loads(FORMATS["json"].write(found, "x"))
    assert record["audio"] == "x"
    assert record["seconds"] == 10
    assert record["score"] == 0.5
    assert record["words"][1] == {
        "text": "25%",
        "start": 0.9,
        "end": 1.25,
        "score": None,
        "exact": False,
        "line": 4,
    }
    assert record["tokens"][0] == {"text": "a", "start": 0.5, "end": 0.9, "score": 0.5, "word": 0}


def test_srt_follows_lines_sentences_and_lengths() -> None:
    words = [
        word("Ano.", 0.0, 0.5),
        word("Proč", 0.6, 1.0),
        word("ne?“", 1.0, 1.5),
        word("Nová", 3661.0, 3661.2, 1),
        word("řádka", 3661.9996, 3663.0, 1),
        word("později", 3672.0, 3673.0, 1),
    ]
    assert FORMATS["srt"].write(aligned(*words), "x") == (
        "1\n00:00:00,000 --> 00:00:00,500\nAno.\n\n"
        "2\n00:00:00,600 --> 00:00:01,500\nProč ne?“\n\n"
        "3\n01:01:01,000 --> 01:01:03,000\nNová řádka\n\n"
        "4\n01:01:12,000 --> 01:01:13,000\npozději\n"
    )
    long = [word("abcdefghi", i / 10, (i + 1) / 10) for i in range(30)]
    lines = FORMATS["srt"].write(aligned(*long), "x").split("\n\n")
    assert all(len(each.splitlines()[2]) <= 84 for each in lines)
    assert len(lines) == 4


@pytest.mark.parametrize(("start", "suffix"), [(0.0, ".png"), (0.5, ".svg"), (5.0, ".png")])
def test_figure(tmp_path: Path, start: float, suffix: str) -> None:
    """The same bytes again; a part without a token is drawn too."""
    text = "abc_ab dd fac_g h bad_ cafe________________________________________________" + "_" * 60
    samples = speak(text)
    found = Aligner(ToneModel()).align(samples, text.replace("_", ""))
    pictures = []
    for name in ("one", "two"):
        path = tmp_path / f"{name}{suffix}"
        draw(found, samples[round(start * RATE) :], RATE, path, start=start, title="a clip")
        pictures.append(path.read_bytes())
    assert len(pictures[0]) > 5000
    if suffix == ".png":
        assert pictures[0] == pictures[1]
