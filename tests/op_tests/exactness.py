"""The same bits for the same numbers, and infinities where the reference has them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from .base import OpTests
from .running import value_and_gradients
from .spec import Call


class Repeatability(OpTests):
    def test_repeatable(self, case: str, device: str, backend: str, dtype: torch.dtype) -> None:
        """The same bits again, with any number of threads."""
        call = self.build(self.spec.cases[case], dtype, device)
        grad = self.some_grad(call)
        first = self._run(call, grad, backend)
        threads = torch.get_num_threads()
        by_library = (device, backend) in self.spec.library_products
        try:
            for count in (threads,) if by_library else (threads, 1, 2):
                torch.set_num_threads(count)
                for a, b in zip(first, self._run(call, grad, backend), strict=True):
                    assert torch.equal(a, b)
        finally:
            torch.set_num_threads(threads)

    def _run(self, call: Call, grad: Tensor, backend: str) -> list[Tensor]:
        out, gradients = value_and_gradients(self.spec.function, call.detached(), grad, backend=backend)
        return [out, *gradients]


class BatchInvariance(OpTests):
    def test_batch_invariance(self, case: str, device: str, backend: str) -> None:
        """An entry of a batch has the bits that it has alone."""
        if self.spec.alone is None:
            pytest.skip("the op has no batch dimension")
        if (device, backend) in self.spec.library_products:
            pytest.skip("the rounding of the BLAS's products depends on the number of rows")
        call = self.build(self.spec.cases[case], torch.float32, device)
        out = self.spec.function(**call.arguments, backend=backend)
        for index in range(3):
            single, part_of = self.spec.alone(call, index)
            assert torch.equal(part_of(out), self.spec.function(**single.arguments, backend=backend))


class NonFinite(OpTests):
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    def test_non_finite_values(self, case: str, device: str, backend: str, value: float) -> None:
        """They come out where the reference has them, and nowhere else."""
        call = self.build(self.spec.cases[case], torch.float32, device).detached(requires_grad=False)
        for name in self.spec.activations:
            for tensor in call.tensors(name)[:1]:
                tensor.view(-1)[tensor.numel() // 2] = value
        out = self.spec.function(**call.arguments, backend=backend)
        exact = self.spec.reference(**call.arguments)
        assert torch.equal(out.isfinite(), exact.isfinite())
        torch.testing.assert_close(out[exact.isfinite()], exact[exact.isfinite()], rtol=1e-4, atol=1e-5)
