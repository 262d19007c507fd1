"""The command line from end to end, and its messages when something is wrong."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from audio_files import write_clip
from command_line import QUICK, Result, fails, record, run
from finetune_data import FRAMES
from small_experiment import few_rounds, few_words
from tiny_encoders import TINY
from transformers import Wav2Vec2FeatureExtractor, WhisperFeatureExtractor

import mmkernels
from mmtransfer import AdaptedModel, registry
from mmtransfer.cli.options import describe_options
from mmtransfer.compare import session
from mmtransfer.compare import step as measure
from mmtransfer.compare.settings import CompareSettings
from mmtransfer.demo.experiments import synthetic_experiment


@pytest.fixture(autouse=True)
def _few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    few_rounds(monkeypatch)


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "whisper"
    TINY["whisper"].build().save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=6, chunk_length=1).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def wav2vec2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "wav2vec2"
    TINY["wav2vec2"].build(head=True, num_feat_extract_layers=3, **FRAMES).save_pretrained(folder)
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
    """A comparison of all default methods, on fewer and shorter words than the command has."""
    output = tmp_path_factory.mktemp("synthetic") / "report"
    arguments = ["--epochs", "2", "--seeds", "2", "--tuning-epochs", "1", "--cpu", "--workers", "1"]
    arguments += ["--save-models", "--output", output]
    with pytest.MonkeyPatch.context() as patch:
        few_rounds(patch)
        few_words(patch)
        return run("compare", "--synthetic", *arguments), output


def test_the_synthetic_comparison_prints_a_table(synthetic: tuple[Result, Path]) -> None:
    result, output = synthetic
    assert result.code == 0, result.stderr
    for title in (registry.find(name).title for name in registry.default_names()):
        row = rf"^\s*{re.escape(title)}\s+\d+\.\d( ± \d+\.\d\s+2 × 2|\s+1 × 1)\s+[\d,]+\s+\d+\.\d\d\s*$"
        assert re.search(row, result.stdout, re.M)
    assert "[synthetic]" in result.stdout
    assert "features of 32 clips in memory" in " ".join(result.stdout.split())
    assert max(map(len, result.stdout.splitlines())) <= 80 or str(output) in result.stdout.splitlines()[-1]
    assert result.stdout.splitlines()[-1] == f"Report: {output / 'report.html'}"


def test_the_json_holds_every_run(synthetic: tuple[Result, Path]) -> None:
    found = record(synthetic[1])
    assert (found["format"], found["version"]) == ("mmtransfer-compare", 3)
    assert found["task"]["synthetic"] is True
    assert found["task"]["metric"] == {"name": "accuracy", "title": "Accuracy", "higher_is_better": True}
    assert found["settings"]["cached_features"] is True
    assert [method["name"] for method in found["methods"]] == list(registry.default_names())
    for method in found["methods"]:
        scores = [run["score"] for run in method["runs"]]
        assert [run["scores"] for run in method["runs"]] == [{"accuracy": score} for score in scores]
        assert method["score"] == pytest.approx(sum(scores) / len(scores))
        if method["through_encoder"]:
            assert ([run["seed"] for run in method["runs"]], method["spread"]) == ([0], None)
        else:
            assert [run["seed"] for run in method["runs"]] == [0, 1]
            assert method["spread"] == pytest.approx(abs(scores[0] - scores[1]) / 2**0.5)
        fusion = method["name"].partition("+")[0] in (
            "weighted-sum",
            "weighted-sum-norm",
            "lff",
            "hff-b",
            "hff-ub",
        )
        every = ["embeddings", "layer 0", "layer 1", "layer 2", "layer 3"]
        assert method["taps"] == (every if fusion else ["layer 3"])
        assert method["step"]["mmkernels"]["milliseconds"] > 0
        assert (method["step"]["eager"] is None) == (method["name"] in ("head", "full"))
        assert method["step"]["agrees"] is True


def test_the_page_is_self_contained_and_says_synthetic(synthetic: tuple[Result, Path]) -> None:
    page = (synthetic[1] / "report.html").read_text(encoding="utf-8")
    assert "Synthetic data and a random encoder" in page
    text = re.sub(r"<svg.*?</svg>", "", page, flags=re.S)
    assert "{{" not in text
    assert "{%" not in text
    assert not re.search(r"<script|<link|<img|@import|url\((?!#)|(src|href)=\"(?!#)", page)
    figures = re.findall(r"<svg .*?</svg>", page, re.S)
    insights = {
        name for m in record(synthetic[1])["methods"] for each in m["runs"] for name in each["insights"]
    }
    assert len(figures) == 2 + len(insights) + 2
    identifiers: list[str] = []
    for figure in figures:
        tree = ElementTree.fromstring(figure)
        identifiers += [node.attrib["id"] for node in tree.iter() if "id" in node.attrib]
        own = {node.attrib["id"] for node in tree.iter() if "id" in node.attrib}
        assert set(re.findall(r"(?:url\(|href=\")#([^\")]+)", figure)) <= own
    assert len(identifiers) == len(set(identifiers))
    labels = " ".join(figures)
    for label in ("Weighted sum", "HFF-b", "embeddings", "layer 3", "ccuracy", "illiseconds"):
        assert label in labels
    assert "cached features" in page
    assert f"torch {torch.__version__}" in page


def test_saved_runs_can_be_loaded(synthetic: tuple[Result, Path]) -> None:
    folder = synthetic[1] / "models"
    methods = record(synthetic[1])["methods"]
    assert {path.name for path in folder.iterdir()} == {
        f"{method['name']}-seed{each['seed']}" for method in methods for each in method["runs"]
    }
    for name in ("hff-b-seed1", "aat-ms-seed0"):
        model = AdaptedModel.from_pretrained(folder / name, synthetic_experiment().model)
        assert model.method.name == name.rpartition("-")[0]
        assert model.task is not None
        classes = synthetic_experiment().recordings.classes
        assert model.task.options() == {"num_labels": 8, "labels": classes}
        config = json.loads((folder / name / "config.json").read_text())
        assert (config["labels"], config["sampling_rate"]) == (list(classes), 16_000)


def test_a_folder_of_class_folders_with_wav2vec2(wav2vec2: Path, sounds: Path, tmp_path: Path) -> None:
    output = tmp_path / "deep" / "report"
    methods = ["--methods", "head", "weighted-sum", "hff-b+hff-adapters", "aat-ms"]
    data = ["--model", wav2vec2, "--data", sounds / "tones"]
    result = run("compare", *data, *methods, "--output", output, *QUICK)
    assert result.code == 0, result.stderr
    found = record(output)
    assert found["task"] | {"classes": 2, "model": "wav2vec2", "model_type": "wav2vec2"} == found["task"]
    assert found["task"]["synthetic"] is False
    assert [method["name"] for method in found["methods"]] == methods[1:]
    assert "Synthetic" not in (output / "report.html").read_text(encoding="utf-8")


def test_a_manifest_with_whisper_chosen_taps_and_methods(whisper: Path, sounds: Path, tmp_path: Path) -> None:
    arguments = ["--methods", "hff-b", "hff-ub", "--no-cache"]
    arguments += ["--set", "taps=[embeddings, 1, -1]", "out_dim=6", "--set", "hff-ub.activation=gelu"]
    data = ["--model", whisper, "--data", sounds / "clips.csv", "--output", tmp_path]
    result = run("compare", *data, *arguments, *QUICK)
    assert result.code == 0, result.stderr
    found = record(tmp_path)
    assert found["task"] | {"train_clips": 6, "test_clips": 2} == found["task"]
    assert found["settings"]["cached_features"] is False
    assert [method["name"] for method in found["methods"]] == ["hff-b", "hff-ub"]
    for method, activation in zip(found["methods"], ("relu", "gelu"), strict=True):
        options = method["options"][method["name"]]
        assert (options["taps"], options["out_dim"]) == (["embeddings", 1, -1], 6)
        assert options["activation"] == activation
        assert method["taps"] == ["embeddings", "layer 1", "layer 3"]
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Encoder frozen, in the loop" in page
    assert "computed in every step" in page


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--set", "taps=[7]"], ["layer indices in [-4, 3]", "got 7"]),
        (["--set", "taps=[1, 1]"], ["distinct"]),
        (["--set", "taps=[1, top]"], ["'top'", "embeddings"]),
        (["--set", "taps=7"], ["taps must be", "got 7"]),
        (["--set", "width=7"], ["none of the methods", "'width'"]),
        (["--set", "hff-b.width=7"], ["hff-b has no option 'width'"]),
        (["--set", "hff-c.out_dim=7"], ["none of the methods", "'hff-c'"]),
        (["--set", "out_dim=0"], ["out_dim must be at least 1, got 0"]),
        (["--set", "mixing_rate=fast"], ["mixing_rate must be float, got 'fast'"]),
        (["--methods", "lff", "mean"], ["'mean'", "weighted-sum-norm"]),
        (["--methods", "lff,hff-b"], ["'lff,hff-b'"]),
        (["--methods", "aat-ms+lff"], ["must be one method, or a readout + an edit"]),
        (["--task", "translation"], ["task must be one of classification, ctc"]),
    ],
)
def test_wrong_taps_methods_and_options(
    whisper: Path, sounds: Path, tmp_path: Path, arguments: list[str], parts: list[str]
) -> None:
    data = ["--model", whisper, "--data", sounds / "clips.csv", "--output", tmp_path / "report"]
    fails(run("compare", *data, *QUICK, *arguments), *parts)
    assert not list((tmp_path / "report").glob("*"))


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        (["bottleneck"], ["field=value", "'bottleneck'"]),
        (["=3"], ["field=value", "'=3'"]),
        (["taps=[1"], ["'taps=[1'", "YAML"]),
        (["hff-b=3", "hff-b.out_dim=3"], ["'hff-b.out_dim=3'"]),
    ],
)
def test_options_of_methods_that_cannot_be_read(tmp_path: Path, given: list[str], parts: list[str]) -> None:
    fails(run("compare", "--synthetic", "--output", tmp_path, "--set", *given), *parts, code=2)


def test_wrong_data(whisper: Path, sounds: Path, tmp_path: Path) -> None:
    def attempt(data: Path) -> Result:
        return run("compare", "--model", whisper, "--data", data, "--output", tmp_path / "report", *QUICK)

    fails(attempt(tmp_path / "nowhere"), "nowhere does not exist", "a manifest (.csv")
    (tmp_path / "empty").mkdir()
    fails(attempt(tmp_path / "empty"), "holds no audio")
    (tmp_path / "one").mkdir()
    shutil.copytree(sounds / "tones" / "high", tmp_path / "one" / "high")
    fails(attempt(tmp_path / "one"), "at least two")
    manifest = tmp_path / "list.csv"
    manifest.write_text("file,label\na.wav,x\n")
    fails(attempt(manifest), "lacks the column 'path'")
    shutil.copytree(sounds / "tones", tmp_path / "broken")
    for clip in (tmp_path / "broken").glob("*/*.wav"):
        clip.write_bytes(b"no audio at all")
    fails(attempt(tmp_path / "broken"), "cannot be used", "0.wav", "cannot be read as audio")


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
    fails(attempt(truncated), "truncated", "is cut off after")
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


def test_ignored_files_are_said(wav2vec2: Path, sounds: Path, tmp_path: Path) -> None:
    shutil.copytree(sounds / "tones", tmp_path / "tones")
    (tmp_path / "tones" / "low" / "0.m4a").write_bytes(b"of another type")
    data = ["--model", wav2vec2, "--data", tmp_path / "tones", "--output", tmp_path / "report"]
    result = run("compare", *data, "--methods", "head", *QUICK)
    assert result.code == 0, result.stderr
    assert "chance 50.0%; ignored: 1 .m4a file\n" in result.stderr


def test_the_output_folder_is_respected(whisper: Path, sounds: Path, tmp_path: Path) -> None:
    data = ["--model", whisper, "--data", sounds / "clips.csv", "--methods", "head"]
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    (foreign / "report.html").write_text("mine")
    fails(run("compare", *data, "--output", foreign, *QUICK), "report.html, thesis.tex", "--force")
    assert (foreign / "report.html").read_text() == "mine"
    assert run("compare", *data, "--output", foreign, "--force", *QUICK).code == 0
    assert (foreign / "thesis.tex").read_text() == "years of work"
    # From now on it is a report's folder.
    again = run("compare", *data, "--output", foreign, *QUICK)
    assert again.code == 0, again.stderr

    (tmp_path / "file").write_text("")
    fails(run("compare", *data, "--output", tmp_path / "file" / "report", *QUICK), "--output")


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([], "one of --demo, --demo-prompts, --synthetic, or --model"),
        (["--demo", "--synthetic"], "one of --demo, --demo-prompts, --synthetic, or --model"),
        (["--model", "x"], "--model and --data go together"),
        (["--data", "x"], "--model and --data go together"),
        (
            ["--synthetic", "--model", "x", "--data", "y"],
            "one of --demo, --demo-prompts, --synthetic, or --model",
        ),
        (["--synthetic", "--epochs", "0"], "epochs must be at least 1, got 0"),
        (["--synthetic", "--tuning-epochs", "0"], "tuning_epochs must be at least 1, got 0"),
        (["--synthetic", "--seeds", "many"], "--seeds"),
        (["--synthetic", "--test-fraction", "1"], "--test-fraction must be between 0 and 1"),
        (["--synthetic", "--max-seconds", "31"], "--max-seconds must be above 0 and at most 30"),
        (["--synthetic", "--width", "3"], "--width"),
    ],
)
def test_options_that_do_not_go_together(arguments: list[str], part: str, tmp_path: Path) -> None:
    result = run("compare", "--output", tmp_path / "report", *arguments)
    assert result.code == 2
    assert part in " ".join(re.sub("[│╭╮╰╯─|+]", " ", result.stderr).split())
    assert result.stdout == ""
    assert not (tmp_path / "report").exists()


def test_the_defaults_are_those_of_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[CompareSettings] = []
    # The package has a function of the module's name.
    command = importlib.import_module("mmtransfer.cli.compare")

    def stop(_: object, settings: CompareSettings) -> None:
        given.append(settings)
        raise SystemExit(0)

    monkeypatch.setattr(command, "_load", lambda *_, **__: None)
    monkeypatch.setattr(command, "_run", stop)
    assert run("compare", "--synthetic", "--output", tmp_path).code == 0
    assert given == [CompareSettings()]


def test_a_wrong_kernel_is_reported_and_gets_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_difference", lambda ours, theirs: 0.5)
    result = run("compare", "--synthetic", "--methods", "lff", "--output", tmp_path, *QUICK)
    assert result.code == 1
    assert "differ by 5.0e-01 in LFF" in result.stderr
    assert "results differ" in result.stdout
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "results differ" in page
    assert "One training step of readout and head on features in memory" not in page


def test_only_the_main_process_prints_and_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "is_main_process", lambda: False)
    arguments = ["--methods", "head", "--output", tmp_path, "--save-models", *QUICK]
    result = run("compare", "--synthetic", *arguments)
    assert result.code == 0
    assert result.stdout == ""
    assert not list(tmp_path.iterdir())


def test_info_and_bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "layer_mix on cpu" in run("info").stdout
    monkeypatch.setattr(mmkernels, "__file__", str(tmp_path / "mmkernels" / "__init__.py"))
    fails(run("bench", "--quick"), "source checkout")


def test_the_methods_are_listed_with_their_options() -> None:
    result = run("methods")
    assert result.code == 0
    assert max(map(len, result.stdout.splitlines())) <= 100
    # Entries begin in the first column; their lines are wrapped.
    entries = {entry.split()[0]: " ".join(entry.split()) for entry in re.split(r"\n(?=\S)", result.stdout)}
    for name, method in registry.methods().items():
        assert method().paper in entries[name]
        for option in describe_options(method()):
            assert option.meaning, (name, option.name)
            assert f"{option.name}={option.default} ({option.allowed}); {option.meaning}" in entries[name]
    assert (
        "bottleneck=null (an integer or null, at least 1); hidden width of the adapters; None for a quarter"
        in entries["aat-ms"]
    )
    assert "activation=gelu (one of none, relu, gelu, gelu_tanh, silu)" in entries["aat-ms"]
    assert "taps=null ([an integer or embeddings, ...] or null)" in entries["lff"]
    assert "norm=true (true or false)" in entries["hff-b"]
    assert "A readout + an edit is a method too" in result.stdout


def test_help_and_import_are_light() -> None:
    """Neither the package nor the help loads torch."""
    code = (
        "import sys, mmtransfer, mmtransfer.cli\n"
        "for arguments in (['--help'], ['compare', '--help'], ['merge', '--help'], []):\n"
        "    try:\n"
        "        mmtransfer.cli.main(arguments)\n"
        "    except SystemExit as left:\n"
        "        assert not left.code\n"
        "print([name for name in ('torch', 'transformers', 'matplotlib', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "compare" in done.stdout
    assert "--tuning-epochs" in done.stdout
    assert done.stdout.strip().splitlines()[-1] == "[]"


def test_the_module_runs_as_a_program(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    command = [sys.executable, "-m", "mmtransfer.cli", "compare", "--synthetic", "--output"]
    done = subprocess.run([*command, tmp_path / "file"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("mmtransfer: ")


def test_a_reader_that_ends_early_is_no_fault() -> None:
    command = f"set -o pipefail; {sys.executable} -m mmtransfer.cli methods | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("head")
    assert done.stderr == ""
