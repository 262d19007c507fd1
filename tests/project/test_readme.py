"""What README.md tells users to type exists and runs."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mmtransfer.cli import app

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


def test_two_commands_come_first() -> None:
    assert blocks("bash")[0].split("\n") == ["make demo", "make test", ""]


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
def test_mmtransfer_options_exist(command: str) -> None:
    words = shlex.split(command)[1:]
    listed = CliRunner().invoke(app, [*words[:1], "--help"], env={"COLUMNS": "200"})
    assert listed.exit_code == 0
    for word in words:
        if word.startswith("--"):
            assert word in listed.output, word


@pytest.mark.parametrize("command", [c for c in commands("python") if " -m " in c])
def test_python_modules_run(command: str) -> None:
    words = [sys.executable, *shlex.split(command)[1:]]
    assert subprocess.run(words, cwd=ROOT, capture_output=True, check=False).returncode == 0


def test_first_example_runs() -> None:
    names: dict[str, object] = {}
    exec(blocks("python")[0], names)
    assert tuple(names["mixed"].shape) == (8, 400, 768)  # type: ignore[attr-defined]
    assert tuple(names["pairs"].shape) == (3000, 6, 1024)  # type: ignore[attr-defined]


@pytest.mark.parametrize("block", blocks("python"))
def test_examples_name_what_exists(block: str) -> None:
    import importlib

    compile(block, "README.md", "exec")
    for module, names in re.findall(r"^from ([\w.]+) import ([\w, ]+)$", block, re.MULTILINE):
        for name in names.split(","):
            assert hasattr(importlib.import_module(module), name.strip()), f"{module}.{name}"
