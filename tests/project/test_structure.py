"""The rules of the tree: one op, one name, one fixed set of files; imports point one way only."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tree import ROOT, imports, starts

from mmkernels._info import op_names

FILES_OF_AN_OP = (
    "csrc/include/mmkernels/{op}.h",
    "csrc/cpu/{op}.cpp",
    "csrc/cuda/{op}.cu",
    "csrc/torch/{op}_cpu.cpp",
    "csrc/torch/{op}_cuda.cpp",
    "mmkernels/ops/{op}/__init__.py",
    "mmkernels/ops/{op}/api.py",
    "mmkernels/ops/{op}/schema.py",
    "mmkernels/ops/{op}/reference.py",
    "mmkernels/ops/{op}/triton.py",
    "mmkernels/nn/{op}.py",
    "tests/ops/test_{op}.py",
    "benches/ops/bench_{op}.py",
)

# Kernels that several ops share.
SHARED = ("norm_product",)


@pytest.mark.parametrize("op", op_names())
def test_an_op_has_its_files(op: str) -> None:
    missing = [name for pattern in FILES_OF_AN_OP if not (ROOT / (name := pattern.format(op=op))).exists()]
    assert not missing


@pytest.mark.parametrize(
    ("folder", "suffix"), [("csrc/cpu", ".cpp"), ("csrc/cuda", ".cu")], ids=["cpu", "cuda"]
)
def test_every_kernel_file_is_an_op(folder: str, suffix: str) -> None:
    """An op's kernels may be in several files, `<op>_<part>`, so that they compile side by side."""
    for path in (ROOT / folder).glob(f"*{suffix}"):
        assert owner(path) is not None, path.name


def owner(path: Path) -> str | None:
    """The op, or the code that several ops share, whose name the file has: `<name>` or `<name>_<part>`."""
    return next(
        (name for name in (*op_names(), *SHARED) if path.stem == name or path.stem.startswith(f"{name}_")),
        None,
    )


def test_no_op_includes_another() -> None:
    """Kernels and glue that two ops share have a name and files, as norm_product."""
    folders = ("csrc/cpu", "csrc/cuda", "csrc/include/mmkernels", "csrc/torch")
    files = [path for folder in folders for path in (ROOT / folder).iterdir() if path.is_file()]
    assert {owner(path) for path in files} > {*op_names(), *SHARED}
    wrong = [
        f"{path.relative_to(ROOT)}: {included}"
        for path in files
        for included in re.findall(r'^#include "([^"]+)"', path.read_text(), re.MULTILINE)
        if owner(path) and owner(Path(included)) not in (None, owner(path), *SHARED)
    ]
    assert not wrong


# Forbidden imports of a folder: the arrows of the design point from kernels to ops, to modules and patches,
# to methods.
FORBIDDEN = {
    "mmkernels/ops": ("mmkernels.nn", "mmkernels.compat", "mmkernels.patch", "transformers"),
    "mmkernels/nn": ("mmkernels.compat", "mmkernels.patch", "transformers"),
    "mmkernels/compat": ("mmkernels.nn", "mmkernels.patch", "transformers"),
    "mmkernels/patch": ("transformers",),
    "mmkernels": ("mmtransfer", "benches", "op_tests", "pytest", "hypothesis"),
    "python/mmtransfer": ("benches", "op_tests", "pytest", "hypothesis", "mmkernels.ops"),
}


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_imports_point_one_way(folder: str) -> None:
    wrong = {
        str(path.relative_to(ROOT)): sorted(found)
        for path in sorted((ROOT / folder).rglob("*.py"))
        if (found := starts(imports(path), *FORBIDDEN[folder]))
    }
    assert not wrong


def test_backends_of_an_op_do_not_import_each_other() -> None:
    for op in op_names():
        folder, module = ROOT / "mmkernels/ops" / op, f"mmkernels.ops.{op}"
        kernels = sorted(path.stem for path in folder.glob("triton*.py"))
        assert not starts(imports(folder / "reference.py"), *(f"{module}.{name}" for name in kernels))
        for name in kernels:
            assert not starts(imports(folder / f"{name}.py"), f"{module}.reference"), name


@pytest.mark.parametrize("op", op_names())
def test_no_op_imports_another(op: str) -> None:
    """Code that two ops share has a name and files above them, as ops/_norm_product.py."""
    others = [f"mmkernels.ops.{other}" for other in op_names() if other != op]
    for path in (ROOT / "mmkernels/ops" / op).glob("*.py"):
        found = imports(path)
        assert not starts(found, *others), path
        assert not {f"mmkernels.{other}" for other in op_names()} & found, path


def test_triton_is_imported_by_launchers_only() -> None:
    """An op's kernels may be in several files: `triton.py`, which launches them, and `triton_<part>.py`."""
    ops = ROOT / "mmkernels/ops"
    shared = [ops / name for name in ("_triton.py", "_norm_product.py", "_norm_product_kernels.py")]
    kernels = {*shared, *ops.glob("*/triton.py"), *ops.glob("*/triton_*.py")}
    for path in (ROOT / "mmkernels").rglob("*.py"):
        assert path in kernels or not starts(imports(path), "triton"), path


def test_kernels_know_nothing_of_torch() -> None:
    sources = [
        *(ROOT / "csrc/cpu").iterdir(),
        *(ROOT / "csrc/cuda").rglob("*.cu*"),
        *(ROOT / "csrc/include").rglob("*.h"),
    ]
    for path in sources:
        if path.is_file():
            assert "torch/" not in path.read_text(), path


def test_csrc_holds_only_what_ships() -> None:
    shipped = {"cpu", "cuda", "include", "module.cpp", "torch"}
    assert {path.name for path in (ROOT / "csrc").iterdir()} == shipped


def test_inline_ptx_and_launches_have_one_home() -> None:
    for path in (ROOT / "csrc/cuda").rglob("*.cu*"):
        text = path.read_text()
        assert path.name == "ptx.cuh" or "asm volatile" not in text, path
        assert path.name == "launch.cuh" or "<<<" not in text, path


def test_glue_includes_the_stable_interface_only() -> None:
    """torch headers outside torch/csrc/stable and torch/headeronly tie a binary to one torch."""
    allowed = ("torch/csrc/stable/", "torch/headeronly/", "torch/csrc/inductor/aoti_torch/c/", "torch/glue.h")
    own = {f"torch/{path.name}" for path in (ROOT / "csrc/torch").iterdir()}
    for path in (ROOT / "csrc/torch").iterdir():
        for line in path.read_text().splitlines():
            if line.startswith("#include") and ("torch/" in line or "ATen" in line or "c10/" in line):
                header = line.split("<" if "<" in line else '"')[1].rstrip('>"')
                assert header in own or header.startswith(allowed), f"{path.name}: {header}"
