"""Find the model inside wrappers: compiled, parallel, sharded, and those of peft."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

#: Names under which wrapper classes hold their only child: torch.compile, FSDP, activation checkpointing.
_CHILDREN = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
#: Wrappers that replicate or shard the parameters which a model has when it is wrapped.
_PARALLEL = (
    "DistributedDataParallel",
    "DataParallel",
    "FullyShardedDataParallel",
    "FSDPModule",
    "DeepSpeedEngine",
)


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside wrappers, or the model itself.

    Looked through are ``torch.compile`` (a model compiled in place is itself), ``DataParallel``,
    ``DistributedDataParallel``, FSDP, activation checkpointing, peft's models, and a module without
    parameters of its own whose only child is, or wraps, a model of a library (one with ``save_pretrained``).
    """
    *_, innermost = chain(model)
    return innermost


def chain(model: nn.Module) -> Iterator[nn.Module]:
    """The model, the one inside it if it is a wrapper, and so on inwards."""
    yield model
    while (inner := _inside(model)) is not None or (inner := _inside_own(model)) is not None:
        model = inner
        yield model


def is_wrapper(module: nn.Module) -> bool:
    """Whether the module is one of a known wrapper class."""
    return _inside(module) is not None


def plain_name(name: str) -> str:
    """The name of a parameter or module without the parts that wrappers inside the model put into it."""
    return ".".join(part for part in name.split(".") if part not in _CHILDREN)


def parallel_class(model: nn.Module) -> str | None:
    """The name of the parallel wrapper around the model or a part of it, or None.

    Parameters that are added to the model inside later are not replicated or sharded.
    """
    for module in model.modules():
        for cls in type(module).__mro__:
            if cls.__name__ in _PARALLEL and cls.__module__.startswith(("torch.", "deepspeed.")):
                return cls.__name__
    return None


def _inside(model: nn.Module) -> nn.Module | None:
    """The module that a known wrapper holds."""
    if isinstance(model, torch.jit.ScriptModule):  # its children are no modules of Python
        return None
    for name in _CHILDREN:
        if (child := model._modules.get(name)) is not None:
            return child
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return model.module
    if any(cls.__module__.partition(".")[0] == "peft" for cls in type(model).__mro__):
        # PeftModel and the tuner in it (LoraModel); the layers of peft have neither.
        if callable(getattr(type(model), "get_base_model", None)):
            return model.get_base_model()  # type: ignore[operator]
        if callable(getattr(type(model), "inject_adapter", None)):
            return model._modules.get("model")
    return None


def _inside_own(model: nn.Module) -> nn.Module | None:
    """The only child of a wrapper that a user wrote, if it leads to a model of a library."""
    if isinstance(model, torch.jit.ScriptModule) or _of_library(model):
        return None
    if len(model._modules) != 1 or any(True for _ in model.parameters(recurse=False)):
        return None
    (child,) = model._modules.values()
    return child if child is not None and _of_library(unwrap(child)) else None


def _of_library(model: nn.Module) -> bool:
    return callable(getattr(type(model), "save_pretrained", None))
