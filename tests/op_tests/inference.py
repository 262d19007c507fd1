"""Tensors made under ``torch.inference_mode()``, as a frozen encoder hands them over."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from .base import OpTests
from .derivatives import gradients_of_a_penalty
from .running import of_leaves, value_and_gradients
from .spec import Call


def made_for_inference(call: Call, chosen: list[bool]) -> Call:
    """The call with leaves, those ``chosen`` copied under inference mode, the others requiring a gradient."""
    given = iter(chosen)

    def change(name: str, tensor: Tensor) -> Tensor:
        if name not in call.differentiable:
            return tensor
        if not next(given):
            return tensor.detach().requires_grad_()
        with torch.inference_mode():
            return tensor.clone()

    return call.mapped(change)


class InferenceTensors(OpTests):
    def _compare(self, call: Call, inference: Call, backend: str) -> None:
        """The same bits as with ordinary tensors, for all leaves that require a gradient."""
        ordinary = call.detached()
        for leaf, given in zip(ordinary.leaves(), inference.leaves(), strict=True):
            leaf.requires_grad_(given.requires_grad)
        grad = self.some_grad(call)
        out, gradients = value_and_gradients(self.spec.function, inference, grad, backend=backend)
        expected, others = value_and_gradients(self.spec.function, ordinary, grad, backend=backend)
        assert torch.equal(out, expected)
        for gradient, other in zip(gradients, others, strict=True):
            assert torch.equal(gradient, other)

    def _activations(self, call: Call) -> list[bool]:
        """One entry for each leaf, in the order of the arguments: whether it is an activation."""
        names = [name for name in call.arguments if name in call.differentiable]
        return [name in self.spec.activations for name in names for _ in call.tensors(name)]

    def test_activations(self, case: str, device: str, backend: str) -> None:
        call = self.build(self.spec.cases[case], torch.float32, device)
        inference = made_for_inference(call, self._activations(call))
        assert any(leaf.is_inference() for leaf in inference.leaves())
        for chosen in (backend, "reference"):
            self._compare(call, inference, chosen)

    def test_every_tensor_alone(self, case: str, device: str, backend: str) -> None:
        call = self.build(self.spec.cases[case], torch.float32, device)
        for index in range(len(call.leaves())):
            alone = made_for_inference(call, [i == index for i in range(len(call.leaves()))])
            for chosen in (backend, "reference"):
                self._compare(call, alone, chosen)

    def test_second_order(self, compiled_case: str) -> None:
        call = self.build(self.spec.cases[compiled_case], torch.float64, "cpu")
        inference = made_for_inference(call, self._activations(call))
        parameters = tuple(name for name in call.differentiable if name not in self.spec.activations)
        assert parameters
        of_parameters = Call(inference.arguments, parameters)
        at = of_parameters.leaves()
        found = gradients_of_a_penalty(of_leaves(self.spec.function, of_parameters), at, at)
        expected = gradients_of_a_penalty(
            of_leaves(self.spec.reference, Call(call.arguments, parameters)), at, at
        )
        torch.testing.assert_close(found, expected)

    def test_a_compiled_call_is_refused_by_torch(self, compiled_case: str, device: str, backend: str) -> None:
        """A compiled function saves its inputs by itself, and torch's message names both ways out."""
        call = self.build(self.spec.cases[compiled_case], torch.float32, device)
        inference = made_for_inference(call, self._activations(call))
        torch._dynamo.reset()
        compiled = torch.compile(self.spec.function, backend="aot_eager")
        with pytest.raises(RuntimeError, match=r"make a clone.*torch.no_grad\(\)"):
            compiled(**inference.arguments, backend=backend)
        with torch.no_grad():
            out = compiled(**inference.arguments, backend=backend)
        assert torch.equal(out, self.spec.function(**call.arguments, backend=backend))
