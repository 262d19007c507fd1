"""Why ``accelerate`` replaced nothing: modules of a model that come close to a fragment with a kernel."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from torch import nn

from mmkernels.ops.layer_mix.schema import MAX_LAYERS
from mmkernels.patch.bottleneck import find_bottleneck
from mmkernels.patch.recogniser import Unsupported
from mmkernels.patch.report import Note


def near_misses(model: nn.Module) -> list[Note]:
    """One note for each kind of near miss and place; never empty."""
    found: dict[tuple[str, str], int] = {}
    for name, module in model.named_modules():
        for text in _remarks(name, module):
            # The layers of an encoder are one place.
            place = re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name)
            key = place, text.replace(name, place) if name else text
            found[key] = found.get(key, 0) + 1
    notes = [
        Note(place, text if count == 1 else f"{text} ({count} modules)")
        for (place, text), count in found.items()
    ]
    return notes or [
        Note(
            "",
            f"no module of this {type(model).__name__} resembles one that accelerate replaces: the sum of "
            "hidden states in transformers' audio classifiers (use_weighted_layer_sum=True), s3prl's "
            "Featurizer, the attention adapters of transformers' speech models (config.adapter_attn_dim), "
            "bottleneck adapters of the adapters library, or those that adapters=[...] names",
        )
    ]


def _remarks(name: str, module: nn.Module) -> Iterator[str]:
    cls = type(module)
    if isinstance(module, torch.jit.ScriptModule):
        if not name:
            yield "it is a TorchScript module, whose code is fixed; accelerate the module it was made from"
        return
    config = vars(module).get("config")
    if not name and getattr(config, "use_weighted_layer_sum", None) is False:
        yield (
            f"{cls.__name__} sums no layers; transformers' audio classifiers do, with "
            "config.use_weighted_layer_sum=True"
        )
    width = getattr(config, "adapter_attn_dim", None)
    if not name and width is not None and getattr(config, "do_stable_layer_norm", None) is False:
        yield (
            f"config.adapter_attn_dim is {width}, but its layers have no adapters; transformers makes them "
            "with config.do_stable_layer_norm=True"
        )
    if any(base.__name__ == "BottleneckLayer" for base in cls.__mro__) and hasattr(module, "adapters"):
        yield "it is a BottleneckLayer without adapters; call accelerate after add_adapter"
    if cls.__module__.startswith("peft.tuners.") and hasattr(module, "base_layer"):
        yield f"it is a {cls.__name__} of peft, for which there is no op"
    if isinstance(module, nn.Sequential):
        if _is_bottleneck(module):
            yield f"it is a bottleneck; if it is an adapter, name it: accelerate(model, adapters=[{name!r}])"
    elif _has_bottleneck(name, module):
        yield (
            f"{cls.__name__} has the projections of a bottleneck adapter in a forward of its own; "
            "mmkernels.nn.Adapter is one with a kernel"
        )
    for parameter, value in module.named_parameters(recurse=False):
        mixes = re.search(r"weights$|^layer_weight|^scalar_", parameter)
        if mixes and value.dim() == 1 and 2 <= value.numel() <= MAX_LAYERS:
            yield (
                f"if its parameter {parameter} ({value.numel()},) weighs layers, mmkernels.nn.LayerMix or "
                "Featurizer computes their sum"
            )


def _is_bottleneck(module: nn.Sequential) -> bool:
    try:
        down = find_bottleneck(module).down
    except Unsupported:
        return False
    return down.out_features < down.in_features


def _has_bottleneck(name: str, module: nn.Module) -> bool:
    linear = [child for child in module.children() if isinstance(child, nn.Linear)]
    if "adapter" not in f"{name.rpartition('.')[2]} {type(module).__name__}".lower() or len(linear) != 2:
        return False
    down, up = linear
    sizes = down.in_features, down.out_features
    return sizes == (up.out_features, up.in_features) and down.out_features < down.in_features
