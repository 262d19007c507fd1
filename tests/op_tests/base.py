"""The base of all kinds of tests: gives each test method the cases and kernels that its arguments ask for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from .running import backends, devices, generator_for
from .spec import Call, OpSpec, Shape


class OpTests:
    """Test methods of this class are run for every combination of those of these arguments that they take:

    - ``case``, ``zero_case``: names of the op's cases; ``compiled_case``: of the first two.
    - ``device`` and ``backend``, or these two and ``dtype``: the kernels that run on this machine.
    """

    spec: ClassVar[OpSpec]
    dtypes: ClassVar[Sequence[torch.dtype]]

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        served = [
            pytest.param(device, backend, dtype, id=f"{device}-{backend}-{str(dtype).removeprefix('torch.')}")
            for device in devices()
            for dtype in self.dtypes
            for backend in backends(device, dtype)
        ]
        cases = {
            "case": list(self.spec.cases),
            "zero_case": list(self.spec.zero_cases),
            "compiled_case": list(self.spec.cases)[:2],
        }
        names = metafunc.fixturenames
        for argument in cases.keys() & set(names):
            metafunc.parametrize(argument, cases[argument])
        if "backend" in names and self._asks_for_dtypes(metafunc):
            metafunc.parametrize(("device", "backend", "dtype"), served)
        elif "backend" in names:
            metafunc.parametrize(("device", "backend"), sorted({p.values[:2] for p in served}))

    def _asks_for_dtypes(self, metafunc: pytest.Metafunc) -> bool:
        """Whether the method takes a dtype that no mark of its own gives it."""
        own = {mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")}
        return "dtype" in metafunc.fixturenames and "dtype" not in own

    def build(self, shape: Shape, dtype: torch.dtype, device: str, seed: int = 0) -> Call:
        return self.spec.make(shape, dtype, torch.device(device), generator_for(seed))

    def some_grad(self, call: Call, seed: int = 5) -> Tensor:
        """An incoming gradient for the call's result."""
        out = self.spec.reference(**call.detached(requires_grad=False).arguments)
        return torch.randn(out.shape, generator=generator_for(seed)).to(out)
