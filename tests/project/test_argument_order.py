"""One order of arguments behind a public function: that of the op's schema, in Python, Triton and C++."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch
from tree import ROOT

from mmkernels._info import op_names

#: A registered function, and the op that it belongs to.
KERNELS = [
    (op, f"{op}_{direction}")
    for op in op_names()
    for direction in ("fwd", "bwd")
    if hasattr(torch.ops.mmkernels, f"{op}_{direction}")
]


def schema_arguments(name: str) -> list[str]:
    return [each.name for each in getattr(torch.ops.mmkernels, name).default._schema.arguments]


def parameters_of(path: Path, function: str) -> list[str] | None:
    """Names of a Python function's parameters, or None if the file does not define it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and node.name == function:
            return [each.arg for each in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    return None


def glue_parameters(path: Path, name: str) -> list[str]:
    """Of the C++ function that a glue file registers under this name."""
    text = path.read_text()
    registered = re.search(rf'm\.impl\("{name}", TORCH_BOX\(&(\w+)\)\)', text)
    assert registered, f"{path.name} does not register {name}"
    definition = re.search(rf"\n[\w:<>, \n]*\b{registered[1]}\(([^)]*)\) \{{", text)
    assert definition, f"{path.name} does not define {registered[1]}"
    return [parameter.split()[-1].lstrip("&*") for parameter in definition[1].split(",")]


@pytest.mark.parametrize(("op", "name"), KERNELS)
def test_one_order(op: str, name: str) -> None:
    expected = schema_arguments(name)
    assert parameters_of(ROOT / f"mmkernels/ops/{op}/triton.py", name) == expected
    for device in ("cpu", "cuda"):
        found = glue_parameters(ROOT / f"csrc/torch/{op}_{device}.cpp", name)
        # Unnamed C++ parameters keep their type's name; `given_x` is x before it is checked.
        plain = [each.removeprefix("given_").removesuffix("_index") for each in found]
        assert plain == expected, (device, plain, expected)


@pytest.mark.parametrize("op", op_names())
def test_a_reference_takes_the_arguments_of_its_public_function(op: str) -> None:
    public = parameters_of(ROOT / f"mmkernels/ops/{op}/api.py", op)
    reference = parameters_of(ROOT / f"mmkernels/ops/{op}/reference.py", op)
    assert public is not None
    assert reference == [name for name in public if name in (reference or [])]
    assert set(public) - set(reference or []) <= {"backend", "out"}
