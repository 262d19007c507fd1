"""Values and gradients against the float64 reference, by the tolerance rule."""

from __future__ import annotations

import hypothesis
import pytest
import torch
from hypothesis import strategies
from torch import Tensor

from .base import OpTests
from .running import backends, of_leaves, value_and_gradients
from .spec import Call, Shape
from .tolerance import check_against_reference


class ValuesAndGradients(OpTests):
    def test_values_and_gradients(self, case: str, device: str, backend: str, dtype: torch.dtype) -> None:
        shape = self.spec.cases[case]
        check_against_reference(self.spec, lambda seed: self.build(shape, dtype, device, seed), backend)


class Gradcheck(OpTests):
    def test_gradcheck(self, case: str) -> None:
        call = self.build(self.spec.cases[case], torch.float64, "cpu").detached()
        assert torch.autograd.gradcheck(of_leaves(self.spec.function, call), call.leaves(), fast_mode=True)


class WideParameters(OpTests):
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
    def test_wide_parameters(self, case: str, device: str, backend: str, dtype: torch.dtype) -> None:
        """float32 parameters with half-precision activations, as autocast and master weights produce them."""

        def mix(seed: int) -> Call:
            call = self.build(self.spec.cases[case], torch.float32, device, seed)
            return call.mapped(lambda name, t: t.to(dtype) if name in self.spec.activations else t)

        check_against_reference(self.spec, mix, backend)
        call = mix(0).detached()
        grad = self.some_grad(call)
        _, gradients = value_and_gradients(self.spec.function, call, grad, backend=backend)
        assert [g.dtype for g in gradients] == [leaf.dtype for leaf in call.leaves()]
        if not self.spec.rounds_products:
            self._check_float32(call, grad, gradients)

    def _check_float32(self, call: Call, grad: Tensor, gradients: list[Tensor]) -> None:
        """The parameters' gradients have the accuracy of float32, for this incoming gradient."""
        wide = call.detached(torch.float64)
        _, exact = value_and_gradients(self.spec.reference, wide, grad.double())
        _, plain = value_and_gradients(self.spec.reference, call.detached(), grad)
        for found, r, e in zip(gradients, exact, plain, strict=True):
            if found.dtype == torch.float32:
                allowed = 4 * (e - r).abs().max() + 16 * torch.finfo(torch.float32).eps * r.abs().max()
                assert (found - r).abs().max() <= allowed


class Fuzz(OpTests):
    def test_fuzz(self, device: str, backend: str) -> None:
        """Drawn shapes, dtypes and seeds."""
        allowed = [dtype for dtype in self.dtypes if backend in backends(device, dtype)]

        @hypothesis.settings(max_examples=40, deadline=None, derandomize=True, database=None)
        @hypothesis.given(self.spec.shapes(), strategies.sampled_from(allowed), strategies.integers(0, 2**16))
        def run(shape: Shape, dtype: torch.dtype, seed: int) -> None:
            check_against_reference(self.spec, lambda s: self.build(shape, dtype, device, s), backend, seed)

        run()
