"""Values and gradients against the float64 reference, by the tolerance rule."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import hypothesis
import pytest
import torch
from hypothesis import strategies
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .base import OpTests
from .running import backends, of_leaves, poisoned_memory, value_and_gradients
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


class Casts(TorchDispatchMode):
    """Counts the casts that autograd and the public function ask for; not those inside an op."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._to_copy.default
        return func(*args, **(kwargs or {}))


class NarrowParameters(OpTests):
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
    def test_narrow_parameters(self, case: str, device: str, backend: str, dtype: torch.dtype) -> None:
        """Parameters in half precision, as in a model of that dtype: nothing is cast, and result and
        gradients are those of the same values in float32, rounded once."""
        call = self.build(self.spec.cases[case], dtype, device)
        grad = self.some_grad(call)
        with poisoned_memory(), Casts() as casts:
            out, gradients = value_and_gradients(self.spec.function, call.detached(), grad, backend=backend)
        assert (casts.count > 0) == self.spec.casts_parameters
        wide = self._with_wide(call, self._parameters(call))
        expected, sums = value_and_gradients(self.spec.function, wide.detached(), grad, backend=backend)
        assert torch.equal(out, expected)
        products = self.spec.rounded_by_library.get((device, backend), ())
        names = [name for name in call.differentiable for _ in call.tensors(name)]
        for name, found, total in zip(names, gradients, sums, strict=True):
            assert found.dtype == dtype
            if name in products:
                allowed = 2 * torch.finfo(dtype).eps * total.abs().max()
                assert (found - total).abs().max() <= allowed, name
            else:
                assert torch.equal(found, total.to(dtype)), name

    def test_mixed_parameters(self, case: str, device: str, backend: str) -> None:
        """Parameters of several dtypes act as the same values in float32; gradients have their dtypes."""
        call = self.build(self.spec.cases[case], torch.bfloat16, device)
        parameters = self._parameters(call)
        mixed = self._with_wide(call, parameters[::2])
        grad = self.some_grad(mixed)
        out, gradients = value_and_gradients(self.spec.function, mixed.detached(), grad, backend=backend)
        wide = self._with_wide(call, parameters)
        expected, sums = value_and_gradients(self.spec.function, wide.detached(), grad, backend=backend)
        assert torch.equal(out, expected)
        for found, leaf, total in zip(gradients, mixed.leaves(), sums, strict=True):
            assert found.dtype == leaf.dtype
            assert torch.equal(found, total.to(found.dtype))

    def _parameters(self, call: Call) -> list[str]:
        names = (name for name in call.differentiable if name not in self.spec.activations)
        return [name for name in names if call.tensors(name)]

    @staticmethod
    def _with_wide(call: Call, names: Collection[str]) -> Call:
        return call.mapped(lambda name, tensor: tensor.float() if name in names else tensor)


class Fuzz(OpTests):
    def test_fuzz(self, device: str, backend: str) -> None:
        """Drawn shapes, dtypes and seeds."""
        allowed = [dtype for dtype in self.dtypes if backend in backends(device, dtype)]

        @hypothesis.settings(max_examples=40, deadline=None, derandomize=True, database=None)
        @hypothesis.given(self.spec.shapes(), strategies.sampled_from(allowed), strategies.integers(0, 2**16))
        def run(shape: Shape, dtype: torch.dtype, seed: int) -> None:
            check_against_reference(self.spec, lambda s: self.build(shape, dtype, device, s), backend, seed)

        run()
