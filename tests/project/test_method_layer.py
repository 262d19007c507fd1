"""The rules of python/mmtransfer: a paper is a folder, one line of the registry names it, imports point
down.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tree import ROOT, imports, starts

from mmtransfer import registry
from mmtransfer.registry import PAPERS

PACKAGE = ROOT / "python/mmtransfer"
FILES_OF_A_PAPER = (
    "python/mmtransfer/{paper}/__init__.py",
    "python/mmtransfer/{paper}/methods.py",
    "tests/methods/test_{paper}.py",
)
#: General code that must know no method.
GENERAL = ("compare", "training", "cli", "tasks", "encoders", "data")
#: Each imports from those before it alone, when it is imported.
FLOORS = (
    ("versions", "model_files"),
    ("data",),
    ("training.settings", "training.memory"),
    ("encoders",),
    ("tokens",),
    ("method",),
    PAPERS,
    ("registry",),
    ("tasks",),
    ("saving",),
    ("model", "preparation"),
    ("checkpoint",),
    ("training",),
    ("recognition",),
    ("align",),
    ("compare",),
    ("demo",),
    # A paper's command is a part of the command line.
    ("cli", "align.command", *(f"{paper}.command" for paper in PAPERS)),
)


def sources(*folders: str) -> list[Path]:
    roots = [PACKAGE / folder for folder in folders] if folders else [PACKAGE]
    return sorted(path for root in roots for path in root.rglob("*.py"))


def of_paper(path: Path) -> str | None:
    folder = path.relative_to(PACKAGE).parts[0]
    return folder if folder in PAPERS else None


@pytest.mark.parametrize("paper", PAPERS)
def test_a_paper_has_its_files(paper: str) -> None:
    assert not [name for each in FILES_OF_A_PAPER if not (ROOT / (name := each.format(paper=paper))).exists()]
    assert list((PACKAGE / paper / "recipes").glob("*.yaml"))
    if paper != "baselines":
        assert (ROOT / f"benches/methods/bench_{paper}.py").exists()


@pytest.mark.parametrize("paper", PAPERS)
def test_a_paper_imports_no_other(paper: str) -> None:
    others = [f"mmtransfer.{other}" for other in PAPERS if other != paper]
    wrong = {path.name: found for path in sources(paper) if (found := starts(imports(path), *others))}
    assert not wrong


def test_the_registry_alone_names_papers() -> None:
    papers = [f"mmtransfer.{paper}" for paper in PAPERS]
    for path in sources():
        if of_paper(path) is None:
            assert not starts(imports(path), *papers), path
    folders = {path.parent.name for path in PACKAGE.glob("*/methods.py")}
    assert folders == set(PAPERS)


def words_of_methods() -> Iterator[str]:
    """Patterns of methods' names and titles; ordinary English words count as whole strings alone."""
    for method in registry.methods().values():
        ordinary = method.name.isalpha() and method.name in ("head", "full", "partial", "prompt")
        if not ordinary:
            yield rf"\b{re.escape(method.name)}\b"
            yield re.escape(method.title)
        yield rf"^{re.escape(method.name)}$"


def strings(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def test_general_code_holds_no_method_name() -> None:
    pattern = re.compile("|".join(words_of_methods()), re.IGNORECASE)
    wrong = [
        f"{path.relative_to(PACKAGE)}:{line}: {pattern.search(text)[0]!r}"  # type: ignore[index]
        for path in sources("compare", "training", "cli")
        for line, text in strings(path)
        if pattern.search(text)
    ]
    assert not wrong
    page = (PACKAGE / "compare/page.html").read_text()
    assert not re.search(r"HFF|AAT|LFF|weighted sum", page, re.IGNORECASE)


def test_general_code_asks_no_method_for_its_class() -> None:
    classes = {method.__name__ for method in registry.methods().values()}
    for path in sources():
        if of_paper(path) is None:
            names = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
            assert not names & classes, path


def test_a_method_has_one_spelling() -> None:
    """No string of the package, and no text in the documentation, spells a name with underscores."""
    names = [name for name in registry.methods() if "-" in name]
    pattern = re.compile("|".join(rf"^{name.replace('-', '_')}$" for name in names))
    for folder in ("python", "benches"):
        for path in (ROOT / folder).rglob("*.py"):
            wrong = [f"{path}:{line}: {text}" for line, text in strings(path) if pattern.match(text)]
            assert not wrong
    underscored = re.compile("|".join(rf"\b{name.replace('-', '_')}\b" for name in names))
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "benches/README.md"):
        assert not underscored.search(path.read_text()), path


def test_the_tree_says_what_the_registry_says() -> None:
    assert len(registry.methods()) == sum(len(registry._folder(paper).METHODS) for paper in PAPERS)
    for paper in PAPERS:
        for name in registry._folder(paper).COMPARED:
            registry.find(name)
    for method in registry.methods().values():
        assert method.title
        assert method.paper
        assert re.fullmatch(r"[a-z]+(-[a-z]+)*", method.name)


def floor(module: str) -> int:
    inside = module.removeprefix("mmtransfer.")
    exact = {name: index for index, names in enumerate(FLOORS) for name in names}
    parts = inside.split(".")
    for length in range(len(parts), 0, -1):
        name = ".".join(parts[:length])
        if name in exact:
            return exact[name]
    raise AssertionError(f"{module} is on no floor")


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
    if name in ("__init__", "__main__"):
        return
    own = floor(name)
    inside = {module for module in imports(path, only_at_import=True) if module.startswith("mmtransfer.")}
    wrong = {module for module in inside if floor(module) > own}
    # The settings become flags before anything is loaded.
    wrong -= {m for m in wrong if name.startswith("cli") and m.startswith("mmtransfer.compare.settings")}
    assert not wrong


def test_settings_and_flags_import_no_torch() -> None:
    code = "import sys, mmtransfer.cli, mmtransfer.compare.settings, mmtransfer.training.settings\n"
    code += "print([name for name in ('torch', 'transformers', 'matplotlib') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
