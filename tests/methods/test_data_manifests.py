"""CSV manifests: headers, encodings, quotes and lines as programs write them, and messages of refusals."""

from __future__ import annotations

import os
import re
import shutil
import unicodedata
from pathlib import Path

import pytest
import soundfile
from audio_files import tone, write_tiny_clip

from mmtransfer.data import DataError, from_folder, from_manifest

NAMES = [f"{label}/{take}.wav" for label in ("crow", "owl") for take in range(4)]
#: All clips with their labels, in the order of the columns path and label.
ROWS = [f"{name},{name.split('/')[0]}" for name in NAMES]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, name in enumerate(NAMES):
        write_tiny_clip(tmp_path / name, number)
    return tmp_path


def write(folder: Path, *lines: str, end: str = "\n", encoding: str = "utf-8") -> Path:
    path = folder / "list.csv"
    path.write_bytes("".join(line + end for line in lines).encode(encoding))
    return path


def refusal(path: Path) -> str:
    with pytest.raises(DataError) as refused:
        from_manifest(path)
    return str(refused.value)


class TestHeader:
    @pytest.mark.parametrize(
        "header",
        [
            "path,label",
            "Path,Label",
            "PATH,LABEL",
            "path, label",
            " path , label ",
            '"path", "label"',
            "file_name,label",
            "File Name,Label",
            "filename,label",
            "audio,label",
            "file-path,label",
            "audio_filepath,label",
        ],
    )
    def test_names_of_columns(self, folder, header):
        recordings = from_manifest(write(folder, header, *ROWS))
        assert recordings.classes == ("crow", "owl")
        assert len(recordings.train) + len(recordings.test) == 8
        assert recordings.ignored == ()

    @pytest.mark.parametrize("delimiter", [";", "\t", "|", " ; ", ", "])
    def test_delimiters(self, folder, delimiter):
        lines = [line.replace(",", delimiter) for line in ["path,label", *ROWS]]
        assert from_manifest(write(folder, *lines)).classes == ("crow", "owl")

    @pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
    def test_line_ends_and_byte_order_mark(self, folder, end, encoding):
        path = write(
            folder, "path;label", *(row.replace(",", ";") for row in ROWS), end=end, encoding=encoding
        )
        assert from_manifest(path).classes == ("crow", "owl")

    @pytest.mark.parametrize(
        ("header", "column", "found"),
        [
            ("file;class", "path", "file,class"),
            ("Path,Class ID", "label", "path,class_id"),
            ("crow/0.wav,crow", "path", "crow/0.wav,crow"),
            ("file_name,words", "label", "file_name,words"),
            ("path label", "path", "path_label"),
            (",".join(f"column{index}" for index in range(20)), "path", "column7,..."),
        ],
    )
    def test_a_missing_column_shows_those_that_are_there(self, folder, header, column, found):
        message = refusal(write(folder, header, *ROWS))
        missing = {"path": "'path'", "label": "'label' or 'text'"}[column]
        assert f"lacks the column {missing}; expected path, label or text, and optionally split" in message
        assert message.endswith(found)

    def test_path_is_used_before_its_synonyms(self, folder):
        rows = [f"elsewhere.wav,{row}" for row in ROWS]
        recordings = from_manifest(write(folder, "filename,path,label", *rows))
        assert recordings.ignored == ("column filename",)

    @pytest.mark.parametrize(
        ("header", "message"),
        [
            ("audio,file_name,label", "the columns audio, file_name for 'path'; call one of them path"),
            ("path,label,Label", "the columns label, label for 'label'"),
        ],
    )
    def test_two_columns_for_one(self, folder, header, message):
        assert message in refusal(write(folder, header, *(f"{row},x" for row in ROWS)))

    def test_other_columns_are_said(self, folder):
        rows = [f"{index},{row},x,1" for index, row in enumerate(ROWS)]
        recordings = from_manifest(write(folder, ",path,label,Notes,fold", *rows))
        assert recordings.describe().endswith("; ignored: columns (unnamed), notes, fold")

    @pytest.mark.parametrize("name", ["subset", "Set", "partition", "fold"])
    def test_a_split_by_another_name(self, folder, name):
        rows = [
            f"{row},{part}" for row, part in zip(ROWS, ["train", "train", "Val", "test"] * 2, strict=True)
        ]
        message = refusal(write(folder, f"path,label,{name}", *rows))
        assert f"has train and test in the column {name.lower()!r}; call it split" in message


class TestEncoding:
    @pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
    def test_utf_16(self, folder, encoding):
        message = refusal(write(folder, "path,label", *ROWS, encoding=encoding))
        assert message.endswith("save it as UTF-8")

    def test_code_page_1252(self, folder):
        message = refusal(write(folder, "path,label", *ROWS, "owl/0.wav,café", encoding="cp1252"))
        assert "list.csv cannot be read as a CSV manifest (line 10 is not UTF-8); save it as UTF-8" in message

    def test_no_csv_at_all(self, folder):
        assert "cannot be read as a CSV manifest" in refusal(folder / "crow" / "0.wav")
        lines = '{"file_name": "crow/0.wav", "label": "crow"}'
        assert "list.csv line 1 cannot be read as CSV" in refusal(write(folder, lines))


class TestSplit:
    @pytest.mark.parametrize("words", [("Train", "TEST"), (" train ", "test"), ("training", "Testing")])
    def test_names_of_parts(self, folder, words):
        rows = [f"{row},{words[index % 4 == 0]}" for index, row in enumerate(ROWS)]
        recordings = from_manifest(write(folder, "path,label,Split", *rows))
        assert [clip.source.name for clip in recordings.test] == ["0.wav", "0.wav"]

    @pytest.mark.parametrize("word", ["validation", "dev", "Val"])
    def test_a_validation_part(self, folder, word):
        words = ("train", "test", word, "train")
        rows = [f"{row},{words[index % 4]}" for index, row in enumerate(ROWS)]
        recordings = from_manifest(write(folder, "path,label,split", *rows))
        assert [len(recordings.train), len(recordings.test)] == [4, 2]
        assert [str(clip.source.relative_to(folder)) for clip in recordings.validation] == [
            "crow/2.wav",
            "owl/2.wav",
        ]
        assert [clip.label for clip in recordings.validation] == [0, 1]
        assert recordings.ignored == ()

    @pytest.mark.parametrize("word", ["validation", "dev", "trian", "0", ""])
    def test_a_part_that_cannot_be_meant(self, folder, word):
        rows = [f"{row},{word if index == 5 else 'train'}" for index, row in enumerate(ROWS)]
        message = refusal(write(folder, "path,label,split", *rows))
        assert f"list.csv line 7 has split {word!r}; allowed are train and test" in message


class TestLines:
    def test_numbers_after_quoted_line_ends_comments_and_empty_lines(self, folder):
        lines = [
            "# made by hand",
            "",
            "path,label,note",
            f'{ROWS[0]},"two\nlines, and\r\nthree"',
            " , ,",
            "# more",
        ]
        message = refusal(write(folder, *lines, f"{ROWS[1]},x", "owl/0.wav,,"))
        assert message.endswith("list.csv line 10 has no label; every line needs path and label")

    def test_comments_are_counted(self, folder):
        recordings = from_manifest(
            write(folder, "# first", "path,label", "#owl/9.wav,owl", *ROWS, "# last, line")
        )
        assert recordings.ignored == ("3 comment lines",)

    def test_short_lines_and_empty_cells_at_the_end(self, folder):
        lines = ["path,label,speaker", *ROWS[:-1], ROWS[-1] + ",,,"]
        assert len(from_manifest(write(folder, *lines)).train) == 6

    def test_a_comma_in_a_name_without_quotes(self, folder):
        message = refusal(write(folder, "path,label", *ROWS, "owl/a, b.wav,owl"))
        assert "list.csv line 10 has 3 cells and the header has 2; put quotes around" in message

    def test_a_comma_in_a_name_with_quotes(self, folder):
        write_tiny_clip(folder / "owl" / 'a, "b".wav', 99)
        recordings = from_manifest(write(folder, "path,label", *ROWS, '"owl/a, ""b"".wav",owl'))
        assert len(recordings.train) + len(recordings.test) == 9

    def test_a_quote_that_is_never_closed_takes_no_lines_with_it(self, folder):
        message = refusal(write(folder, "path,label", ROWS[0], f'"{ROWS[1]}', *ROWS[2:]))
        assert "list.csv line 3 cannot be read as CSV" in message

    def test_an_empty_file(self, folder):
        assert "list.csv lacks the column 'path'" in refusal(write(folder))
        assert "list.csv lists no clip" in refusal(write(folder, "path,label", "", ","))

    def test_every_missing_file_has_its_line(self, folder):
        message = refusal(write(folder, "path,label", ROWS[0], "gone.wav,owl", "owl,owl"))
        assert "lists 2 missing files (line 3: " in message
        assert "gone.wav, line 4: " in message

    def test_a_damaged_file_has_its_line(self, folder, caplog):
        (folder / "owl" / "1.wav").write_bytes(b"no audio")
        path = write(folder, "path,label", *ROWS)
        assert from_manifest(path).ignored == ("1 unusable clip (owl/1.wav)",)
        expected = f"list.csv line 7: {folder / 'owl' / '1.wav'} cannot be read as audio"
        assert expected in caplog.text
        with pytest.raises(DataError, match=re.escape(expected)):
            from_manifest(path, strict=True)

    def test_a_class_of_damaged_files_does_not_vanish(self, folder):
        for take in range(4):
            (folder / "owl" / f"{take}.wav").write_bytes(b"no audio")
        assert "has no train clip of 1 class (owl)" in refusal(write(folder, "path,label", *ROWS))
        write_tiny_clip(folder / "owl" / "0.wav", 0)
        assert "line 6: class 'owl' has one clip" in refusal(write(folder, "path,label", *ROWS))

    def test_more_than_half_damaged(self, folder):
        for name in NAMES[:5]:
            (folder / name).write_bytes(b"no audio")
        assert "list has 8 clips, of which 5 cannot be used, the first for this: " in refusal(
            write(folder, "path,label", *ROWS)
        )

    def test_a_class_with_one_clip_has_its_line(self, folder):
        message = refusal(write(folder, "path,label", *ROWS[:-1], "owl/3.wav,wren"))
        assert "list.csv line 9: class 'wren' has one clip" in message


class TestPaths:
    def test_absolute_and_relative_paths_draw_the_same_split(self, folder, monkeypatch):
        monkeypatch.chdir(folder)

        def test_part(path: Path) -> list[Path]:
            return [clip.source.resolve() for clip in from_manifest(path).test]

        relative = test_part(write(folder, "path,label", *ROWS))
        assert test_part(write(folder, "path,label", *(f"{folder}/{row}" for row in ROWS))) == relative
        assert test_part(Path("list.csv")) == relative
        dotted = write(folder, "path,label", *(f"../{folder.name}/./{row}" for row in ROWS))
        assert test_part(dotted) == relative
        dotted.unlink()
        assert {clip.resolve() for clip in relative} == {clip.source for clip in from_folder(folder).test}

    def test_files_elsewhere_draw_the_same_split_on_every_machine(self, folder):
        def test_part(home: Path) -> list[str]:
            shutil.copytree(folder / "crow", home / "sounds" / "crow")
            shutil.copytree(folder / "owl", home / "sounds" / "owl")
            (home / "lists").mkdir()
            rows = [f"{home}/sounds/{row}" for row in ROWS]
            return [
                str(clip.source.relative_to(home))
                for clip in from_manifest(write(home / "lists", "path,label", *rows)).test
            ]

        assert test_part(folder / "one") == test_part(folder / "other" / "machine")

    @pytest.mark.parametrize("form", ["NFC", "NFD"])
    @pytest.mark.parametrize("on_disk", ["NFC", "NFD"])
    def test_accents_in_either_form(self, folder, form, on_disk):
        name = "Zürich/café/ñ.wav"
        file = write_tiny_clip(folder / unicodedata.normalize(on_disk, name), 99)
        for path in (name, f"./{name}", f"{folder}/{name}", name.replace("/", "\\")):
            row = unicodedata.normalize(form, f"{path},owl")
            recordings = from_manifest(write(folder, "path,label", *ROWS, row))
            assert any(clip.source.samefile(file) for clip in recordings.train + recordings.test)

    @pytest.mark.parametrize("name", ["a\\b.wav", " a.wav", "a.wav "])
    def test_a_name_that_is_really_so(self, folder, name):
        file = write_tiny_clip(folder / name, 99)
        recordings = from_manifest(write(folder, "path,label", *ROWS, f'"{name}",owl'))
        assert any(clip.source == file for clip in recordings.train + recordings.test)

    def test_labels_in_two_forms_are_one_class(self, folder):
        labels = ["caf\u00e9", "cafe\u0301", " caf\u00e9", "caf\u00e9\u00a0"]
        rows = [f"crow/{take}.wav,{label}" for take, label in enumerate(labels)]
        assert from_manifest(write(folder, "path,label", *rows, *ROWS[4:])).classes == ("caf\u00e9", "owl")

    @pytest.mark.parametrize(
        "address", ["https://host/a.wav", "s3://bucket/a.wav", "file:///a.wav", "hf+x://a.wav"]
    )
    def test_addresses(self, folder, address):
        message = refusal(write(folder, "path,label", *ROWS, f"{address},owl"))
        assert f"list.csv line 10 has the address {address}; download the file" in message

    @pytest.mark.parametrize("name", ["~nobody-here/a.wav", "x" * 5_000, "..", "owl"])
    def test_what_is_no_file(self, folder, name):
        assert "lists 1 missing file (line 10: " in refusal(write(folder, "path,label", *ROWS, f"{name},owl"))


class TestOnce:
    @pytest.mark.parametrize(
        "again",
        [
            "crow/1.wav,crow",
            "crow/1.wav,owl",
            "./crow/1.wav,crow",
            "{folder}/crow/1.wav,crow",
            "link.wav,crow",
        ],
    )
    def test_a_file_listed_twice(self, folder, again):
        os.link(folder / "crow" / "1.wav", folder / "link.wav")
        message = refusal(write(folder, "path,label", *ROWS, again.format(folder=folder)))
        assert "twice, in line 3 and line 10; list it once" in message
        assert str(folder) in message

    def test_every_file_in_train_and_test(self, folder):
        rows = [f"{row},{part}" for part in ("train", "test") for row in ROWS]
        message = refusal(write(folder, "path,label,split", *rows))
        assert f"lists {folder / 'crow' / '0.wav'} twice, in line 2 and line 10" in message


def test_any_format_that_can_be_read_may_be_listed(folder):
    soundfile.write(folder / "a.aiff", tone(300), 16_000)
    soundfile.write(folder / "b.opus", tone(300), 16_000, format="OGG", subtype="OPUS")
    recordings = from_manifest(write(folder, "path,label", *ROWS, "a.aiff,crow", "b.opus,owl"))
    assert len(recordings.train) + len(recordings.test) == 10
    (folder / "c.raw").write_bytes(bytes(9_000))
    with pytest.raises(DataError, match=r"c\.raw cannot be read as audio"):
        from_manifest(write(folder, "path,label", *ROWS, "c.raw,crow"), strict=True)


@pytest.mark.parametrize("name", ["set", "Subset", "splits", "is_test"])
def test_a_split_under_another_name_is_not_drawn_again(folder, name):
    """Also where its values are no parts, or more than parts."""
    for values in ("01", ("train", "eval"), ("tr", "tt"), ("train", "extra")):
        rows = [f"{row},{values[number % 2]}" for number, row in enumerate(ROWS)]
        assert "looks like a split; call it split" in refusal(write(folder, f"path,label,{name}", *rows))
