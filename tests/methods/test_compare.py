"""Training, measuring and comparing fusions, on generated sounds and small random encoders."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import Wav2Vec2FeatureExtractor, set_seed

from mmtransfer import tasks
from mmtransfer.compare import CompareSettings, compare
from mmtransfer.compare import step as measure
from mmtransfer.compare.step import Step, compare_steps
from mmtransfer.data import DataError, synthetic
from mmtransfer.data.features import Collator
from mmtransfer.hff import HFF, FrozenEncoder, reference
from mmtransfer.methods import METHODS
from mmtransfer.tasks import Task, synthetic_task
from mmtransfer.training.caching import (
    CachedFeatures,
    EncoderCollator,
    cache_features,
    collate_features,
)
from mmtransfer.training.loop import TrainSettings, parameter_groups, predict, train
from tests.methods.tiny_encoders import TINY

# Four, so that HFF-b has a level of projections.
TAPS = ["embeddings", 0, 1, 3]
QUICK = TrainSettings(epochs=2, batch_size=8, cpu=True)


@pytest.fixture(autouse=True)
def _few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test looks at a time."""
    monkeypatch.setattr(measure, "ROUNDS", (2, 2))


@pytest.fixture(scope="module")
def task() -> Task:
    """Few short words on the small random Whisper encoder."""
    words = synthetic(classes=4, train_clips=6, test_clips=3, seconds=0.4)
    return replace(synthetic_task(), recordings=words)


@pytest.fixture(scope="module")
def cached(task: Task) -> dict[str, CachedFeatures]:
    encoder = FrozenEncoder(task.model, TAPS)
    collate = EncoderCollator(Collator(task.recordings, task.extractor), encoder)
    return {
        "train": cache_features(encoder, task.recordings.train, collate, batch_size=5),
        "test": cache_features(encoder, task.recordings.test, collate, batch_size=5),
    }


def build(task: Task, fusion: str = "weighted_sum", seed: int = 0) -> HFF:
    set_seed(seed)
    return HFF.build(task.model, TAPS, fusion=fusion, out_dim=16, num_labels=len(task.recordings.classes))


def test_cached_features_are_in_the_order_of_the_clips(task: Task, cached: dict[str, CachedFeatures]) -> None:
    encoder = FrozenEncoder(task.model, TAPS)
    collate = EncoderCollator(Collator(task.recordings, task.extractor), encoder)
    for index in (0, 7, 23):
        clip = task.recordings.train[index]
        batch = collate([clip])
        assert int(batch["lengths"]) == math.ceil(len(clip.source) / 160)
        alone = encoder(batch["input_features"], batch["lengths"]).features
        item = cached["train"][index]
        assert item["label"] == clip.label
        torch.testing.assert_close(item["features"], alone, atol=1e-4, rtol=1e-4)


def test_cached_features_keep_no_frame_of_padding_for_wav2vec2() -> None:
    words = synthetic(classes=2, train_clips=3, test_clips=1, seconds=0.3)
    encoder = FrozenEncoder(TINY["wav2vec2"].build(), [0, 3])
    collator = Collator(words, Wav2Vec2FeatureExtractor(return_attention_mask=True))
    collate = EncoderCollator(collator, encoder)
    features = cache_features(encoder, words.train, collate, batch_size=6)
    for clip, item in zip(words.train, (features[i] for i in range(6)), strict=True):
        alone = encoder(**{name: value for name, value in collate([clip]).items() if name != "labels"})
        torch.testing.assert_close(item["features"], alone.features, atol=1e-4, rtol=1e-4)


def test_features_larger_than_the_memory_are_refused(task: Task) -> None:
    encoder = FrozenEncoder(task.model, TAPS)
    collate = EncoderCollator(Collator(task.recordings, task.extractor), encoder)
    collate.collator.max_seconds = None
    years = [*task.recordings.train, replace(task.recordings.train[0], seconds=1e9)]
    with pytest.raises(DataError, match=r"cached features need .* GiB.*--no-cache"):
        cache_features(encoder, years, collate, batch_size=2)


def test_selected_taps_come_in_the_order_asked_for(cached: dict[str, CachedFeatures]) -> None:
    features = cached["train"]
    assert torch.equal(features.select([2, 0])[5]["features"], features[5]["features"][:, [2, 0]])
    assert torch.equal(features.select([1, 2])[5]["features"], features[5]["features"][:, 1:3])
    batch = collate_features([features.select([2])[i] for i in (4, 1)])
    assert batch["features"].shape[1:] == (1, 64)
    assert batch["lengths"].tolist() == [features.lengths[4], features.lengths[1]]
    assert torch.equal(batch["features"][: features.lengths[4], 0], features[4]["features"][:, 2])


@pytest.mark.parametrize("fusion", ["weighted_sum", "hff_b"])
def test_the_same_seed_gives_the_same_weights(
    task: Task, cached: dict[str, CachedFeatures], fusion: str
) -> None:
    found = []
    for seed in (1, 1, 2):
        model = build(task, fusion, seed)
        result = train(model, cached["train"], collate_features, replace(QUICK, seed=seed))
        found.append(
            (result.loss, model.fusion.state_dict(), predict(model, cached["test"], collate_features, QUICK))
        )
    assert found[0][0] == found[1][0] != found[2][0]
    assert all(torch.equal(value, found[1][1][name]) for name, value in found[0][1].items())
    assert torch.equal(found[0][2][0], found[1][2][0])


def test_predictions_are_in_the_order_of_the_clips(task: Task, cached: dict[str, CachedFeatures]) -> None:
    model = build(task)
    logits, labels = predict(model, cached["test"], collate_features, QUICK)
    assert labels.tolist() == [clip.label for clip in task.recordings.test]
    item = cached["test"][4]
    alone = model(features=item["features"], lengths=torch.tensor([len(item["features"])])).logits
    torch.testing.assert_close(logits[4], alone[0])


def test_only_the_fusion_and_the_head_are_trained(task: Task, cached: dict[str, CachedFeatures]) -> None:
    model = build(task)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train(model, cached["train"], collate_features, QUICK)
    changed = {
        name.split(".")[0]
        for name, value in model.state_dict().items()
        if not torch.equal(value, before[name])
    }
    assert changed == {"fusion", "head"}


def test_parameter_groups_give_mixing_weights_their_rate_and_only_matrices_decay(task: Task) -> None:
    settings = TrainSettings(learning_rate=0.5, mixing_learning_rate=0.25, weight_decay=0.125)
    mixing = build(task).fusion.weights
    groups = parameter_groups(build(task), settings)
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [
        (0.5, 0.125),
        (0.5, 0.0),
        (0.25, 0.0),
    ]
    assert [parameter.shape for parameter in groups[2]["params"]] == [mixing.shape]
    for model in (build(task), build(task, "hff_b")):
        grouped = parameter_groups(model, settings)
        assert sum(p.numel() for group in grouped for p in group["params"]) == sum(
            p.numel() for p in model.parameters() if p.requires_grad
        )
        names = {id(p): name for name, p in model.named_parameters()}
        assert {names[id(p)].rpartition(".")[2] for p in grouped[0]["params"]} == {"weight"}


@pytest.mark.parametrize("fusion", ["weighted_sum", "lff", "hff_b"])
def test_a_saved_run_reproduces_its_predictions(
    task: Task, cached: dict[str, CachedFeatures], fusion: str, tmp_path: Path
) -> None:
    model = build(task, fusion)
    train(model, cached["train"], collate_features, QUICK)
    expected, _ = predict(model, cached["test"], collate_features, QUICK)
    model.save_pretrained(tmp_path / "saved")
    loaded = HFF.from_pretrained(tmp_path / "saved", task.model)
    found, _ = predict(loaded, cached["test"], collate_features, QUICK)
    assert torch.equal(found, expected)


def test_the_synthetic_task_is_learned_well_above_chance() -> None:
    settings = CompareSettings(
        methods=("last", "weighted-sum"), seeds=(0,), training=TrainSettings(epochs=20, cpu=True)
    )
    result = compare(synthetic_task(), settings)
    chance = result.task["chance"]
    assert chance == pytest.approx(1 / 8)
    assert [method.accuracy > 2.5 * chance for method in result.methods] == [True, True]


def test_cached_and_uncached_training_agree(task: Task) -> None:
    methods = ("last", "weighted-sum", "hff-b")
    settings = CompareSettings(methods=methods, seeds=(0,), training=QUICK)
    stored, encoded = (compare(task, replace(settings, cache=cache)) for cache in (True, False))
    assert stored.feature_seconds is not None
    assert encoded.feature_seconds is None
    for ours, theirs in zip(stored.methods, encoded.methods, strict=True):
        assert ours.runs[0].loss == pytest.approx(theirs.runs[0].loss, rel=1e-3)
        assert ours.accuracy == pytest.approx(theirs.accuracy, abs=1.01 / 12)
        assert ours.tap_names == theirs.tap_names


def test_a_comparison_can_be_repeated(task: Task) -> None:
    settings = CompareSettings(methods=("last", "hff-b"), seeds=(0, 1), training=QUICK)
    first, second = (compare(task, settings) for _ in range(2))
    for ours, theirs in zip(first.methods, second.methods, strict=True):
        assert [(run.accuracy, run.loss) for run in ours.runs] == [
            (run.accuracy, run.loss) for run in theirs.runs
        ]
        assert ours.runs[0].loss != ours.runs[1].loss


def test_the_last_layer_is_the_encoders_whatever_the_taps(task: Task) -> None:
    settings = CompareSettings(methods=("last", "lff"), seeds=(0,), taps=(1, "embeddings"), training=QUICK)
    last, lff = compare(task, settings).methods
    assert last.tap_names == ["3"]
    assert lff.tap_names == ["1", "embeddings"]
    assert last.trainable_parameters == 64 * 4 + 4
    # The paper's width, 5/8 of the encoder's.
    assert lff.trainable_parameters == (2 * 64 * 40 + 40) + (40 * 4 + 4)
    assert last.step.eager is None
    (alone,) = compare(task, replace(settings, methods=("last",), taps=None)).methods
    assert alone.runs[0].loss == last.runs[0].loss


def test_tap_weights_are_reported(task: Task) -> None:
    settings = CompareSettings(
        methods=("weighted-sum", "lff", "hff-b"), seeds=(0,), taps=(0, 3), training=QUICK
    )
    mixed, lff, hff = compare(task, settings).methods
    assert sum(mixed.runs[0].tap_weights) == pytest.approx(1.0)
    assert mixed.tap_weights_kind == "softmax"
    assert len(lff.runs[0].tap_weights) == 2
    assert lff.tap_weights_kind == "norm"
    assert hff.runs[0].tap_weights is None


def test_methods_and_taps_that_cannot_work_are_refused_before_any_work(task: Task) -> None:
    with pytest.raises(DataError, match=r"no method is called 'hff'.*hff-b"):
        compare(task, CompareSettings(methods=("hff",)))
    with pytest.raises(DataError, match=r"layer indices in \[-4, 3\].*got 4"):
        compare(task, CompareSettings(taps=(4,)))


def test_deep_encoders_are_tapped_at_every_second_layer() -> None:
    deep = TINY["wav2vec2"].build(num_hidden_layers=14)
    assert tasks.default_taps(deep) == [1, 3, 5, 7, 9, 11, 13]
    assert tasks.default_taps(TINY["wav2vec2"].build()) == ["embeddings", 0, 1, 2, 3]


class _Wrong(reference.EagerWeightedSum):
    """A twin that is off by a factor."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 1.1 * super().forward(x)


def test_a_wrong_result_is_noticed(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    method = replace(METHODS["weighted-sum"], eager=_Wrong)
    monkeypatch.setitem(METHODS, "weighted-sum", method)
    settings = CompareSettings(methods=("weighted-sum", "hff-b"), seeds=(0,), training=QUICK)
    wrong, right = compare(task, settings).methods
    assert not wrong.step.agrees
    assert right.step.agrees
    assert 0 < right.step.difference < 1e-4


class _Allocating(nn.Module):
    """A linear layer that keeps floats for the backward pass."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements = elements
        self.scale = nn.Parameter(torch.ones(1))
        self.linear = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        big = x.new_ones(self.elements)
        return self.linear(x) * (big * self.scale).square().mean()


def test_peak_memory_of_a_step_is_measured() -> None:
    x, labels = torch.randn(2, 8), torch.tensor([0, 1])

    def peak(elements: int) -> float:
        step = Step(_Allocating(elements), lambda model: model(x), labels)
        return compare_steps(step).mmkernels.memory_mib

    # Each of 32 MiB: the ones and the product, which square saves; in its backward pass also the incoming
    # gradient, the product's first power, the double of that, and their product.
    assert peak(2**23) == pytest.approx(6 * 32, abs=0.1)
    assert peak(1) < 0.1


@pytest.mark.parametrize("bf16", [False, True])
def test_training_under_autocast(task: Task, cached: dict[str, CachedFeatures], bf16: bool) -> None:
    model = build(task, "hff_b")
    result = train(model, cached["train"], collate_features, replace(QUICK, bf16=bf16))
    assert math.isfinite(result.loss)
    assert {p.dtype for p in model.fusion.parameters()} == {torch.float32}
