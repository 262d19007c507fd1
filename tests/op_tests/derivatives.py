"""Derivatives beyond the first in reverse mode: forward mode, second order, ``torch.func``.

The kernels have none of them. ``backend="auto"`` takes the reference there by itself, and a kernel asked for
by name is refused. Every test compares with the same derivative of the reference, in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functionalize, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from .base import OpTests
from .running import generator_for, of_leaves
from .spec import Call

Function = Callable[..., Tensor]
#: A derivative: of a function of some tensors, at those tensors, along directions of the same shapes.
Derivative = Callable[[Function, list[Tensor], list[Tensor]], Any]


def squared(function: Function) -> Function:
    """A scalar whose second derivative depends on all of the function's."""
    return lambda *tensors: function(*tensors).square().sum()


def every(tensors: list[Tensor]) -> tuple[int, ...]:
    return tuple(range(len(tensors)))


def as_leaves(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def tangent_in_dual_level(function: Function, at: list[Tensor], along: list[Tensor]) -> Tensor:
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(a, d) for a, d in zip(at, along, strict=True)]
        tangent = forward_ad.unpack_dual(function(*duals)).tangent
        assert tangent is not None, "the tangent is lost"
        return tangent


def tangents_one_by_one(function: Function, at: list[Tensor], along: list[Tensor]) -> list[Tensor]:
    """The tangent for each input that has one, all others without."""

    def one(index: int) -> Tensor:
        swapped = [*at[:index], forward_ad.make_dual(at[index], along[index]), *at[index + 1 :]]
        tangent = forward_ad.unpack_dual(function(*swapped)).tangent
        assert tangent is not None, f"the tangent of input {index} is lost"
        return tangent

    with forward_ad.dual_level():
        return [one(index) for index in range(len(at))]


def tangent_of_the_incoming_gradient(function: Function, at: list[Tensor], along: list[Tensor]) -> Any:
    leaves = as_leaves(at)
    out = function(*leaves)
    with forward_ad.dual_level():
        gradients = torch.autograd.grad(out, leaves, forward_ad.make_dual(torch.ones_like(out), out.detach()))
        tangents = [forward_ad.unpack_dual(gradient).tangent for gradient in gradients]
    assert None not in [tangent if tangent is None else 0 for tangent in tangents], "a tangent is lost"
    return tangents


def gradients_of_a_penalty(function: Function, at: list[Tensor], along: list[Tensor]) -> Any:
    """Of a loss plus the squared norm of its gradients: where the graph of those is lost, so is the penalty,
    without an error."""
    leaves = as_leaves(at)
    loss = squared(function)(*leaves)
    gradients = torch.autograd.grad(loss, leaves, create_graph=True)
    (loss + sum(gradient.square().sum() for gradient in gradients)).backward()
    return [leaf.grad for leaf in leaves]


def penalty_of_one_input(function: Function, at: list[Tensor], along: list[Tensor]) -> Any:
    """The gradients of the penalty on one input's gradient, where only that input requires one."""

    def one(index: int) -> Tensor:
        tensors = [tensor.detach().clone().requires_grad_(i == index) for i, tensor in enumerate(at)]
        loss = squared(function)(*tensors)
        (gradient,) = torch.autograd.grad(loss, tensors[index], create_graph=True)
        (found,) = torch.autograd.grad(loss + gradient.square().sum(), tensors[index])
        return found

    return [one(index) for index in range(len(at))]


def inner_steps(function: Function, at: list[Tensor], along: list[Tensor]) -> Any:
    """The gradient through two steps of gradient descent, as in MAML."""
    leaves = as_leaves(at)
    tensors = leaves
    for _ in range(2):
        gradients = torch.autograd.grad(squared(function)(*tensors), tensors, create_graph=True)
        tensors = [t - 1e-3 * g for t, g in zip(tensors, gradients, strict=True)]
    return torch.autograd.grad(squared(function)(*tensors), leaves)


def inputs_that_depend_on_each_other(function: Function, at: list[Tensor], along: list[Tensor]) -> Any:
    """Second order, where all inputs are functions of one tensor."""
    (factor,) = as_leaves([torch.ones((), dtype=at[0].dtype)])
    tensors = [tensor * factor for tensor in at]
    loss = squared(function)(*tensors)
    first = torch.autograd.grad(loss, [factor, *tensors], create_graph=True)
    return [*first, *torch.autograd.grad(sum(g.square().sum() for g in first), factor)]


def second_order_through_a_checkpoint(function: Function, at: list[Tensor], along: list[Tensor]) -> Any:
    def recomputed(*tensors: Tensor) -> Tensor:
        return checkpoint(function, *tensors, use_reentrant=False)

    return gradients_of_a_penalty(recomputed, at, along)


def of_smallest(function: Function, at: list[Tensor]) -> tuple[Function, Tensor]:
    """The sum of the result's rows as a function of the smallest input alone: with a small Jacobian."""
    index = min(every(at), key=lambda i: at[i].numel())

    def sum_of_rows(tensor: Tensor) -> Tensor:
        out = function(*at[:index], tensor, *at[index + 1 :])
        return out.reshape(-1, out.shape[-1]).sum(0)

    return sum_of_rows, at[index]


def batched(at: list[Tensor], along: list[Tensor]) -> list[Tensor]:
    return [torch.stack([a, a + d, a - d]) for a, d in zip(at, along, strict=True)]


def vmap_over_one_input(function: Function, at: list[Tensor], along: list[Tensor]) -> Any:
    values = batched(at, along)
    return [
        vmap(function, in_dims=tuple(0 if i == index else None for i in every(at)))(
            *at[:index], values[index], *at[index + 1 :]
        )
        for index in every(at)
    ]


def gradient_beside_a_transform(function: Function, at: list[Tensor], along: list[Tensor]) -> Any:
    """The transform acts on another tensor; those of the op require gradients of their own."""
    leaves = as_leaves(at)
    found = grad(lambda factor: (factor * function(*leaves)).sum())(torch.ones((), dtype=at[0].dtype))
    return [found]


FORWARD: dict[str, Derivative] = {
    "jvp": lambda f, at, along: jvp(f, tuple(at), tuple(along)),
    "dual_level": tangent_in_dual_level,
    "one_by_one": tangents_one_by_one,
    "incoming_gradient": tangent_of_the_incoming_gradient,
    "jacfwd": lambda f, at, along: jacfwd(of_smallest(f, at)[0])(of_smallest(f, at)[1]),
    "without_autograd": lambda f, at, along: torch.no_grad()(tangent_in_dual_level)(f, at, along),
    "forward_over_reverse": lambda f, at, along: jvp(grad(squared(f), every(at)), tuple(at), tuple(along)),
    "forward_over_forward": lambda f, at, along: jvp(
        lambda *t: jvp(f, t, tuple(along))[1], tuple(at), tuple(along)
    ),
}
SECOND: dict[str, Derivative] = {
    "penalty": gradients_of_a_penalty,
    "penalty_of_one_input": penalty_of_one_input,
    "inner_steps": inner_steps,
    "dependent_inputs": inputs_that_depend_on_each_other,
    "checkpoint": second_order_through_a_checkpoint,
    "functional_jvp": lambda f, at, along: torch.autograd.functional.jvp(f, tuple(at), tuple(along)),
    "functional_vhp": lambda f, at, along: torch.autograd.functional.vhp(squared(f), tuple(at), tuple(along)),
    "functional_hessian": lambda f, at, along: torch.autograd.functional.hessian(
        squared(of_smallest(f, at)[0]), of_smallest(f, at)[1]
    ),
    "vectorized_hessian": lambda f, at, along: torch.autograd.functional.hessian(
        squared(of_smallest(f, at)[0]), of_smallest(f, at)[1], vectorize=True
    ),
    "vectorized_jacobian": lambda f, at, along: torch.autograd.functional.jacobian(
        of_smallest(f, at)[0], of_smallest(f, at)[1], vectorize=True
    ),
}
FUNCTIONS: dict[str, Derivative] = {
    "grad": lambda f, at, along: grad(squared(f), every(at))(*at),
    "vjp": lambda f, at, along: vjp(f, *at)[1](f(*at)),
    "jacrev": lambda f, at, along: jacrev(of_smallest(f, at)[0])(of_smallest(f, at)[1]),
    "hessian": lambda f, at, along: hessian(squared(of_smallest(f, at)[0]))(of_smallest(f, at)[1]),
    "vmap": lambda f, at, along: vmap(f)(*batched(at, along)),
    "vmap_over_one_input": vmap_over_one_input,
    "vmap_of_vmap": lambda f, at, along: vmap(vmap(f))(*[b[None] for b in batched(at, along)]),
    "gradients_of_samples": lambda f, at, along: vmap(grad(squared(f), every(at)))(*batched(at, along)),
    "grad_of_grad": lambda f, at, along: grad(
        lambda *t: sum(g.square().sum() for g in grad(squared(f), every(at))(*t)), every(at)
    )(*at),
    "beside": gradient_beside_a_transform,
    "functionalize": lambda f, at, along: functionalize(f)(*at),
    "make_fx": lambda f, at, along: make_fx(grad(squared(f), every(at)))(*at)(*at),
}
DERIVATIVES = {**FORWARD, **SECOND, **FUNCTIONS}


class Launched(TorchDispatchMode):
    """Counts the package's own torch ops that run."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.namespace.startswith("mmkernels")
        return func(*args, **(kwargs or {}))


class Derivatives(OpTests):
    def _point(self, case: str, device: str = "cpu") -> tuple[Call, list[Tensor], list[Tensor]]:
        dtype = torch.float64 if device == "cpu" else torch.float32  # GPUs take no float64
        call = self.build(self.spec.cases[case], dtype, device)
        at = call.leaves()
        generator = generator_for(11)
        return call, at, [torch.randn(t.shape, generator=generator).to(t) for t in at]

    @pytest.mark.parametrize("derivative", DERIVATIVES)
    def test_derivative(self, case: str, derivative: str) -> None:
        call, at, along = self._point(case)
        run = of_leaves(self.spec.function, call)
        try:
            expected = DERIVATIVES[derivative](of_leaves(self.spec.reference, call), at, along)
        except NotImplementedError:  # torch has no tangent of silu's gradient
            with pytest.raises(NotImplementedError, match="does not support it"):
                DERIVATIVES[derivative](run, at, along)
            return
        torch.testing.assert_close(DERIVATIVES[derivative](run, at, along), expected, rtol=1e-9, atol=1e-9)

    def test_gradcheck_of_every_mode(self, compiled_case: str) -> None:
        """Against finite differences: tangents, and several gradients or tangents at once."""
        call, at, _ = self._point(compiled_case)
        run, leaves = of_leaves(self.spec.function, call), as_leaves(at)
        assert torch.autograd.gradcheck(run, leaves, fast_mode=True, check_forward_ad=True)
        assert torch.autograd.gradcheck(
            *of_smallest(run, leaves),
            check_forward_ad=True,
            check_batched_grad=True,
            check_batched_forward_grad=True,
        )
        assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)

    @pytest.mark.parametrize("derivative", sorted({*DERIVATIVES} - {"functionalize"}))
    def test_a_kernel_asked_for_by_name_is_refused(
        self, compiled_case: str, backend: str, device: str, derivative: str
    ) -> None:
        call, at, along = self._point(compiled_case, device)
        message = rf'{self.spec.name}: backend=.{backend}. .*use backend="reference"'
        with pytest.raises(ValueError, match=message):
            DERIVATIVES[derivative](of_leaves(self.spec.function, call, backend=backend), at, along)

    def test_an_unknown_backend_in_a_transform(self, compiled_case: str) -> None:
        call, at, along = self._point(compiled_case)
        with pytest.raises(ValueError, match="backend must be one of auto, native, triton, reference"):
            jvp(of_leaves(self.spec.function, call, backend="fastest"), tuple(at), tuple(along))

    @pytest.mark.parametrize("transform", ["vmap_grad", "jvp"])
    def test_a_compiled_transform(self, compiled_case: str, transform: str) -> None:
        call, at, along = self._point(compiled_case)
        torch._dynamo.reset()

        def derivative(function: Function) -> Function:
            if transform == "jvp":
                return lambda *t: jvp(function, t, tuple(along))[1]
            return vmap(grad(squared(function), every(at)))

        given = at if transform == "jvp" else batched(at, along)
        of_op = derivative(of_leaves(self.spec.function, call))
        found = torch.compile(of_op, backend="aot_eager", fullgraph=True)(*given)
        expected = derivative(of_leaves(self.spec.reference, call))(*given)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)

    def test_a_transform_of_a_compiled_call(self, compiled_case: str) -> None:
        call, at, along = self._point(compiled_case)
        torch._dynamo.reset()
        compiled = torch.compile(of_leaves(self.spec.function, call), backend="aot_eager")
        found = jvp(compiled, tuple(at), tuple(along))
        expected = jvp(of_leaves(self.spec.reference, call), tuple(at), tuple(along))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)

    def test_second_order_of_a_compiled_call_is_an_error(self, compiled_case: str) -> None:
        call, at, along = self._point(compiled_case)
        torch._dynamo.reset()
        compiled = torch.compile(of_leaves(self.spec.function, call), backend="aot_eager")
        with pytest.raises(RuntimeError, match="does not currently support double backward"):
            gradients_of_a_penalty(compiled, at, along)

    def test_the_kernel_serves_what_no_transform_acts_on(self, case: str, device: str, backend: str) -> None:
        """A dual level or a transform elsewhere in the program costs no kernel."""
        call = self.build(self.spec.cases[case], torch.float32, device)
        run = of_leaves(self.spec.function, call, backend=backend)
        leaves = as_leaves(call.leaves())
        expected = run(*leaves)
        grads = torch.autograd.grad(expected.square().sum(), leaves)
        with Launched() as launched, forward_ad.dual_level():
            out = run(*leaves)
            found = torch.autograd.grad(out.square().sum(), leaves)
        assert launched.count == 2
        with Launched() as launched:
            scaled = vmap(lambda factor: factor * run(*call.leaves()))(torch.ones(2, device=device))
        assert launched.count == 1
        alone = run(*call.leaves())  # without gradients: compiled apart, and another last bit on a GPU
        for value, other in ((out, expected), (scaled[1], alone), *zip(found, grads, strict=True)):
            assert torch.equal(value, other)

    def test_half_precision(self, case: str) -> None:
        """Derivatives of wide parameters beside activations in half precision, and their dtypes."""
        call = self.build(self.spec.cases[case], torch.float32, "cpu")
        call = call.mapped(lambda name, t: t.bfloat16() if name in self.spec.activations else t)
        at = call.leaves()
        along = [torch.ones_like(t) for t in at]
        run, reference = of_leaves(self.spec.function, call), of_leaves(self.spec.reference, call)
        for derivative in (FORWARD["jvp"], FUNCTIONS["grad"]):
            torch.testing.assert_close(derivative(run, at, along), derivative(reference, at, along))
        gradients = gradients_of_a_penalty(run, at, along)
        assert [g.dtype for g in gradients] == [t.dtype for t in at]

    def test_second_order_of_zero_sizes(self, zero_case: str) -> None:
        call = self.build(self.spec.zero_cases[zero_case], torch.float64, "cpu")
        at = call.leaves()
        found = gradients_of_a_penalty(of_leaves(self.spec.function, call), at, at)
        expected = gradients_of_a_penalty(of_leaves(self.spec.reference, call), at, at)
        torch.testing.assert_close(found, expected)
