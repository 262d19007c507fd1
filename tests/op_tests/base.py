"""The base of all kinds of tests: parametrizes each test method by the names of its arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from .running import backends, devices, generator_for
from .spec import Call, OpSpec, Shape


class OpTests:
    """A test method gets every combination of values of those arguments below that it has.

    - ``case`` and ``zero_case``: the names of the op's cases; ``compiled_case``: the first two of them.
    - ``device`` and ``backend``, or ``device``, ``backend`` and ``dtype``: the kernels of this machine.
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
        for argument, values in cases.items():
            if argument in names:
                metafunc.parametrize(argument, values)
        if "backend" in names and self._asks_for_dtypes(metafunc):
            metafunc.parametrize(("device", "backend", "dtype"), served)
        elif "backend" in names:
            metafunc.parametrize(("device", "backend"), sorted({p.values[:2] for p in served}))

    def _asks_for_dtypes(self, metafunc: pytest.Metafunc) -> bool:
        """Whether the method has an argument ``dtype`` that no mark parametrizes."""
        own = {mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")}
        return "dtype" in metafunc.fixturenames and "dtype" not in own

    def build(self, shape: Shape, dtype: torch.dtype, device: str, seed: int = 0) -> Call:
        return self.spec.make(shape, dtype, torch.device(device), generator_for(seed))

    def some_grad(self, call: Call, seed: int = 5) -> Tensor:
        """An incoming gradient for the call's result."""
        out = self.spec.reference(**call.detached(requires_grad=False).arguments)
        return torch.randn(out.shape, generator=generator_for(seed)).to(out)
