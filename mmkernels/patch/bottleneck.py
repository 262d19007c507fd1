"""Shared by the adapter recognisers: find the parts of a bottleneck, and run them as one op."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from mmkernels.activations import ACTIVATIONS, TRANSFORMERS_CLASSES
from mmkernels.ops._common import accumulate_dtype, autocasts, dtype_served
from mmkernels.ops.adapter import adapter
from mmkernels.patch.recogniser import Unsupported
from mmkernels.patch.rewrite import Body, KnownFunctions

_MODULES = {nn.Identity: "none", nn.ReLU: "relu", nn.SiLU: "silu"}
_FUNCTIONS = {
    functional.relu: "relu",
    torch.relu: "relu",
    functional.gelu: "gelu",
    functional.silu: "silu",
}


#: The forward of the adapters library's wrapper of an activation.
_WRAPPERS = KnownFunctions(("calls f", Body("def forward(self, x): return self.f(x)")))
_FORWARDS: dict[type[nn.Module], Any] = {
    cls: cls.forward for cls in (nn.Linear, nn.LayerNorm, nn.Dropout, nn.Identity, nn.ReLU, nn.GELU, nn.SiLU)
}


class Mismatch(Unsupported):
    """The layers are not those of a bottleneck; the message lists them."""


class Bottleneck(NamedTuple):
    """``up(activation(down(norm(x))))``."""

    norm: nn.LayerNorm | None
    down: nn.Linear
    activation: str
    up: nn.Linear

    def __call__(self, x: Tensor, residual: Tensor | None = None, scale: float = 1.0) -> Tensor:
        norm, down, up = self.norm, self.down, self.up
        return adapter(
            x,
            down.weight,
            down.bias,
            up.weight,
            up.bias,
            residual=residual,
            scale=scale,
            activation=self.activation,
            norm_weight=None if norm is None else norm.weight,
            norm_bias=None if norm is None else norm.bias,
            eps=1e-5 if norm is None else norm.eps,
        )

    def serves(self, x: object) -> bool:
        """Whether the op takes ``x`` and the parameters, and its result has the dtype that the modules give.

        If not, the modules run, or raise. They also run for tensor subclasses (sharded, quantised).
        """
        if type(x) is not Tensor or x.is_nested or x.layout != torch.strided or not dtype_served(x):
            return False
        if x.dim() == 0 or x.shape[-1] != self.down.weight.shape[-1]:
            return False
        parameters = [self.down.weight, self.down.bias, self.up.weight, self.up.bias]
        if self.norm is not None:
            parameters += [self.norm.weight, self.norm.bias]
        return all(parameter is None or _goes_with(parameter, x) for parameter in parameters)


def _goes_with(parameter: Tensor, x: Tensor) -> bool:
    if type(parameter) not in (Tensor, nn.Parameter) or parameter.device != x.device:
        return False
    if parameter.dtype == x.dtype:
        return True
    casts = autocasts(x) and torch.float64 not in (x.dtype, parameter.dtype)
    return casts and dtype_served(parameter)


def takes_residual(residual: object, x: Tensor) -> bool:
    """Whether the op adds ``residual`` with the result of ``+``. If not, add it outside the op."""
    computed = x.dtype
    if autocasts(x) and computed != torch.float64:
        computed = torch.get_autocast_dtype(x.device.type)
    return (
        type(residual) is Tensor
        and residual.shape == x.shape
        and residual.device == x.device
        and residual.dtype in (computed, accumulate_dtype(computed))
    )


def find_bottleneck(layers: Iterable[nn.Module]) -> Bottleneck:
    """The parts of ``[LayerNorm], Linear, activation, Linear``, dropout of probability 0 among them ignored.

    Raises:
        Mismatch: the layers are others, or of widths that make no bottleneck adapter.
    """
    layers = [layer for layer in layers if not (type(layer) is nn.Dropout and layer.p == 0)]
    kinds = [type_before_parametrizations(layer) for layer in layers]
    first = int(bool(kinds) and kinds[0] is nn.LayerNorm)
    if len(layers) != first + 3 or kinds[first] is not nn.Linear or kinds[-1] is not nn.Linear:
        given = ", ".join(map(_class_name, kinds)) or "no layer"
        raise Mismatch(f"it has {given}; a bottleneck is [LayerNorm,] Linear, activation, Linear")
    norm = layers[0] if first else None
    down, function, up = layers[first:]
    assert isinstance(down, nn.Linear)
    assert isinstance(up, nn.Linear)
    if (down.in_features, down.out_features) != (up.out_features, up.in_features):
        raise Mismatch(
            f"its projections are {down.in_features} -> {down.out_features} and {up.in_features} -> "
            f"{up.out_features}; an adapter ends with the width that it starts with"
        )
    assert norm is None or isinstance(norm, nn.LayerNorm)
    if norm is not None and (norm.normalized_shape != (down.in_features,) or norm.weight is None):
        raise Mismatch(f"its LayerNorm must have a weight and the shape ({down.in_features},)")
    return Bottleneck(norm, down, _activation(function), up)


def _class_name(cls: type[Any]) -> str:
    """With its module where torch has a class of that name (those of quantisation and of PEFT)."""
    ours = cls is getattr(nn, cls.__name__, cls)
    return cls.__name__ if ours else f"{cls.__module__}.{cls.__qualname__}"


def check_intact(modules: Iterable[tuple[str, nn.Module]]) -> None:
    """Raise ``Unsupported`` if a module does more than its class: hooks, parametrisations, an own forward."""
    if torch.nn.modules.module._has_any_global_hook():
        raise Unsupported("there are global module hooks, which the op would not call")
    for name, module in modules:
        cls = type(module)
        if cls.forward is not _FORWARDS.get(cls, cls.forward):
            raise Unsupported(f"forward of the class of {name}, {cls.__name__}, was replaced")
        if is_parametrized(module):
            raise Unsupported(f"{name} is parametrised (torch.nn.utils.parametrize)")
        if "forward" in vars(module):
            raise Unsupported(f"forward of {name} is overridden on the instance, by a hook or a wrapper")
        if (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
        ):
            raise Unsupported(f"{name} has hooks, which the op would not call")


def _activation(function: Any) -> str:
    """Name of an activation that the op has. Known objects only: equal values on some inputs prove little."""
    cls = type(function)
    if cls.__name__ == "Activation_Function_Class" and _WRAPPERS.name(cls.forward):
        function = getattr(function, "f", None)
        cls = type(function)
    name = _MODULES.get(cls)
    if cls is nn.GELU:
        name = "gelu" if function.approximate == "none" else "gelu_tanh"
    elif cls.__module__ == "transformers.activations":
        name = TRANSFORMERS_CLASSES.get(cls.__name__)
    elif not isinstance(function, nn.Module):
        name = _FUNCTIONS.get(function)
    if name is None:
        given = getattr(function, "__name__", cls.__name__)
        raise Mismatch(f"its activation is {given}; the op has {', '.join(ACTIVATIONS)}")
    return name
