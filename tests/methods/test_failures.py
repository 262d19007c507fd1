"""Methods without a result: a row with the reason, the others as they are, exit status 1."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import QUICK as QUICK_FLAGS
from command_line import run
from small_experiment import QUICK, build, collator, few_rounds, few_words, inputs_of, small_experiment

from mmtransfer import registry
from mmtransfer.compare import session, tables
from mmtransfer.compare import step as measure
from mmtransfer.compare.experiment import Experiment
from mmtransfer.compare.failures import failure_reason, finite_numbers
from mmtransfer.compare.results import Comparison
from mmtransfer.compare.session import compare
from mmtransfer.compare.settings import CompareSettings
from mmtransfer.compare.step import Step
from mmtransfer.data import DataError
from mmtransfer.training.caching import CachedFeatures, cache_features
from mmtransfer.training.finite import NotFiniteError
from mmtransfer.training.loop import predict, train

FAST = CompareSettings(
    seeds=1, epochs=1, batch_size=8, tuning_epochs=1, tuning_batch_size=8, cpu=True, workers=0
)


@pytest.fixture(autouse=True)
def _few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    few_rounds(monkeypatch)


@pytest.fixture
def experiment() -> Experiment:
    return small_experiment()


def poison(experiment: Experiment, layer: int = 1) -> None:
    with torch.no_grad():
        experiment.model.encoder.layers[layer].fc1.weight[0, 0] = math.nan


def read(folder: Path) -> dict:
    """The report's record; a NaN in it is an error."""

    def refuse(text: str) -> None:
        raise AssertionError(text)

    return json.loads((folder / "report.json").read_text(), parse_constant=refuse)


def reasons(comparison: Comparison) -> dict[str, str]:
    return {method.name: method.reason for method in comparison.failed}


@pytest.fixture(scope="module")
def found() -> Comparison:
    """A comparison on an encoder with NaN in its layer 1."""
    experiment = small_experiment()
    poison(experiment)
    methods = ("head", "weighted-sum", "lff", "aat-ms", "full", "lff+bitfit")
    options = {"weighted-sum": {"taps": [0, "embeddings"]}}
    with pytest.MonkeyPatch.context() as patch:
        few_rounds(patch)
        return compare(experiment, replace(FAST, methods=methods, options=options))


class TestNaNInTheModel:
    def test_methods_that_read_sound_layers_have_a_row(self, found: Comparison) -> None:
        assert [method.name for method in found.methods] == ["weighted-sum"]
        assert math.isfinite(found.methods[0].runs[0].loss)

    def test_the_others_have_a_reason_that_names_clip_and_layer(self, found: Comparison) -> None:
        assert list(reasons(found)) == ["head", "lff", "aat-ms", "full", "lff+bitfit"]
        assert re.fullmatch(r"the features of clip \d+ at layer 3 are not finite", reasons(found)["head"])
        assert "at layer 1 are not finite" in reasons(found)["lff"]
        assert reasons(found)["full"].startswith("Head, which it starts from, failed: the features of")
        assert reasons(found)["lff+bitfit"].startswith("LFF, which it starts from, failed: the features of")

    def test_the_report_shows_them(self, found: Comparison, tmp_path: Path) -> None:
        tables.write_report(tmp_path, found)
        record = read(tmp_path)
        assert [method["name"] for method in record["methods"]] == ["weighted-sum"]
        assert {each["name"]: each["reason"] for each in record["failed"]} == reasons(found)
        page = (tmp_path / "report.html").read_text(encoding="utf-8")
        for method in found.failed:
            assert f"{method.title} failed: {method.reason}" in page.replace("&#39;", "'")
        assert page.count('<tr class="failed">') == 5
        overview = re.search(r"<svg .*?</svg>", page, re.S)
        assert overview is not None
        assert len(re.findall(r">failed</text>", overview[0])) == 5
        assert ">Full fine-tuning</text>" in overview[0]

    def test_a_report_of_failures_alone(self, found: Comparison, tmp_path: Path) -> None:
        tables.write_report(tmp_path, replace(found, methods=[]))
        assert read(tmp_path)["methods"] == []
        assert (tmp_path / "report.html").read_text(encoding="utf-8").count('<tr class="failed">') == 5
        assert len(tables.to_tables(replace(found, methods=[]))) == 1


def test_nan_in_the_model_without_a_cache(experiment) -> None:
    poison(experiment)
    found = compare(experiment, replace(FAST, methods=("head", "bitfit"), cache=False))
    assert found.methods == []
    assert "the training loss is nan in epoch 1" in reasons(found)["head"]
    assert "which it starts from, failed: the training loss is nan" in reasons(found)["bitfit"]


@pytest.mark.parametrize("rate", ["1e30", "1e38"])
def test_a_learning_rate_that_diverges(rate: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few_words(monkeypatch)
    arguments = ["--methods", "head", "lff", "--learning-rate", rate, "--output", tmp_path]
    result = run("compare", "--synthetic", *arguments, *QUICK_FLAGS, "--epochs", "2")
    assert result.code == 1
    assert re.search(r"^mmtransfer: Head failed: .*; 1 more failed, see the report$", result.stderr, re.M)
    assert re.search(r"^\s*LFF\s+failed\s", result.stdout, re.M)
    assert "learning rate" in result.stdout
    assert result.stdout.splitlines()[-1] == f"Report: {tmp_path / 'report.html'}"
    assert {each["name"] for each in read(tmp_path)["failed"]} == {"head", "lff"}


class TestExceptions:
    def fail_in(self, monkeypatch, name: str, error: BaseException, seed: int = 0) -> None:
        original = session.train

        def failing(model, examples, collate, settings, **options):
            if model.method.name == name and settings.seed == seed:
                raise error
            return original(model, examples, collate, settings, **options)

        monkeypatch.setattr(session, "train", failing)

    @pytest.mark.parametrize(
        "error",
        [
            torch.OutOfMemoryError("CUDA out of memory.\n  Tried to allocate 2 GiB"),
            MemoryError(),
            TypeError("forward() got an unexpected argument 'x'"),
            AssertionError("[/bold] $x$"),
        ],
    )
    def test_the_other_methods_go_on(self, experiment, monkeypatch, error, tmp_path: Path) -> None:
        self.fail_in(monkeypatch, "lff", error)
        found = compare(experiment, replace(FAST, methods=("lff", "head")))
        assert [method.name for method in found.methods] == ["head"]
        reason = reasons(found)["lff"]
        assert reason.startswith(f"{type(error).__name__} (test_failures.py, line ")
        assert " ".join(str(error).split()) in reason
        tables.write_report(tmp_path, found)
        assert read(tmp_path)["failed"][0]["reason"] == reason

    def test_runs_that_were_done_are_kept(self, experiment, monkeypatch) -> None:
        self.fail_in(monkeypatch, "head", RuntimeError("no"), seed=1)
        found = compare(experiment, replace(FAST, methods=("head",), seeds=3))
        assert [each.seed for each in found.failed[0].runs] == [0]

    def test_an_interrupt_ends_the_comparison(self, experiment, monkeypatch) -> None:
        self.fail_in(monkeypatch, "head", KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            compare(experiment, replace(FAST, methods=("head", "lff")))

    def test_data_that_cannot_be_read_ends_the_comparison(self, experiment, monkeypatch) -> None:
        self.fail_in(monkeypatch, "head", DataError("a.wav cannot be read"))
        with pytest.raises(DataError, match=r"a\.wav"):
            compare(experiment, replace(FAST, methods=("head", "lff")))

    def test_among_several_processes_a_failure_of_one_ends_all(self, experiment, monkeypatch) -> None:
        """The others would wait for it."""
        self.fail_in(monkeypatch, "head", RuntimeError("out of memory"))
        monkeypatch.setattr(session, "process_count", lambda: 2)
        with pytest.raises(RuntimeError, match="out of memory"):
            compare(experiment, replace(FAST, methods=("head",)))

    def test_a_method_that_cannot_be_built_is_refused_at_once(self, experiment, monkeypatch) -> None:
        def broken(self, encoder):
            raise KeyError("width")

        monkeypatch.setattr(type(registry.find("lff")), "readout", broken)
        with pytest.raises(DataError, match=r"LFF cannot be used here: KeyError \(test_failures\.py, line"):
            compare(experiment, replace(FAST, methods=("head", "lff")))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
class TestFigures:
    def test_a_score(self, experiment, monkeypatch, value: float) -> None:
        monkeypatch.setattr(session, "train", lambda *_, **__: pytest.fail("not needed"))
        with pytest.raises(NotFiniteError, match=rf"score 'accuracy' is {value}"):
            finite_numbers("score", {"accuracy": value})

    def test_an_insight(self, experiment, monkeypatch, value: float) -> None:
        method = type(registry.find("weighted-sum"))
        monkeypatch.setattr(method, "insights", lambda *_: {"weight": {"layer 0": torch.tensor(value)}})
        found = compare(experiment, replace(FAST, methods=("weighted-sum", "head")))
        assert reasons(found) == {"weighted-sum": f"weight 'layer 0' is {value}"}


class TestPython:
    @pytest.fixture
    def cached(self, experiment) -> CachedFeatures:
        model = build(experiment, "head")
        return cache_features(
            model.encoder, experiment.recordings.train[:6], collator(experiment, model.encoder)
        )

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_features_of_a_clip(self, experiment, value: float) -> None:
        model = build(experiment, "head")
        seen = []
        forward = model.encoder.forward

        def spoil(*args, **kwargs):
            taps = forward(*args, **kwargs)
            seen.append(taps)
            if len(seen) == 2:
                taps.features[-1, 0, 3] = value
            return taps

        model.encoder.forward = spoil
        collate = collator(experiment, model.encoder)
        clips = sorted(experiment.recordings.train[:6], key=lambda clip: clip.seconds)
        examples = cache_features(model.encoder, clips, collate, batch_size=2)
        del model.encoder.forward
        for call in (train, predict):
            with pytest.raises(NotFiniteError, match="the features of clip 3 at layer 3 are not finite"):
                call(model, examples, examples.collate, QUICK)

    def test_features_given_as_they_are(self, experiment, cached) -> None:
        model = build(experiment, "head")
        cached.features[5] = math.nan
        with pytest.raises(NotFiniteError, match="the training loss is nan in epoch 1"):
            train(model, cached, cached.collate, QUICK)

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_logits(self, experiment, cached, value: float) -> None:
        model = build(experiment, "head")
        cached.features[-1, 0, 0] = value
        with pytest.raises(NotFiniteError, match="the logits of clip 5 are not finite"):
            predict(model, cached, cached.collate, replace(QUICK, batch_size=4))

    def test_weights_after_the_last_step(self, experiment, cached, monkeypatch) -> None:
        """The loss of the last step is of the weights before it."""
        model = build(experiment, "head")
        original = torch.optim.AdamW.step

        def step(self, *args, **kwargs):
            original(self, *args, **kwargs)
            with torch.no_grad():
                model.head.classifier.bias[0] = math.inf

        monkeypatch.setattr(torch.optim.AdamW, "step", step)
        settings = replace(QUICK, epochs=1, batch_size=16)
        with pytest.raises(NotFiniteError, match=r"head\.classifier\.bias is not finite after training"):
            train(model, cached, cached.collate, settings)

    def test_nothing_to_train_on(self, experiment) -> None:
        model = build(experiment, "head")
        with pytest.raises(ValueError, match="examples are empty"):
            train(model, [], collator(experiment, model.encoder), QUICK)
        with pytest.raises(ValueError, match="clips are empty"):
            cache_features(model.encoder, [], collator(experiment, model.encoder))

    def test_one_step_trains(self, experiment, cached) -> None:
        """Warm-up gives the first of several steps the rate 0."""
        model = build(experiment, "head")
        before = model.head.classifier.weight.detach().clone()
        train(model, cached, cached.collate, replace(QUICK, epochs=1, batch_size=16))
        assert not torch.equal(model.head.classifier.weight, before)

    @pytest.mark.parametrize("cache", [True, False])
    def test_a_clip_with_infinite_samples(self, experiment, cache: bool) -> None:
        recordings = experiment.recordings
        samples = np.array(recordings.train[4].source)
        samples[100] = np.inf
        clips = [*recordings.train]
        clips[4] = replace(clips[4], source=samples)
        broken = replace(experiment, recordings=replace(recordings, train=clips))
        with pytest.raises(DataError, match=r"a clip of .* holds NaN or infinite samples"):
            compare(broken, replace(FAST, methods=("head",), cache=cache))


class TestSteps:
    @pytest.fixture
    def steps(self, experiment) -> tuple[Step, Step]:
        model = build(experiment, "aat-m")
        examples = inputs_of(experiment, model)["train"]
        batch = examples.collate([examples[0], examples[1]])
        twin = model.method.baseline(model)
        assert twin is not None
        return Step(model, batch), Step(twin, batch)

    def test_a_kernel_that_makes_nan_does_not_agree(self, steps) -> None:
        with torch.no_grad():
            steps[0].model.head.classifier.weight[0] = math.nan
        assert measure._difference(*steps) == math.inf

    def test_a_model_that_makes_nan_has_no_time(self, steps) -> None:
        with torch.no_grad():
            steps[1].model.head.classifier.weight[0] = math.nan
        with pytest.raises(NotFiniteError, match="logits is not finite in a training step"):
            measure._difference(*steps)


def test_long_and_empty_messages() -> None:
    assert failure_reason(ValueError()) == "ValueError"
    assert failure_reason(NotFiniteError("a\n b")) == "a b"
    assert len(failure_reason(ValueError("x" * 5000))) < 350


def test_what_json_cannot_have_becomes_text_or_null() -> None:
    given = {1: math.nan, ("a",): [np.float32(0.5), Path("x")], "t": torch.float16, "i": np.int64(3)}
    plain = tables._plain(given)
    assert plain == {"1": None, "('a',)": [0.5, "x"], "t": "torch.float16", "i": 3}
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain


def test_titles_are_text(experiment, monkeypatch, tmp_path: Path) -> None:
    """Neither markup of the terminal nor mathematics of the figures."""
    monkeypatch.setattr(type(registry.find("lff")), "title", "[/x] $_{ <b>")
    found = compare(experiment, replace(FAST, methods=("lff",)))
    tables.write_report(tmp_path, found)
    assert "[/x] $_{ &lt;b&gt;" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert [str(cell) for cell in tables.to_tables(found)[0].columns[0].cells] == ["[/x] $_{ <b>"]
