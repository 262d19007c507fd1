"""No work for a gradient that nobody asks for."""

from __future__ import annotations

import torch

from .base import OpTests
from .running import value_and_gradients


class OnlyRequestedGradients(OpTests):
    def test_only_requested_gradients(self, case: str, device: str, backend: str) -> None:
        """The gradient of one input alone equals that computed together with all others."""
        call = self.build(self.spec.cases[case], torch.float32, device)
        grad = self.some_grad(call)
        _, together = value_and_gradients(self.spec.function, call.detached(), grad, backend=backend)
        for index in range(len(call.leaves())):
            single = call.detached()
            for position, leaf in enumerate(single.leaves()):
                leaf.requires_grad_(position == index)
            _, (found,) = value_and_gradients(self.spec.function, single, grad, backend=backend)
            torch.testing.assert_close(found, together[index])


class Frozen(OpTests):
    def test_no_gradient_recorded_when_frozen(self, case: str, device: str, backend: str) -> None:
        call = self.build(self.spec.cases[case], torch.float32, device)
        frozen = self.spec.function(**call.detached(requires_grad=False).arguments, backend=backend)
        assert not frozen.requires_grad
        with torch.no_grad():
            out = self.spec.function(**call.detached().arguments, backend=backend)
        assert out.grad_fn is None
        assert torch.equal(out, frozen)
