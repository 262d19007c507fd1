"""Folders of recordings with text files, and the choice of the reader by what is given."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from audio_files import write_tiny_clip

from mmtransfer.data import Clip, DataError, Recordings, from_transcripts, load_data


def clips(recordings: Recordings) -> list[Clip]:
    return recordings.train + recordings.validation + recordings.test


def texts(recordings: Recordings) -> dict[str, str | None]:
    return {clip.source.name: clip.text for clip in clips(recordings)}


def spoken(folder: Path, count: int = 10, first: int = 0) -> Path:
    """Clips with a text file each."""
    for number in range(first, first + count):
        write_tiny_clip(folder / f"{number}.wav", number)
        (folder / f"{number}.txt").write_text(f" word {number}\n", encoding="utf-8")
    return folder


def librispeech(root: Path, *speakers: int) -> Path:
    """Folders of two chapters each."""
    for speaker in speakers:
        for chapter in (7, 8):
            folder = root / f"{speaker}" / f"{chapter}"
            names = [f"{speaker}-{chapter}-{number:04d}" for number in range(2)]
            for name in names:
                write_tiny_clip(folder / f"{name}.wav", hash_of(name))
            rows = [f"{name} THE WORDS OF {name}" for name in names]
            (folder / f"{speaker}-{chapter}.trans.txt").write_text("\n".join(rows) + "\n")
    return root


def hash_of(name: str) -> int:
    return int(name.replace("-", ""))


class TestFromTranscripts:
    def refusal(self, path: Path, **options: Any) -> str:
        with pytest.raises(DataError) as refused:
            from_transcripts(path, **options)
        return str(refused.value)

    def test_a_text_file_per_clip(self, tmp_path):
        spoken(tmp_path / "a")
        write_tiny_clip(tmp_path / "b" / "é.wav", 99)
        (tmp_path / "b" / "e\u0301.TXT").write_bytes("\ufefftwo  lines,\r\none text\r\n".encode())
        recordings = from_transcripts(tmp_path)
        assert recordings.transcribed
        assert texts(recordings)["3.wav"] == "word 3"
        assert texts(recordings)["é.wav"] == "two  lines,\r\none text"
        assert [len(recordings.train), len(recordings.test), recordings.ignored] == [9, 2, ()]

    def test_lists_of_librispeech_and_their_speakers(self, tmp_path):
        recordings = from_transcripts(librispeech(tmp_path, 19, 26, 27, 32, 40))
        assert len(clips(recordings)) == 20
        for clip in clips(recordings):
            assert clip.text == f"THE WORDS OF {clip.source.stem}"
            assert clip.speaker == clip.source.stem.split("-")[0]
        assert len({clip.speaker for clip in recordings.test}) == 1
        assert recordings.ignored == ()

    def test_parts_on_top(self, tmp_path):
        for index, part in enumerate(("train", "Dev", "test")):
            spoken(tmp_path / part / "more", 3, 10 * index)
        recordings = from_transcripts(tmp_path)
        assert [clip.text for clip in recordings.validation] == ["word 10", "word 11", "word 12"]
        assert [clip.text for clip in recordings.test] == ["word 20", "word 21", "word 22"]

    @pytest.mark.parametrize("names", [("train-clean-100", "dev-clean"), ("train", "other"), ("tr", "tt")])
    def test_parts_that_cannot_be_meant(self, tmp_path, names):
        for index, name in enumerate(names):
            librispeech(tmp_path / name, 10 * index + 1)
        assert "holds parts of a data set (" in self.refusal(tmp_path)
        assert "name them train, test and, if wanted, validation" in self.refusal(tmp_path)

    @pytest.mark.parametrize("other", ["extra", "."])
    def test_audio_next_to_the_parts(self, tmp_path, other):
        for index, part in enumerate(("train", "test", other)):
            spoken(tmp_path / part, 2, 10 * index)
        assert "has train and test, and " in self.refusal(tmp_path)

    def test_what_is_not_used_is_said(self, tmp_path, caplog):
        spoken(tmp_path)
        (tmp_path / "1.txt").write_text(" \n")
        (tmp_path / "2.txt").unlink()
        (tmp_path / "3.wav").write_bytes(b"no audio")
        (tmp_path / "README.txt").write_text("of the data set")
        (tmp_path / "4.json").write_text("{}")
        (tmp_path / ".5.wav").write_text("")
        recordings = from_transcripts(tmp_path)
        assert len(clips(recordings)) == 7
        assert recordings.ignored == (
            "1 .json file",
            f"1 transcript without audio ({tmp_path / 'README.txt'})",
            "1 hidden",
            "3 unusable clips (1.wav, 2.wav, 3.wav)",
        )
        assert f"{tmp_path / '1.txt'} has no text for {tmp_path / '1.wav'}" in caplog.text
        assert f"there is no transcript for {tmp_path / '2.wav'}" in caplog.text
        assert f"{tmp_path / '1.txt'} has no text" in self.refusal(tmp_path, strict=True)

    def test_no_transcripts_at_all(self, tmp_path):
        for number in range(4):
            write_tiny_clip(tmp_path / "cat" / f"{number}.wav", number)
        assert "has 4 clips, of which 4 cannot be used, the first for this: there is no transcript" in (
            self.refusal(tmp_path)
        )

    def test_two_transcripts_of_one_clip(self, tmp_path):
        librispeech(tmp_path, 19)
        folder = tmp_path / "19" / "7"
        (folder / "19-7-0000.txt").write_text("again")
        assert "are transcripts of one clip; remove one" in self.refusal(tmp_path)
        (folder / "19-7-0000.txt").unlink()
        (folder / "19-7.trans.txt").write_text("19-7-0000 A\n\n19-7-0000 B\n")
        message = self.refusal(tmp_path)
        assert f"{folder / '19-7.trans.txt'} line 3 has the clip 19-7-0000 for a second time" in message

    def test_links(self, tmp_path):
        spoken(tmp_path)
        os.link(tmp_path / "3.wav", tmp_path / "30.wav")
        (tmp_path / "30.txt").write_text("word 3")
        recordings = from_transcripts(tmp_path)
        assert len(clips(recordings)) == 10
        assert recordings.ignored == ("1 link to what is used already",)
        (tmp_path / "30.txt").write_text("another")
        assert "are one file, with two transcripts or parts; remove one" in self.refusal(tmp_path)

    def test_no_audio_and_no_folder(self, tmp_path):
        (tmp_path / "a.txt").write_text("a")
        assert "holds no .wav, .flac, .ogg, .mp3 files, found 1 .txt file" in self.refusal(tmp_path)
        assert "is not a folder; give a folder of recordings" in self.refusal(tmp_path / "a.txt")

    def test_a_text_that_is_no_utf_8(self, tmp_path):
        spoken(tmp_path)
        (tmp_path / "3.txt").write_bytes("été".encode("cp1252"))
        assert "3.txt cannot be read as a transcript (line 1 is not UTF-8)" in self.refusal(tmp_path)


class TestLoadData:
    @pytest.fixture
    def birds(self, tmp_path: Path) -> Path:
        for number in range(8):
            write_tiny_clip(tmp_path / "birds" / ("crow", "owl")[number % 2] / f"{number}.wav", number)
        return tmp_path / "birds"

    def refusal(self, source: Any, **options: Any) -> str:
        with pytest.raises(DataError) as refused:
            load_data(source, **{"kind": "text", **options})
        return str(refused.value)

    def test_folders(self, birds, tmp_path, monkeypatch):
        assert load_data(birds, kind="label").classes == ("crow", "owl")
        monkeypatch.chdir(tmp_path)
        assert load_data("birds", kind="label").classes == ("crow", "owl")
        assert texts(load_data(str(spoken(tmp_path / "words")), kind="text"))["1.wav"] == "word 1"

    @pytest.mark.parametrize("name", ["list.csv", "list.tsv", "list.txt", "list.jsonl", "list.json", "list"])
    def test_manifests(self, birds, name):
        files = sorted(birds.glob("*/*.wav"))
        if "json" in name:
            rows = [f'{{"path": "{file}", "text": "a", "label": "{file.parent.name}"}}' for file in files]
        else:
            rows = ["path\ttext\tlabel", *(f"{file}\ta\t{file.parent.name}" for file in files)]
        (birds / name).write_text("\n".join(rows))
        assert load_data(birds / name, kind="label").classes == ("crow", "owl")
        assert load_data(birds / name, kind="text").transcribed

    def test_options_arrive(self, birds):
        (birds / "crow" / "0.wav").write_bytes(b"no audio")
        with pytest.raises(DataError, match="cannot be read as audio"):
            load_data(birds, kind="label", strict=True)
        assert len(load_data(birds, kind="label", test_fraction=0.5).test) == 4
        drawn = [load_data(birds, kind="label", seed=seed).test for seed in range(5)]
        assert len({frozenset(clip.source for clip in test) for test in drawn}) > 1

    def test_data_sets(self, tmp_path, monkeypatch):
        datasets = pytest.importorskip("datasets")
        datasets.disable_progress_bars()
        spoken(tmp_path / "files", 4)
        audio = [{"bytes": (tmp_path / f"files/{n}.wav").read_bytes(), "path": f"{n}.wav"} for n in range(4)]
        source = datasets.Dataset.from_dict({"audio": audio, "text": list("abcd"), "label": list("xyxy")})
        source = source.cast_column("audio", datasets.Audio())
        source.save_to_disk(tmp_path / "saved")
        datasets.DatasetDict(train=source).save_to_disk(tmp_path / "splits")
        source.to_parquet(tmp_path / "hub" / "data" / "train-00000.parquet")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        for each in (source, tmp_path / "saved", str(tmp_path / "splits"), tmp_path / "hub"):
            assert {clip.text for clip in clips(load_data(each, kind="text"))} == set("abcd")
            assert load_data(each, kind="label").classes == ("x", "y")
        asked = []
        monkeypatch.setattr(datasets, "load_dataset", lambda *args: asked.append(args) or source)
        assert load_data("speech/words", kind="text", config="it").name == "speech/words"
        assert asked == [("speech/words", "it")]

    @pytest.mark.parametrize(
        "source", ["gone.csv", "./gone", "/gone/away", "a/b/c", "gone.jsonl", Path("gone")]
    )
    def test_what_is_not_there(self, source, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setitem(sys.modules, "datasets", None)
        message = self.refusal(source)
        assert message.startswith(f"{Path(source)} does not exist; expected a folder of recordings with text")
        assert "expected a folder of class folders, a manifest (.csv, .tsv, .txt, .jsonl, " in (
            self.refusal(source, kind="label")
        )

    def test_a_name_without_the_library(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "datasets", None)
        message = self.refusal("speech/words")
        assert message.startswith("there is no file or folder speech/words; expected a folder of recordings")
        assert message.endswith("install with: pip install 'datasets>=3'")

    def test_a_recording(self, birds):
        assert "0.wav is one recording; expected a folder" in self.refusal(birds / "crow" / "0.wav")

    def test_arguments(self, birds):
        for kind in ("words", None):
            with pytest.raises(ValueError, match="kind must be 'label'"):
                load_data(birds, kind=kind)
        (birds / "list.csv").write_text("path,text\ncrow/0.wav,a\ncrow/2.wav,b\n")
        with pytest.raises(ValueError, match="config is for a data set by name"):
            load_data(birds / "list.csv", kind="text", config="it")
        with pytest.raises(ValueError, match="config is for a data set by name"):
            load_data(birds, kind="label", config="it")
