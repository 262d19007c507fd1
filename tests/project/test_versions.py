"""The releases that pyproject.toml asks for: one list, checked, and tried by `make floors`."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys

import pytest
from tree import ROOT

from mmtransfer import versions

FLOORS = ROOT / "tests/floors"
DECLARED = re.compile(r'^\s*"([A-Za-z0-9_-]+)>=([\d.]+)",?$', re.MULTILINE)


def declared() -> dict[str, str]:
    """What pyproject.toml asks for in its extras, and torch."""
    text = (ROOT / "pyproject.toml").read_text()
    torch = re.search(r'^dependencies = \["torch>=([\d.]+)"\]$', text, re.MULTILINE)
    assert torch is not None
    return {**dict(DECLARED.findall(text)), "torch": torch[1]}


def pinned(file: str) -> dict[str, str]:
    lines = (FLOORS / file).read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_the_check_knows_what_is_declared() -> None:
    asked = declared()
    assert {name: asked[name] for name in versions.FLOORS} == versions.FLOORS


def test_the_floors_that_are_tried_are_those_declared() -> None:
    tried, asked = pinned("floors.txt"), declared()
    development = {"clang-format", "cmake", "mypy", "ruff", "torch-abi-audit"}
    development |= {"pytest", "pytest-benchmark", "pytest-xdist"}
    assert tried.keys() == asked.keys() - development
    # The one torch that the test machines can install is not the floor.
    assert {name for name in tried if versions._numbers(tried[name]) != versions._numbers(asked[name])} == {
        "torch"
    }


@pytest.mark.parametrize("name", ["floors", "peers"])
def test_the_last_run_was_with_these_versions(name: str) -> None:
    record = json.loads((FLOORS / "last_run.json").read_text())[name]
    assert record["versions"] == pinned(f"{name}.txt")
    assert record["passed"] > 0
    assert record["failed"] == []


@pytest.mark.parametrize(
    ("installed", "floor", "old"),
    [
        ("4.57.6", "5.9", True),
        ("5.9.0", "5.9", False),
        ("5.9", "5.9.0", False),
        ("5.10.1", "5.9", False),
        ("2.13.0+cpu", "2.11", False),
        ("2.11.0a0+git", "2.11", False),
        ("5.9.0.dev0", "5.9", False),
        ("5.8.9rc1", "5.9", True),
    ],
)
def test_versions_are_compared_as_numbers(installed: str, floor: str, old: bool) -> None:
    assert (versions._numbers(installed) < versions._numbers(floor)) == old


def fake(monkeypatch: pytest.MonkeyPatch, **replaced: str) -> None:
    version = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: replaced.get(name) or version(name))


def test_the_sentence_has_both_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    assert versions.find_problem() is None
    fake(monkeypatch, transformers="4.57.6", peft="0.17.0")
    with pytest.raises(ImportError) as caught:
        versions.check()
    assert str(caught.value) == (
        "mmtransfer needs transformers 5.9 or later (installed: 4.57.6), peft 0.18 or later (installed: "
        "0.17.0); install with: pip install --upgrade 'transformers>=5.9' 'peft>=0.18'"
    )


def test_an_install_without_readable_metadata_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: None)
    assert versions.find_problem() is None


OLD = """
import importlib.metadata, sys
version = importlib.metadata.version
importlib.metadata.version = lambda name: "4.57.6" if name == "transformers" else version(name)
# As an earlier release: nothing of it may be needed before the sentence.
sys.modules["transformers"] = None
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", OLD + code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "code",
    [
        "import mmtransfer.hff",
        "import mmtransfer.encoders",
        "from mmtransfer import prepare",
        "from mmtransfer import compare",
        "from mmtransfer import TappedEncoder, hff",
    ],
)
def test_an_import_ends_with_the_sentence(code: str) -> None:
    done = run(code)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(
        "ImportError: mmtransfer needs transformers 5.9 or later (installed: 4.57.6); install with: "
    )


@pytest.mark.parametrize("arguments", [["compare", "--synthetic"], ["methods"]])
def test_the_command_line_says_the_sentence_alone(arguments: list[str]) -> None:
    done = run(f"from mmtransfer.cli import main\nmain({arguments})")
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("mmtransfer needs transformers 5.9 or later")
    assert len(done.stderr.splitlines()) == 1


def test_kernels_and_accelerate_do_not_mind() -> None:
    done = run("from mmtransfer.cli import main\nmain(['info'])")
    assert done.returncode == 0
    assert "layer_mix" in done.stdout
    done = run("import torch, mmkernels\nprint(mmkernels.accelerate(torch.nn.Linear(2, 2)).replaced)")
    assert (done.returncode, done.stdout) == (0, "[]\n")
