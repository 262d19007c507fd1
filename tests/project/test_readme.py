"""README.md: its commands exist, its examples run, and its figures are those of the committed records."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from mmtransfer import AdaptedModel, cli, registry
from mmtransfer.demo.experiments import synthetic_experiment
from mmtransfer.tasks import Classification

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands(program: str) -> list[str]:
    """Lines of shell blocks, and inline code, that call the program; comments cut off."""
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    lines += [
        code.replace("\n", " ")
        for code in re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", README, flags=re.DOTALL))
    ]
    cut = [line.split("#")[0].strip().removeprefix(".venv/bin/") for line in lines]
    return sorted({line for line in cut if re.match(rf"{program}\b", line)})


def test_a_newcomer_finds_the_two_commands() -> None:
    assert "make demo\nmake test\n" in blocks("bash")


@pytest.mark.parametrize("command", commands("make"))
def test_make_targets_exist(command: str) -> None:
    result = subprocess.run(
        ["make", "--dry-run", *shlex.split(command)[1:]],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("command", commands("mmtransfer"))
def test_mmtransfer_options_exist(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(command)[1:]
    with pytest.raises(SystemExit) as stopped:
        cli.main([*words[:1], "--help"])
    assert stopped.value.code == 0
    listed = capsys.readouterr().out
    for word in words:
        if word.startswith("--") and word != "--help":
            assert word in listed, word


@pytest.mark.parametrize("command", [c for c in commands("python") if " -m " in c])
def test_python_modules_take_their_options(command: str) -> None:
    """What measures takes minutes and writes over the committed records: only what reads them is run."""
    words = shlex.split(command)[1:]
    reads = words[1] == "mmkernels" or "--report" in words
    result = subprocess.run(
        [sys.executable, *(words if reads else [*words[:2], "--help"])],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    if not reads:
        assert all(word in result.stdout for word in words if word.startswith("--"))


def test_examples_run(capsys: pytest.CaptureFixture[str]) -> None:
    """In one namespace, in their order; comments behind `print` are its output."""
    names: dict[str, Any] = {}
    for block in blocks("python"):
        exec(block, names)
        printed = capsys.readouterr().out
        for line in re.findall(r"^# (.*)$", block, re.MULTILINE):
            assert line in printed
    assert tuple(names["mixed"].shape) == (8, 400, 768)
    assert tuple(names["pairs"].shape) == (3000, 6, 1024)


def test_the_example_of_a_method_can_be_registered() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)
    # A module, which the dataclass looks up.
    module = types.ModuleType("example_of_contributing")
    sys.modules[module.__name__] = module
    exec(block, module.__dict__)
    try:
        encoder = synthetic_experiment().model
        model = AdaptedModel(encoder, "hff-b+scale", Classification(num_labels=3), start=0.5)
        output = model(input_features=torch.randn(2, 80, 100), labels=torch.tensor([0, 2]))
        output.loss.backward()
        for factor in model.encoder.edit.parameters:
            assert factor.item() == 0.5
            assert factor.grad is not None
    finally:
        registry.unregister("scale")


def test_figures_are_those_of_the_records() -> None:
    names = sorted(set(re.findall(r"benches/results/([\w-]+\.json)", README)))
    assert names
    paths = [str(ROOT / "benches/results" / name) for name in names]
    command = [sys.executable, "-m", "benches", "--report", *paths, "--markdown", "--quick"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for line in printed.splitlines():
        if line.startswith("|"):
            assert line in README


@pytest.mark.parametrize(
    ("name", "rows"),
    [("demo", None), ("demo-merging", {"full": "`full`, three seeds", "l-mam": "`l-mam`"})],
    ids=["demo", "merging"],
)
def test_rows_of_methods_are_those_of_the_records(name: str, rows: dict[str, str] | None) -> None:
    record = json.loads((ROOT / f"docs/{name}.json").read_text())
    methods = {method["name"]: method for method in record["methods"]}
    for method, start in (rows or {method: f"`{method}`" for method in methods}).items():
        result = methods[method]
        row = next(line for line in README.splitlines() if line.startswith(f"| {start} |"))
        assert f" {100 * result['score']:.1f}" in row
        if result["spread"]:
            assert f" ± {100 * result['spread']:.1f} |" in row
        assert f" {result['trainable_parameters']:,} " in row
        assert f" {result['seconds_per_epoch']:.1f} |" in row


@pytest.mark.parametrize("block", blocks("python"))
def test_examples_name_what_exists(block: str) -> None:
    import importlib

    compile(block, "README.md", "exec")
    for module, names in re.findall(r"^from ([\w.]+) import ([\w, ]+)$", block, re.MULTILINE):
        for name in names.split(","):
            assert hasattr(importlib.import_module(module), name.strip()), f"{module}.{name}"
