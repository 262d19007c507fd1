"""Training: parameters that move, their rates, the order of clips, repetition and saving."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_experiment import QUICK, TAPS, build, collator, inputs_of, small_experiment, words_of_two_lengths

from mmtransfer import AdaptedModel, registry
from mmtransfer.compare.experiment import Experiment
from mmtransfer.encoders import TappedEncoder
from mmtransfer.method import EditMethod
from mmtransfer.training import loop
from mmtransfer.training.caching import CachedFeatures, cache_features
from mmtransfer.training.loop import parameter_groups, predict, train
from mmtransfer.training.settings import Training

EDITS = [name for name, method in registry.methods().items() if issubclass(method, EditMethod)]
TUNED = [*EDITS, "hff-b+hff-adapters", "weighted-sum+aat-ms"]


@pytest.fixture(scope="module")
def experiment() -> Experiment:
    return small_experiment()


@pytest.fixture(scope="module")
def cached(experiment: Experiment) -> dict[str, CachedFeatures]:
    encoder = TappedEncoder(experiment.model, TAPS)
    collate = collator(experiment, encoder)
    return {
        "train": cache_features(encoder, experiment.recordings.train, collate, batch_size=5),
        "test": cache_features(encoder, experiment.recordings.test, collate, batch_size=5),
    }


@pytest.fixture(scope="module")
def lengths() -> Experiment:
    return small_experiment(words_of_two_lengths())


def fusion(experiment: Experiment, method: str = "weighted-sum", seed: int = 0) -> AdaptedModel:
    return build(experiment, method, seed, taps=TAPS, out_dim=16)


@pytest.mark.parametrize("method", ["weighted-sum", "hff-b"])
def test_the_same_seed_gives_the_same_weights(experiment, cached, method: str) -> None:
    found = []
    for seed in (1, 1, 2):
        model = fusion(experiment, method, seed)
        result = train(model, cached["train"], cached["train"].collate, replace(QUICK, seed=seed))
        predictions = predict(model, cached["test"], cached["test"].collate, QUICK)
        found.append((result.loss, model.readout.state_dict(), predictions))
    assert found[0][0] == found[1][0] != found[2][0]
    assert all(torch.equal(value, found[1][1][name]) for name, value in found[0][1].items())
    assert found[0][2] == found[1][2]


def test_predictions_are_in_the_order_of_the_clips(experiment, cached, monkeypatch) -> None:
    model = fusion(experiment)
    monkeypatch.setattr(type(model.task), "decode", lambda _task, logits, _lengths: list(logits.unbind()))
    logits = predict(model, cached["test"], cached["test"].collate, QUICK)
    assert len(logits) == len(experiment.recordings.test)
    for index in (0, 4, 11):
        item = cached["test"][index]
        alone = model(features=item["features"], lengths=torch.tensor([len(item["features"])])).logits
        torch.testing.assert_close(logits[index], alone[0])


def test_predictions_are_in_the_order_of_the_clips_though_batches_are_not(lengths, monkeypatch) -> None:
    model = build(lengths, "full")
    examples = inputs_of(lengths, model)["test"]
    assert examples.lengths != sorted(examples.lengths)
    monkeypatch.setattr(type(model.task), "decode", lambda _task, logits, _lengths: list(logits.unbind()))
    logits = predict(model, examples, examples.collate, replace(QUICK, batch_size=3))
    assert examples.targets == [clip.label for clip in lengths.recordings.test]
    for index in (0, 7, 15):
        alone = model(**examples.collate([examples[index]])).logits[0]
        torch.testing.assert_close(logits[index], alone, atol=1e-4, rtol=1e-3)


def test_only_readout_and_head_are_trained_on_a_frozen_encoder(experiment, cached) -> None:
    model = fusion(experiment)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train(model, cached["train"], cached["train"].collate, QUICK)
    changed = {
        name.split(".")[0]
        for name, value in model.state_dict().items()
        if not torch.equal(value, before[name])
    }
    assert changed == {"readout", "head"}


class TestParameterGroups:
    def test_mixing_weights_have_their_rate_and_only_matrices_decay(self, experiment) -> None:
        settings = Training(learning_rate=0.5, weight_decay=0.125)
        model = build(experiment, "weighted-sum", out_dim=16, mixing_rate=0.25)
        groups = parameter_groups(model, settings)
        assert [(group["lr"], group["weight_decay"]) for group in groups] == [
            (0.5, 0.125),
            (0.5, 0.0),
            (0.25, 0.0),
        ]
        assert [id(parameter) for parameter in groups[2]["params"]] == [id(model.readout.weights)]

    @pytest.mark.parametrize("method", ["head", "weighted-sum", "lff", "hff-b", "hff-ub", *TUNED])
    def test_every_trained_parameter_is_in_one_group(self, experiment, method: str) -> None:
        model = build(experiment, method)
        grouped = parameter_groups(model, QUICK)
        found = [id(p) for group in grouped for p in group["params"]]
        assert sorted(found) == sorted(id(p) for p in model.parameters() if p.requires_grad)
        names = {id(p): name for name, p in model.named_parameters()}
        for parameter in grouped[0]["params"]:
            leaf = names[id(parameter)].rpartition(".")[2]
            # LoRA's matrices are called lora_A.lora.weight.
            assert leaf in ("weight", "down_weight", "up_weight"), names[id(parameter)]

    def test_matrices_of_adapters_decay_and_their_biases_do_not(self, experiment) -> None:
        model = build(experiment, "aat-ms")
        matrices, vectors = parameter_groups(model, QUICK)
        names = {id(value): key for key, value in model.named_parameters()}
        decaying = {names[id(value)].rpartition(".")[2] for value in matrices["params"]}
        assert decaying == {"down_weight", "up_weight", "weight"}
        assert {names[id(value)].rpartition(".")[2] for value in vectors["params"]} == {
            "down_bias",
            "up_bias",
            "bias",
        }
        assert len(matrices["params"]) == len(vectors["params"]) == 4 * 2 * 2 + 1


@pytest.mark.parametrize("method", ["weighted-sum", "lff", "hff-b"])
def test_a_saved_run_reproduces_its_predictions(experiment, cached, method: str, tmp_path: Path) -> None:
    model = fusion(experiment, method)
    train(model, cached["train"], cached["train"].collate, QUICK)
    model.save_pretrained(tmp_path / "saved")
    loaded = AdaptedModel.from_pretrained(tmp_path / "saved", experiment.model)
    item = cached["test"][3]
    batch = {"features": item["features"], "lengths": torch.tensor([len(item["features"])])}
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    examples = cached["test"]
    expected = predict(model, examples, examples.collate, QUICK)
    assert predict(loaded, examples, examples.collate, QUICK) == expected


@pytest.mark.parametrize("bf16", [False, True])
def test_training_under_autocast(experiment, cached, bf16: bool) -> None:
    model = fusion(experiment, "hff-b")
    result = train(model, cached["train"], cached["train"].collate, replace(QUICK, bf16=bf16))
    assert math.isfinite(result.loss)
    assert {p.dtype for p in model.readout.parameters()} == {torch.float32}


class TestThroughTheEncoder:
    @pytest.mark.parametrize("method", TUNED)
    def test_a_method_trains_its_parameters_and_no_others(self, lengths, method: str) -> None:
        model = build(lengths, method)
        start = {key: value.detach().clone() for key, value in model.named_parameters()}
        trained = {key for key, value in model.named_parameters() if value.requires_grad}
        examples = inputs_of(lengths, model)["train"]
        result = train(model, examples, examples.collate, replace(QUICK, epochs=1))
        assert math.isfinite(result.loss)
        changed = {key for key, value in model.named_parameters() if not torch.equal(value, start[key])}
        # Key biases move no attention score, and their gradient is rounding.
        assert changed <= trained
        assert len(changed) >= 0.8 * len(trained)

    @pytest.mark.parametrize("method", ["aat-ms", "hff-b+hff-adapters"])
    def test_training_begins_with_readout_and_head_of_the_frozen_encoder(self, lengths, method: str) -> None:
        found = registry.find(method)
        assert found.starts_from is not None
        start, model = build(lengths, found.starts_from), build(lengths, method, seed=1)
        with torch.no_grad():
            for parameter in start.parameters():
                if parameter.requires_grad:
                    parameter.normal_()
        examples = inputs_of(lengths, model)["train"]
        batch = examples.collate([examples[index] for index in range(3)])
        expected = start(**batch).logits
        assert not torch.allclose(model(**batch).logits, expected)
        model.begin_with(start)
        # Adapters start as the identity.
        torch.testing.assert_close(model(**batch).logits, expected, atol=1e-4, rtol=1e-4)

    def test_the_head_takes_the_frames_of_the_last_layer(self, lengths) -> None:
        head, tuned = build(lengths, "head", seed=1), build(lengths, "full")
        head.begin_with(tuned)
        examples = inputs_of(lengths, tuned)["test"]
        batch = examples.collate([examples[index] for index in range(4)])
        torch.testing.assert_close(tuned(**batch).logits, head(**batch).logits)

    @pytest.mark.parametrize("method", ["aat-m", "hff-b+hff-adapters"])
    def test_training_can_be_repeated_and_saved(self, lengths, method: str, tmp_path: Path) -> None:
        losses, models = [], []
        for seed in (1, 1, 2):
            model = build(lengths, method, seed)
            examples = inputs_of(lengths, model)
            result = train(model, examples["train"], examples["train"].collate, replace(QUICK, seed=seed))
            losses.append(result.loss)
            models.append(model.eval())
            model.save_pretrained(tmp_path / str(seed))
        assert losses[0] == losses[1] != losses[2]
        batch = examples["test"].collate([examples["test"][index] for index in range(6)])
        expected = models[0](**batch).logits
        assert torch.equal(models[1](**batch).logits, expected)
        loaded = AdaptedModel.from_pretrained(tmp_path / "1", small_experiment().model)
        assert not loaded.edit_is_empty
        assert torch.equal(loaded(**batch).logits, expected)

    def test_the_upper_half_is_the_upper_half(self, lengths) -> None:
        layers = build(lengths, "partial").encoder.parts.all_layers
        assert [any(p.requires_grad for p in layer.parameters()) for layer in layers] == [
            False,
            False,
            True,
            True,
        ]


@pytest.mark.parametrize(("method", "unused"), [("hff-b", False), ("bitfit", True), ("aat-ms", True)])
def test_unused_parameters_are_looked_for_where_there_may_be_some(
    experiment, tmp_path: Path, method: str, unused: bool
) -> None:
    """Under DDP looking costs time, and not looking where there are some ends in an error."""
    model = build(experiment, method)
    examples = inputs_of(experiment, model)["train"]
    trainer = loop._Trainer.of(model, examples, examples.collate, QUICK, None, None, tmp_path, None)
    assert trainer.args.ddp_find_unused_parameters is unused
    assert trainer.args.n_gpu <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"learning_rate": -1.0}, "learning_rate must be finite and not negative, got -1.0"),
        ({"weight_decay": math.nan}, "weight_decay must be finite"),
    ],
)
def test_settings_out_of_range(options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Training(**options)
