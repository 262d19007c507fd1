"""Stored features and stored inputs: the order of the clips, no padding, and no more than fits in memory."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from small_experiment import (
    TAPS,
    build,
    collator,
    inputs_of,
    small_experiment,
    task_of,
    words_of_two_lengths,
)
from tiny_encoders import TINY
from transformers import Wav2Vec2FeatureExtractor

from mmtransfer.compare.experiment import Experiment
from mmtransfer.data import DataError, synthetic
from mmtransfer.data.features import Collator
from mmtransfer.encoders import TappedEncoder
from mmtransfer.tasks import Classification
from mmtransfer.training.caching import CachedFeatures, EncoderCollator, cache_features, cache_inputs


@pytest.fixture(scope="module")
def experiment() -> Experiment:
    return small_experiment()


@pytest.fixture(scope="module")
def cached(experiment: Experiment) -> CachedFeatures:
    encoder = TappedEncoder(experiment.model, TAPS)
    collate = collator(experiment, encoder)
    return cache_features(encoder, experiment.recordings.train, collate, batch_size=5)


class TestFeatures:
    def test_they_are_in_the_order_of_the_clips(self, experiment, cached) -> None:
        encoder = TappedEncoder(experiment.model, TAPS)
        collate = collator(experiment, encoder)
        for index in (0, 7, 23):
            clip = experiment.recordings.train[index]
            batch = collate([clip])
            assert int(batch["lengths"]) == math.ceil(len(clip.source) / 160)
            alone = encoder(batch["input_features"], batch["lengths"]).features
            item = cached[index]
            assert item["target"] == clip.label
            torch.testing.assert_close(item["features"], alone, atol=1e-4, rtol=1e-4)

    def test_no_frame_of_padding_is_kept_for_wav2vec2(self) -> None:
        words = synthetic(classes=2, train_clips=3, test_clips=1, seconds=0.3)
        encoder = TappedEncoder(TINY["wav2vec2"].build(), [0, 3])
        extractor = Wav2Vec2FeatureExtractor(return_attention_mask=True)
        collate = EncoderCollator(Collator(words, extractor), encoder, Classification(num_labels=2))
        features = cache_features(encoder, words.train, collate, batch_size=6)
        for clip, item in zip(words.train, (features[i] for i in range(6)), strict=True):
            alone = encoder(**{name: value for name, value in collate([clip]).items() if name != "labels"})
            torch.testing.assert_close(item["features"], alone.features, atol=1e-4, rtol=1e-4)

    def test_more_than_the_memory_holds_is_refused(self, experiment) -> None:
        encoder = TappedEncoder(experiment.model, TAPS)
        collate = collator(experiment, encoder)
        collate.collator.max_seconds = None
        years = [*experiment.recordings.train, replace(experiment.recordings.train[0], seconds=1e9)]
        with pytest.raises(DataError, match=r"cached features need .* GiB.*--no-cache"):
            cache_features(encoder, years, collate, batch_size=2)

    def test_selected_taps_come_in_the_order_asked_for(self, cached) -> None:
        assert torch.equal(cached.select([2, 0])[5]["features"], cached[5]["features"][:, [2, 0]])
        assert torch.equal(cached.select([1, 2])[5]["features"], cached[5]["features"][:, 1:3])
        selected = cached.select([2])
        batch = selected.collate([selected[index] for index in (4, 1)])
        assert batch["features"].shape[1:] == (1, 64)
        assert batch["lengths"].tolist() == [cached.lengths[4], cached.lengths[1]]
        assert batch["labels"].tolist() == [cached.targets[4], cached.targets[1]]
        assert torch.equal(batch["features"][: cached.lengths[4], 0], cached[4]["features"][:, 2])


class TestInputs:
    @pytest.mark.parametrize("model_type", ["whisper", "wav2vec2", "wav2vec2-no-mask"])
    def test_they_give_the_logits_of_fresh_ones(self, model_type: str) -> None:
        experiment = small_experiment(words_of_two_lengths())
        if model_type != "whisper":
            extractor = Wav2Vec2FeatureExtractor(return_attention_mask=model_type == "wav2vec2")
            experiment = replace(experiment, model=TINY["wav2vec2"].build(), extractor=extractor)
        model = build(experiment, "aat-ms").eval()
        collate, cached = collator(experiment, model.encoder), inputs_of(experiment, model)["test"]
        clips = experiment.recordings.test[:12]
        fresh = collate(clips)
        stored = cached.collate([cached[index] for index in range(12)])
        assert torch.equal(fresh["labels"], stored["labels"])
        assert len(set(stored["lengths"].tolist())) > 1
        with torch.no_grad():
            wanted = [model(**collate([clip])).logits[0] for clip in clips]
            torch.testing.assert_close(model(**stored).logits, torch.stack(wanted), atol=2e-4, rtol=1e-3)

    def test_more_than_the_memory_holds_is_refused(self, experiment) -> None:
        collate = collator(experiment, TappedEncoder(experiment.model, [-1]))
        collate.collator.max_seconds = None
        years = [*experiment.recordings.train, replace(experiment.recordings.train[0], seconds=1e9)]
        with pytest.raises(DataError, match=r"cached inputs need .* GiB.*--no-cache"):
            cache_inputs(years, collate)


def test_labels_are_those_that_the_task_makes(experiment) -> None:
    class Doubled(Classification):
        def target(self, clip):
            return 2 * clip.label

        def collate(self, targets):
            return torch.tensor(targets) + 0.5

    encoder = TappedEncoder(experiment.model, [-1])
    collate = collator(experiment, encoder)
    collate.task = Doubled(num_labels=4)
    clips = experiment.recordings.test
    wanted = [2 * clip.label + 0.5 for clip in clips]
    assert collate(clips)["labels"].tolist() == wanted
    for cached in (cache_features(encoder, clips, collate), cache_inputs(clips, collate)):
        assert cached.collate([cached[index] for index in range(len(clips))])["labels"].tolist() == wanted
    assert task_of(experiment).target(clips[0]) == clips[0].label
