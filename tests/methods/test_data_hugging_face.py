"""Data sets of the `datasets` library: columns, splits, embedded audio and files, and messages."""

from __future__ import annotations

import io
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from audio_files import tone, write_tiny_clip

import mmtransfer.data.audio
from mmtransfer.data import Clip, DataError, Recordings, StoredAudio, from_dataset, read_audio

datasets = pytest.importorskip("datasets")
datasets.disable_progress_bars()


def encoded(number: int, suffix: str = "WAV", seconds: float = 0.05) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, tone(200 + number, seconds), 16_000, format=suffix)
    return out.getvalue()


def make(count: int = 10, first: int = 0, **columns: Any) -> Any:
    """A data set with embedded audio, and transcripts unless other columns are given."""
    numbers = range(first, first + count)
    audio = [{"bytes": encoded(number), "path": f"{number}.wav"} for number in numbers]
    columns = columns or {"text": [f"word {number}" for number in numbers]}
    return datasets.Dataset.from_dict({"audio": audio, **columns}).cast_column("audio", datasets.Audio())


def labelled(count: int = 10, first: int = 0) -> Any:
    dataset = make(count, first, label=[number % 2 for number in range(count)])
    return dataset.cast_column("label", datasets.ClassLabel(names=["crow", "café "]))


def clips(recordings: Recordings) -> list[Clip]:
    return recordings.train + recordings.validation + recordings.test


def refusal(source: Any, **options: Any) -> str:
    with pytest.raises(DataError) as refused:
        from_dataset(source, **options)
    return str(refused.value)


class TestSources:
    def test_a_dataset_has_its_test_part_drawn(self):
        recordings = from_dataset(make())
        assert recordings.transcribed
        assert [len(recordings.train), len(recordings.validation), len(recordings.test)] == [8, 0, 2]
        assert sorted(clip.text for clip in clips(recordings)) == [f"word {number}" for number in range(10)]
        for clip in clips(recordings):
            number = int(clip.text.split()[1])
            assert clip.seconds == pytest.approx(0.05)
            expected = read_audio(encoded(number))
            np.testing.assert_array_equal(recordings.load(clip), expected)
            np.testing.assert_array_equal(recordings.load(clip, 16_000, 0.03), expected[:480])

    def test_splits_by_name(self):
        source = datasets.DatasetDict(
            {"train": make(4), "Dev": make(2, 10), "test": make(3, 20), "invalidated": make(2, 30)}
        )
        recordings = from_dataset(source)
        assert [clip.text for clip in recordings.validation] == ["word 10", "word 11"]
        assert [clip.text for clip in recordings.test] == ["word 20", "word 21", "word 22"]
        assert [len(recordings.train), recordings.ignored] == [4, ("2 clips in invalidated",)]

    @pytest.mark.parametrize(
        "names",
        [("train", "validation"), ("test",), ("dev",), ("train.100", "test.b"), ("train", "Train")],
    )
    def test_splits_that_cannot_be_meant(self, names):
        source = datasets.DatasetDict({name: make(4, 10 * index) for index, name in enumerate(names)})
        message = refusal(source)
        assert f"has the splits {', '.join(names)}; give a DatasetDict of one called train" in message

    @pytest.mark.parametrize("name", ["train", "all"])
    def test_a_single_split_is_drawn_like_a_dataset(self, name):
        drawn = [
            {c.text for c in from_dataset(s).test} for s in (make(), datasets.DatasetDict({name: make()}))
        ]
        assert drawn[0] == drawn[1]
        assert len(drawn[0]) == 2

    def test_a_folder_on_disk(self, tmp_path):
        datasets.DatasetDict(train=labelled(6), test=labelled(4, 10)).save_to_disk(tmp_path / "birds")
        make().save_to_disk(tmp_path / "words")
        recordings = from_dataset(tmp_path / "birds")
        assert [recordings.name, recordings.classes] == ["birds", ("café", "crow")]
        assert [clip.label for clip in recordings.test] == [1, 0, 1, 0]
        assert from_dataset(str(tmp_path / "words")).describe().startswith("words: transcribed speech, ")

    def test_a_folder_of_parquet_files(self, tmp_path, monkeypatch):
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        for split in ("train", "test"):
            make(4, 10 * (split == "test")).to_parquet(
                tmp_path / "hub" / "data" / f"{split}-00000-of-00001.parquet"
            )
        recordings = from_dataset(tmp_path / "hub")
        assert [len(recordings.train), len(recordings.test)] == [4, 4]
        np.testing.assert_array_equal(recordings.load(recordings.test[1]), read_audio(encoded(11)))

    def test_a_name_is_loaded_with_its_configuration(self, monkeypatch):
        asked = []
        monkeypatch.setattr(datasets, "load_dataset", lambda *args: asked.append(args) or make())
        assert from_dataset("speech/words", config="it").name == "speech/words"
        assert asked == [("speech/words", "it")]

    @pytest.mark.parametrize("error", [ConnectionError, ValueError, FileNotFoundError, RuntimeError])
    def test_a_name_that_cannot_be_loaded(self, monkeypatch, error):
        def fail(*_: Any) -> None:
            raise error("no such\nthing.")

        monkeypatch.setattr(datasets, "load_dataset", fail)
        message = refusal("speech/none")
        assert message.startswith(
            "speech/none is no folder, and cannot be loaded from the hub (no such thing); give a folder"
        )

    def test_other_objects(self):
        for source in (3, [1], {"train": 1}, make().to_iterable_dataset()):
            with pytest.raises(TypeError, match=r"source must be a Dataset, a DatasetDict, .* got "):
                from_dataset(source)

    def test_without_the_library(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(ImportError, match="need the package datasets; install with: pip install"):
            from_dataset("anything")


class TestColumns:
    @pytest.mark.parametrize("name", ["text", "Sentence", "transcription"])
    def test_of_transcripts(self, name):
        recordings = from_dataset(make(4, **{name: [" a  b ", "cafe\u0301", "x\ny", "007"]}))
        assert {clip.text for clip in clips(recordings)} == {"a  b", "café", "x\ny", "007"}

    def test_of_classes(self):
        assert from_dataset(labelled()).classes == ("café", "crow")
        assert from_dataset(make(4, label=["b", "a", "b", "a "])).classes == ("a", "b")
        assert from_dataset(make(4, label=[1, 0, 1, 0])).classes == ("0", "1")
        assert from_dataset(make(4, label=[True, False] * 2)).classes == ("False", "True")

    def test_the_only_class_label(self):
        assert from_dataset(labelled().rename_column("label", "bird")).classes == ("café", "crow")

    def test_both_kinds(self):
        source = labelled().add_column("sentence", [f"word {number}" for number in range(10)])
        assert (
            "has both label and sentence; its columns are audio (Audio), label (ClassLabel), sentence ("
            in (refusal(source))
        )
        assert from_dataset(source, kind="label").classes == ("café", "crow")
        assert from_dataset(source, kind="text").transcribed
        assert from_dataset(source, text="sentence").transcribed
        assert not from_dataset(source, label="label").transcribed

    def test_a_class_label_of_another_name_next_to_a_transcript(self):
        source = labelled().rename_column("label", "gender").add_column("text", ["a"] * 10)
        assert from_dataset(source).transcribed

    def test_several_class_labels(self):
        source = labelled().rename_column("label", "one").add_column("two", [0, 1] * 5)
        source = source.cast_column("two", datasets.ClassLabel(names=["a", "b"]))
        assert refusal(source).endswith(
            "lacks label or text; its columns are audio (Audio), one (ClassLabel), two (ClassLabel); "
            "say label=... or text=..."
        )
        assert from_dataset(source, label="two").classes == ("a", "b")

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (
                {"text": "words"},
                "has no column 'words' for text; its columns are audio (Audio), text (string)",
            ),
            ({"audio": "text"}, "lacks a column of audio, or has several; its columns are audio (Audio)"),
            ({"kind": "label"}, "lacks label; its columns are audio (Audio), text (string)"),
            ({"text": "audio"}, "has the column 'audio' of another type; its columns are"),
            ({"speaker": "audio"}, "has the column 'audio' of another type"),
        ],
    )
    def test_columns_that_are_not_there(self, options, message):
        assert message in refusal(make(), **options)

    def test_numbers_are_no_transcripts(self):
        assert "has the column 'text' of another type; " in refusal(make(4, text=[1, 2, 3, 4]))

    def test_two_columns_of_audio(self):
        source = make().add_column("other", [{"bytes": encoded(9, seconds=0.1), "path": None}] * 10)
        source = source.cast_column("other", datasets.Audio())
        assert clips(from_dataset(source))[0].seconds == pytest.approx(0.05)
        assert clips(from_dataset(source, audio="other"))[0].seconds == pytest.approx(0.1)
        assert "has several" in refusal(source.rename_column("audio", "first"))

    def test_paths_without_a_type_are_no_audio(self):
        source = datasets.Dataset.from_dict({"path": ["a.wav"], "text": ["a"]})
        assert "or make it one with cast_column(name, datasets.Audio())" in refusal(source)

    @pytest.mark.parametrize("name", ["speaker", "speaker_id", "client_id"])
    def test_speakers(self, name):
        voices = ["anna", "bob", " cleo", "", None] * 2
        source = make().add_column(name, voices)
        recordings = from_dataset(source, test_fraction=0.4)
        found = {int(clip.text.split()[1]): clip.speaker for clip in clips(recordings)}
        assert [found[number] for number in range(5)] == ["anna", "bob", "cleo", None, None]
        sides = [{clip.speaker for clip in part} - {None} for part in (recordings.train, recordings.test)]
        assert not sides[0] & sides[1]
        numbered = from_dataset(make().add_column("voice", [0, 1] * 5), speaker="voice")
        assert {clip.speaker for clip in clips(numbered)} == {"0", "1"}

    def test_arguments_that_contradict_each_other(self):
        for options in (
            {"label": "a", "text": "b"},
            {"label": "a", "kind": "text"},
            {"text": "a", "kind": "label"},
        ):
            with pytest.raises(ValueError, match="must be None where"):
                from_dataset(make(), **options)
        with pytest.raises(ValueError, match="kind must be"):
            from_dataset(make(), kind="words")


class TestRows:
    def test_a_shuffled_data_set_has_the_same_draw(self):
        def drawn(source: Any) -> set[str | None]:
            return {clip.text for clip in from_dataset(source).test}

        assert drawn(make().shuffle(seed=3)) == drawn(make()) == drawn(make().select(range(10)[::-1]))
        recordings = from_dataset(make().shuffle(seed=3))
        for clip in clips(recordings):
            np.testing.assert_array_equal(
                recordings.load(clip), read_audio(encoded(int(clip.text.split()[1])))
            )

    def test_names_that_are_not_distinct(self):
        audio = [{"bytes": encoded(number), "path": "audio.wav"} for number in range(10)]
        source = datasets.Dataset.from_dict({"audio": audio, "text": ["a"] * 10})
        recordings = from_dataset(source.cast_column("audio", datasets.Audio()))
        assert len(clips(recordings)) == 10
        assert str(recordings.train[0].source) == "data set row 0 (audio.wav)"

    def test_what_cannot_be_used(self, caplog):
        audio = [{"bytes": encoded(number), "path": f"{number}.wav"} for number in range(8)]
        audio[1]["bytes"] = b"no audio"
        audio[2]["bytes"] = encoded(2, seconds=0.01)
        audio[5] = {"bytes": None, "path": None}
        texts = ["a", "b", "c", " ", "e", "f", "g", "h"]
        source = datasets.Dataset.from_dict({"audio": audio, "text": texts})
        source = source.cast_column("audio", datasets.Audio())
        recordings = from_dataset(source)
        assert {clip.text for clip in clips(recordings)} == {"a", "e", "g", "h"}
        assert recordings.ignored == ("4 unusable clips (row 3, row 5, row 1, ...)",)
        assert "data set row 3 has no text" in caplog.text
        assert "data set row 5 has no audio" in caplog.text
        assert "data set row 1 (1.wav) cannot be read as audio" in caplog.text
        assert "data set row 3 has no text" in refusal(source, strict=True)
        source = source.select([0, 4, 2])
        assert "data set row 2 (2.wav) lasts 10.0 ms" in refusal(source, strict=True)

    def test_no_label(self):
        source = make(4, label=[0, 1, -1, 0]).cast_column("label", datasets.ClassLabel(names=["a", "b"]))
        assert "data set row 2 has no label; every row needs audio and a label" in refusal(source)
        assert "row 1 has no label" in refusal(make(4, label=["a", None, "b", "b"]))

    def test_files_next_to_the_data_set(self, tmp_path):
        paths = [str(write_tiny_clip(tmp_path / f"{number}.wav", number)) for number in range(6)]

        def source(paths: list[str]) -> Any:
            dataset = datasets.Dataset.from_dict({"audio": paths, "text": ["a"] * len(paths)})
            return dataset.cast_column("audio", datasets.Audio())

        recordings = from_dataset(source(paths))
        assert {clip.source for clip in clips(recordings)} == set(map(Path, paths))
        message = refusal(source([*paths, "gone.wav"]))
        assert "lists 1 missing file (data set row 6: gone.wav); correct the paths" in message
        message = refusal(datasets.DatasetDict(train=source(paths), test=source(paths[2:3])))
        assert f"test row 0: {paths[2]} is also that of data set train row 2; list it once" in message
        assert "row 0 has the address https://host/a.wav; download" in refusal(source(["https://host/a.wav"]))
        Path(paths[3]).write_bytes(b"no audio")
        assert f"data set row 3: {paths[3]} cannot be read" in refusal(source(paths), strict=True)

    def test_copies_in_train_and_test_are_said(self, caplog):
        from_dataset(datasets.DatasetDict(train=make(4), test=make(4, 3)))
        assert "1 copy of equal content in train and in test (data set test row 0 (3.wav) and" in caplog.text

    def test_nothing_is_decoded_before_it_is_loaded(self, tmp_path, monkeypatch):
        make().save_to_disk(tmp_path / "words")
        monkeypatch.setattr(datasets.Audio, "decode_example", None)
        with monkeypatch.context() as context:
            context.setattr(mmtransfer.data.audio, "_decode", None)
            recordings = from_dataset(tmp_path / "words")
        assert recordings.load(recordings.train[0]).shape == (800,)

    def test_workers_can_have_the_clips(self, tmp_path):
        make().save_to_disk(tmp_path / "words")
        recordings = from_dataset(tmp_path / "words")
        copied = pickle.loads(pickle.dumps(recordings))
        # The audio stays on disk.
        assert len(pickle.dumps(recordings.train)) < 10 * len(encoded(0))
        np.testing.assert_array_equal(copied.load(copied.test[0]), recordings.load(recordings.test[0]))
        assert isinstance(copied.test[0].source, StoredAudio)


class TestBytes:
    @pytest.mark.parametrize("suffix", ["WAV", "FLAC", "OGG", "MP3"])
    def test_formats(self, tmp_path, suffix):
        content = encoded(0, suffix, seconds=1.0)
        (tmp_path / "a").write_bytes(content)
        for seconds in (None, 0.3):
            np.testing.assert_array_equal(
                read_audio(content, 8_000, seconds), read_audio(tmp_path / "a", 8_000, seconds)
            )

    @pytest.mark.parametrize("content", [b"", b"RIFF", b"no audio"])
    def test_no_audio(self, content):
        with pytest.raises(DataError, match="the audio in the given bytes cannot be read as audio"):
            read_audio(content)

    def test_a_file_that_breaks_off(self):
        content = encoded(0, "FLAC", seconds=2.0)
        with pytest.raises(DataError, match=r"the audio in the given bytes (is damaged|breaks off)"):
            read_audio(content[: len(content) // 2])
