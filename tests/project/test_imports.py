"""What importing mmkernels does not do, each shown in a fresh process."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest


def run(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return result.stdout


def test_import_is_quiet_and_light() -> None:
    out = run(
        """
        import sys, torch
        before = set(sys.modules)
        import mmkernels
        assert not torch.cuda.is_initialized()
        heavy = {"triton", "transformers", "pytest", "hypothesis", "mmtransfer", "matplotlib"}
        print(sorted(heavy & set(sys.modules) - before))
        """
    )
    assert out == "[]\n"


@pytest.mark.parametrize("module", ["mmkernels.nn", "mmkernels.patch", "mmkernels.activations"])
def test_submodules_are_light_too(module: str) -> None:
    out = run(
        f"import sys, torch; before = set(sys.modules); import {module}; "
        "print('transformers' in sys.modules, 'triton' in set(sys.modules) - before)"
    )
    assert out == "False False\n"


BLOCKED = """
import importlib.abc, sys

class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names}:
            raise ModuleNotFoundError(f"blocked: {{name}}", name=name)

sys.meta_path.insert(0, Block())
"""


def test_works_without_triton_and_transformers() -> None:
    out = run(
        BLOCKED.format(names={"triton", "transformers"})
        + textwrap.dedent(
            """
            import torch, mmkernels
            x = [torch.ones(2, 3)] * 2
            print(mmkernels.layer_mix(x, torch.tensor([0.25, 0.5])).sum().item())
            try:
                mmkernels.layer_mix(x, torch.ones(2), backend="triton")
            except ValueError as error:
                print(error)
            """
        )
    )
    assert out.splitlines() == ["4.5", "layer_mix: backend='triton' cannot be used: Triton is not installed"]


def test_works_without_compiled_libraries() -> None:
    """Then the reference serves, gradients and tracing included, and asking for the kernels gives the
    reason."""
    out = run(
        """
        import torch
        from torch.utils import _pytree  # loaded before the patch below
        def missing(path):
            raise OSError("undefined symbol: planted")
        torch.ops.load_library = missing
        import mmkernels
        w = torch.ones(2, requires_grad=True)
        layers = [torch.ones(2, 3)] * 2
        mmkernels.layer_mix(layers, w, norm=True).sum().backward()
        print(w.grad is not None, mmkernels.info()["ops"]["layer_mix"]["cpu"]["serves"])
        try:
            mmkernels.layer_mix(layers, w, backend="native")
        except ValueError as error:
            print("planted" in str(error))
        traced = torch.compile(mmkernels.layer_mix, backend="eager", fullgraph=True)
        print(traced(layers, w).sum().item())
        """
    )
    assert out.splitlines() == ["True reference", "True", "12.0"]


def test_info_prints_what_serves() -> None:
    out = run("import runpy; runpy.run_module('mmkernels', run_name='__main__')")
    assert "layer_mix on cpu: native" in out
    assert "torch" in out
