"""LoRA in the format of peft: a folder that `PeftModel.from_pretrained` reads, and one that it wrote."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
#: In front of the model's names, and the name of the adapter inside ours.
_PREFIX, _ADAPTER = "base_model.model.", "lora"
_OURS = re.compile(rf"^(?P<target>.+)\.lora_(?P<side>[AB])\.{_ADAPTER}\.weight$")
_PEFTS = re.compile(r"^(?P<target>.+)\.lora_(?P<side>[AB])\.weight$")
#: Settings of peft that make another computation, unless they have one of these values.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (False,),
    # The others begin by changing the weights of the model.
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
    "fan_in_fan_out": (False,),
    "bias": ("none",),
    "lora_bias": (False,),
    "rank_pattern": ({},),
    "alpha_pattern": ({},),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "layer_replication": (None,),
    "megatron_config": (None,),
    "alora_invocation_tokens": (None,),
}


@dataclass(frozen=True)
class PeftFolder:
    """A folder of peft, as a model that is prepared with LoRA needs it.

    Attributes:
        rank: of all updates.
        targets: the linear layers with an update, by their names in the model.
        head: the names of the modules that are saved whole.
        tensors: by the names of the prepared model; the scale of the updates is in the second factor.
    """

    rank: int
    targets: tuple[str, ...]
    head: tuple[str, ...]
    tensors: Mapping[str, torch.Tensor]


def files(
    model: nn.Module, head: Sequence[str], tensors: Mapping[str, torch.Tensor]
) -> dict[str, Callable[[Path], object]]:
    """Peft's two files as functions that write them; none where its format lacks some of these tensors.

    It has the updates and whole modules, found by the ends of their names: no parameters of the model itself,
    no part of a module that is tied to the encoder, no running statistics.
    """
    modules = [name for name, _ in model.named_modules()]
    if any(sum(name.endswith(each) for name in modules) != 1 for each in head):
        return {}
    whole = {f"{name}.{key}" for name in head for key in model.get_submodule(name).state_dict()}
    updates = {name: match for name in tensors if (match := _OURS.match(name))}
    if whole != tensors.keys() - updates.keys():
        return {}
    suffix = f".{_ADAPTER}.weight"
    renamed = {
        _PREFIX + (name.removesuffix(suffix) + ".weight" if name in updates else name): tensor
        for name, tensor in tensors.items()
    }
    targets = [*dict.fromkeys(match["target"] for match in updates.values())]
    text = _configuration(model, head, targets, tensors)
    return {
        WEIGHTS: lambda path: save_file(renamed, path, metadata={"format": "pt"}),
        CONFIG: lambda path: path.write_text(text, encoding="utf-8"),
    }


def _configuration(
    model: nn.Module, head: Sequence[str], targets: list[str], tensors: Mapping[str, torch.Tensor]
) -> str:
    from peft import LoraConfig

    rank = next(tensor.shape[0] for name, tensor in tensors.items() if ".lora_A." in name)
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=targets,
        modules_to_save=list(head) or None,
        inference_mode=True,
        base_model_name_or_path=getattr(getattr(model, "config", None), "_name_or_path", None) or None,
    )
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        return (Path(folder) / CONFIG).read_text(encoding="utf-8")


def read(folder: Path) -> PeftFolder | None:
    """The content of a folder that peft wrote; None if it is none.

    Raises:
        ValueError: an adapter of another kind, each difference named.
    """
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        return None
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    others = [
        f"{key} {config[key]!r}"
        for key, plain in _PLAIN.items()
        if key in config and config[key] not in plain and config[key] is not None
    ]
    if others:
        raise ValueError(
            f"{folder} has {', '.join(others)}; a plain LoRA can be loaded here, others by "
            "peft.PeftModel.from_pretrained"
        )
    rank = config["r"]
    scale = config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)
    tensors, targets, head = {}, [], set()
    for name, tensor in load_file(folder / WEIGHTS).items():
        name = name.removeprefix(_PREFIX)
        match = _PEFTS.match(name)
        if match is None:
            head.add(_head_of(name, config.get("modules_to_save") or [], folder))
            tensors[name] = tensor
            continue
        ours = f"{match['target']}.lora_{match['side']}.{_ADAPTER}.weight"
        tensors[ours] = tensor * scale if match["side"] == "B" else tensor
        if match["target"] not in targets:
            targets.append(match["target"])
    return PeftFolder(rank, tuple(targets), tuple(sorted(head)), tensors)


def _head_of(name: str, modules: Sequence[str], folder: Path) -> str:
    """The module, one of `modules_to_save`, that a tensor belongs to."""
    path = name.split(".")
    for length in range(1, len(path)):
        module = ".".join(path[:length])
        if any(module == each or module.endswith(each) for each in modules):
            return module
    raise ValueError(f"{folder} has a tensor {name!r} of no module that its configuration names")
