"""`--import FILE`: Python files with methods and tasks of the user's, which register them."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path

from .messages import fail


def import_files(files: Iterable[Path]) -> None:
    """Run each file once, as `import` would; exits with one sentence if that fails."""
    for file in files:
        _import(file.expanduser())


def _import(file: Path) -> None:
    if not file.is_file():
        fail(f"--import {file} is no file; give a Python file that registers methods or tasks")
    # A name of its own: a file may be called as a module that exists.
    name = f"mmtransfer_import_{file.resolve().as_posix().removesuffix('.py').replace('/', '_')}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        fail(f"--import {file} is no Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up; the file may import its neighbours, as a script can.
    sys.modules[name] = module
    sys.path.insert(0, str(file.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        lines = [
            frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)
        ]
        line = f", line {lines[-1]}" if lines else ""
        fail(f"--import {file} failed{line} ({type(error).__name__}: {' '.join(str(error).split())})")
