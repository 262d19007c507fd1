"""Values of options: numbers as people write them, and zero, false and nothing apart from "not given"."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import QUICK, fails, run
from small_experiment import build, small_experiment

import mmtransfer
from mmtransfer import AdaptedModel, Group, Method, registry
from mmtransfer.cli import values
from mmtransfer.compare.experiment import user_experiment
from mmtransfer.compare.settings import CompareSettings
from mmtransfer.data.features import Collator
from mmtransfer.tasks import Classification, Task, register_task
from mmtransfer.training.caching import EncoderCollator, cache_features
from mmtransfer.training.loop import parameter_groups
from mmtransfer.training.settings import Training

OUT_OF_RANGE = (-1, 0, math.nan, math.inf, -math.inf, 1.5, True, "3", None)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10),
        ("-007", -7),
        ("00", 0),
        ("0x1F", 31),
        ("0o10", 8),
        ("1_000", 1000),
        ("+5", 5),
        ("08", 8),
        ("1e-3", 1e-3),
        ("1E5", 1e5),
        ("010.5", 10.5),
        ("1.", 1.0),
        (".5", 0.5),
        ("-.5e-3", -5e-4),
        ("-.inf", -math.inf),
        ("1:30", "1:30"),
        ("1:30.5", "1:30.5"),
        ("2024-01-01", "2024-01-01"),
        ("0b11", "0b11"),
        ("1_", "1_"),
        ("=", "="),
        ("true", True),
        ("No", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("none", "none"),
        ("[1, 010, embeddings]", [1, 10, "embeddings"]),
        ("{a: 010}", {"a": 10}),
    ],
)
def test_yaml_as_people_read_it(text: str, value) -> None:
    found = values.parse(text)
    assert (type(found), found) == (type(value), value)


@pytest.mark.parametrize("text", ["a: 1\na: 2", "set: {x: 1, x: 2}", "[1, {b: 1, b: 1}]"])
def test_a_name_that_is_given_twice(text: str) -> None:
    with pytest.raises(ValueError, match="is given twice"):
        values.parse(text)


class TestSettings:
    @pytest.mark.parametrize("value", OUT_OF_RANGE)
    @pytest.mark.parametrize("name", ["epochs", "batch_size"])
    def test_counts(self, name: str, value) -> None:
        for kind in (Training, CompareSettings):
            if value is not None or kind is Training:
                with pytest.raises(ValueError, match=f"^{name} must be "):
                    kind(**{name: value})

    @pytest.mark.parametrize("name", ["seeds", "tuning_seeds", "tuning_epochs", "tuning_batch_size"])
    @pytest.mark.parametrize("value", OUT_OF_RANGE[:-1])
    def test_counts_of_a_comparison(self, name: str, value) -> None:
        with pytest.raises(ValueError, match=f"^{name} must be "):
            CompareSettings(**{name: value})

    @pytest.mark.parametrize("name", ["seeds", "tuning_seeds"])
    def test_seeds_are_always_given(self, name: str) -> None:
        with pytest.raises(ValueError, match=f"^{name} must be an integer, got None"):
            CompareSettings(**{name: None})

    @pytest.mark.parametrize("value", [-1, math.nan, math.inf, True, "1e-3", None])
    @pytest.mark.parametrize("name", ["learning_rate", "weight_decay"])
    def test_rates(self, name: str, value) -> None:
        with pytest.raises(ValueError, match=f"^{name} must be "):
            Training(**{name: value})
        if name == "learning_rate" and value is not None:
            with pytest.raises(ValueError, match=f"^{name} must be "):
                CompareSettings(learning_rate=value)
            with pytest.raises(ValueError, match=f"^{name} must be "):
                Group([], value)

    @pytest.mark.parametrize("value", [-1, 2**32, 0.0, math.nan, None, False])
    def test_random_seeds(self, value) -> None:
        with pytest.raises(ValueError, match=r"^seed must be "):
            Training(seed=value)
        assert Training(seed=0).seed == 0

    @pytest.mark.parametrize("value", ["no", "", 0, 1, None])
    @pytest.mark.parametrize("name", ["bf16", "cpu", "cache"])
    def test_flags(self, name: str, value) -> None:
        for kind in (Training, CompareSettings):
            if hasattr(kind, name):
                with pytest.raises(ValueError, match=f"^{name} must be True or False"):
                    kind(**{name: value})

    def test_numbers_of_numpy(self) -> None:
        assert Training(epochs=np.int64(3), learning_rate=np.float32(0.5)).epochs == 3

    @pytest.mark.parametrize("methods", [(), [], "", "head"])
    def test_no_methods_are_not_all_methods(self, methods) -> None:
        with pytest.raises(ValueError, match="methods must be a list of names, at least one, or None"):
            CompareSettings(methods=methods)

    def test_a_rate_of_zero_trains_nothing(self) -> None:
        model = build(small_experiment(), "weighted-sum", mixing_rate=0.5)
        for given, expected in ((0, {0.0}), (0.0, {0.0}), (0.25, {0.25, 0.5}), (None, {0.01, 0.5})):
            settings = CompareSettings(learning_rate=given).training(model.method.training, frozen=True)
            assert {group["lr"] for group in parameter_groups(model, settings)} == expected


class TestOptions:
    @pytest.mark.parametrize(
        ("method", "options"),
        [
            ("aat-ms", {"bottleneck": 0}),
            ("aat-ms", {"bottleneck": False}),
            ("aat-ms", {"activation": ""}),
            ("aat-ms", {"rewrite": 0}),
            ("aat-ms", {"rewrite": None}),
            ("aat-ms", {"scale": math.nan}),
            ("lff", {"out_dim": 0}),
            ("lff", {"depth": None}),
            ("hff-b", {"norm": ""}),
            ("lora", {"rank": 0}),
            ("prompt", {"prompt_tokens": 0}),
            ("weighted-sum", {"mixing_rate": -1.0}),
            ("weighted-sum", {"mixing_rate": math.nan}),
        ],
    )
    def test_falsy_values_are_checked(self, method: str, options) -> None:
        (name,) = options
        with pytest.raises(ValueError, match=f"{method}: {name} must be "):
            registry.find(method, **options)

    @pytest.mark.parametrize(
        ("method", "name"), [("aat-ms", "layers"), ("partial", "layers"), ("lff", "taps")]
    )
    def test_no_layers_are_not_all_layers(self, method: str, name: str) -> None:
        with pytest.raises(ValueError, match=f"{name} must be layer indices .*, at least one, got"):
            build(small_experiment(), method, **{name: []})

    def test_zero_is_a_value(self) -> None:
        found = registry.find("aat-ms", scale=0.0)
        assert found.options()["aat-ms"]["scale"] == 0.0
        assert registry.find("weighted-sum", mixing_rate=0).mixing_rate == 0


class TestCommandLine:
    @pytest.mark.parametrize(
        ("arguments", "part"),
        [
            (["--set", "bottleneck="], "'bottleneck=' has no value; bottleneck=null leaves the choice"),
            (["--set", "bottleneck= "], "has no value"),
            (["--set", "aat-ms.layers="], "aat-ms.layers=null leaves the choice to the method"),
            (["--methods", "head", "--learning-rate="], "--learning-rate has an empty value"),
            (["--task", ""], "--task has an empty value"),
            (["--output", ""], "--output has an empty value"),
        ],
    )
    def test_empty_values(self, arguments: list[str], part: str, tmp_path: Path) -> None:
        fails(run("compare", "--synthetic", "--output", tmp_path, *arguments), part, code=2)

    @pytest.mark.parametrize("name", ["--data", "--model"])
    def test_an_empty_folder_is_not_the_current_one(self, name: str, tmp_path: Path) -> None:
        other = {"--data": "--model", "--model": "--data"}[name]
        fails(run("compare", name, "", other, tmp_path), f"{name} has an empty value", code=2)

    @pytest.mark.parametrize(
        ("given", "part"),
        [
            ("layers=1:30", "layers must be tuple"),
            ("bottleneck=0b11", "bottleneck must be int"),
            ("bottleneck=1e2", "bottleneck must be int"),
            ("scale=.nan", "scale must be finite"),
            ("bottleneck=00", "bottleneck must be at least 1, got 0"),
        ],
    )
    def test_values_that_are_no_numbers(self, given: str, part: str, tmp_path: Path) -> None:
        arguments = ["--methods", "aat-ms", "--set", given, "--output", tmp_path / "report"]
        fails(run("compare", "--synthetic", *arguments), part)

    @pytest.mark.parametrize(
        ("arguments", "part"),
        [
            (["--max-seconds", "0.01"], "--max-seconds must be at least 0.025"),
            (["--max-seconds", "nan"], "--max-seconds must be above 0"),
            (["--max-seconds", "-1"], "--max-seconds must be above 0"),
            (["--test-fraction", "nan"], "--test-fraction must be between 0 and 1"),
            (["--test-fraction", "0"], "--test-fraction must be between 0 and 1"),
            (["--epochs", "-3"], "epochs must be at least 1, got -3"),
            (["--learning-rate", "nan"], "learning_rate must be finite"),
            (["--learning-rate", "-1e-3"], "learning_rate must be finite and not negative"),
            (["--methods"], "methods must be a list of names, at least one"),
            (["--dtype", "int8"], "--dtype"),
        ],
    )
    def test_numbers_out_of_range(self, arguments: list[str], part: str) -> None:
        result = run("compare", "--model", "x", "--data", "y", *arguments)
        assert result.code == 2
        assert part in " ".join(result.stderr.replace("│", " ").split())

    @pytest.mark.parametrize("arguments", [["--test-fraction", "0.5"], ["--max-seconds", "1"]])
    def test_options_that_would_be_ignored(self, arguments: list[str]) -> None:
        result = run("compare", "--synthetic", *arguments)
        assert result.code == 2
        assert f"{arguments[0]} is for --data alone" in " ".join(result.stderr.replace("│", " ").split())

    @pytest.mark.parametrize(
        ("text", "part"),
        [
            ("data: 010\n", "data must be text, in quotes where it looks like something else, got 10"),
            ("output: 1.10\n", "output must be text"),
            ("dtype: null\n", "dtype must be one value, got None"),
            ("seeds: null\n", "seeds must be one value, got None"),
            ("methods: [head, 1]\n", "methods must be text"),
            ("epochs: 3\nepochs: 4\n", "'epochs' is given twice"),
            ("set: {a: !!binary aGk=}\n", "set Object of type bytes is not JSON"),
        ],
    )
    def test_recipes(self, text: str, part: str, tmp_path: Path) -> None:
        (tmp_path / "mine.yaml").write_text(text)
        fails(run("compare", "--synthetic", "--recipe", tmp_path / "mine.yaml"), part, code=2)

    def test_two_recipes(self) -> None:
        arguments = ["--recipe", "aat/adapters", "--recipe=hff/fusions"]
        fails(run("compare", "--synthetic", *arguments), "--recipe can be given once", code=2)

    def test_help_is_readable(self) -> None:
        text = " ".join(run("compare", "--help").stdout.replace("│", " ").split())
        assert "{None}" not in text
        for part in ("--recipe FILE YAML file", "--import FILE Python", "--epochs INT", "--data PATH"):
            assert part in text


METHOD_FILE = '''
from dataclasses import dataclass
from typing import ClassVar

from helper_of_mine import TITLE
from mmtransfer import Method, registry


@registry.register
@dataclass(frozen=True, kw_only=True)
class Mine(Method):
    """A method from a file of the user's."""

    name: ClassVar[str] = "mine"
    title: ClassVar[str] = TITLE
    paper: ClassVar[str] = "none"

    factor: float = 1.0
'''


class TestImport:
    @pytest.fixture
    def mine(self, tmp_path: Path, monkeypatch):
        # As a module that exists: the file is another.
        path = tmp_path / "code" / "torch.py"
        path.parent.mkdir()
        path.write_text(METHOD_FILE)
        (path.parent / "helper_of_mine.py").write_text("TITLE = 'My method'\n")
        monkeypatch.setattr("sys.path", [*__import__("sys").path])
        yield path
        if "mine" in registry.methods():
            registry.unregister("mine")

    @pytest.mark.parametrize("place", ["in front", "equals", "behind"])
    def test_methods_of_a_file(self, mine: Path, place: str) -> None:
        words = {
            "in front": ["--import", mine, "methods"],
            "equals": [f"--import={mine}", "methods"],
            "behind": ["methods", "--import", mine, "--import", mine],
        }[place]
        result = run(*words)
        assert result.code == 0, result.stderr
        assert "mine               readout  A method from a file of the user's (none)" in result.stdout
        assert "factor=1.0  (a number)" in result.stdout

    def test_a_comparison(self, mine: Path, tmp_path: Path) -> None:
        arguments = ["--methods", "mine", "--set", "factor=2", "--output", tmp_path / "report", *QUICK]
        result = run("--import", mine, "compare", "--synthetic", *arguments)
        assert result.code == 0, result.stderr
        assert "My method" in result.stdout

    def test_files_that_cannot_be_imported(self, tmp_path: Path) -> None:
        fails(run("methods", "--import", tmp_path / "no.py"), "no.py is no file; give a Python file")
        fails(run("methods", "--import", tmp_path), "is no file")
        (tmp_path / "words.txt").write_text("")
        fails(run("methods", "--import", tmp_path / "words.txt"), "its name must end in .py")
        (tmp_path / "broken.py").write_text("x = 1\nimport nothing_of_the_kind\n")
        broken = ["broken.py failed, line 2 (ModuleNotFoundError: No module named 'nothing_of_the_kind')"]
        fails(run("compare", "--synthetic", "--import", tmp_path / "broken.py"), *broken)
        (tmp_path / "syntax.py").write_text("def\n")
        fails(run("methods", "--import", tmp_path / "syntax.py"), "syntax.py failed (SyntaxError")


class TestPython:
    def test_classes_given_for_instances(self) -> None:
        encoder = small_experiment().model
        method = type(registry.find("aat-ms"))
        message = r"method must be a name or a Method, got the class AAT; write AAT\(\)"
        for call in (AdaptedModel, mmtransfer.prepare):
            with pytest.raises(TypeError, match=message):
                call(encoder, method)
        with pytest.raises(TypeError, match="method must be a name or a Method, got None"):
            registry.find(None)
        with pytest.raises(TypeError, match=r"task must be a Task or None, got the class Classification; wr"):
            AdaptedModel(encoder, "head", Classification)
        with pytest.raises(TypeError, match="task must be a Task or None, got 3"):
            AdaptedModel(encoder, "head", 3)
        assert AdaptedModel(encoder, "head", Classification(num_labels=2)).head is not None

    def test_what_cannot_be_registered(self) -> None:
        for register, found in ((registry.register, registry.find("lff")), (register_task, None)):
            with pytest.raises(TypeError, match=r"takes a class of (methods|tasks), got"):
                register(found)
        nameless = type("Nameless", (Method,), {"title": "T", "paper": "P"})
        with pytest.raises(TypeError, match="Nameless must have a class attribute name, a text"):
            registry.register(nameless)
        without = type("Without", (Task,), {"name": "without"})
        with pytest.raises(TypeError, match="Without must have a class attribute metric, a Metric"):
            register_task(without)

    def test_a_readout_without_a_width(self, monkeypatch) -> None:
        monkeypatch.setattr(type(registry.find("lff")), "readout", lambda *_: torch.nn.Identity())
        with pytest.raises(TypeError, match=r"the readout of lff must be a module with an integer attribute"):
            AdaptedModel(small_experiment().model, "lff", Classification(num_labels=2))

    @pytest.mark.parametrize("shape", [(4, 2, 64), (4, 1, 65), (4, 0, 64)])
    def test_features_of_other_taps(self, shape) -> None:
        model = build(small_experiment(), "head")
        with pytest.raises(ValueError, match=r"features must be \(N, 1, 64\), the taps 3, got shape"):
            model(features=torch.zeros(shape), lengths=torch.tensor([4]))

    def test_no_utterances(self) -> None:
        model = build(small_experiment(), "head")
        empty = {"features": torch.zeros(0, 1, 64), "lengths": torch.zeros(0, dtype=torch.int64)}
        assert model(**empty).logits.shape == (0, 4)
        with pytest.raises(ValueError, match="a batch of 0 utterances has no loss"):
            model(**empty, labels=torch.zeros(0, dtype=torch.int64))

    @pytest.mark.parametrize("seconds", [0, 0.01, -1.0, math.nan, math.inf, "3", None])
    def test_seconds(self, seconds) -> None:
        with pytest.raises(ValueError, match="max_seconds must be"):
            replace(small_experiment(), max_seconds=seconds)

    @pytest.mark.parametrize("size", [0, -1, 1.5, None])
    def test_batches_of_a_cache(self, size) -> None:
        experiment = small_experiment()
        model = build(experiment, "head")
        collate = EncoderCollator(
            Collator(experiment.recordings, experiment.extractor), model.encoder, model.task
        )
        with pytest.raises(ValueError, match="batch_size must be"):
            cache_features(model.encoder, experiment.recordings.train, collate, batch_size=size)

    def test_dtypes(self, tmp_path: Path) -> None:
        (tmp_path / "data").mkdir()
        with pytest.raises((ValueError, RuntimeError)):
            user_experiment("x", tmp_path / "data", dtype="int8")
