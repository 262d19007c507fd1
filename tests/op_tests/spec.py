"""The description of an op that its tests are made from, and one call of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mmkernels.ops._common import accumulate_dtype

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
Shape = Mapping[str, Any]


@dataclass(frozen=True)
class Call:
    """One call of a public function: its keyword arguments, and the names of the differentiable ones."""

    arguments: dict[str, Any]
    differentiable: tuple[str, ...]

    def with_arguments(self, **changes: Any) -> Call:
        return replace(self, arguments={**self.arguments, **changes})

    def mapped(self, change: Callable[[str, Tensor], Tensor]) -> Call:
        """The call with every tensor (also those in lists) replaced by ``change(argument name, tensor)``."""

        def apply(name: str, value: Any) -> Any:
            if isinstance(value, Tensor):
                return change(name, value)
            if isinstance(value, (list, tuple)) and value and isinstance(value[0], Tensor):
                return [change(name, item) for item in value]
            return value

        return replace(self, arguments={name: apply(name, value) for name, value in self.arguments.items()})

    def tensors(self, name: str) -> list[Tensor]:
        """The tensors of one argument: one, those of a list, or none."""
        value = self.arguments.get(name)
        if value is None:
            return []
        return [value] if isinstance(value, Tensor) else list(value)

    def leaves(self) -> list[Tensor]:
        """The tensors of the differentiable arguments, in the order of their names, lists flattened."""
        return [tensor for name in self.differentiable for tensor in self.tensors(name)]

    def detached(self, dtype: torch.dtype | None = None, requires_grad: bool = True) -> Call:
        """A call with copies of the tensors (strides kept), floating ones cast to ``dtype`` if given."""

        def change(name: str, tensor: Tensor) -> Tensor:
            if not tensor.is_floating_point():
                return tensor
            copy = tensor.detach() if dtype is None else tensor.detach().to(dtype)
            return copy.requires_grad_(requires_grad and name in self.differentiable)

        return self.mapped(change)


@dataclass(frozen=True)
class OpSpec:
    """An op, its reference and its cases."""

    name: str
    function: Callable[..., Tensor]
    #: The definition; takes the same keyword arguments except ``backend``.
    reference: Callable[..., Tensor]
    #: ``make(shape, dtype, device, generator)`` builds a call.
    make: Callable[[Shape, torch.dtype, torch.device, torch.Generator], Call]
    cases: Mapping[str, Shape]
    zero_cases: Mapping[str, Shape]
    #: Torch ops that one call runs: ``raw(call) -> [(op, positional arguments), ...]``.
    raw: Callable[[Call], list[tuple[Any, tuple[Any, ...]]]]
    #: Hypothesis strategy of shapes.
    shapes: Callable[[], Any]
    #: ``alone(call, index) -> (call for batch entry index alone, function from full output to its output)``;
    #: None if not batched.
    alone: Callable[[Call, int], tuple[Call, Callable[[Tensor], Tensor]]] | None = None
    #: The usual code of a user, in the activations' dtype: the bound on a kernel's error is a multiple of its
    #: error.
    eager: Callable[..., Tensor] | None = None
    #: Two shapes of one case; torch.compile must treat the sizes in which they differ as dynamic.
    dynamic: tuple[Shape, Shape] | None = None
    #: (device, backend) whose float32 products are the BLAS's: its rounding may depend on the number of
    #: threads and of rows.
    library_products: Sequence[tuple[str, str]] = ()
    #: Arguments whose dtype is that of the result; the others may be of a wider one, as under autocast.
    activations: Sequence[str] = field(default=())

    #: Whether products run in the activations' dtype, so that wider parameters' gradients have its rounding.
    rounds_products: bool = False

    #: (device, backend) -> parameters whose gradients in half precision may be a library's products, with its
    #: rounding.
    rounded_by_library: Mapping[tuple[str, str], Sequence[str]] = field(default_factory=dict)
    #: Whether the op casts parameters of half precision to float32 before its kernels.
    casts_parameters: bool = False
    #: Whether the result is of the type of sums, as a loss.
    wide_result: bool = False

    def result_dtype(self, call: Call) -> torch.dtype:
        dtype = call.tensors(self.activations[0])[0].dtype
        return accumulate_dtype(dtype) if self.wide_result else dtype


def away_from_zero(draw: Callable[[], Call], reference: Callable[..., Tensor]) -> Call:
    """A drawn call in which rounding changes the sign of no input of relu, if a hundred draws have one.

    A change of sign adds or removes a whole term of a gradient, and no error bound holds.
    """
    for _ in range(100):
        call = draw()
        if call.arguments["activation"] != "relu":
            break
        if not (reference(**{**call.arguments, "activation": "none"}).abs() < 0.02).any():
            break
    return call
