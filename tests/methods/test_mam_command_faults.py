"""`mmtransfer merge` with wrong recipes and checkpoints, with outputs in the way, and interrupted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from command_line import fails, run
from merge_files import linear, load, merge, merged, random_tensors, same, save, untouched
from tiny_encoders import TINY

from mmtransfer.data import DataError
from mmtransfer.mam.files import run as running
from mmtransfer.mam.files.output import new_folder


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return save(tmp_path / "a", random_tensors(1), 2), save(tmp_path / "b", random_tensors(2))


def refused(recipe: Any, output: Path, *parts: str) -> None:
    """One sentence with these parts, and nothing written."""
    fails(merge(recipe, output), *parts)
    untouched(output)


BOTH = [{"model": "a", "parameters": {"weight": 1}}, {"model": "b", "parameters": {"weight": 1}}]
LINEAR = {"merge_method": "linear", "models": BOTH}
MAM = {"merge_method": "mam", "target": "a", "source": "b", "lambda": 0.1}


@pytest.mark.parametrize(
    ("recipe", "parts"),
    [
        ("", ["a recipe must hold merge_method", "got nothing"]),
        ("- a\n- b\n", ["a recipe must hold merge_method", "got list"]),
        ("models: [a\n", ["cannot be read as YAML"]),
        ("merge_method: linear\nmerge_method: mam\n", ["'merge_method' is given twice"]),
        ({"models": BOTH}, ["merge_method must be linear or mam, got None"]),
        ({"merge_method": "slerp"}, ["merge_method must be linear or mam, got 'slerp'"]),
        ({**LINEAR, "model": 3}, ["model is none of", "did you mean 'models'?"]),
        ({**LINEAR, "slices": []}, ["slices is not supported; there are merge_method, models"]),
        ({**LINEAR, "models": BOTH[:1]}, ["models must list two models or more"]),
        ({**LINEAR, "models": {"a": 1}}, ["models must list two models or more"]),
        ({**LINEAR, "models": [*BOTH, "c"]}, ["models[2] must hold `name: value` lines, got 'c'"]),
        ({**LINEAR, "models": [BOTH[0], {"model": 3}]}, ["models[1].model must be the folder", "got 3"]),
        (
            {**LINEAR, "models": [BOTH[0], {"model": "b", "parameters": {"density": 1}}]},
            ["models[1].parameters.density is not supported; there are weight"],
        ),
        (
            {**LINEAR, "models": [BOTH[0], {"model": "b", "parameters": {"wieght": 1}}]},
            ["models[1].parameters.wieght is none of weight; did you mean 'weight'?"],
        ),
        ({**LINEAR, "parameters": {"weight": "much"}}, ["parameters.weight must be a number", "got 'much'"]),
        ({**LINEAR, "parameters": {"weight": []}}, ["parameters.weight must be a number", "got []"]),
        ({**LINEAR, "parameters": {"weight": True}}, ["parameters.weight must be a number", "got True"]),
        ({**LINEAR, "parameters": {"weight": float("nan")}}, ["parameters.weight must be a number"]),
        ({**LINEAR, "parameters": {"weight": [{"filter": "x"}]}}, ["weight[0] must have filter and value"]),
        ({**LINEAR, "parameters": {"weight": [{"filter": 3, "value": 1}]}}, ["weight[0].filter must be"]),
        ({**LINEAR, "parameters": {"normalize": 1}}, ["parameters.normalize must be true or false, got 1"]),
        ({**LINEAR, "base_model": "c"}, ["base_model must be one of the models, a, b, got 'c'"]),
        ({**LINEAR, "dtype": "int8"}, ["dtype must be one of float32", "got 'int8'"]),
        ({**LINEAR, "out_dtype": ["float32"]}, ["out_dtype must be one of float32"]),
        ({**LINEAR, "tokenizer_source": "union"}, ["tokenizer_source must be base, got 'union'"]),
        ({**LINEAR, "missing": "drop"}, ["missing must be error or keep, got 'drop'"]),
        ({**MAM, "lambda": 1.5}, ["lambda must be a number in [0, 1]", "got 1.5"]),
        ({**MAM, "lambda": [0.1, -0.1]}, ["lambda must be a number in [0, 1]", "got [0.1, -0.1]"]),
        ({**MAM, "lambda": None}, ["lambda must be a number in [0, 1]", "got None"]),
        ({**MAM, "target": None}, ["target must be the folder or the hub name of a model, got None"]),
        ({**MAM, "layers": "5-3"}, ["layers must be a list of layers or FIRST-LAST, got '5-3'"]),
        ({**MAM, "layers": [1.5]}, ["layers must be a list of layers"]),
        ({**MAM, "parts": "qkv"}, ["parts must list some of q, k and v, got 'qkv'"]),
        ({**MAM, "bias": "yes please"}, ["bias must be true or false"]),
        ({**MAM, "model": "a"}, ["model is none of merge_method, target"]),
    ],
)
def test_wrong_recipes(tmp_path: Path, recipe: Any, parts: list[str]) -> None:
    refused(recipe, tmp_path / "out", *parts)


def test_wrong_arguments(pair: tuple[Path, Path], tmp_path: Path) -> None:
    fails(run("merge", tmp_path / "none.yaml", tmp_path / "out"), "none.yaml cannot be read")
    recipe = linear((pair[0], 1), (pair[1], 1))
    fails(merge(recipe, tmp_path / "out", "--max-shard-size", "big"), "--max-shard-size", "'big'", code=2)
    fails(run("merge", tmp_path / "recipe.yaml"), "give OUT", code=2)
    untouched(tmp_path / "out")


def test_checkpoints_that_are_damaged(pair: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = pair
    recipe, out = linear((b, 1), (a, 1)), tmp_path / "out"
    shard, index = a / "model-00002-of-00002.safetensors", a / "model.safetensors.index.json"
    whole, text = shard.read_bytes(), index.read_text()

    shard.write_bytes(whole[:-1])
    refused(recipe, out, str(a), shard.name, "is cut off after")
    shard.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    refused(recipe, out, shard.name, "git lfs pull")
    shard.write_bytes(whole.replace(b'"shape":[8]', b'"shape":[9]'))
    refused(recipe, out, shard.name, "cannot be read")
    shard.unlink()
    refused(recipe, out, f"{a} lacks {shard.name}, which {index.name} names for", "download it again")
    shard.write_bytes(whole)

    weight_map = json.loads(text)["weight_map"]
    for wrong, parts in [
        ({**weight_map, "ghost": shard.name}, ["1 tensor (ghost)", shard.name, "does not have"]),
        ({**weight_map, "norm.weight": "../x"}, ["'../x' for a file in its folder"]),
        ({}, ["without a weight_map"]),
    ]:
        index.write_text(json.dumps({"weight_map": wrong}))
        refused(recipe, out, str(a), *parts)
    index.write_text("{")
    refused(recipe, out, str(a), "without a weight_map")
    index.unlink()
    refused(recipe, out, f"{a} has no weights, and merging reads safetensors")
    torch.save({}, a / "pytorch_model.bin")
    refused(recipe, out, "pytorch_model.bin alone", "save_pretrained")
    (a / "config.json").unlink()
    refused(recipe, out, str(a), "has no config.json")
    refused(linear((b, 1), (tmp_path / "none", 1)), out, "none does not exist")
    refused(linear((b, 1), (b / "config.json", 1)), out, "is a file")


def test_models_of_the_hub(pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch(name: str, allow_patterns: list[str]) -> str:
        assert "*.safetensors" in allow_patterns
        assert "*.bin" not in allow_patterns
        if name != "org/model":
            raise OSError("Repository Not Found.")
        return str(pair[0])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    monkeypatch.chdir(tmp_path)
    found = merged(linear((Path("org/model"), 1), (Path("b"), 0)), tmp_path / "out")
    same(found, load(pair[0]))
    wrong = linear((Path("org/modle"), 1), (Path("b"), 0))
    refused(wrong, tmp_path / "new", "org/modle is no folder", "from the hub", "Repository Not Found")


def test_tensors_that_do_not_fit(tmp_path: Path) -> None:
    def attempt(changes: dict[str, Any], *parts: str, of_first: dict[str, Any] | None = None) -> None:
        """One model has other tensors; None takes one away."""
        number = len(list(tmp_path.iterdir()))
        first, second = random_tensors(1) | (of_first or {}), random_tensors(2) | changes
        models = [{k: v for k, v in each.items() if v is not None} for each in (first, second)]
        folders = [save(tmp_path / f"{number}{side}", each) for side, each in zip("ab", models, strict=True)]
        refused(linear((folders[0], 1), (folders[1], 1)), tmp_path / "out", *parts)

    attempt({"norm.weight": torch.ones(9)}, "norm.weight is [8] in", "[9] in", "different shapes")
    attempt({"norm.weight": None}, "lacks 1 tensor (norm.weight)", "missing: keep")
    attempt({"head": torch.ones(2)}, "has 1 tensor (head) more than", "missing: keep")
    attempt({"ids": torch.arange(3)}, "ids, of I64, differs", of_first={"ids": torch.arange(1, 4)})
    attempt({"norm.weight": torch.arange(8)}, "norm.weight is I64 in", "cannot be summed")
    eighth = torch.ones(8).to(torch.float8_e4m3fn)
    attempt({"norm.weight": eighth}, "F8_E4M3", "cannot be summed", of_first={"norm.weight": eighth})


def test_values_beyond_float16(tmp_path: Path) -> None:
    wide = {**random_tensors(1, torch.bfloat16), "norm.weight": torch.full((8,), 70_000.0).bfloat16()}
    a, b = save(tmp_path / "a", wide), save(tmp_path / "b", random_tensors(2, torch.bfloat16))
    recipe = linear((a, 1), (b, 0), dtype="float16")
    refused(recipe, tmp_path / "out", "norm.weight has values beyond those of float16", "bfloat16")


def test_weights_that_cannot_be_used(pair: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = pair
    refused(linear((a, 1), (b, -1)), tmp_path / "out", "the weights of", "add up to 0", "normalize: false")
    some = [{"filter": "attn", "value": 1}]
    refused(linear((a, 1), (b, some)), tmp_path / "out", f"models[1], {b}, has no weight for embed.weight")
    none = {"merge_method": "linear", "models": [{"model": str(a)}, {"model": str(b)}]}
    refused(none, tmp_path / "out", "models[0]", "has no weight for")


def test_attention_of_models_that_do_not_fit(tmp_path: Path) -> None:
    for name, model in {
        "hubert": TINY["hubert"].build(),
        "wide": TINY["bert"].build(hidden_size=32),
        "deep": TINY["bert"].build(num_hidden_layers=6),
        "bert": TINY["bert"].build(),
    }.items():
        model.save_pretrained(tmp_path / name)
    save(tmp_path / "unknown", random_tensors(1))
    lost = {
        name: each for name, each in load(tmp_path / "bert").items() if "layer.2.attention.self.k" not in name
    }
    save(tmp_path / "lost", lost, **json.loads((tmp_path / "bert" / "config.json").read_text()))

    def attempt(source: str, *parts: str, **settings: Any) -> None:
        recipe = {**MAM, "target": str(tmp_path / "hubert"), "source": str(tmp_path / source), **settings}
        refused(recipe, tmp_path / "out", *parts)

    attempt("wide", "must be equally wide", "hubert, has 16", "bert, 32")
    attempt("deep", "the target has 4 layers and the source 6", "layer_map=[0, 2, 3, 5]")
    attempt("unknown", "no model can be built from the config.json of", "unknown")
    attempt("lost", "lacks the tensor encoder.layer.2.attention.self.key.weight")
    attempt("bert", "layers must be layer indices in [-4, 3]", "got 7", layers=[1, 7])
    attempt("bert", "layer_map must have 4 entries", "in [-4, 3]", layer_map=[0, 1, 2, 9])
    attempt(
        "bert",
        "lambda must be a number",
        "one for each of the 2 layers",
        layers=[0, 1],
        **{"lambda": [0.1, 0.2, 0.3]},
    )


def test_code_of_a_checkpoint_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers would ask on the terminal; the answer is no."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    TINY["hubert"].build().save_pretrained(tmp_path / "hubert")
    foreign = save(
        tmp_path / "foreign", random_tensors(1), model_type="foreign", auto_map={"AutoConfig": "own.Own"}
    )
    (foreign / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    recipe = {**MAM, "target": str(tmp_path / "hubert"), "source": str(foreign)}
    refused(recipe, tmp_path / "out", "no model can be built from the config.json of", "custom code")
    assert not (tmp_path / "ran").exists()


def test_the_output_is_respected(pair: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = pair
    recipe, out = linear((a, 1), (b, 1)), tmp_path / "out"
    fails(merge(recipe, a), f"{a} holds the input {a}")
    fails(merge(recipe, a, "--overwrite"), f"{a} holds the input {a}")
    (tmp_path / "deep").mkdir()
    inside = save(tmp_path / "deep" / "c", random_tensors(1))
    fails(merge(linear((inside, 1), (b, 1)), tmp_path / "deep"), "holds the input")
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    for options in ([], ["--overwrite"]):
        fails(merge(recipe, out, *options), "holds other files (thesis.tex)")
    assert (out / "thesis.tex").read_text() == "years of work"
    (out / "thesis.tex").unlink()
    one, other = load(a), load(b)
    halves = {name: torch.lerp(one[name], other[name], 0.5) for name in one}
    # An empty folder is filled; an earlier merge is replaced if that is asked for.
    same(merged(recipe, out), halves)
    fails(merge(linear((a, 1), (b, 0)), out), "holds an earlier merge; --overwrite replaces it")
    same(load(out), halves)
    same(merged(linear((a, 1), (b, 0)), out, "--overwrite", "--max-shard-size", "500"), one)
    assert not (out / "model.safetensors").exists()
    (tmp_path / "file").write_text("")
    fails(merge(recipe, tmp_path / "file"), "exists and is no folder")
    same(merged(recipe, tmp_path / "new" / "deeper" / "out"), halves)


def test_a_running_merge_is_not_disturbed(pair: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with new_folder(out) as folder:
        (folder / "merge_recipe.yaml").write_text("")
        fails(merge(linear((pair[0], 1), (pair[1], 1)), out), f"another merge is writing {out}")
        assert folder.exists()
    assert [path.name for path in out.iterdir()] == ["merge_recipe.yaml"]


def test_files_that_come_meanwhile_stay(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def fill() -> None:
        with new_folder(out, overwrite=True) as folder:
            (folder / "merge_recipe.yaml").write_text("")
            out.mkdir()
            (out / "thesis.tex").write_text("years of work")

    with pytest.raises(DataError, match="holds other files"):
        fill()
    assert [path.name for path in tmp_path.rglob("*.tex")] == ["thesis.tex"]


@pytest.mark.parametrize("place", ["create", "write_piece", "write_index", "write_settings"])
def test_an_error_leaves_nothing(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(running, place, fail)
    refused(linear((pair[0], 1), (pair[1], 1)), tmp_path / "out", "No space left on device")
    monkeypatch.undo()
    monkeypatch.setattr(running.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 100})())
    refused(linear((pair[0], 1), (pair[1], 1)), tmp_path / "out", "GB free")


#: Forks a process for each place, which gets a signal there; then the command runs undisturbed.
INTERRUPTED = """
import os, signal, sys
# A shell ignores it for what runs in the background.
signal.signal(signal.SIGINT, signal.default_int_handler)
from pathlib import Path
from mmtransfer.cli import main
from mmtransfer.mam.files import output, run
recipe, out, *options = sys.argv[1:]
before = sorted(os.listdir(out)) if os.path.exists(out) else None
for number in (signal.SIGKILL, signal.SIGINT):
    for owner, place, count in (
        (run, "create", 2), (run, "write_piece", 1), (run, "write_piece", 5), (run, "write_index", 1),
        (run, "write_settings", 1), (output, "_put", 1),
    ):
        child = os.fork()
        if not child:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            inner, left = getattr(owner, place), [count]
            def outer(*arguments):
                left[0] -= 1
                if not left[0]:
                    os.kill(os.getpid(), number)
                return inner(*arguments)
            setattr(owner, place, outer)
            try:
                main(["merge", recipe, out, "--max-shard-size", "500", *options])
            except SystemExit as stopped:
                os._exit(stopped.code)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status == (-9 if number == signal.SIGKILL else 130), (place, status)
        found = sorted(os.listdir(out)) if os.path.exists(out) else None
        assert found == before, (place, found)
        left = [name for name in os.listdir(os.path.dirname(out)) if name.startswith(".out")]
        assert len(left) == (number == signal.SIGKILL), (place, left)
        if number == signal.SIGINT:
            continue
        print(place)
main(["merge", recipe, out, *options])
"""


@pytest.mark.parametrize("earlier", [False, True])
def test_an_interrupted_merge_leaves_no_folder(
    pair: tuple[Path, Path], tmp_path: Path, earlier: bool
) -> None:
    """Killed at any point, there is no result, or the earlier one; the next run removes what was left."""
    a, b = pair
    (tmp_path / "place").mkdir()
    out = tmp_path / "place" / "out"
    if earlier:
        merged(linear((a, 1), (b, 0)), out)
    (out.parent / "recipe.yaml").write_text(json.dumps(linear((a, 1), (b, 1))))
    options = ["--overwrite"] if earlier else []
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, out.parent / "recipe.yaml", out, *options],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    one, other = load(a), load(b)
    same(load(out), {name: torch.lerp(one[name], other[name], 0.5) for name in one})
    assert sorted(path.name for path in out.parent.iterdir()) == ["out", "recipe.yaml"]
