"""The compiled libraries and the torch library that their kernels are registered in.

Schemas and fake functions are defined in Python (``ops/<op>/schema.py``); the shared libraries only add
kernels. A package without compiled libraries can therefore be imported and traced, and runs with
``backend="reference"``.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import pathlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

NAMESPACE = "mmkernels"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")

_LIBRARY_FILES = {"cpu": "libmmkernels_cpu.so", "cuda": "libmmkernels_cuda.so"}
#: Why a device's compiled kernels are missing; a device that is not a key has them.
load_errors: dict[str, str] = {}
#: The compiled library of a device, where it is loaded.
paths: dict[str, pathlib.Path] = {}


def _library_folders() -> list[pathlib.Path]:
    """Folders that may hold the compiled files; an editable install has them in another folder than the
    Python sources."""
    folders = [pathlib.Path(__file__).parent]
    spec = importlib.util.find_spec(f"{__package__}._C")
    if spec is not None and spec.origin:
        folders.insert(0, pathlib.Path(spec.origin).parent)
    else:
        try:
            files = importlib.metadata.files(NAMESPACE) or []
        except importlib.metadata.PackageNotFoundError:
            files = []
        folders += [pathlib.Path(str(f.locate())).parent for f in files if f.name in _LIBRARY_FILES.values()]
    return folders


def load() -> None:
    """Load the compiled libraries that exist; record missing ones in :data:`load_errors`, print nothing."""
    folders = _library_folders()
    for device, file in _LIBRARY_FILES.items():
        path = next((folder / file for folder in folders if (folder / file).exists()), None)
        if path is None:
            built = "with nvcc on PATH" if device == "cuda" else "from source with a C++20 compiler"
            load_errors[device] = f"this install has no {file}; build mmkernels {built} to get it"
            continue
        try:
            torch.ops.load_library(str(path))
        except OSError as error:
            load_errors[device] = f"{path} does not load into torch {torch.__version__}: {error}"
        else:
            paths[device] = path


def compiled_module() -> ModuleType | None:
    """``mmkernels._C``, or None where it is missing or was built for another Python."""
    try:
        return importlib.import_module(f"{__package__}._C")
    except ImportError:
        return None


def first_use_in_capture(what: str) -> str:
    """The message where CUDA refuses to load a kernel because the stream is being captured."""
    return (
        f"{what}: a kernel is used for the first time inside a CUDA graph capture, where it cannot be "
        "loaded; run the step once before the capture"
    )


def define(name: str, arguments: str, returns: str, fake: Callable[..., Any], python: str) -> None:
    """Define ``mmkernels::<name>`` and its twin ``mmkernels::<name>_triton``.

    The compiled libraries register the kernels of the first. The second runs the function ``name`` of the
    module ``python`` on CUDA tensors, and on CPU tensors in Triton's interpreter. The module, and with it
    Triton, is imported at the first launch.
    """

    def triton_kernel(*args: Any) -> Any:
        function = getattr(importlib.import_module(python), name)
        try:
            return function(*args)
        except RuntimeError as error:
            if "stream is capturing" in str(error):
                raise RuntimeError(first_use_in_capture(name)) from error
            raise

    for op in (name, f"{name}_triton"):
        LIBRARY.define(f"{op}({arguments}) -> {returns}", tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"{NAMESPACE}::{op}", fake, lib=LIBRARY)
    for key in ("CUDA", "CPU"):
        LIBRARY.impl(f"{name}_triton", triton_kernel, key)
