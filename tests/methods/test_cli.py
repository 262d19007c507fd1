"""The command line from end to end, and what it says when something is wrong."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from click.testing import Result
from transformers import Wav2Vec2FeatureExtractor, WhisperFeatureExtractor
from typer.testing import CliRunner

import mmkernels
from mmtransfer import cli, compare
from mmtransfer.compare import step as measure
from mmtransfer.hff import HFF
from mmtransfer.methods import DEFAULT_METHODS, METHODS
from mmtransfer.tasks import synthetic_task
from tests.methods.audio_files import write_clip
from tests.methods.tiny_encoders import TINY

QUICK = ["--epochs", "1", "--seeds", "1", "--batch-size", "8", "--tuning-epochs", "1", "--cpu"]


@pytest.fixture(autouse=True)
def _few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "ROUNDS", (2, 2))


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def record(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def fails(result: Result, *parts: str, code: int = 1) -> None:
    """One sentence on standard error, no traceback, nothing on standard output."""
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit)
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith("mmtransfer: ")
    for part in parts:
        assert part in line
    assert "Traceback" not in result.output
    assert result.stdout == ""


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "whisper"
    TINY["whisper"].build().save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=6, chunk_length=1).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def wav2vec2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "wav2vec2"
    TINY["wav2vec2"].build(head=True).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(return_attention_mask=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of four tones, and a manifest of the same with a split."""
    root = tmp_path_factory.mktemp("data")
    lines = ["path,label,split"]
    for label, base in (("high", 900.0), ("low", 200.0)):
        for take in range(4):
            write_clip(root / "tones" / label / f"{take}.wav", base + 20 * take, 0.2 + 0.01 * take)
            lines.append(f"tones/{label}/{take}.wav,{label},{'test' if take == 3 else 'train'}")
    (root / "clips.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Path]:
    output = tmp_path_factory.mktemp("synthetic") / "report"
    arguments = ["--epochs", "2", "--seeds", "2", "--tuning-epochs", "1", "--cpu"]
    arguments += ["--save", "--output", output]
    return run("compare", "--synthetic", *arguments), output


def test_the_synthetic_comparison_prints_a_table(synthetic: tuple[Result, Path]) -> None:
    result, output = synthetic
    assert result.exit_code == 0, result.output
    for title in (METHODS[name].title for name in DEFAULT_METHODS):
        row = rf"^\s*{re.escape(title)}\s+\d+\.\d( ± \d+\.\d\s+2 × 2|\s+1 × 1)\s+[\d,]+\s+\d+\.\d\d\s*$"
        assert re.search(row, result.stdout, re.M)
    assert "[synthetic]" in result.stdout
    assert "features of 32 clips in memory" in " ".join(result.stdout.split())
    assert max(map(len, result.stdout.splitlines())) <= 80 or str(output) in result.stdout.splitlines()[-1]


def test_the_json_holds_every_run(synthetic: tuple[Result, Path]) -> None:
    found = record(synthetic[1])
    assert (found["format"], found["version"]) == ("mmtransfer-compare", 1)
    assert found["task"]["synthetic"] is True
    assert found["settings"]["cached_features"] is True
    assert found["settings"]["taps"] == ["embeddings", "0", "1", "2", "3"]
    assert [method["name"] for method in found["methods"]] == list(DEFAULT_METHODS)
    for method in found["methods"]:
        accuracies = [run["accuracy"] for run in method["runs"]]
        assert method["accuracy"] == pytest.approx(sum(accuracies) / len(accuracies))
        if method["through_encoder"]:
            assert ([run["seed"] for run in method["runs"]], method["spread"]) == ([0], None)
        else:
            assert [run["seed"] for run in method["runs"]] == [0, 1]
            assert method["spread"] == pytest.approx(abs(accuracies[0] - accuracies[1]) / 2**0.5)
        assert method["step"]["mmkernels"]["milliseconds"] > 0
        assert (method["step"]["eager"] is None) == (method["name"] in ("last", "full"))
        assert method["step"]["agrees"] is True


def test_the_page_is_self_contained_and_says_synthetic(synthetic: tuple[Result, Path]) -> None:
    page = (synthetic[1] / "report.html").read_text(encoding="utf-8")
    assert "Synthetic data and a random encoder" in page
    assert "$" not in re.sub(r"<svg.*?</svg>", "", page, flags=re.S)
    assert not re.search(r"<script|<link|<img|@import|url\((?!#)|(src|href)=\"(?!#)", page)
    figures = re.findall(r"<svg .*?</svg>", page, re.S)
    assert len(figures) == 5
    identifiers: list[str] = []
    for figure in figures:
        tree = ElementTree.fromstring(figure)
        identifiers += [node.attrib["id"] for node in tree.iter() if "id" in node.attrib]
        own = {node.attrib["id"] for node in tree.iter() if "id" in node.attrib}
        assert set(re.findall(r"(?:url\(|href=\")#([^\")]+)", figure)) <= own
    assert len(identifiers) == len(set(identifiers))
    text = " ".join(figures)
    for label in (
        "Weighted sum + norm",
        "HFF-b",
        "embeddings",
        "layer 3",
        "accuracy, %",
        "milliseconds per step",
    ):
        assert label in text
    assert "cached features" in page
    assert f"torch {torch.__version__}" in page


def test_saved_runs_can_be_loaded(synthetic: tuple[Result, Path]) -> None:
    folder = synthetic[1] / "models"
    assert len(list(folder.iterdir())) == 2 * 5 + 4
    model = HFF.from_pretrained(folder / "hff-b-seed1", synthetic_task().model)
    assert model.head is not None
    assert model.head.num_labels == 8


def test_a_folder_of_class_folders_with_wav2vec2(wav2vec2: Path, sounds: Path, tmp_path: Path) -> None:
    output = tmp_path / "deep" / "report"
    methods = ["--methods", "head,weighted-sum,hff-b-adapters,aat-ms"]
    data = ["--model", wav2vec2, "--data", sounds / "tones"]
    result = run("compare", *data, *methods, "--output", output, *QUICK)
    assert result.exit_code == 0, result.output
    found = record(output)
    assert found["task"] | {"classes": 2, "model": "wav2vec2", "model_type": "wav2vec2"} == found["task"]
    assert found["task"]["synthetic"] is False
    assert "Synthetic" not in (output / "report.html").read_text(encoding="utf-8")


def test_a_manifest_with_whisper_chosen_taps_and_methods(whisper: Path, sounds: Path, tmp_path: Path) -> None:
    arguments = ["--methods", "hff-b,hff-ub", "--taps", "embeddings,1,-1", "--no-cache", "--width", "6"]
    data = ["--model", whisper, "--data", sounds / "clips.csv", "--output", tmp_path]
    result = run("compare", *data, *arguments, *QUICK)
    assert result.exit_code == 0, result.output
    found = record(tmp_path)
    assert found["task"] | {"train_clips": 6, "test_clips": 2} == found["task"]
    assert found["settings"] | {"taps": ["embeddings", "1", "3"], "width": 6} == found["settings"]
    assert found["settings"]["cached_features"] is False
    assert [method["name"] for method in found["methods"]] == ["hff-b", "hff-ub"]
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Encoder frozen, in the loop" in page
    assert "computed in every step" in page


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--taps", "7"], ["layer indices in [-4, 3]", "got 7"]),
        (["--taps", "1,1"], ["distinct"]),
        (["--taps", "1,top"], ["'top'", "embeddings"]),
        (["--methods", "lff,mean"], ["'mean'", "weighted-sum-norm"]),
    ],
)
def test_wrong_taps_and_methods(
    whisper: Path, sounds: Path, tmp_path: Path, arguments: list[str], parts: list[str]
) -> None:
    data = ["--model", whisper, "--data", sounds / "clips.csv", "--output", tmp_path / "report"]
    fails(run("compare", *data, *arguments, *QUICK), *parts)
    assert not list((tmp_path / "report").glob("*"))


def test_wrong_data(whisper: Path, sounds: Path, tmp_path: Path) -> None:
    def attempt(data: Path) -> Result:
        return run("compare", "--model", whisper, "--data", data, "--output", tmp_path / "report", *QUICK)

    fails(attempt(tmp_path / "nowhere"), "nowhere does not exist", "CSV manifest")
    (tmp_path / "empty").mkdir()
    fails(attempt(tmp_path / "empty"), "holds no audio")
    (tmp_path / "one").mkdir()
    shutil.copytree(sounds / "tones" / "high", tmp_path / "one" / "high")
    fails(attempt(tmp_path / "one"), "at least two")
    manifest = tmp_path / "list.csv"
    manifest.write_text("file,label\na.wav,x\n")
    fails(attempt(manifest), "lacks the column 'path'")
    shutil.copytree(sounds / "tones", tmp_path / "broken")
    (tmp_path / "broken" / "low" / "0.wav").write_bytes(b"no audio at all")
    fails(attempt(tmp_path / "broken"), "0.wav", "cannot be read as audio")


def test_wrong_models(whisper: Path, sounds: Path, tmp_path: Path) -> None:
    def attempt(model: Path) -> Result:
        data = ["--data", sounds / "clips.csv", "--output", tmp_path / "report"]
        return run("compare", "--model", model, *data, *QUICK)

    def damaged(name: str) -> Path:
        shutil.copytree(whisper, tmp_path / name)
        return tmp_path / name

    fails(attempt(tmp_path / "nowhere"), "nowhere does not exist", "hub name")
    (tmp_path / "empty").mkdir()
    fails(attempt(tmp_path / "empty"), "config.json")
    without_weights = damaged("without-weights")
    (without_weights / "model.safetensors").unlink()
    fails(attempt(without_weights), "without-weights", "with its weights")
    truncated = damaged("truncated")
    weights = (truncated / "model.safetensors").read_bytes()
    (truncated / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    fails(attempt(truncated), "no model can be loaded from", "truncated")
    without_extractor = damaged("without-extractor")
    (without_extractor / "preprocessor_config.json").unlink()
    fails(attempt(without_extractor), "preprocessor_config.json")


def test_models_without_a_complete_speech_encoder(wav2vec2: Path, sounds: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    data = ["--data", sounds / "clips.csv", "--output", tmp_path / "report"]
    partial = tmp_path / "partial"
    shutil.copytree(wav2vec2, partial)
    tensors = load_file(partial / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if "layers.2.attention.q_proj" not in name}
    assert len(kept) < len(tensors)
    save_file(kept, partial / "model.safetensors", metadata={"format": "pt"})
    fails(run("compare", "--model", partial, *data, *QUICK), "lacks 2 weights of the encoder", "q_proj")

    text = tmp_path / "text"
    TINY["bert"].build().save_pretrained(text)
    fails(run("compare", "--model", text, *data, *QUICK), "is a text model")


def test_the_output_folder_is_respected(whisper: Path, sounds: Path, tmp_path: Path) -> None:
    data = ["--model", whisper, "--data", sounds / "clips.csv", "--methods", "last"]
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    (foreign / "report.html").write_text("mine")
    fails(run("compare", *data, "--output", foreign, *QUICK), "report.html, thesis.tex", "--force")
    assert (foreign / "report.html").read_text() == "mine"
    assert run("compare", *data, "--output", foreign, "--force", *QUICK).exit_code == 0
    assert (foreign / "thesis.tex").read_text() == "years of work"
    # From now on it is a report's folder.
    again = run("compare", *data, "--output", foreign, *QUICK)
    assert again.exit_code == 0, again.output

    (tmp_path / "file").write_text("")
    fails(run("compare", *data, "--output", tmp_path / "file" / "report", *QUICK), "--output")


@pytest.mark.parametrize(
    "arguments",
    [[], ["--demo", "--synthetic"], ["--model", "x"], ["--data", "x"], ["--synthetic", "--epochs", "0"]],
)
def test_options_that_do_not_go_together(arguments: list[str]) -> None:
    result = run("compare", *arguments)
    assert result.exit_code == 2
    assert "Usage" in result.stderr


def test_the_defaults_are_those_of_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[compare.CompareSettings] = []

    def stop(_: object, settings: compare.CompareSettings) -> None:
        given.append(settings)
        raise SystemExit(0)

    monkeypatch.setattr(cli, "_load_task", lambda *_, **__: None)
    monkeypatch.setattr(cli, "_run", stop)
    assert run("compare", "--synthetic", "--output", tmp_path).exit_code == 0
    assert given == [compare.CompareSettings()]


def test_a_wrong_kernel_is_reported_and_gets_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_difference", lambda ours, theirs: 0.5)
    result = run("compare", "--synthetic", "--methods", "lff", "--output", tmp_path, *QUICK)
    assert result.exit_code == 1
    assert "differ by 5.0e-01 in LFF" in result.stderr
    assert "results differ" in result.stdout
    assert "milliseconds per step" not in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_only_the_main_process_prints_and_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "is_main_process", lambda: False)
    result = run("compare", "--synthetic", "--methods", "last", "--output", tmp_path, *QUICK)
    assert result.exit_code == 0
    assert result.stdout == ""
    assert not list(tmp_path.iterdir())


def test_info_and_bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "layer_mix on cpu" in run("info").stdout
    monkeypatch.setattr(mmkernels, "__file__", str(tmp_path / "mmkernels" / "__init__.py"))
    fails(run("bench", "--quick"), "source checkout")


def test_help_and_import_are_light() -> None:
    """Neither the package nor the help loads torch."""
    code = (
        "import sys, mmtransfer, mmtransfer.cli\n"
        "from typer.testing import CliRunner\n"
        "assert 'compare' in CliRunner().invoke(mmtransfer.cli.app, ['--help']).output\n"
        "print([name for name in ('torch', 'transformers', 'matplotlib', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_module_runs_as_a_program(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    command = [
        sys.executable,
        "-m",
        "mmtransfer.cli",
        "compare",
        "--synthetic",
        "--output",
        tmp_path / "file",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("mmtransfer: ")
