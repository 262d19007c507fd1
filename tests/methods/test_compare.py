"""Comparisons on generated sounds and a small random encoder: repeatable, independent, refused early."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_experiment import few_rounds, small_experiment, words_of_two_lengths
from tiny_encoders import TINY

from mmtransfer.compare.experiment import Experiment
from mmtransfer.compare.results import in_parts
from mmtransfer.compare.session import compare, find_methods
from mmtransfer.compare.settings import CompareSettings
from mmtransfer.data import DataError
from mmtransfer.demo.experiments import synthetic_experiment
from mmtransfer.encoders import Encoder, default_taps
from mmtransfer.hff import eager
from mmtransfer.training.settings import Training

QUICK = CompareSettings(
    seeds=1,
    epochs=2,
    batch_size=8,
    tuning_epochs=1,
    tuning_batch_size=8,
    learning_rate=3e-3,
    cpu=True,
    workers=0,
)


@pytest.fixture(autouse=True)
def _few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    few_rounds(monkeypatch)


@pytest.fixture(scope="module")
def experiment() -> Experiment:
    return small_experiment()


@pytest.fixture(scope="module")
def lengths() -> Experiment:
    return small_experiment(words_of_two_lengths())


def test_the_synthetic_experiment_is_learned_well_above_chance() -> None:
    settings = CompareSettings(methods=("head", "weighted-sum"), seeds=1, epochs=20, cpu=True, workers=0)
    result = compare(synthetic_experiment(), settings)
    chance = result.task["chance"]
    assert chance == pytest.approx(1 / 8)
    assert [method.score > 2.5 * chance for method in result.methods] == [True, True]


def test_cached_and_uncached_training_agree(experiment) -> None:
    settings = replace(QUICK, methods=("head", "weighted-sum", "hff-b"))
    stored = compare(experiment, replace(settings, workers=1))
    encoded = compare(experiment, replace(settings, cache=False))
    assert stored.feature_seconds is not None
    assert encoded.feature_seconds is None
    for ours, theirs in zip(stored.methods, encoded.methods, strict=True):
        assert ours.runs[0].loss == pytest.approx(theirs.runs[0].loss, rel=1e-3)
        assert ours.score == pytest.approx(theirs.score, abs=1.01 / 12)
        assert ours.taps == theirs.taps


def test_a_comparison_can_be_repeated(experiment) -> None:
    settings = replace(QUICK, methods=("head", "hff-b"), seeds=2)
    first, second = (compare(experiment, settings) for _ in range(2))
    for ours, theirs in zip(first.methods, second.methods, strict=True):
        assert [(run.seed, run.score, run.loss) for run in ours.runs] == [
            (run.seed, run.score, run.loss) for run in theirs.runs
        ]
        assert [run.seed for run in ours.runs] == [0, 1]
        assert ours.runs[0].loss != ours.runs[1].loss


def test_the_last_layer_is_the_encoders_for_all_taps(experiment) -> None:
    settings = replace(QUICK, methods=("head", "lff"), options={"taps": [1, "embeddings"]})
    last, lff = compare(experiment, settings).methods
    assert last.taps == ["layer 3"]
    assert lff.taps == ["layer 1", "embeddings"]
    assert last.trainable_parameters == 64 * 4 + 4
    # The paper's width, 5/8 of the encoder's.
    assert lff.trainable_parameters == (2 * 64 * 40 + 40) + (40 * 4 + 4)
    assert last.step.eager is None
    (alone,) = compare(experiment, replace(settings, methods=("head",), options={})).methods
    assert alone.runs[0].loss == last.runs[0].loss


def test_weights_of_layers_are_reported(experiment) -> None:
    methods = ("weighted-sum", "lff", "hff-b")
    mixed, lff, hff = compare(experiment, replace(QUICK, methods=methods, options={"taps": [0, 3]})).methods
    ((title, weights),) = mixed.runs[0].insights.items()
    assert title == "Weight of each layer in the sum"
    assert list(weights) == ["layer 0", "layer 3"]
    assert sum(weights.values()) == pytest.approx(1.0)
    ((title, norms),) = lff.runs[0].insights.items()
    assert title.startswith("Frobenius norm")
    assert list(norms) == ["layer 0", "layer 3"]
    assert hff.runs[0].insights == {}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"methods": ("hff",)}, r"no method is called 'hff'.*hff-b"),
        ({"methods": ("hff-b+lff",)}, r"must be one method, or a readout \+ an edit"),
        ({"methods": ("lff",), "options": {"taps": [4]}}, r"layer indices in \[-4, 3\].*got 4"),
        ({"methods": ("head",), "options": {"taps": [1]}}, r"none of the methods head has an option 'taps'"),
        ({"methods": ("lff",), "options": {"lff": {"width": 1}}}, "lff has no option 'width'"),
        ({"methods": ("lff",), "options": {"hff-b": {"out_dim": 1}}}, "none of the methods lff .*'hff-b'"),
        ({"methods": ("lff",), "options": {"depth": 0}}, "lff: depth must be at least 1"),
        ({"methods": ("aat-ms",), "options": {"layers": [7]}}, r"AAT\^MS cannot be used here: layers must"),
        ({"task": "frames"}, "task must be one of classification, ctc, text, got 'frames'"),
        (
            {"methods": ("hff-b+hff-adapters",), "options": {"taps": ["embeddings"]}},
            r"HFF-b \+ HFF adapters cannot be used here: the readout taps the embeddings only",
        ),
    ],
)
def test_methods_and_options_that_cannot_work_are_refused_before_any_work(
    experiment, monkeypatch, settings, message: str
) -> None:
    def fail(*_, **__):
        raise AssertionError("work was done")

    monkeypatch.setattr("mmtransfer.compare.store.cache_features", fail)
    monkeypatch.setattr("mmtransfer.compare.session.train", fail)
    with pytest.raises(DataError, match=message):
        compare(experiment, replace(QUICK, **settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
        ({"tuning_seeds": 0}, "tuning_seeds must be at least 1"),
        ({"tuning_epochs": 0}, "tuning_epochs must be at least 1, got 0"),
        ({"tuning_batch_size": 0}, "tuning_batch_size must be at least 1, got 0"),
        ({"epochs": -1}, "^epochs must be at least 1, got -1"),
        ({"learning_rate": -1.0}, "learning_rate must be finite"),
    ],
)
def test_settings_out_of_range(settings, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CompareSettings(**settings)


def test_deep_encoders_are_tapped_at_every_second_layer() -> None:
    deep = Encoder(TINY["wav2vec2"].build(num_hidden_layers=14))
    assert default_taps(deep) == (1, 3, 5, 7, 9, 11, 13)
    assert default_taps(Encoder(TINY["wav2vec2"].build())) == ("embeddings", 0, 1, 2, 3)


def test_a_wrong_result_is_noticed(experiment, monkeypatch) -> None:
    right_forward = eager.EagerWeightedSum.forward
    monkeypatch.setattr(eager.EagerWeightedSum, "forward", lambda self, x: 1.1 * right_forward(self, x))
    wrong, right = compare(experiment, replace(QUICK, methods=("weighted-sum", "hff-b"))).methods
    assert not wrong.step.agrees
    assert right.step.agrees
    assert 0 < right.step.difference < 1e-4


def test_methods_do_not_disturb_each_other_or_the_model(lengths) -> None:
    before = {key: value.clone() for key, value in lengths.model.state_dict().items()}
    attributes = {name: set(module.__dict__) for name, module in lengths.model.named_modules()}
    names = ("full", "aat-m", "lora", "head")
    together = compare(lengths, replace(QUICK, methods=names))
    assert lengths.model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in lengths.model.state_dict().items())
    for name, module in lengths.model.named_modules():
        assert set(module.__dict__) == attributes[name], name
    for method in together.methods:
        (alone,) = compare(lengths, replace(QUICK, methods=(method.name,))).methods
        assert alone.runs[0].loss == method.runs[0].loss
        assert alone.runs[0].score == method.runs[0].score
    assert [method.through_encoder for method in together.methods] == [True, True, True, False]
    assert [method.epochs for method in together.methods] == [1, 1, 1, 2]
    assert together.feature_seconds is not None
    assert [[method.name for method in part] for part in in_parts(together.methods)] == [
        ["head"],
        ["full", "aat-m", "lora"],
    ]


def test_without_a_cache_the_same_methods_run(lengths) -> None:
    (method,) = compare(lengths, replace(QUICK, methods=("aat-m",), cache=False, workers=1)).methods
    assert method.runs[0].loss > 0
    assert method.step.agrees


@pytest.mark.parametrize(
    "methods", [("hff-b+aat-m",), ("hff-b", "hff-b+aat-m"), ("aat-m", "weighted-sum+aat-m")]
)
def test_a_pair_begins_with_its_readout_as_the_options_have_it(lengths, methods) -> None:
    options = {"out_dim": 12, "taps": [1, 2], "bottleneck": 3}
    found = compare(lengths, replace(QUICK, methods=methods, options=options)).methods[-1]
    readout, edit = found.options.values()
    assert (readout["out_dim"], readout["taps"], edit["bottleneck"]) == (12, (1, 2), 3)
    assert found.taps == ["layer 1", "layer 2"]
    assert found.through_encoder


def test_options_of_one_method_leave_the_others_alone(experiment) -> None:
    settings = replace(
        QUICK,
        methods=("hff-b", "hff-ub"),
        options={"hff-b": {"activation": "gelu"}, "activation": "silu", "out_dim": 8},
    )
    balanced, chain = compare(experiment, settings).methods
    assert (balanced.options["hff-b"]["activation"], balanced.options["hff-b"]["out_dim"]) == ("gelu", 8)
    assert (chain.options["hff-ub"]["activation"], chain.options["hff-ub"]["out_dim"]) == ("silu", 8)


def test_options_of_the_training_of_one_method() -> None:
    options = {"full": {"learning_rate": 3e-4, "max_steps": 7, "recompute": "full"}, "head": {"epochs": 2}}
    settings = CompareSettings(methods=("head", "full"), options=options, learning_rate=0.5, epochs=9)
    head, full = find_methods(settings)
    assert full.recompute == "full"
    found = settings.training(full.training, frozen=False, name="full")
    assert (found.learning_rate, found.max_steps) == (3e-4, 7)
    found = settings.training(head.training, frozen=True, name="head")
    assert (found.learning_rate, found.epochs) == (0.5, 2)


def test_options_of_a_pair_under_its_name() -> None:
    name = "hff-b+aat-m"
    options = {"bottleneck": 4, name: {"bottleneck": 3, "learning_rate": 3e-4}}
    settings = CompareSettings(methods=(name, "aat-m"), options=options)
    pair, alone = find_methods(settings)
    assert (pair.options()["aat-m"]["bottleneck"], alone.options()["aat-m"]["bottleneck"]) == (3, 4)
    assert settings.training(pair.training, frozen=False, name=name).learning_rate == 3e-4
    with pytest.raises(ValueError, match=r"hff-b\+aat-m has no option 'width'; it has"):
        find_methods(replace(settings, options={name: {"width": 3}}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": {"epochs": 0}}, "head: epochs must be at least 1"),
        ({"head": {"learning_rate": "much"}}, "head: learning_rate must be a number"),
        ({"head": {"seeds": 2}}, "head has no option 'seeds'"),
        ({"full": {"epochs": 2}}, "none of the methods head has an option 'full'"),
        ({"epochs": 2}, "none of the methods head has an option 'epochs'"),
    ],
)
def test_wrong_options_of_training(options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_methods(CompareSettings(methods=("head",), options=options))


def test_values_that_are_not_given_are_those_of_the_method() -> None:
    method = Training(epochs=7, batch_size=5, learning_rate=0.5, weight_decay=0.25)
    assert CompareSettings(workers=0).training(method, frozen=True) == method
    assert CompareSettings(workers=0).training(method, frozen=False) == method
    given = CompareSettings(
        epochs=2, tuning_batch_size=3, learning_rate=0.125, bf16=True, cpu=True, workers=0
    )
    assert given.training(method, frozen=True) == replace(
        method, epochs=2, learning_rate=0.125, bf16=True, cpu=True
    )
    assert given.training(method, frozen=False) == replace(
        method, batch_size=3, learning_rate=0.125, bf16=True, cpu=True
    )
