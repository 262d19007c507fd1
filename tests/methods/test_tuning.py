"""Methods that train through the encoder: their data, their models, and that they leave others alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import Wav2Vec2FeatureExtractor, set_seed

from mmtransfer.compare import CompareSettings, compare
from mmtransfer.compare import step as measure
from mmtransfer.compare.step import Step, compare_steps
from mmtransfer.data import DataError, Recordings, synthetic
from mmtransfer.data.features import Collator
from mmtransfer.encoders import descriptions as models
from mmtransfer.hff import HFF, AdaptedEncoder
from mmtransfer.methods import METHODS, EncoderMethod, Job, find_method
from mmtransfer.tasks import Task, synthetic_task
from mmtransfer.training.caching import CachedInputs, EncoderCollator, cache_inputs
from mmtransfer.training.loop import TrainSettings, parameter_groups, predict, train
from tests.methods.tiny_encoders import TINY

QUICK = TrainSettings(epochs=2, batch_size=8, learning_rate=3e-3, cpu=True)
TUNED = [name for name, method in METHODS.items() if method.through_encoder]


@pytest.fixture(autouse=True)
def _few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test looks at a time."""
    monkeypatch.setattr(measure, "ROUNDS", (2, 2))


def words(classes: int = 4) -> Recordings:
    """Few short words of two lengths."""
    short, long = (synthetic(classes=classes, train_clips=3, test_clips=2, seconds=s) for s in (0.25, 0.5))
    return replace(short, train=short.train + long.train, test=short.test + long.test)


@pytest.fixture(scope="module")
def task() -> Task:
    return replace(synthetic_task(), recordings=words())


@pytest.fixture(scope="module")
def job(task: Task) -> Job:
    return Job(task.model, ("embeddings", 0, 1, 3), 16, 4)


def collator(task: Task, model: torch.nn.Module) -> EncoderCollator:
    return EncoderCollator(Collator(task.recordings, task.extractor), model.encoder)


def build(name: str, job: Job, seed: int = 0) -> torch.nn.Module:
    set_seed(seed)
    return METHODS[name].build(job)


def inputs_of(task: Task, model: torch.nn.Module) -> dict[str, CachedInputs]:
    collate = collator(task, model)
    return {
        "train": cache_inputs(task.recordings.train, collate),
        "test": cache_inputs(task.recordings.test, collate),
    }


@pytest.mark.parametrize("model_type", ["whisper", "wav2vec2", "wav2vec2-no-mask"])
def test_cached_inputs_give_the_logits_of_fresh_ones(task: Task, model_type: str) -> None:
    if model_type != "whisper":
        extractor = Wav2Vec2FeatureExtractor(return_attention_mask=model_type == "wav2vec2")
        task = replace(task, model=TINY["wav2vec2"].build(), extractor=extractor)
    model = build("aat-ms", Job(task.model, (-1,), 8, 4)).eval()
    collate, cached = collator(task, model), inputs_of(task, model)["test"]
    fresh = collate(task.recordings.test[:12])
    stored = cached.collate([cached[index] for index in range(12)])
    assert torch.equal(fresh["labels"], stored["labels"])
    assert len(set(stored["lengths"].tolist())) > 1
    with torch.no_grad():
        wanted = [model(**collate([clip])).logits[0] for clip in task.recordings.test[:12]]
        torch.testing.assert_close(model(**stored).logits, torch.stack(wanted), atol=2e-4, rtol=1e-3)


def test_predictions_are_in_the_order_of_the_clips_though_batches_are_not(task: Task, job: Job) -> None:
    model = build("full", job)
    cached = inputs_of(task, model)["test"]
    logits, labels = predict(model, cached, cached.collate, replace(QUICK, batch_size=3))
    assert labels.tolist() == [clip.label for clip in task.recordings.test]
    for index in (0, 7, 15):
        alone = model(**cached.collate([cached[index]])).logits[0]
        torch.testing.assert_close(logits[index], alone, atol=1e-4, rtol=1e-3)


def test_training_begins_with_what_the_frozen_encoder_taught(task: Task, job: Job) -> None:
    for name in ("aat-ms", "hff-b-adapters"):
        method = find_method(name)
        assert isinstance(method, EncoderMethod)
        start, model = method.start.build(job), method.build(job)
        with torch.no_grad():
            for parameter in start.parameters():
                if parameter.requires_grad:
                    parameter.normal_()
        cached = inputs_of(task, model)["train"]
        batch = cached.collate([cached[index] for index in range(3)])
        expected = start(**batch).logits
        assert not torch.allclose(model(**batch).logits, expected)
        method.begin(model, start)
        # Adapters start as the identity.
        torch.testing.assert_close(model(**batch).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", TUNED)
def test_a_method_trains_its_own_parameters_and_leaves_the_encoder_alone(
    task: Task, job: Job, name: str
) -> None:
    before = {key: value.clone() for key, value in task.model.state_dict().items()}
    model = build(name, job)
    start = {key: value.detach().clone() for key, value in model.named_parameters()}
    trained = {key for key, value in model.named_parameters() if value.requires_grad}
    cached = inputs_of(task, model)["train"]
    train(model, cached, cached.collate, replace(QUICK, epochs=1))
    changed = {key for key, value in model.named_parameters() if not torch.equal(value, start[key])}
    # Key biases move no attention score, and their gradient is rounding.
    assert changed <= trained
    assert len(changed) >= 0.8 * len(trained)
    assert all(torch.equal(value, before[key]) for key, value in task.model.state_dict().items())


def test_the_head_and_the_pooled_frames_are_those_of_the_last_layer(task: Task, job: Job) -> None:
    last, tuned = build("last", job), build("full", job)
    assert isinstance(last, HFF)
    last.head.load_state_dict(tuned.head.state_dict())
    cached = inputs_of(task, tuned)["test"]
    batch = cached.collate([cached[index] for index in range(4)])
    torch.testing.assert_close(tuned(**batch).logits, last(**batch).logits)


@pytest.mark.parametrize("name", ["aat-m", "hff-b-adapters"])
def test_training_can_be_repeated_and_saved(task: Task, job: Job, name: str, tmp_path: Path) -> None:
    found = []
    for seed in (1, 1, 2):
        model = build(name, job, seed)
        cached = inputs_of(task, model)
        result = train(model, cached["train"], cached["train"].collate, replace(QUICK, seed=seed))
        found.append((result.loss, predict(model, cached["test"], cached["test"].collate, QUICK)[0]))
        model.save_pretrained(tmp_path / str(seed))
    assert found[0][0] == found[1][0] != found[2][0]
    assert torch.equal(found[0][1], found[1][1])
    if name == "aat-m":
        loaded = build(name, job, 5)
        loaded.load_adapters(tmp_path / "1")
    else:
        loaded = HFF.from_pretrained(tmp_path / "1", task.model)
        assert isinstance(loaded.encoder, AdaptedEncoder)
    logits, _ = predict(loaded, cached["test"], cached["test"].collate, QUICK)
    assert torch.equal(logits, found[0][1])


def test_matrices_of_adapters_decay_and_their_biases_do_not(job: Job) -> None:
    model = build("aat-ms", job)
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


@pytest.mark.parametrize("name", ["aat-ms", "aat-m", "aat-s", "houlsby", "hff-b-adapters"])
def test_the_eager_twin_agrees_and_a_wrong_one_is_noticed(task: Task, job: Job, name: str) -> None:
    method = METHODS[name]
    assert isinstance(method, EncoderMethod)
    ours, eager = build(name, job), method.build_eager(job)
    assert eager is not None
    for parameter in ours.parameters():
        if parameter.requires_grad and parameter.dim() > 1 and not parameter.any():
            torch.nn.init.trunc_normal_(parameter, std=0.1)
    cached = inputs_of(task, ours)["train"]
    batch = cached.collate([cached[index] for index in range(6)])
    labels = batch.pop("labels")
    steps = [Step(model, lambda model: model(**batch).logits, labels) for model in (ours, eager)]
    assert compare_steps(*steps).agrees
    steps[1].forward = lambda model: 1.1 * model(**batch).logits
    assert not compare_steps(*steps).agrees


def test_methods_do_not_disturb_each_other(task: Task) -> None:
    settings = CompareSettings(seeds=(0,), training=QUICK, tuning=replace(QUICK, epochs=1))
    together = compare(task, replace(settings, methods=("full", "aat-m", "last")))
    for method in together.methods:
        (alone,) = compare(task, replace(settings, methods=(method.name,))).methods
        assert alone.runs[0].loss == method.runs[0].loss
        assert alone.runs[0].accuracy == method.runs[0].accuracy
    assert [method.through_encoder for method in together.methods] == [True, True, False]
    assert [method.epochs for method in together.methods] == [1, 1, 2]
    assert together.feature_seconds is not None


def test_without_a_cache_the_same_methods_run(task: Task) -> None:
    settings = CompareSettings(methods=("aat-m",), tuning=replace(QUICK, epochs=1), cache=False)
    (method,) = compare(task, settings).methods
    assert method.runs[0].loss > 0
    assert method.step.agrees


def test_adapters_need_a_layer_among_the_taps(task: Task) -> None:
    with pytest.raises(DataError, match=r"HFF-b \+ adapters cannot be used here: taps must have a layer"):
        compare(task, CompareSettings(methods=("hff-b-adapters",), taps=("embeddings",)))


def test_the_upper_half_is_the_upper_half(job: Job) -> None:
    model = build("partial", job)
    layers = models.get_layers(model.encoder.encoder)
    assert [any(p.requires_grad for p in layer.parameters()) for layer in layers] == [
        False,
        False,
        True,
        True,
    ]
