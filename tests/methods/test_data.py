"""A user's own recordings and the generated task: reading, splitting, resampling, and every refusal."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from audio_files import tone, write_clip
from transformers import WhisperFeatureExtractor

from mmtransfer.data import (
    SAMPLE_RATE,
    Clip,
    DataError,
    Recordings,
    from_folder,
    from_manifest,
    read_audio,
    synthetic,
)
from mmtransfer.data.features import extract


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "birds"
    for label in ("crow", "owl"):
        for take in range(5):
            write_clip(root / label / f"{take}.wav", 200.0 + 50 * take)
    return root


class TestReadAudio:
    @pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000])
    @pytest.mark.parametrize("frequency", [220.0, 1_500.0, 3_300.0])
    def test_resampling_keeps_the_frequency_the_level_and_the_duration(self, tmp_path, rate, frequency):
        soundfile.write(tmp_path / "tone.wav", tone(frequency, 1.0, rate), rate, subtype="FLOAT")
        samples = read_audio(tmp_path / "tone.wav")
        assert samples.dtype == np.float32
        assert abs(len(samples) - SAMPLE_RATE) <= 1
        inner = samples[2_000:14_000]
        spectrum = np.abs(np.fft.rfft(inner * np.hanning(len(inner))))
        peak = np.fft.rfftfreq(len(inner), 1 / SAMPLE_RATE)[spectrum.argmax()]
        assert peak == pytest.approx(frequency, abs=SAMPLE_RATE / len(inner))
        assert np.sqrt(np.mean(inner**2)) == pytest.approx(0.5 / np.sqrt(2), rel=2e-3)

    def test_resampling_does_not_alias(self, tmp_path):
        soundfile.write(tmp_path / "tone.wav", tone(15_000, 1.0, 48_000), 48_000, subtype="FLOAT")
        assert np.abs(read_audio(tmp_path / "tone.wav")[2_000:14_000]).max() < 1e-3

    def test_channels_are_averaged(self, tmp_path):
        left, right = tone(300), tone(700)
        soundfile.write(tmp_path / "stereo.wav", np.stack([left, right], 1), SAMPLE_RATE, subtype="FLOAT")
        np.testing.assert_allclose(read_audio(tmp_path / "stereo.wav"), (left + right) / 2, atol=1e-6)

    @pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
    def test_formats(self, tmp_path, suffix):
        soundfile.write(tmp_path / f"tone.{suffix}", tone(440, 1.0), SAMPLE_RATE)
        samples = read_audio(tmp_path / f"tone.{suffix}")
        spectrum = np.abs(np.fft.rfft(samples))
        assert np.fft.rfftfreq(len(samples), 1 / SAMPLE_RATE)[spectrum.argmax()] == pytest.approx(440, abs=2)

    def test_crop_reads_the_beginning(self, tmp_path):
        path = write_clip(tmp_path / "a.wav", seconds=1.0)
        np.testing.assert_array_equal(read_audio(path, max_seconds=0.25), read_audio(path)[:4_000])

    def test_not_audio(self, tmp_path):
        (tmp_path / "a.wav").write_bytes(b"not audio at all")
        with pytest.raises(
            DataError, match=r"a\.wav cannot be read as audio .*; use \.wav, \.flac, \.ogg, \.mp3 files"
        ):
            read_audio(tmp_path / "a.wav")

    def test_missing(self, tmp_path):
        with pytest.raises(DataError, match=r"gone\.wav does not exist"):
            read_audio(tmp_path / "gone.wav")

    def test_empty(self, tmp_path):
        soundfile.write(tmp_path / "a.wav", np.zeros(0), SAMPLE_RATE)
        with pytest.raises(DataError, match=r"a\.wav is empty"):
            read_audio(tmp_path / "a.wav")

    def test_too_short(self, tmp_path):
        soundfile.write(tmp_path / "a.wav", np.zeros(160), SAMPLE_RATE)
        with pytest.raises(DataError, match=r"a\.wav lasts 10\.0 ms; clips must last at least 25 ms"):
            read_audio(tmp_path / "a.wav")

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_not_finite(self, tmp_path, value):
        samples = tone(300)
        samples[77] = value
        soundfile.write(tmp_path / "a.wav", samples, SAMPLE_RATE, subtype="FLOAT")
        with pytest.raises(DataError, match=r"a\.wav holds NaN or infinite samples"):
            read_audio(tmp_path / "a.wav")


class TestFromFolder:
    def test_classes_split_and_load(self, folder):
        recordings = from_folder(folder)
        assert recordings.name == "birds"
        assert recordings.classes == ("crow", "owl")
        assert [len(recordings.train), len(recordings.test)] == [8, 2]
        clip = recordings.train[0]
        assert clip.seconds == pytest.approx(0.1)
        assert recordings.load(clip).shape == (1_600,)
        assert recordings.load(clip, 8_000, 0.05).shape == (400,)
        assert recordings.describe() == (
            "birds: 2 classes, train 8 clips (1 s), test 2 clips (0 s), chance 50.0%"
        )

    def test_every_file_once(self, folder):
        recordings = from_folder(folder, test_fraction=0.4)
        files = [clip.source for clip in recordings.train + recordings.test]
        assert sorted(files) == sorted(folder.rglob("*.wav"))

    def test_split_depends_on_names_and_seed_alone(self, folder, tmp_path):
        def test_names(recordings: Recordings, root: Path) -> set[str]:
            return {str(clip.source.relative_to(root)) for clip in recordings.test}

        copy = Path(shutil.copytree(folder, tmp_path / "elsewhere" / "copy"))
        assert test_names(from_folder(folder), folder) == test_names(from_folder(copy), copy)
        splits = {frozenset(test_names(from_folder(folder, seed=seed), folder)) for seed in range(6)}
        assert len(splits) > 1

    def test_given_split(self, folder, tmp_path):
        for split in ("train", "test"):
            shutil.copytree(folder, tmp_path / "split" / split)
        (tmp_path / "split" / "test" / "owl" / "0.wav").unlink()
        recordings = from_folder(tmp_path / "split")
        assert recordings.classes == ("crow", "owl")
        assert [len(recordings.train), len(recordings.test)] == [10, 9]

    def test_nested_files_and_other_files(self, folder):
        write_clip(folder / "owl" / "night" / "x.flac")
        (folder / "owl" / "notes.txt").write_text("not audio")
        (folder / "owl" / "._0.wav").write_bytes(b"resource fork")
        write_clip(folder / ".hidden" / "0.wav")
        recordings = from_folder(folder)
        assert recordings.classes == ("crow", "owl")
        assert len(recordings.train) + len(recordings.test) == 11

    def test_no_folder(self, tmp_path):
        with pytest.raises(DataError, match="absent is not a folder"):
            from_folder(tmp_path / "absent")

    def test_empty_folder(self, tmp_path):
        with pytest.raises(DataError, match=r"holds no audio; expected <class>/<name> with \.wav"):
            from_folder(tmp_path)

    def test_one_class(self, folder):
        shutil.rmtree(folder / "owl")
        with pytest.raises(DataError, match="birds has 1 class; at least two are needed"):
            from_folder(folder)

    def test_one_clip_in_a_class(self, folder):
        write_clip(folder / "wren" / "0.wav")
        with pytest.raises(DataError, match=r"class 'wren' has one clip \(.*0\.wav\)"):
            from_folder(folder)

    def test_class_missing_from_test(self, folder, tmp_path):
        for split in ("train", "test"):
            shutil.copytree(folder, tmp_path / "split" / split)
        shutil.rmtree(tmp_path / "split" / "test" / "owl")
        with pytest.raises(
            DataError, match=r"split has no test clip of 1 class \(owl\); every class must occur"
        ):
            from_folder(tmp_path / "split")

    def test_unreadable_files_are_left_out_and_named(self, folder, caplog):
        for take in range(4):
            (folder / "owl" / f"9{take}.wav").write_bytes(b"RIFF")
        recordings = from_folder(folder)
        assert len(recordings.train) + len(recordings.test) == 10
        assert recordings.ignored == ("4 unusable clips (owl/90.wav, owl/91.wav, owl/92.wav, ...)",)
        assert "birds: left out 4 clips that cannot be used: " in caplog.text
        assert "owl/92.wav cannot be read as audio (" in caplog.text
        assert "owl/93.wav cannot" not in caplog.text

    def test_too_short_files_are_left_out(self, folder):
        write_clip(folder / "owl" / "9.wav", seconds=0.02)
        assert from_folder(folder).ignored == ("1 unusable clip (owl/9.wav)",)

    def test_strict_stops_at_an_unreadable_file(self, folder):
        (folder / "owl" / "9.wav").write_bytes(b"RIFF")
        with pytest.raises(DataError, match=r"owl/9\.wav cannot be read as audio"):
            from_folder(folder, strict=True)

    def test_more_than_half_unreadable(self, folder):
        for take in range(5):
            (folder / "owl" / f"{take}.wav").write_bytes(b"RIFF")
        with pytest.raises(DataError, match=r"birds has no train clip of 1 class \(owl\)"):
            from_folder(folder)
        (folder / "crow" / "0.wav").write_bytes(b"")
        with pytest.raises(
            DataError,
            match=r"birds has 10 clips, of which 6 cannot be used, the first for this: .*crow/0\.wav cannot",
        ):
            from_folder(folder)

    @pytest.mark.parametrize("fraction", [0.0, 1.0, -1.0])
    def test_test_fraction(self, folder, fraction):
        with pytest.raises(ValueError, match="test_fraction must be between 0 and 1, got"):
            from_folder(folder, test_fraction=fraction)


class TestFromManifest:
    @staticmethod
    def write(folder: Path, lines: Sequence[str]) -> Path:
        manifest = folder / "list.csv"
        manifest.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return manifest

    def test_without_split(self, folder):
        names = [f"{label}/{take}.wav" for label in ("crow", "owl") for take in range(5)]
        manifest = self.write(folder, ["path,label", *(f"{name},{name[0].upper()}" for name in names)])
        recordings = from_manifest(manifest)
        assert recordings.name == "list"
        assert recordings.classes == ("C", "O")
        assert [len(recordings.train), len(recordings.test)] == [8, 2]

    def test_with_split_absolute_paths_and_extra_columns(self, folder):
        rows = ["label,speaker,split,path"]
        for label in ("crow", "owl"):
            rows += [f"{label},x,train,{folder / label / '0.wav'}", f'{label},y,test," {label}/1.wav "']
        recordings = from_manifest(self.write(folder, rows))
        assert [clip.source for clip in recordings.test] == [
            folder / "crow" / "1.wav",
            folder / "owl" / "1.wav",
        ]
        assert [clip.label for clip in recordings.train] == [0, 1]

    def test_byte_order_mark(self, folder):
        names = [f"{label}/{take}.wav,{label}" for label in ("crow", "owl") for take in range(2)]
        manifest = self.write(folder, ["\ufeffpath,label", *names])
        assert from_manifest(manifest).classes == ("crow", "owl")

    def test_missing_files_are_counted(self, folder):
        rows = ["path,label", *(f"crow/gone{i}.wav,crow" for i in range(5)), "owl/0.wav,owl"]
        with pytest.raises(DataError, match=r"lists 5 missing files \(.*gone0\.wav, .*gone2\.wav, \.\.\.\)"):
            from_manifest(self.write(folder, rows))

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            (
                ["file,label", "a,b"],
                r"lacks the column 'path'; expected path, label or text, and optionally split and speaker",
            ),
            (["path,class", "a,b"], r"lacks the column 'label'"),
            (["path,label"], r"lists no clip"),
            (["path,label", "owl/0.wav,owl", "owl/1.wav,"], r"line 3 has no label"),
            (
                ["path,label,split", "owl/0.wav,owl,dev"],
                r"line 2 has split 'dev'; allowed are train and test",
            ),
            (["path,label,split", "owl/0.wav,owl"], r"line 2 has split ''"),
        ],
    )
    def test_bad_lines(self, folder, rows, message):
        with pytest.raises(DataError, match=message):
            from_manifest(self.write(folder, rows))

    def test_no_manifest(self, tmp_path):
        with pytest.raises(DataError, match=r"none\.csv cannot be read as a CSV manifest"):
            from_manifest(tmp_path / "none.csv")

    def test_class_missing_from_train(self, folder):
        rows = ["path,label,split", "crow/0.wav,crow,train", "crow/1.wav,crow,test", "owl/0.wav,owl,test"]
        with pytest.raises(DataError, match=r"has no train clip of 1 class \(owl\)"):
            from_manifest(self.write(folder, rows))


class TestSynthetic:
    def test_shape_and_label(self):
        recordings = synthetic(classes=3, train_clips=4, test_clips=2, seconds=0.4)
        assert recordings.synthetic
        assert "[synthetic]" in recordings.describe()
        assert [len(recordings.train), len(recordings.test)] == [12, 6]
        for clip in recordings.train + recordings.test:
            samples = recordings.load(clip)
            assert samples.dtype == np.float32
            assert len(samples) == round(clip.seconds * SAMPLE_RATE)
            assert 0.34 <= clip.seconds <= 0.46
            assert np.isfinite(samples).all()
            assert 0.1 < np.abs(samples).max() < 1.0

    def test_deterministic(self):
        first, second, other = (synthetic(classes=2, seconds=0.2, seed=seed) for seed in (1, 1, 2))
        for a, b in zip(first.train, second.train, strict=True):
            np.testing.assert_array_equal(a.source, b.source)
        assert not np.array_equal(first.train[0].source, other.train[0].source)

    def test_test_voices_are_higher(self):
        def centroid(clip: Clip) -> float:
            power = np.abs(np.fft.rfft(clip.source)) ** 2
            return float((power * np.fft.rfftfreq(len(clip.source), 1 / SAMPLE_RATE)).sum() / power.sum())

        recordings = synthetic()
        train, test = (np.mean([centroid(c) for c in part]) for part in (recordings.train, recordings.test))
        assert test / train > 1.1

    def test_words_can_be_learned_across_voices(self):
        """Nearest class mean on coarse log-mel pictures beats chance far, and does not solve the task."""
        recordings = synthetic()
        extractor = WhisperFeatureExtractor()

        def pictures(clips: Sequence[Clip]) -> torch.Tensor:
            parts = []
            for clip in clips:
                mel = extract(extractor, [recordings.load(clip)])["input_features"]
                frames = int(clip.seconds * 100)
                parts.append(torch.nn.functional.adaptive_avg_pool2d(mel[..., :frames], (40, 12)).flatten())
            return torch.stack(parts)

        train, test = pictures(recordings.train), pictures(recordings.test)
        means = train.unflatten(0, (8, -1)).mean(1)
        guesses = torch.cdist(test, means).argmin(1)
        accuracy = (guesses == torch.tensor([clip.label for clip in recordings.test])).float().mean()
        assert 0.4 < accuracy <= 1.0

    @pytest.mark.parametrize("argument", ["classes", "train_clips", "test_clips", "seconds"])
    def test_bad_arguments(self, argument):
        with pytest.raises(ValueError, match=f"{argument} must be at least"):
            synthetic(**{argument: 0})
