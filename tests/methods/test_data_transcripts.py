"""Manifests with transcripts, CSV and JSON lines, and what is left out of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from audio_files import write_tiny_clip

from mmtransfer.data import Clip, DataError, Recordings, from_manifest

NAMES = [f"{take}.wav" for take in range(10)]
TEXTS = [f"word {take}" for take in range(10)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, name in enumerate(NAMES):
        write_tiny_clip(tmp_path / name, number)
    return tmp_path


def write(folder: Path, *lines: str, name: str = "list.csv", end: str = "\n", start: str = "") -> Path:
    path = folder / name
    path.write_bytes((start + "".join(line + end for line in lines)).encode())
    return path


def write_json(folder: Path, *objects: Any, name: str = "list.jsonl", **style: str) -> Path:
    return write(folder, *(json.dumps(each, ensure_ascii=False) for each in objects), name=name, **style)


def objects(**more: Any) -> list[dict[str, Any]]:
    return [{"audio_filepath": name, "text": text, **more} for name, text in zip(NAMES, TEXTS, strict=True)]


def clips(recordings: Recordings) -> list[Clip]:
    return recordings.train + recordings.validation + recordings.test


def texts(recordings: Recordings) -> dict[str, str | None]:
    return {clip.source.name: clip.text for clip in clips(recordings) if isinstance(clip.source, Path)}


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(DataError) as refused:
        from_manifest(path, **options)
    return str(refused.value)


ROWS = [f"{name},{text}" for name, text in zip(NAMES, TEXTS, strict=True)]


class TestCSV:
    @pytest.mark.parametrize("column", ["text", "Sentence", "TRANSCRIPT", " transcription "])
    def test_names_of_the_column(self, folder, column):
        recordings = from_manifest(write(folder, f"path,{column}", *ROWS))
        assert recordings.transcribed
        assert recordings.classes == ()
        assert texts(recordings) == dict(zip(NAMES, TEXTS, strict=True))
        assert all(clip.label is None and clip.speaker is None for clip in clips(recordings))
        assert [len(recordings.train), len(recordings.test)] == [8, 2]
        assert recordings.describe() == "list: transcribed speech, train 8 clips (0 s), test 2 clips (0 s)"

    def test_the_draw_depends_on_names_and_seed_alone(self, folder):
        def drawn(rows: list[str], seed: int = 0) -> set[str]:
            return {
                clip.source.name for clip in from_manifest(write(folder, "path,text", *rows), seed=seed).test
            }

        assert drawn(ROWS) == drawn(ROWS[::-1]) == drawn([f"{folder}/{row} again" for row in ROWS])
        assert len({frozenset(drawn(ROWS, seed)) for seed in range(6)}) > 1

    @pytest.mark.parametrize(
        ("written", "text"),
        [
            ('" two  spaces "', "two  spaces"),
            ('"a, ""b"""', 'a, "b"'),
            ('"two\r\nlines"', "two\r\nlines"),
            ("cafe\u0301", "café"),
            ("null", "null"),
            ("007", "007"),
            ("ＡＢＣ ﬁ", "ＡＢＣ ﬁ"),
        ],
    )
    def test_texts_are_as_written(self, folder, written, text):
        assert (
            texts(from_manifest(write(folder, "path,text", f"0.wav,{written}", *ROWS[1:])))["0.wav"] == text
        )

    def test_two_columns_of_texts(self, folder):
        rows = [f"{row},again" for row in ROWS]
        message = refusal(write(folder, "path,sentence,transcript", *rows))
        assert "has the columns sentence, transcript for 'text'; call one of them text" in message
        recordings = from_manifest(write(folder, "path,text,transcript", *rows))
        assert recordings.ignored == ("column transcript",)
        assert texts(recordings)["0.wav"] == "word 0"

    def test_labels_and_texts(self, folder):
        rows = [f"{row},{'ab'[number % 2]}" for number, row in enumerate(ROWS)]
        path = write(folder, "path,sentence,label", *rows)
        message = refusal(path)
        assert (
            "list.csv has both labels and transcripts (label in line 2, text in line 2); keep one" in message
        )
        assert from_manifest(path, kind="label").classes == ("a", "b")
        assert from_manifest(path, kind="label").ignored == ("column sentence",)
        assert texts(from_manifest(path, kind="text"))["0.wav"] == "word 0"

    def test_an_empty_column_of_labels_next_to_texts(self, folder):
        recordings = from_manifest(
            write(folder, "path,label,text", *(row.replace(",", ",,") for row in ROWS))
        )
        assert recordings.transcribed
        assert recordings.ignored == ("column label",)

    def test_the_other_kind(self, folder):
        path = write(folder, "path,text", *ROWS)
        assert "list.csv lacks the column 'label'; expected path, label or text" in refusal(
            path, kind="label"
        )
        path = write(folder, "path,label", *ROWS)
        assert "list.csv lacks the column 'text'; expected path" in refusal(path, kind="text")
        with pytest.raises(ValueError, match="kind must be 'label', 'text' or None, got 'words'"):
            from_manifest(path, kind="words")

    def test_given_split_with_validation(self, folder):
        parts = ["train", "Dev", "test", "train", "train"] * 2
        rows = [f"{row},{part}" for row, part in zip(ROWS, parts, strict=True)]
        recordings = from_manifest(write(folder, "path,text,split", *rows))
        assert [clip.text for clip in recordings.validation] == ["word 1", "word 6"]
        assert [clip.text for clip in recordings.test] == ["word 2", "word 7"]
        assert [len(recordings.train), recordings.ignored] == [6, ()]

    def test_one_clip(self, folder):
        assert "line 2: list has one clip (" in refusal(write(folder, "path,text", ROWS[0]))

    def test_copies_with_another_transcript_are_said(self, folder, caplog):
        (folder / "1.wav").write_bytes((folder / "0.wav").read_bytes())
        from_manifest(write(folder, "path,text", *ROWS))
        assert "list has 1 copy of equal content with another transcript" in caplog.text


class TestUnusable:
    def test_is_left_out_counted_and_named(self, folder, caplog):
        (folder / "7.wav").write_bytes(b"RIFF")
        rows = [*ROWS[:2], "2.wav, ", "3.wav", *ROWS[4:]]
        recordings = from_manifest(write(folder, "path,text", *rows))
        assert set(texts(recordings)) == set(NAMES) - {"2.wav", "3.wav", "7.wav"}
        assert recordings.ignored == ("3 unusable clips (2.wav, 3.wav, 7.wav)",)
        assert recordings.describe().endswith("; ignored: 3 unusable clips (2.wav, 3.wav, 7.wav)")
        assert f"list.csv line 4: {folder / '2.wav'} has no text; write its transcript" in caplog.text
        assert f"list.csv line 9: {folder / '7.wav'} cannot be read as audio" in caplog.text

    def test_strict_stops_with_the_line(self, folder):
        path = write(folder, "path,text", *ROWS[:2], "2.wav,", *ROWS[3:])
        assert "list.csv line 4: " in refusal(path, strict=True)
        (folder / "5.wav").write_bytes(b"")
        path = write(folder, "path,text", *ROWS)
        assert f"list.csv line 7: {folder / '5.wav'} cannot be read" in refusal(path, strict=True)

    def test_more_than_half(self, folder):
        path = write(folder, "path,text", *ROWS[:4], *(f"{name}," for name in NAMES[4:]))
        message = refusal(path)
        assert "list has 10 clips, of which 6 cannot be used, the first for this: " in message
        assert "list.csv line 6: " in message
        assert from_manifest(write(folder, "path,text", *ROWS[:5], *(f"{n}," for n in NAMES[5:]))).ignored

    def test_missing_files_are_refused(self, folder):
        assert "lists 1 missing file (line 12: " in refusal(write(folder, "path,text", *ROWS, "gone.wav,x"))


class TestJSONLines:
    @pytest.mark.parametrize("name", ["list.jsonl", "list.json", "LIST.JSONL", "list.ndjson"])
    def test_as_nemo_writes_it(self, folder, name):
        recordings = from_manifest(write_json(folder, *objects(duration=0.03, offset=0.0), name=name))
        assert texts(recordings) == dict(zip(NAMES, TEXTS, strict=True))
        assert recordings.ignored == ("columns duration, offset",)

    @pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\n\n  \n"])
    @pytest.mark.parametrize("start", ["", "\ufeff"])
    def test_line_ends_empty_lines_and_byte_order_mark(self, folder, start, end):
        recordings = from_manifest(write_json(folder, *objects(), start=start, end=end))
        assert len(clips(recordings)) == 10

    def test_labels(self, folder):
        found = [{"path": name, "label": number % 2} for number, name in enumerate(NAMES)]
        assert from_manifest(write_json(folder, *found)).classes == ("0", "1")
        found = [{"path": name, "Label": number % 2 == 0} for number, name in enumerate(NAMES)]
        assert from_manifest(write_json(folder, *found)).classes == ("false", "true")

    def test_numbers_are_as_written(self, folder):
        lines = [f'{{"path": "{name}", "text": 1.{number}0}}' for number, name in enumerate(NAMES)]
        recordings = from_manifest(write(folder, *lines, name="list.jsonl"))
        assert texts(recordings)["3.wav"] == "1.30"

    def test_texts_with_every_line_end(self, folder):
        text = "one\ntwo\r\nthree\u2028four\u0085five\x0csix"
        found = objects()
        found[0]["text"] = f" {text}\t"
        assert texts(from_manifest(write_json(folder, *found)))["0.wav"] == text

    def test_null_and_missing_texts_are_left_out(self, folder):
        found = objects()
        found[1]["text"] = None
        del found[2]["text"]
        assert from_manifest(write_json(folder, *found)).ignored == ("2 unusable clips (1.wav, 2.wav)",)

    def test_speaker_and_split(self, folder):
        found = objects(split="train", speaker=7)
        found[4].update(split="test", speaker="anna")
        recordings = from_manifest(write_json(folder, *found))
        assert {clip.speaker for clip in recordings.train} == {"7"}
        assert [(clip.text, clip.speaker) for clip in recordings.test] == [("word 4", "anna")]

    def test_lines_that_mix_labels_and_texts(self, folder):
        found = objects()
        found[3] = {"path": "3.wav", "label": "dog"}
        found = [{"path": each.get("audio_filepath", "3.wav"), **each} for each in found]
        message = refusal(write_json(folder, *found))
        assert "list.jsonl has both labels and transcripts (label in line 4, text in line 1)" in message

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            (
                '{"path": "0.wav"',
                "line 3 cannot be read as JSON (Expecting ',' delimiter in column 17); write",
            ),
            ("0.wav,some words", "line 3 cannot be read as JSON (Extra data in column 2); write one object"),
            ('["0.wav", "some words"]', "line 3 is no JSON object; write one object per line"),
            ('{"path": "0.wav", "text": ["some"]}', "line 3 has a list as 'text'; text is needed"),
            ('{"path": {"bytes": 0}, "text": "a"}', "line 3 has an object as 'path'; text is needed"),
            ('{"text": "a", "text": "b"}', "line 3 cannot be read as JSON ('text' comes twice); write one"),
            ('{"path": "0.wav", "text": "\\ud800"}', "line 3 has characters in text that Unicode lacks"),
            ('{"text": "a"}', "line 3 has no path; every line needs path and text"),
            ('{"path": "\\u0000", "text": "a"}', "lists 1 missing file (line 3: "),
            ("[" * 100_000, "line 3 cannot be read as JSON ("),
        ],
    )
    def test_bad_lines(self, folder, line, message):
        found = [json.dumps({"path": name, "text": "a"}) for name in NAMES[1:]]
        path = write(folder, found[0], "", line, *found[1:], name="list.jsonl")
        assert f"list.jsonl {message}" in refusal(path)

    def test_two_spellings_of_a_column(self, folder):
        found = objects()
        found[3]["Text"] = "other"
        assert "has the columns text, text for 'text'" in refusal(write_json(folder, *found))

    def test_other_columns_may_hold_anything(self, folder):
        found = objects(words=[{"start": 0.1}], meta={"a": None}, score=float("nan"))
        assert from_manifest(write_json(folder, *found)).ignored == ("columns words, meta, score",)

    def test_pieces_of_long_recordings(self, folder):
        found = objects(offset=0)
        found[6]["offset"] = 2.5
        message = refusal(write_json(folder, *found))
        assert "list.jsonl line 7 has the offset 2.5, and whole files are read; cut the pieces out" in message

    def test_a_missing_column(self, folder):
        message = refusal(write_json(folder, *({"path": name, "words": "a"} for name in NAMES)))
        assert message.endswith(
            "lacks the column 'label' or 'text'; expected path, label or text, and optionally split and "
            "speaker, found path,words"
        )
        assert "lacks the column 'path'" in refusal(write(folder, name="list.jsonl"))

    def test_utf_16(self, folder):
        path = folder / "list.jsonl"
        path.write_bytes("\n".join(json.dumps(each) for each in objects()).encode("utf-16"))
        assert "list.jsonl cannot be read as a JSON lines manifest" in refusal(path)
        assert refusal(path).endswith("save it as UTF-8")

    def test_a_file_in_two_parts(self, folder):
        found = [*objects(split="train"), {"audio_filepath": "./3.wav", "text": "a", "split": "test"}]
        assert "twice, in line 4 and line 11; list it once" in refusal(write_json(folder, *found))
