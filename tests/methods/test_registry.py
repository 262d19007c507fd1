"""A method or a task that is registered gets all the rest from that alone: training, checkpoints, reports."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command_line import QUICK as QUICK_FLAGS
from command_line import fails, record, run
from example_methods import FrameLabels, LearntMerge, MaxReadout
from small_experiment import QUICK, build, few_rounds, few_words, inputs_of, small_experiment

import mmtransfer
from mmtransfer import AdaptedModel, registry, tasks
from mmtransfer.compare import session
from mmtransfer.compare.experiment import Experiment
from mmtransfer.compare.session import compare
from mmtransfer.compare.settings import CompareSettings
from mmtransfer.tasks.base import TASKS
from mmtransfer.training.caching import CachedFeatures, CachedInputs
from mmtransfer.training.loop import parameter_groups, train

EDIT, READOUT, PAIR = "learnt-merge", "max-readout", "max-readout+learnt-merge"
EXAMPLES = (EDIT, READOUT, PAIR)
TASK_NAMES = ("classification", "frames")


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch):
    few_rounds(monkeypatch)
    registry.register(LearntMerge)
    registry.register(MaxReadout)
    tasks.register_task(FrameLabels)
    yield
    registry.unregister(EDIT)
    registry.unregister(READOUT)
    del TASKS["frames"]


@pytest.fixture(scope="module")
def experiment() -> Experiment:
    return small_experiment()


class TestTraining:
    @pytest.mark.parametrize("task", TASK_NAMES)
    @pytest.mark.parametrize("method", EXAMPLES)
    def test_the_loss_falls_and_only_what_is_trained_moves(self, experiment, method: str, task: str) -> None:
        model = build(experiment, method, task=task)
        examples = inputs_of(experiment, model, task)["train"]
        before = {name: value.detach().clone() for name, value in model.named_parameters()}
        trained = {name for name, value in model.named_parameters() if value.requires_grad}
        first = train(model, examples, examples.collate, replace(QUICK, epochs=1)).loss
        last = train(model, examples, examples.collate, replace(QUICK, epochs=5)).loss
        assert last < 0.95 * first
        moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
        assert moved == trained
        assert any("merge_lambda" in name for name in trained) == (method != READOUT)
        assert any(name.startswith("readout.") for name in trained) == (method != EDIT)

    @pytest.mark.parametrize("method", [EDIT, PAIR])
    def test_parameter_groups_have_the_rates_of_the_method(self, experiment, method: str) -> None:
        model = build(experiment, method, rate=0.5)
        groups = parameter_groups(model, QUICK)
        assert groups[-1]["lr"] == 0.5
        assert groups[-1]["weight_decay"] == 0.0
        assert [id(p) for p in groups[-1]["params"]] == [id(p) for p in model.encoder.edit.parameters]
        assert [group["lr"] for group in groups[:-1]] == [QUICK.learning_rate] * 2

    def test_rates_reach_the_optimiser(self, experiment) -> None:
        """Warm-up has a first step of rate 0; with the same gradient AdamW's second step is the rate."""
        model = build(experiment, EDIT, rate=0.25)
        examples = inputs_of(experiment, model)["train"]
        settings = replace(QUICK, epochs=2, batch_size=len(examples), learning_rate=0.0)
        train(model, examples, examples.collate, settings)
        for parameter in model.encoder.edit.parameters:
            assert abs(float(parameter.detach())) == pytest.approx(0.25, rel=1e-3)

    def test_features_are_cached_exactly_where_the_edit_is_empty(self, experiment, monkeypatch) -> None:
        seen: dict[str, type] = {}
        original = session.train

        def spy(model, examples, *rest, **options):
            seen[model.method.name] = type(examples)
            assert model.edit_is_empty == isinstance(examples, CachedFeatures)
            return original(model, examples, *rest, **options)

        monkeypatch.setattr(session, "train", spy)
        settings = CompareSettings(
            methods=EXAMPLES,
            seeds=1,
            epochs=1,
            tuning_epochs=1,
            batch_size=8,
            tuning_batch_size=8,
            cpu=True,
            workers=0,
        )
        found = compare(experiment, settings).methods
        assert seen == {
            "head": CachedFeatures,
            EDIT: CachedInputs,
            READOUT: CachedFeatures,
            PAIR: CachedInputs,
        }
        assert [method.through_encoder for method in found] == [True, False, True]
        assert [method.taps for method in found] == [
            ["layer 3"],
            ["layer 2", "layer 3"],
            ["layer 2", "layer 3"],
        ]


class TestCheckpoints:
    OPTIONS = (
        (EDIT, {"start": 0.25, "rate": 0.5}),
        (READOUT, {"out_dim": 7}),
        (PAIR, {"start": 0.25, "out_dim": 7}),
    )

    @pytest.mark.parametrize("task", TASK_NAMES)
    @pytest.mark.parametrize(("method", "options"), OPTIONS)
    def test_they_come_back_with_their_options(
        self, experiment, tmp_path: Path, method: str, options, task: str
    ) -> None:
        model = build(experiment, method, task=task, **options)
        examples = inputs_of(experiment, model, task)["train"]
        train(model, examples, examples.collate, replace(QUICK, epochs=1))
        model.eval().save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        assert config["method"] == method
        assert (
            options.items() <= {k: v for part in config["options"].values() for k, v in part.items()}.items()
        )
        assert config["task"] == {"name": task, "options": json.loads(json.dumps(model.task.options()))}
        assert config["task"]["options"]["num_labels"] == 4
        loaded = AdaptedModel.from_pretrained(tmp_path, small_experiment().model)
        assert (loaded.method, loaded.task) == (model.method, model.task)
        batch = examples.collate([examples[index] for index in range(5)])
        torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits)

    def test_a_prepared_model_comes_back(self, experiment, tmp_path: Path) -> None:
        model, fresh = small_experiment().model, small_experiment().model
        prepared = mmtransfer.prepare(model, EDIT, start=0.5)
        assert [name.rpartition(".")[2] for name in prepared.trainable] == ["merge_lambda"] * 4
        with torch.no_grad():
            model.get_parameter(prepared.trainable[0]).fill_(0.75)
        mmtransfer.save(model, tmp_path)
        assert mmtransfer.load_prepared(fresh, tmp_path).method == LearntMerge(start=0.5)
        assert fresh.get_parameter(prepared.trainable[0]).item() == 0.75
        mmtransfer.revert(fresh)
        assert not any("merge_lambda" in name for name in fresh.state_dict())

    def test_without_the_registration_the_name_is_unknown(self, experiment, tmp_path: Path) -> None:
        build(experiment, EDIT).save_pretrained(tmp_path)
        registry.unregister(EDIT)
        try:
            with pytest.raises(ValueError, match="no method is called 'learnt-merge'"):
                AdaptedModel.from_pretrained(tmp_path, small_experiment().model)
        finally:
            registry.register(LearntMerge)


class TestCommandLine:
    @pytest.fixture(autouse=True)
    def _few_words(self, monkeypatch: pytest.MonkeyPatch) -> None:
        few_words(monkeypatch)

    def compare(self, output: Path, *arguments: str, methods=EXAMPLES):
        flags = ["--methods", *methods, "--output", output, *QUICK_FLAGS]
        return run("compare", "--synthetic", *flags, *arguments)

    @pytest.mark.parametrize("task", TASK_NAMES)
    def test_a_row_and_a_figure_of_each(self, tmp_path: Path, task: str) -> None:
        result = self.compare(tmp_path, "--task", task, "--save-models")
        assert result.code == 0, result.stderr
        found = record(tmp_path)
        page = (tmp_path / "report.html").read_text(encoding="utf-8")
        assert [method["name"] for method in found["methods"]] == list(EXAMPLES)
        assert found["task"]["name"] == task
        for method in found["methods"]:
            title = re.escape(method["title"])
            assert re.search(rf"<t[hd][^>]*>\s*{title}\s*</t[hd]>", page)
            assert re.search(rf"^\s*{title}\s", result.stdout, re.M)
            (each,) = method["runs"]
            assert 0 <= each["score"] <= 1
            if method["name"] == READOUT:
                assert each["insights"] == {}
            else:
                assert list(each["insights"]["Learnt lambda"]) == [f"layer {index}" for index in range(4)]
                assert any(each["insights"]["Learnt lambda"].values())
            assert (tmp_path / "models" / f"{method['name']}-seed0" / "config.json").is_file()
        figures = [
            figure for figure in re.findall(r"<figure>.*?</figure>", page, re.S) if "Learnt lambda" in figure
        ]
        assert len(figures) == 1
        assert "Learnt merge" in figures[0]
        assert "Max + Learnt merge" in figures[0]
        if task == "frames":
            assert found["task"]["metric"] == {
                "name": "frame_error",
                "title": "Frame error",
                "higher_is_better": False,
            }
            assert found["task"]["chance"] is None
            scores = found["methods"][0]["runs"][0]["scores"]
            assert scores.keys() == {"frame_error", "frames"}
            assert scores["frame_error"] == found["methods"][0]["score"]
            assert re.search(r"Frame.*\n.*error, %", result.stdout)
            assert "Frame error" in page
            assert "ccuracy" not in re.sub('<p class="banner">.*?</p>', "", page + result.stdout, flags=re.S)
        else:
            assert found["task"]["chance"] == pytest.approx(1 / 8)

    def test_options_by_set(self, tmp_path: Path) -> None:
        given = ["--set", "start=0.5", f"{EDIT}.rate=1e-9", "out_dim=9"]
        result = self.compare(tmp_path, *given)
        assert result.code == 0, result.stderr
        edit, readout, pair = record(tmp_path)["methods"]
        assert edit["options"] == {EDIT: {"start": 0.5, "rate": 1e-9}}
        assert readout["options"] == {READOUT: {"out_dim": 9}}
        assert pair["options"] == {**readout["options"], **edit["options"]}
        for method in (edit, pair):
            values = method["runs"][0]["insights"]["Learnt lambda"].values()
            assert list(values) == pytest.approx([0.5] * 4)
        assert readout["trainable_parameters"] == (64 * 9 + 9) + (9 * 8 + 8)

    @pytest.mark.parametrize(
        ("given", "parts"),
        [
            ("start=fast", ["learnt-merge: start must be float, got 'fast'"]),
            ("max-readout.start=1", ["max-readout has no option 'start'"]),
            ("bottleneck=1", ["none of the methods learnt-merge, max-readout", "'bottleneck'"]),
        ],
    )
    def test_wrong_options(self, tmp_path: Path, given: str, parts: list[str]) -> None:
        fails(self.compare(tmp_path, "--set", given), *parts)

    def test_the_list_of_methods(self) -> None:
        entries = re.split(r"\n(?=\S)", run("methods").stdout)
        (merge,) = [" ".join(each.split()) for each in entries if each.startswith("learnt-merge ")]
        (largest,) = [" ".join(each.split()) for each in entries if each.startswith("max-readout ")]
        assert re.match(r"learnt-merge edit A learnt weight between .* \(a test\) ", merge)
        assert re.match(r"max-readout readout The largest value over .* \(a test\) ", largest)
        assert "start=0.0 (a number)" in merge
        assert "rate=0.1 (a number)" in merge
        assert "out_dim=24 (an integer)" in largest

    def test_after_they_are_unregistered(self, tmp_path: Path) -> None:
        registry.unregister(READOUT)
        try:
            assert "max-readout" not in run("methods").stdout
            fails(self.compare(tmp_path, methods=[PAIR]), "no method is called 'max-readout'")
        finally:
            registry.register(MaxReadout)
        del TASKS["frames"]
        fails(
            self.compare(tmp_path, "--task", "frames"),
            "task must be one of classification, ctc, text, got 'frames'",
        )
        tasks.register_task(FrameLabels)


class TestRegistering:
    def test_a_name_that_is_taken_is_refused(self) -> None:
        class Other(LearntMerge):
            pass

        class Head(LearntMerge):
            name = "head"

        with pytest.raises(ValueError, match="a method is called 'learnt-merge' already"):
            registry.register(Other)
        with pytest.raises(ValueError, match="a method is called 'head' already"):
            registry.register(Head)
        assert registry.methods()[EDIT] is LearntMerge

    def test_registering_again_changes_nothing(self) -> None:
        assert registry.register(LearntMerge) is LearntMerge
        assert list(registry.methods()).count(EDIT) == 1

    @pytest.mark.parametrize("name", ["", "a+b", "a b", "a/b"])
    def test_a_name_that_cannot_be_given_is_refused(self, name: str) -> None:
        wrong = type("Wrong", (LearntMerge,), {"name": name})
        with pytest.raises(ValueError, match="name"):
            registry.register(wrong)

    def test_another_task_of_the_same_name_is_refused(self) -> None:
        class Other(FrameLabels):
            pass

        with pytest.raises(ValueError, match="a task is called 'frames' already"):
            tasks.register_task(Other)
        assert tasks.register_task(FrameLabels) is FrameLabels

    def test_the_defaults_are_the_papers(self) -> None:
        assert not set(registry.default_names()) & set(EXAMPLES)
        assert len(set(registry.default_names())) == len(registry.default_names())
