"""Folder trees: which folders are parts and classes, messages of refusals, and what is said of the rest."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import pytest
from audio_files import write_tiny_clip

from mmtransfer.data import DataError, from_folder
from mmtransfer.data.audio import SUFFIXES
from mmtransfer.data.columns import SYNONYMS
from mmtransfer.data.names import LITTER, PARTS


def classes_in(root: Path, *parts: str, labels: tuple[str, ...] = ("cat", "dog")) -> Path:
    """Class folders with three clips each, in each of the part folders (or in `root`)."""
    number = sum(1 for _ in root.rglob("*.wav"))
    for part in parts or (".",):
        for label in labels:
            for _ in range(3):
                number += 1
                write_tiny_clip(root / part / label / f"{number}.wav", number)
    return root


class TestParts:
    @pytest.mark.parametrize(
        "parts",
        [
            ("train", "test"),
            ("Train", "Test"),
            ("TRAIN", "testing"),
            ("training", "test", "logs"),
            ("train", "test", "__MACOSX"),
        ],
    )
    def test_train_and_test_are_the_split(self, tmp_path, parts):
        classes_in(tmp_path, *parts[:2])
        for other in parts[2:]:
            (tmp_path / other).mkdir()
        recordings = from_folder(tmp_path)
        assert recordings.classes == ("cat", "dog")
        assert {clip.source.parts[-3] for clip in recordings.train} == {parts[0]}
        assert [len(recordings.train), len(recordings.test)] == [6, 6]

    @pytest.mark.parametrize("word", ["validation", "valid", "val", "dev", "Eval", "DEV", "development"])
    def test_a_validation_part(self, tmp_path, word):
        recordings = from_folder(classes_in(tmp_path, "train", "test", word))
        assert recordings.classes == ("cat", "dog")
        assert not any(word in clip.source.parts for clip in recordings.train + recordings.test)
        assert all(clip.source.parts[-3] == word for clip in recordings.validation)
        assert [clip.label for clip in recordings.validation] == [0, 0, 0, 1, 1, 1]
        assert recordings.ignored == ()
        assert ", validation 6 clips (0 s), test 6 clips" in recordings.describe()

    def test_two_folders_of_validation_are_one_part(self, tmp_path, caplog):
        recordings = from_folder(classes_in(tmp_path, "train", "test", "dev", "val"))
        assert {clip.source.parts[-3] for clip in recordings.validation} == {"dev", "val"}
        assert "dev and val are one validation part" in caplog.text

    def test_a_class_in_validation_alone_is_left_out_and_said(self, tmp_path):
        classes_in(classes_in(tmp_path, "train", "test"), "dev", labels=("cat", "owl"))
        recordings = from_folder(tmp_path)
        assert recordings.classes == ("cat", "dog")
        assert [clip.source.parent.name for clip in recordings.validation] == ["cat"] * 3
        assert recordings.ignored == ("3 clips in validation alone of 1 class (owl)",)

    def test_validation_without_class_folders(self, tmp_path):
        write_tiny_clip(classes_in(tmp_path, "train", "test") / "dev" / "0.wav", 99)
        assert from_folder(tmp_path).ignored == ("1 clip outside class folders",)

    def test_validation_is_a_link_to_test(self, tmp_path):
        classes_in(tmp_path, "train", "test")
        (tmp_path / "dev").symlink_to("test")
        with pytest.raises(DataError, match="are one file, in two parts; remove one"):
            from_folder(tmp_path)

    def test_clips_in_validation_alone(self, tmp_path):
        classes_in(tmp_path, "dev")
        for number, part in enumerate(("train", "test")):
            write_tiny_clip(tmp_path / part / "0.wav", 90 + number)
        with pytest.raises(DataError, match="has no class folders with audio for train and test; add them"):
            from_folder(tmp_path)

    @pytest.mark.parametrize(
        "parts",
        [
            ("train", "val"),
            ("train", "validation"),
            ("Train", "Dev"),
            ("dev", "test"),
            ("train",),
            ("test", "eval"),
            ("train-clean-100", "test-clean"),
            ("dev-clean", "dev-other"),
            ("train_set", "test_set"),
            ("trainset", "testset"),
            ("set.audio_train", "set.audio_test"),
            ("fold1", "fold2", "fold10"),
            ("fold_1", "fold_2"),
        ],
    )
    def test_parts_are_no_classes(self, tmp_path, parts):
        with pytest.raises(
            DataError, match=r"parts of a data set .*, not classes; name two of them train and"
        ):
            from_folder(classes_in(tmp_path, *parts))

    def test_parts_without_class_folders_are_no_classes(self, tmp_path):
        for number, part in enumerate(("train", "validation", "test")):
            write_tiny_clip(tmp_path / part / "0.wav", number)
        with pytest.raises(DataError, match=r"has no class folders with audio; found 3 clips outside"):
            from_folder(tmp_path)

    def test_a_part_without_class_folders(self, tmp_path):
        classes_in(tmp_path, "train")
        write_tiny_clip(tmp_path / "test" / "0.wav", 99)
        with pytest.raises(DataError, match="has no class folders with audio for test; add them"):
            from_folder(tmp_path)

    @pytest.mark.parametrize("word", ["test", "val", "Dev", "train"])
    def test_a_part_beside_classes_is_refused(self, tmp_path, word):
        classes_in(classes_in(tmp_path), word)
        with pytest.raises(DataError, match=f"holds {word}, the name of a part .*, beside cat, dog; "):
            from_folder(tmp_path)

    def test_a_train_is_a_vehicle_beside_others(self, tmp_path, caplog):
        recordings = from_folder(classes_in(tmp_path, labels=("bus", "train")))
        assert recordings.classes == ("bus", "train")
        assert "the folder train is taken for a class" in caplog.text
        recordings = from_folder(classes_in(tmp_path / "vehicles", "bus", "a", labels=("train", "tram")))
        assert recordings.classes == ("a", "bus")

    def test_classes_that_have_a_word_of_a_part_in_their_name(self, tmp_path):
        labels = ("test tone", "train horn", "whistle", "validate", "folder")
        assert from_folder(classes_in(tmp_path, labels=labels)).classes == tuple(sorted(labels))

    def test_two_folders_of_one_part(self, tmp_path):
        with pytest.raises(DataError, match="has Train, train for one part"):
            from_folder(classes_in(tmp_path, "Train", "train", "test"))

    def test_classes_beside_train_and_test(self, tmp_path):
        classes_in(classes_in(tmp_path, "train", "test"), labels=("cat",))
        with pytest.raises(DataError, match=r"has train and test, and 1 other folder \(cat\) with audio"):
            from_folder(tmp_path)

    def test_parts_inside_the_classes(self, tmp_path):
        labels = ("train", "TEST", "val")
        recordings = from_folder(classes_in(tmp_path, "cat", "dog", labels=labels))
        assert recordings.classes == ("cat", "dog")
        assert {clip.source.parent.name for clip in recordings.train} == {"train"}
        assert {clip.source.parent.name for clip in recordings.test} == {"TEST"}
        assert {clip.source.parent.name for clip in recordings.validation} == {"val"}
        assert [len(recordings.train), len(recordings.validation), len(recordings.test)] == [6, 6, 6]

    def test_parts_inside_some_classes(self, tmp_path):
        classes_in(classes_in(tmp_path, "cat", labels=("train", "test")), labels=("dog",))
        with pytest.raises(DataError, match=r"dog/\d+\.wav lies in no part while others do"):
            from_folder(tmp_path)

    def test_parts_inside_the_classes_without_test(self, tmp_path):
        with pytest.raises(
            DataError, match="has train, val inside its class folders; train and test are needed"
        ):
            from_folder(classes_in(tmp_path, "cat", "dog", labels=("train", "val")))

    def test_a_part_inside_another(self, tmp_path):
        classes_in(tmp_path, "train", "test")
        write_tiny_clip(tmp_path / "train" / "cat" / "test" / "0.wav", 99)
        with pytest.raises(DataError, match=r"train/cat/test/0\.wav lies in two parts"):
            from_folder(tmp_path)


@pytest.mark.parametrize(
    "names", ["tr cv tt", "trn tst", "trainval tests", "split1 split2", "part-1 part-2", "seen unseen"]
)
def test_parts_under_other_names_are_no_classes(tmp_path, names):
    root = classes_in(tmp_path, *names.split())
    with pytest.raises(DataError, match=r"holds parts of a data set .*, not classes"):
        from_folder(root)


class TestHidden:
    @pytest.mark.parametrize(
        "path",
        [
            "cat/.ipynb_checkpoints/0-checkpoint.wav",
            "cat/night/.cache/a/0.wav",
            ".git/0.wav",
            "__MACOSX/cat/0.wav",
            "cat/__MACOSX/0.wav",
            "cat/._1.wav",
            "cat/.0.wav",
            "cat/@eaDir/1.wav/0.wav",
        ],
    )
    def test_is_left_out_and_counted(self, tmp_path, path):
        recordings = from_folder(classes_in(tmp_path))
        write_tiny_clip(tmp_path / path, 99)
        again = from_folder(tmp_path)
        assert again.describe() == recordings.describe() + "; ignored: 1 hidden"

    def test_above_the_root_hides_nothing(self, tmp_path):
        assert len(from_folder(classes_in(tmp_path / ".cache" / "__MACOSX" / "data")).train) == 4


class TestWhatIsNotUsed:
    def test_other_files_are_counted_by_type(self, tmp_path):
        classes_in(tmp_path)
        for name in ("a.m4a", "b.M4A", "c.aac", "d.txt", "without"):
            (tmp_path / "cat" / name).write_bytes(b"something")
        assert from_folder(tmp_path).ignored == (
            "2 .m4a files",
            "1 file without a suffix",
            "1 .aac file",
            "1 .txt file",
        )

    def test_many_types_are_summed_up(self, tmp_path):
        classes_in(tmp_path)
        for index in range(9):
            (tmp_path / "cat" / f"x.a{index}").write_bytes(b"something")
        assert from_folder(tmp_path).ignored[-1] == "3 files of other types"

    def test_is_logged_for_those_who_do_not_ask(self, tmp_path, caplog):
        classes_in(tmp_path)
        (tmp_path / "cat" / "a.m4a").write_bytes(b"something")
        from_folder(tmp_path)
        assert caplog.records[0].levelno == logging.WARNING
        assert f"{tmp_path.name}: ignored 1 .m4a file" in caplog.text

    def test_a_class_folder_of_foreign_files(self, tmp_path):
        classes_in(tmp_path)
        (tmp_path / "owl").mkdir()
        for name in ("a.m4a", "b.m4a"):
            (tmp_path / "owl" / name).write_bytes(b"something")
        with pytest.raises(
            DataError, match=r"owl holds no \.wav, \.flac, \.ogg, \.mp3 files, but 2 \.m4a files; convert"
        ):
            from_folder(tmp_path)

    @pytest.mark.parametrize("inside", ["", "deeper", ".hidden"])
    def test_an_empty_class_folder(self, tmp_path, inside):
        classes_in(tmp_path)
        (tmp_path / "owl" / inside).mkdir(parents=True)
        with pytest.raises(DataError, match=r"the class folder .*owl holds no .*, it is empty"):
            from_folder(tmp_path)

    @pytest.mark.parametrize("part", ["train", "test"])
    def test_an_empty_class_folder_in_a_part(self, tmp_path, part):
        classes_in(tmp_path, "train", "test")
        (tmp_path / part / "owl").mkdir()
        with pytest.raises(DataError, match=f"the class folder .*{part}/owl holds no"):
            from_folder(tmp_path)

    def test_a_root_of_foreign_files(self, tmp_path):
        for label in ("cat", "dog"):
            (tmp_path / label).mkdir()
            (tmp_path / label / "a.m4a").write_bytes(b"something")
        with pytest.raises(DataError, match=r"holds no audio; .*, found 2 \.m4a files"):
            from_folder(tmp_path)

    def test_clips_beside_the_class_folders(self, tmp_path):
        write_tiny_clip(classes_in(tmp_path) / "loose.wav", 99)
        assert from_folder(tmp_path).ignored == ("1 clip outside class folders",)


class TestLinks:
    def test_a_linked_folder_in_a_class_is_read(self, tmp_path):
        root = classes_in(tmp_path / "data")
        classes_in(tmp_path / "more", labels=("a", "b"))
        (root / "cat" / "more").symlink_to(tmp_path / "more")
        recordings = from_folder(root)
        assert len(recordings.train) + len(recordings.test) == 12
        assert recordings.ignored == ()

    def test_linked_parts_and_classes(self, tmp_path):
        classes_in(tmp_path / "elsewhere", "a", "b")
        (tmp_path / "data" / "test").mkdir(parents=True)
        (tmp_path / "data" / "train").symlink_to(tmp_path / "elsewhere" / "a")
        for label in ("cat", "dog"):
            (tmp_path / "data" / "test" / label).symlink_to(f"../../elsewhere/b/{label}")
        assert [len(part) for part in (lambda r: (r.train, r.test))(from_folder(tmp_path / "data"))] == [6, 6]

    def test_loops_end(self, tmp_path):
        classes_in(tmp_path)
        (tmp_path / "cat" / "up").symlink_to(tmp_path)
        (tmp_path / "cat" / "same").symlink_to(".")
        (tmp_path / "dog" / "a").mkdir()
        (tmp_path / "dog" / "b").mkdir()
        (tmp_path / "dog" / "a" / "to b").symlink_to("../b")
        (tmp_path / "dog" / "b" / "to a").symlink_to("../a")
        recordings = from_folder(tmp_path)
        assert len(recordings.train) + len(recordings.test) == 6

    def test_many_links_between_folders_are_read_once(self, tmp_path):
        """Paths without a loop, of which there are 12!."""
        classes_in(tmp_path)
        for one in range(12):
            (tmp_path / "cat" / f"{one}").mkdir()
            for other in range(12):
                (tmp_path / "cat" / f"{one}" / f"to {other}").symlink_to(f"../{other}")
        assert len(from_folder(tmp_path).train) == 4

    def test_a_link_moves_no_clip_across_the_split(self, tmp_path):
        classes_in(tmp_path)
        before = [clip.source for clip in from_folder(tmp_path).test]
        (tmp_path / "cat" / "0 link").symlink_to(".")
        for clip in sorted((tmp_path / "cat").glob("*.wav")):
            (tmp_path / "cat" / f"0{clip.name}").symlink_to(clip)
        recordings = from_folder(tmp_path)
        assert [clip.source for clip in recordings.test] == before
        assert recordings.ignored == ("4 links to what is used already",)

    @pytest.mark.parametrize("link", [os.symlink, os.link])
    def test_a_clip_in_two_classes(self, tmp_path, link):
        classes_in(tmp_path)
        link(tmp_path / "cat" / "1.wav", tmp_path / "dog" / "copy.wav")
        with pytest.raises(DataError, match=r"cat/1\.wav and .*dog/copy\.wav are one file, in two classes"):
            from_folder(tmp_path)

    def test_test_is_a_link_to_train(self, tmp_path):
        classes_in(tmp_path, "train")
        (tmp_path / "test").symlink_to("train")
        with pytest.raises(DataError, match="are one file, in two parts; remove one"):
            from_folder(tmp_path)

    @pytest.mark.parametrize("name", ["gone", "gone.wav"])
    def test_a_broken_link(self, tmp_path, name):
        (classes_in(tmp_path) / "cat" / name).symlink_to(tmp_path / "nowhere")
        with pytest.raises(DataError, match=f"cat/{name} is a link that leads nowhere"):
            from_folder(tmp_path)

    def test_a_device(self, tmp_path):
        os.mkfifo(classes_in(tmp_path) / "cat" / "pipe.wav")
        with pytest.raises(DataError, match=r"pipe\.wav is neither a file nor a folder"):
            from_folder(tmp_path)


class TestNames:
    def test_labels_in_two_forms_are_one_class(self, tmp_path, caplog):
        recordings = from_folder(classes_in(tmp_path, labels=("caf\u00e9", "cafe\u0301", "dog ", "dog")))
        assert recordings.classes == ("caf\u00e9", "dog")
        assert "several spellings of the class folder 'caf\u00e9' are one class" in caplog.text

    def test_forms_of_file_names_draw_the_same_split(self, tmp_path):
        def test_part(form: str) -> list[str]:
            for number in range(10):
                write_tiny_clip(tmp_path / form / "cat" / f"{form}{number}.wav", number)
                write_tiny_clip(tmp_path / form / "dog" / f"{form}{number}.wav", 10 + number)
            recordings = from_folder(tmp_path / form)
            return [clip.source.name.removeprefix(form) for clip in recordings.test]

        assert test_part("caf\u00e9") == test_part("cafe\u0301")

    @pytest.mark.parametrize("labels", [("Cat", "cat"), ("cat", "ｃａｔ"), ("ca\u200bt", "cat"), ("ß", "SS")])
    def test_labels_that_look_alike_are_said(self, tmp_path, caplog, labels):
        recordings = from_folder(classes_in(tmp_path, labels=labels))
        assert recordings.classes == tuple(sorted(labels))
        assert "has classes that look alike: " in caplog.text

    def test_names_that_are_no_utf_8(self, tmp_path):
        classes_in(tmp_path)
        (tmp_path / "cat" / "1.wav").rename(os.fsdecode(os.fsencode(tmp_path) + b"/cat/\xff.wav"))
        assert len(from_folder(tmp_path).train) == 4
        (tmp_path / "dog").rename(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
        with pytest.raises(DataError, match=r"the class folder .* is blank or not UTF-8; rename it"):
            from_folder(tmp_path)

    def test_the_name_of_the_working_folder(self, tmp_path, monkeypatch):
        monkeypatch.chdir(classes_in(tmp_path / "sounds"))
        assert from_folder(".").name == "sounds"


class TestCopies:
    def test_in_train_and_test_are_said(self, tmp_path, caplog):
        classes_in(tmp_path, "train", "test")
        shutil.copy(tmp_path / "train" / "cat" / "1.wav", tmp_path / "test" / "cat" / "copy.wav")
        recordings = from_folder(tmp_path)
        assert len(recordings.test) == 7
        assert "has 1 copy of equal content in train and in test" in caplog.text
        assert "test/cat/copy.wav and " in caplog.text

    def test_of_two_labels_are_said(self, tmp_path, caplog):
        classes_in(tmp_path, "train", "test")
        shutil.copy(tmp_path / "train" / "cat" / "1.wav", tmp_path / "train" / "dog" / "copy.wav")
        from_folder(tmp_path)
        assert "has 1 copy of equal content with another label" in caplog.text

    def test_equal_sizes_and_ends_are_no_copies(self, tmp_path, caplog):
        classes_in(tmp_path, "train", "test")
        for part in ("train", "test"):
            path = tmp_path / part / "cat" / "long.wav"
            content = bytearray(write_tiny_clip(path, 99).read_bytes() + bytes(9_000))
            content[50] = part == "train"
            path.write_bytes(content)
        from_folder(tmp_path)
        assert not caplog.records


def test_the_documentation_names_what_is_recognised():
    page = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text().casefold()
    words = [word for words in (*PARTS.values(), *SYNONYMS.values()) for word in words]
    assert not [word for word in (*SUFFIXES, *SYNONYMS, *LITTER, *words) if f"`{word}`" not in page]
