"""Checks of a model before it is changed; each names the parameter or the module that is in the way."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from mmkernels.wrappers import parallel_class

#: The dtypes that an optimiser can work in, narrow ones among them.
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_not_parallel(model: nn.Module) -> None:
    """ValueError for a model inside a wrapper that replicates or shards its parameters."""
    name = parallel_class(model)
    if name == "DataParallel":
        raise ValueError(
            "model is in DataParallel, whose copies would call layers of the original; give the model "
            "inside, and train it in DistributedDataParallel or on one device"
        )
    if name is not None:
        raise ValueError(
            f"model is in {name}, which would not see parameters that come later; change the model first, "
            f"then put it into {name}"
        )


def check_loaded(model: nn.Module) -> None:
    """ValueError for a model with weights that are not there yet: offloaded, or of lazy modules."""
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.UninitializedParameter):
            raise ValueError(f"{name} is not initialised; run the model once, or load its weights")
    kinds = {parameter.is_meta: name for name, parameter in model.named_parameters()}
    if len(kinds) > 1:
        raise ValueError(
            f"{kinds[True]} is on the meta device and {kinds[False]} is not; load all weights of the model "
            "(without offloading to the disk) before changing it"
        )


def check_trainable(parameters: Iterable[nn.Parameter], model: nn.Module) -> None:
    """ValueError for a parameter of `model` that cannot be trained: quantised, sparse, not initialised."""
    for parameter in parameters:
        if (problem := _obstacle(parameter)) is not None:
            name = next((key for key, each in model.named_parameters() if each is parameter), "a parameter")
            raise ValueError(
                f"{name} cannot be trained: {problem}; choose a method that leaves it frozen, or "
                "load the model with floating weights"
            )


def check_unquantised(modules: Iterable[nn.Module], model: nn.Module, purpose: str) -> None:
    """ValueError for a module, or a part of one, whose weights torch.ao.quantization has packed.

    They are no parameters, and no gradient passes through them.
    """
    for module in modules:
        for part in module.modules():
            if is_packed(part):
                name = next(key for key, each in model.named_modules() if each is part)
                raise ValueError(
                    f"{name} is quantised ({type(part).__module__}.{type(part).__qualname__}): {purpose}; "
                    "load the model with floating weights"
                )


def check_nothing_trained_inside(model: nn.Module) -> None:
    """ValueError if adapters of peft in the model ask for gradients; freezing would end their training."""
    for name, module in model.named_modules():
        for attribute in getattr(module, "adapter_layer_names", ()):
            part = getattr(module, attribute, None)
            if isinstance(part, nn.Module) and any(each.requires_grad for each in part.parameters()):
                raise ValueError(
                    f"{name}.{attribute} of peft is trained, and would be frozen with the encoder; merge it "
                    "(merge_and_unload), freeze it, or use this package's method for it"
                )


def check_distinct(layers: Iterable[nn.Module]) -> None:
    """ValueError if one module stands for several layers: a change of one would be one of all."""
    seen: dict[int, int] = {}
    for index, layer in enumerate(layers):
        if (first := seen.setdefault(id(layer), index)) != index:
            raise ValueError(
                f"layers {first} and {index} of the model are one module; the method would change both"
            )


def _obstacle(parameter: nn.Parameter) -> str | None:
    if parameter.dtype not in FLOATING:
        return f"its dtype is {parameter.dtype}"
    if type(parameter) is not nn.Parameter:
        return f"it is a {type(parameter).__module__}.{type(parameter).__qualname__} of {parameter.dtype}"
    if parameter.layout != torch.strided:
        return f"its layout is {parameter.layout} ({parameter.dtype})"
    return None


def is_packed(module: nn.Module) -> bool:
    """Whether the module has weights that torch.ao.quantization packed."""
    packed = ("torch.ao.nn.quantized.", "torch.ao.nn.intrinsic.quantized.")
    # FloatFunctional is in models that are not quantised yet.
    return type(module).__module__.startswith(packed) and type(module).__name__ != "FloatFunctional"
