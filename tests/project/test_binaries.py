"""The built libraries keep to the stable interface, so that one binary serves every torch from 2.11 on."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from mmkernels import _library


def libraries() -> list[Path]:
    folders = _library._library_folders()
    found = {
        file: folder / file
        for folder in folders
        for file in _library._LIBRARY_FILES.values()
        if (folder / file).exists()
    }
    return sorted(found.values())


def undefined_symbols(path: Path) -> list[str]:
    listing = subprocess.run(
        ["nm", "-D", "--undefined-only", "-C", str(path)], capture_output=True, text=True, check=True
    )
    return [
        line.split(maxsplit=1)[1].split(" ", 1)[-1] for line in listing.stdout.splitlines() if line.strip()
    ]


def test_libraries_are_built() -> None:
    names = [path.name for path in libraries()]
    assert "libmmkernels_cpu.so" in names
    if shutil.which("nvcc"):
        assert "libmmkernels_cuda.so" in names


@pytest.mark.parametrize("path", libraries(), ids=lambda path: path.name)
def test_no_unstable_torch_symbol(path: Path) -> None:
    unstable = [s for s in undefined_symbols(path) if re.search(r"\b(at|c10|torch)::", s)]
    assert not unstable
    # Nor any of Python's: the op libraries serve every Python.
    assert not [s for s in undefined_symbols(path) if s.startswith(("Py", "_Py"))]


@pytest.mark.parametrize("path", libraries(), ids=lambda path: path.name)
def test_audit_agrees(path: Path) -> None:
    importlib.metadata.version("torch-abi-audit")
    tool = Path(__import__("sys").executable).with_name("torch-abi-audit")
    report = subprocess.run([str(tool), str(path)], capture_output=True, text=True, check=False)
    text = report.stdout + report.stderr
    assert "UNSTABLE" not in text, text
    assert "STABLE" in text, text
