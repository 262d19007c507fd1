"""Audio files that are not what their names or headers say, and samples that are no audio."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile
from audio_files import tone, write_clip, write_tiny_clip
from transformers import (
    ASTFeatureExtractor,
    SeamlessM4TFeatureExtractor,
    Wav2Vec2FeatureExtractor,
    WhisperFeatureExtractor,
)

from mmtransfer.data import Clip, DataError, Recordings, from_folder, read_audio
from mmtransfer.data.features import Collator, extract

NOISE = np.random.default_rng(0).normal(0, 0.1, 80_000).astype(np.float32)


def with_samples(samples: np.ndarray, count: int = 2) -> Recordings:
    clips = [Clip(samples, label, 1.0) for label in range(count)]
    return Recordings("made", tuple("abc"[:count]), clips, clips)


class TestFormats:
    @pytest.mark.parametrize(
        ("name", "subtype"),
        [
            ("gsm.wav", "GSM610"),
            ("g721.wav", "G721_32"),
            ("nms.wav", "NMS_ADPCM_32"),
            ("gsm.aiff", "GSM610"),
            ("g723.au", "G723_24"),
        ],
    )
    @pytest.mark.parametrize("max_seconds", [None, 0.5, 100.0])
    def test_codecs_that_cannot_be_sought_in(self, tmp_path, name, subtype, max_seconds):
        soundfile.write(tmp_path / name, tone(300, 2.0, 8_000), 8_000, subtype=subtype)
        with soundfile.SoundFile(tmp_path / name) as file:
            assert not file.seekable()
            expected = 2 * file.frames if max_seconds != 0.5 else 8_000
        samples = read_audio(tmp_path / name, max_seconds=max_seconds)
        assert len(samples) == expected
        spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
        assert np.fft.rfftfreq(len(samples), 1 / 16_000)[spectrum.argmax()] == pytest.approx(300, abs=3)

    def test_gsm_in_a_collator_without_a_crop(self, tmp_path):
        for label in ("a", "b"):
            for take in range(2):
                path = tmp_path / label / f"{take}.wav"
                path.parent.mkdir(exist_ok=True)
                soundfile.write(path, tone(300 + take, 0.5, 8_000), 8_000, subtype="GSM610")
        recordings = from_folder(tmp_path)
        batch = Collator(recordings, Wav2Vec2FeatureExtractor(), max_seconds=None)(recordings.train)
        frames = soundfile.info(tmp_path / "a" / "0.wav").frames
        assert batch["input_values"].shape == (2, 2 * frames)

    @pytest.mark.parametrize(
        "subtype", ["MS_ADPCM", "IMA_ADPCM", "ALAW", "ULAW", "PCM_U8", "PCM_24", "DOUBLE"]
    )
    def test_codecs_of_wav(self, tmp_path, subtype):
        soundfile.write(tmp_path / "a.wav", tone(300), 16_000, subtype=subtype)
        samples = read_audio(tmp_path / "a.wav")
        # Without the beginning, to which IMA ADPCM has to adapt, and its last block, which may be cut.
        assert np.abs(samples[500:7_000] - tone(300)[500:7_000]).max() < 0.05

    @pytest.mark.parametrize("name", ["a.mp3", "a.flac", "a.txt", "a"])
    def test_the_content_counts_and_not_the_suffix(self, tmp_path, name):
        write_clip(tmp_path / "a.wav").rename(tmp_path / name)
        assert len(read_audio(tmp_path / name)) == 1_600

    def test_a_name_that_soundfile_takes_for_raw_samples(self, tmp_path):
        write_clip(tmp_path / "a.wav").rename(tmp_path / "a.raw")
        with pytest.raises(DataError, match=r"a\.raw cannot be read as audio"):
            read_audio(tmp_path / "a.raw")

    def test_many_channels_are_averaged(self, tmp_path):
        channels = np.stack([tone(300 + 100 * index) for index in range(6)], 1)
        soundfile.write(tmp_path / "a.wav", channels, 16_000, subtype="FLOAT")
        np.testing.assert_allclose(read_audio(tmp_path / "a.wav"), channels.mean(1), atol=1e-6)

    def test_a_folder_and_an_empty_file(self, tmp_path):
        (tmp_path / "a.wav").mkdir()
        (tmp_path / "b.wav").touch()
        for name in ("a.wav", "b.wav"):
            with pytest.raises(DataError, match=f"{name} cannot be read as audio"):
                read_audio(tmp_path / name)


class TestHeaders:
    def test_a_sampling_rate_of_zero(self, tmp_path):
        content = bytearray(write_clip(tmp_path / "a.wav").read_bytes())
        content[24:28] = struct.pack("<I", 0)
        (tmp_path / "a.wav").write_bytes(content)
        with pytest.raises(DataError, match=r"a\.wav cannot be read as audio"):
            read_audio(tmp_path / "a.wav")

    @pytest.mark.parametrize("name", ["a.flac", "a.mp3"])
    def test_a_file_that_breaks_off(self, tmp_path, name):
        soundfile.write(tmp_path / name, NOISE, 16_000)
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: len(content) // 2])
        with pytest.raises(
            DataError, match=rf"{name} (is damaged|breaks off after 2\.\d of 5\.0 s).*re-export"
        ):
            read_audio(tmp_path / name)
        # What is used of it is whole.
        assert len(read_audio(tmp_path / name, max_seconds=1.0)) == 16_000

    def test_a_damaged_middle(self, tmp_path):
        soundfile.write(tmp_path / "a.ogg", NOISE, 16_000)
        content = bytearray((tmp_path / "a.ogg").read_bytes())
        content[len(content) // 2 : len(content) // 2 + 200] = b"\xff" * 200
        (tmp_path / "a.ogg").write_bytes(content)
        with pytest.raises(DataError, match=r"a\.ogg breaks off after \d\.\d of 5\.0 s"):
            read_audio(tmp_path / "a.ogg")

    def test_a_wav_without_its_end_is_as_long_as_it_is(self, tmp_path):
        content = write_clip(tmp_path / "a.wav").read_bytes()
        (tmp_path / "a.wav").write_bytes(content[:2_044])
        assert 900 < len(read_audio(tmp_path / "a.wav")) <= 1_000

    @pytest.fixture
    def flac(self, tmp_path: Path) -> Path:
        soundfile.write(tmp_path / "a.flac", tone(300), 16_000)
        return tmp_path / "a.flac"

    @staticmethod
    def set_length(flac: Path, top: int, rest: bytes) -> None:
        content = bytearray(flac.read_bytes())
        content[21] = content[21] & 0xF0 | top
        content[22:26] = rest
        flac.write_bytes(content)

    def test_an_unknown_length(self, flac):
        self.set_length(flac, 0, bytes(4))
        with pytest.raises(DataError, match=r"a\.flac does not say how long it is"):
            read_audio(flac)

    def test_a_false_length_takes_no_memory(self, flac):
        self.set_length(flac, 1, b"\xff" * 4)
        tracemalloc.start()
        with pytest.raises(DataError, match=r"a\.flac (is damaged|breaks off)"):
            read_audio(flac)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 2**25


class TestArguments:
    @pytest.mark.parametrize("rate", [0, -16_000, float("nan")])
    def test_sampling_rate(self, tmp_path, rate):
        with pytest.raises(ValueError, match="sample_rate must be positive, got"):
            read_audio(write_clip(tmp_path / "a.wav"), rate)

    @pytest.mark.parametrize("seconds", [0, -1, float("nan"), 0.01])
    def test_max_seconds(self, tmp_path, seconds):
        recordings = with_samples(tone(300))
        for call in (
            lambda: read_audio(write_clip(tmp_path / "a.wav"), max_seconds=seconds),
            lambda: recordings.load(recordings.train[0], max_seconds=seconds),
            lambda: Collator(recordings, Wav2Vec2FeatureExtractor(), max_seconds=seconds),
        ):
            with pytest.raises(
                ValueError, match=r"max_seconds must be (positive|at least 0\.025) or None, got"
            ):
                call()


INTEGERS = (tone(300) * 32_767).astype(np.int16)


class TestValues:
    @pytest.mark.parametrize("dtype", [np.int16, np.int32, np.uint8, np.int64, bool])
    def test_integer_samples(self, dtype):
        recordings = with_samples(INTEGERS.astype(dtype))
        with pytest.raises(TypeError, match=f"{np.dtype(dtype)}; divide int16 by 32768"):
            Collator(recordings, WhisperFeatureExtractor())(recordings.train)
        with pytest.raises(
            TypeError, match=r"audio\[1\] must be floating-point samples between -1 and 1, got"
        ):
            extract(Wav2Vec2FeatureExtractor(), [tone(300), INTEGERS.astype(dtype)])

    def test_integer_samples_as_floating_point(self):
        samples = INTEGERS.astype(np.float32)
        recordings = with_samples(samples)
        with pytest.raises(
            DataError, match=r"source of a clip of made reaches 16383, .*divide 16-bit values"
        ):
            recordings.load(recordings.train[0])
        with pytest.raises(ValueError, match=r"audio\[0\] reaches 16383"):
            extract(Wav2Vec2FeatureExtractor(), [samples])

    def test_integer_samples_in_a_floating_point_file(self, tmp_path):
        soundfile.write(tmp_path / "a.wav", INTEGERS.astype(np.float32), 16_000, subtype="FLOAT")
        with pytest.raises(
            DataError, match=r"a\.wav reaches 16383, .*divide 16-bit values by 32768; re-export"
        ):
            read_audio(tmp_path / "a.wav")

    def test_loud_samples_are_audio(self, tmp_path):
        soundfile.write(tmp_path / "a.wav", 8 * tone(300), 16_000, subtype="FLOAT")
        assert np.abs(read_audio(tmp_path / "a.wav")).max() == pytest.approx(4, rel=1e-3)

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("place", [0, 77, -1])
    def test_not_finite(self, tmp_path, value, place):
        samples = tone(300)
        samples[place] = value
        with pytest.raises(ValueError, match=r"audio\[1\] holds NaN or infinite samples"):
            extract(WhisperFeatureExtractor(), [tone(300), samples])
        for channels in (samples, np.stack([tone(300), samples], 1), np.stack([samples, -samples], 1)):
            soundfile.write(tmp_path / "a.wav", channels, 16_000, subtype="FLOAT")
            with pytest.raises(DataError, match=r"a\.wav holds NaN or infinite samples"):
                read_audio(tmp_path / "a.wav")

    @pytest.mark.parametrize("shape", [(0,), (8_000, 2), (1, 8_000), ()])
    def test_shapes(self, shape):
        samples = np.zeros(shape, np.float32)
        with pytest.raises(ValueError, match=r"must have the shape \(samples,\), one channel, got \("):
            extract(Wav2Vec2FeatureExtractor(), [samples])
        recordings = with_samples(samples)
        with pytest.raises(DataError, match="the source of a clip of made must have the shape"):
            recordings.load(recordings.train[0])

    def test_no_clip(self):
        with pytest.raises(ValueError, match="audio must hold at least one clip, got none"):
            extract(WhisperFeatureExtractor(), [])

    @pytest.mark.parametrize("dtype", [np.float16, np.float64])
    def test_other_precisions_become_float32(self, dtype):
        recordings = with_samples(tone(300).astype(dtype))
        assert recordings.load(recordings.train[0]).dtype == np.float32
        assert recordings.load(recordings.train[0], 8_000).dtype == np.float32

    @pytest.mark.parametrize(
        "extractor",
        [
            WhisperFeatureExtractor(),
            Wav2Vec2FeatureExtractor(do_normalize=True),
            ASTFeatureExtractor(),
            SeamlessM4TFeatureExtractor(),
        ],
        ids=lambda extractor: type(extractor).__name__,
    )
    def test_silence_is_audio_and_its_features_are_finite(self, tmp_path, extractor):
        soundfile.write(tmp_path / "a.wav", np.zeros(8_000), 16_000)
        samples = read_audio(tmp_path / "a.wav")
        assert not samples.any()
        features = extract(extractor, [samples, samples[:1_600]])
        assert all(np.isfinite(value.numpy()).all() for value in features.values())


def test_reading_a_folder_decodes_nothing(tmp_path, monkeypatch):
    for number in range(8):
        write_tiny_clip(tmp_path / "ab"[number % 2] / f"{number}.wav", number)
    monkeypatch.setattr(soundfile.SoundFile, "read", None)
    assert len(from_folder(tmp_path).train) == 6
