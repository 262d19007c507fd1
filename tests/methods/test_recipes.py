"""Recipes: files of options in front of those on the command line, and the messages for wrong ones."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from mmtransfer import cli, registry
from mmtransfer.cli import recipes
from mmtransfer.compare.settings import CompareSettings

#: The package has a function of the module's name.
command = importlib.import_module("mmtransfer.cli.compare")


@pytest.fixture
def recipe(tmp_path: Path):
    def write(text: str, name: str = "mine.yaml") -> str:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Settings and source of a command line, without running it."""

    def run(*arguments: str) -> tuple:
        found: list = []

        def stop(experiment, settings):
            found.append((settings, experiment))
            raise SystemExit(0)

        monkeypatch.setattr(command, "_load", lambda source, task: source)
        monkeypatch.setattr(command, "_run", stop)
        with pytest.raises(SystemExit) as left:
            cli.main(["compare", "--output", str(tmp_path / "report"), *arguments])
        assert left.value.code == 0
        return found[0]

    return run


def test_a_file_stands_for_its_options(recipe, parsed) -> None:
    name = recipe(
        "# Words.\nsynthetic: true\nmethods: [weighted-sum, hff-b+aat-ms]\ntuning_epochs: 3\nbatch-size: 7\n"
        "learning_rate: 1e-3\ncache: false\nbf16: true\ncpu: false\nepochs:\n"
        "set:\n  bottleneck: 64\n  mixing_rate: 1e-3\n  layers: [0, 2]\n  hff-b: {activation: gelu}\n"
    )
    settings, source = parsed("--recipe", name)
    assert source == command.Input(synthetic=True)
    assert settings == CompareSettings(
        methods=("weighted-sum", "hff-b+aat-ms"),
        tuning_epochs=3,
        batch_size=7,
        learning_rate=1e-3,
        cache=False,
        bf16=True,
        options={
            "bottleneck": 64,
            "mixing_rate": 1e-3,
            "layers": [0, 2],
            "hff-b": {"activation": "gelu"},
        },
    )


@pytest.mark.parametrize("form", [["--recipe", "{}"], ["--recipe={}"]])
def test_both_forms_of_the_option_in_any_place(recipe, parsed, form) -> None:
    words = [word.format(recipe("epochs: 3\n")) for word in form]
    assert parsed("--synthetic", *words)[0].epochs == 3
    assert parsed(*words, "--synthetic", "--seeds", "2")[0].epochs == 3


class TestOverriding:
    def test_flags_on_the_command_line_win(self, recipe, parsed) -> None:
        name = recipe("methods: [head, lff]\nepochs: 3\ntuning-epochs: 4\nseeds: 2\n")
        settings, _ = parsed(
            "--synthetic", "--recipe", name, "--methods", "hff-b", "--epochs=5", "--tuning_epochs", "6"
        )
        assert (settings.methods, settings.epochs, settings.tuning_epochs) == (("hff-b",), 5, 6)
        assert settings.seeds == 2

    def test_set_adds_to_the_recipes_and_wins(self, recipe, parsed) -> None:
        name = recipe("set: {bottleneck: 3, activation: relu, hff-b: {out_dim: 4, norm: false}}\n")
        settings, _ = parsed(
            "--synthetic", "--set", "bottleneck=5", "hff-b.out_dim=6", "--recipe", name, "--set", "scale=0.5"
        )
        assert settings.options == {
            "bottleneck": 5,
            "activation": "relu",
            "scale": 0.5,
            "hff-b": {"out_dim": 6, "norm": False},
        }

    def test_no_cache_is_not_given_twice(self, recipe, parsed) -> None:
        settings, _ = parsed("--synthetic", "--no-cache", "--recipe", recipe("cache: false\n"))
        assert settings.cache is False


PACKAGED = sorted(f"{path.parents[1].name}/{path.stem}" for path in recipes._PACKAGE.glob("*/recipes/*.yaml"))
#: Those for `mmtransfer finetune` have one method.
TRAINED = [name for name in PACKAGED if "method" in recipes._read(name)[1]]


@pytest.mark.parametrize("name", TRAINED)
def test_packaged_recipes_train_one_method(name: str, monkeypatch, tmp_path: Path) -> None:
    from mmtransfer.training import finetune
    from mmtransfer.training.finetune_settings import FinetuneSettings
    from mmtransfer.training.run import chosen_task

    found: list = []

    def stop(*arguments, **_) -> None:
        found.append(arguments)
        raise SystemExit(0)

    monkeypatch.setattr(finetune, "finetune", stop)
    arguments = ["--recipe", name, "--model", "a", "--data", "b", "--output", str(tmp_path), "--epochs", "7"]
    with pytest.raises(SystemExit) as left:
        cli.main(["finetune", *arguments])
    assert left.value.code == 0
    model, method, data, output, settings = found[0]
    assert (model, data, output) == ("a", "b", tmp_path)
    assert isinstance(settings, FinetuneSettings)
    assert settings.epochs == 7
    task = chosen_task(settings)
    assert task is not None
    assert registry.find(method, **settings.method_options(task.name)).name == method
    if task.reads_language_model:
        options = {"language_model": settings.language_model, **settings.task_options(task.name)}
        if options.get("tuning") == "multitask":
            options["text"] = "passages.txt"
        assert task(stage=settings.stage, **options).stage == settings.stage


def test_the_recipe_of_ssr_has_the_paper_s_settings() -> None:
    _, content = recipes._read("ssr/stage-1")
    found = {name: content[name] for name in ("max_steps", "learning_rate", "weight_decay", "beta2", "clip")}
    assert found == {
        "max_steps": 400_000,
        "learning_rate": 1e-4,
        "weight_decay": 0.1,
        "beta2": 0.95,
        "clip": 0,
    }
    assert (content["schedule"], content["warmup_steps"], content["final_share"]) == ("cosine", 2000, 0.2)
    assert content["set"]["dropout"] == 0.1
    method = registry.find("ssr", **{name: value for name, value in content["set"].items() if name != "text"})
    assert (method.depth, method.layer, method.lookback, method.attention) == (4, 6, 1, "segment")


@pytest.mark.parametrize("name", [name for name in PACKAGED if name not in TRAINED])
def test_packaged_recipes_name_methods_and_options_that_exist(name: str, parsed) -> None:
    from mmtransfer.compare.session import find_methods

    settings, _ = parsed("--synthetic", "--recipe", name)
    assert len(find_methods(settings)) == len(settings.methods) > 1


@pytest.mark.parametrize(
    ("methods", "own"),
    [
        (("head", "hff-b"), {}),
        (("full",), {"full": {"learning_rate": 3e-4}}),
        (("hff-b+full", "head"), {}),
    ],
)
@pytest.mark.parametrize("form", ["{methods}", "--methods={methods}"])
def test_options_of_methods_that_are_not_compared_stay_away(methods, own, form, parsed) -> None:
    """As in the line of README: one method of the demo's recipe."""
    from mmtransfer.compare.session import find_methods

    words = (
        ["--methods", *methods] if form == "{methods}" or len(methods) > 1 else [f"--methods={methods[0]}"]
    )
    settings, _ = parsed("--demo", *words)
    assert settings.methods == methods
    assert settings.options == own
    assert [method.name for method in find_methods(settings)] == list(methods)


def test_there_are_packaged_recipes_for_every_paper() -> None:
    assert {name.partition("/")[0] for name in PACKAGED} == {*registry.PAPERS, "demo"}


class TestWrongRecipes:
    def fails(self, capsys, arguments: list[str], *parts: str) -> None:
        with pytest.raises(SystemExit) as left:
            cli.main(["compare", "--synthetic", *arguments])
        printed = capsys.readouterr()
        assert left.value.code == 2
        assert printed.out == ""
        assert printed.err.startswith("mmtransfer: ")
        assert printed.err.count("\n") == 1
        for part in parts:
            assert part in printed.err

    def test_no_name(self, capsys) -> None:
        self.fails(capsys, ["--recipe"], "--recipe needs the name of a file")
        self.fails(capsys, ["--recipe="], "--recipe needs the name of a file")

    @pytest.mark.parametrize("name", ["nowhere.yaml", "aat/nowhere", "aat", "/", "../aat/adapters"])
    def test_unknown_names(self, capsys, name: str) -> None:
        self.fails(capsys, ["--recipe", name], f"no recipe {name!r}", *PACKAGED)

    def test_a_folder(self, capsys, tmp_path) -> None:
        self.fails(capsys, ["--recipe", str(tmp_path)], "no recipe")

    @pytest.mark.parametrize(
        "content",
        [b"methods: [head\n", b"\xff\xfe\x00", b"a: b: c\n", b"set: !!python/object:os.system {}\n"],
    )
    def test_files_that_are_no_yaml(self, capsys, tmp_path, content: bytes) -> None:
        (tmp_path / "broken.yaml").write_bytes(content)
        self.fails(
            capsys, ["--recipe", str(tmp_path / "broken.yaml")], "broken.yaml", "cannot be read as YAML"
        )

    def test_a_file_that_may_not_be_read(self, capsys, recipe, monkeypatch) -> None:
        def deny(*_, **__):
            raise PermissionError(13, "Permission denied")

        name = recipe("epochs: 1\n")
        monkeypatch.setattr(Path, "read_text", deny)
        self.fails(capsys, ["--recipe", name], "mine.yaml cannot be read", "Permission denied")

    @pytest.mark.parametrize("text", ["", "- head\n- lff\n", "head\n"])
    def test_files_without_options(self, capsys, recipe, text: str) -> None:
        self.fails(capsys, ["--recipe", recipe(text)], "must hold options, one `name: value` a line")

    @pytest.mark.parametrize(
        ("text", "parts"),
        [
            ("epoch: 3\n", ["option 'epoch', which is none of", "epochs"]),
            ("1: 3\n", ["option 1, which is none of"]),
            ("save: models\n", ["option 'save'"]),
            ("cache: 3\n", ["cache must be true or false, got 3"]),
            ("epochs: {head: 3}\n", ["epochs must be one value, got {"]),
            ("seeds: [1, 2]\n", ["seeds must be one value, got [1, 2]"]),
            ("methods: {head: 1}\n", ["methods must be a list, got"]),
            ("set: [bottleneck]\n", ["--set takes field=value, got 'bottleneck'"]),
        ],
    )
    def test_wrong_content(self, capsys, recipe, text: str, parts: list[str]) -> None:
        self.fails(capsys, ["--recipe", recipe(text)], *parts)

    @pytest.mark.parametrize("text", ["seeds: many\n", "seeds: true\n", "epochs: 0\n"])
    def test_values_of_the_wrong_kind(self, capsys, recipe, text: str) -> None:
        with pytest.raises(SystemExit) as left:
            cli.main(["compare", "--synthetic", "--recipe", recipe(text)])
        assert left.value.code == 2
        assert text.partition(":")[0] in json.dumps(capsys.readouterr().err)
