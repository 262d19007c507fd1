"""Strides of inputs and of incoming gradients, and sizes of zero."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from .base import OpTests
from .running import value_and_gradients
from .spec import Call
from .tolerance import check_against_reference

LAYOUTS = ("sliced", "permuted", "strided")


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values as a slice of a larger tensor, dense with permuted strides, or with a last stride of
    two."""
    if tensor.dim() == 0:
        return tensor
    if layout == "sliced":
        padded = tensor.new_zeros([size + 2 for size in tensor.shape])
        return padded[tuple(slice(1, size + 1) for size in tensor.shape)].copy_(tensor)
    if layout == "permuted":
        return tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor
    return tensor.new_zeros((*tensor.shape, 2))[..., 0].copy_(tensor)


class InputLayouts(OpTests):
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_input_layouts(self, case: str, device: str, backend: str, layout: str) -> None:
        def make(seed: int) -> Call:
            call = self.build(self.spec.cases[case], torch.float32, device, seed)
            return call.mapped(lambda _, tensor: laid_out(tensor, layout))

        check_against_reference(self.spec, make, backend)


class GradientLayouts(OpTests):
    @pytest.mark.parametrize("layout", ["sum", "expanded", *LAYOUTS])
    def test_gradient_layouts(self, case: str, device: str, backend: str, layout: str) -> None:
        call = self.build(self.spec.cases[case], torch.float32, device)
        grad = self.some_grad(call)
        if layout == "sum":
            grad = grad.new_ones(()).expand(grad.shape)
        elif layout == "expanded":
            grad = grad[:1].expand(grad.shape)
        else:
            grad = laid_out(grad, layout)
        _, found = value_and_gradients(self.spec.function, call.detached(), grad, backend=backend)
        _, dense = value_and_gradients(self.spec.function, call.detached(), grad.clone(), backend=backend)
        by_library = device == "cuda" and (device, backend) in self.spec.library_products
        for a, b in zip(found, dense, strict=True):
            if by_library:  # cuBLAS takes another kernel for another layout
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * b.abs().max().item())
            else:
                assert torch.equal(a, b)


class ZeroSizes(OpTests):
    def test_zero_sizes(self, zero_case: str, device: str, backend: str) -> None:
        call = self.build(self.spec.zero_cases[zero_case], torch.float32, device)
        grad = self.some_grad(call)
        out, gradients = value_and_gradients(self.spec.function, call.detached(), grad, backend=backend)
        exact, expected = value_and_gradients(self.spec.reference, call.detached(), grad)
        torch.testing.assert_close(out, exact)
        for g, e in zip(gradients, expected, strict=True):
            torch.testing.assert_close(g, e)
