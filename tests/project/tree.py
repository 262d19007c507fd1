"""The modules that a source file imports."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def imports(path: Path, *, only_at_import: bool = False) -> set[str]:
    """Modules that a file imports, relative ones resolved.

    Also inside functions and for type checkers, unless `only_at_import` asks for those that importing the
    file imports.
    """
    source_root = ROOT / "python" if "python" in path.relative_to(ROOT).parts else ROOT
    package = path.relative_to(source_root).with_suffix("").parts[:-1]
    tree = ast.parse(path.read_text())
    found: set[str] = set()
    for node in _at_import(tree) if only_at_import else ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            found.add(module)
            found.update(f"{module}.{alias.name}" for alias in node.names)
    return found


def _at_import(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from _at_import(child)


def starts(modules: set[str], *names: str) -> set[str]:
    """Those of the modules that are one of the names or inside one."""
    return {
        module for module in modules if any(module == name or module.startswith(f"{name}.") for name in names)
    }
