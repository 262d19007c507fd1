"""The collator: features, lengths and labels of a batch, with each family's own feature extractor."""

from __future__ import annotations

import pytest
import torch
from audio_files import tone
from transformers import (
    ASTFeatureExtractor,
    SeamlessM4TFeatureExtractor,
    Wav2Vec2FeatureExtractor,
    WhisperFeatureExtractor,
)

from mmtransfer.data import DataError, Recordings, synthetic
from mmtransfer.data.features import Collator, extract, load_feature_extractor


@pytest.fixture(scope="module")
def recordings() -> Recordings:
    return synthetic(classes=2, train_clips=3, test_clips=1, seconds=0.6)


class TestCollator:
    def test_whisper_longest_is_the_30_second_input_cut_short(self, recordings):
        longest = Collator(recordings, WhisperFeatureExtractor())(recordings.train)
        whole = Collator(recordings, WhisperFeatureExtractor(), pad_to="max")(recordings.train)
        frames = longest["input_features"].shape[-1]
        assert whole["input_features"].shape == (6, 80, 3_000)
        assert frames % 2 == 0
        assert longest["lengths"].max() <= 160 * frames <= longest["lengths"].max() + 200 + 320
        assert torch.equal(longest["input_features"], whole["input_features"][..., :frames])
        assert torch.equal(longest["lengths"], whole["lengths"])

    def test_whisper_batch_invariance(self, recordings):
        collator = Collator(recordings, WhisperFeatureExtractor())
        batch = collator(recordings.train)
        for row, clip in enumerate(recordings.train):
            alone = collator([clip])["input_features"][0]
            assert torch.equal(batch["input_features"][row, :, : alone.shape[-1]], alone)

    def test_lengths_and_labels(self, recordings):
        batch = Collator(recordings, WhisperFeatureExtractor(), max_seconds=0.55)(recordings.train)
        expected = [min(len(clip.source), 8_800) for clip in recordings.train]
        assert batch["lengths"].tolist() == expected
        assert min(expected) < 8_800
        assert batch["labels"].tolist() == [0, 0, 0, 1, 1, 1]
        assert batch["lengths"].dtype == batch["labels"].dtype == torch.int64

    def test_whisper_window_limits_the_lengths(self):
        features = extract(WhisperFeatureExtractor(chunk_length=1), [tone(300, 1.5), tone(300, 0.5)])
        assert features["lengths"].tolist() == [16_000, 8_000]
        assert features["input_features"].shape == (2, 80, 100)

    @pytest.mark.parametrize(
        ("extractor", "name", "shape"),
        [
            (Wav2Vec2FeatureExtractor(return_attention_mask=True), "input_values", ()),
            (SeamlessM4TFeatureExtractor(), "input_features", (160,)),
            (ASTFeatureExtractor(num_mel_bins=64, max_length=128), "input_values", (128, 64)),
        ],
    )
    def test_other_extractors(self, recordings, extractor, name, shape):
        batch = Collator(recordings, extractor)(recordings.train)
        assert batch[name].shape[0] == 6
        assert tuple(batch[name].shape[batch[name].ndim - len(shape) :]) == shape
        assert batch[name].dtype == torch.float32
        assert batch["lengths"].tolist() == [len(clip.source) for clip in recordings.train]
        if "attention_mask" in batch and name == "input_values":
            assert batch["attention_mask"].sum(1).tolist() == batch["lengths"].tolist()

    def test_extractor_rate(self, recordings):
        extractor = Wav2Vec2FeatureExtractor(sampling_rate=8_000)
        batch = Collator(recordings, extractor)(recordings.train[:1])
        assert batch["lengths"].item() == pytest.approx(len(recordings.train[0].source) / 2, abs=1)

    def test_as_collate_function_of_a_loader(self, recordings):
        loader = torch.utils.data.DataLoader(
            recordings.train, batch_size=4, collate_fn=Collator(recordings, WhisperFeatureExtractor())
        )
        assert [len(batch["labels"]) for batch in loader] == [4, 2]

    def test_extractor_from_folder(self, recordings, tmp_path):
        WhisperFeatureExtractor(feature_size=128).save_pretrained(tmp_path)
        assert Collator(recordings, tmp_path)(recordings.train)["input_features"].shape[1] == 128

    def test_bad_arguments(self, recordings, tmp_path):
        with pytest.raises(DataError, match="no audio feature extractor can be loaded from"):
            load_feature_extractor(tmp_path)
        with pytest.raises(ValueError, match="pad_to must be 'longest' or 'max', got 'none'"):
            Collator(recordings, WhisperFeatureExtractor(), pad_to="none")
        with pytest.raises(ValueError, match="max_seconds must be positive or None, got 0"):
            Collator(recordings, WhisperFeatureExtractor(), max_seconds=0)
