"""What each method of `prepare` adds to the layers of an encoder, and which of its parameters stay trainable.

An installer takes a `Plan`, whose checks have all passed, and an `Undo`, in which it notes what it changes.
It returns the encoder's trainable parameters.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from mmkernels.nn import Adapter
from mmtransfer.models import ModelDescription

from . import inject, recompute, rewrite


@dataclass
class Plan:
    """A checked call of `prepare`."""

    model: nn.Module
    method: str
    description: ModelDescription
    encoder: nn.Module
    layers: list[nn.Module]
    width: int
    bottleneck: int
    activation: str
    scale: float
    backend: str
    prompt_tokens: int
    rank: int
    # Which of "attention" and "mlp" are rewritten.
    rewritten: tuple[str, ...]
    recompute: str


@dataclass
class Undo:
    """What was done to a model, to be taken back in reverse."""

    # The last item is a list of the value that the attribute had, empty where there was none.
    attributes: list[tuple[nn.Module, str, list[Any]]] = field(default_factory=list)
    added: list[tuple[nn.Module, str]] = field(default_factory=list)
    replaced: list[tuple[nn.Module, str, nn.Module]] = field(default_factory=list)
    flags: list[tuple[nn.Parameter, bool]] = field(default_factory=list)

    def note(self, module: nn.Module, name: str) -> None:
        """Have `revert` restore a plain attribute of the module."""
        self.attributes.append((module, name, [module.__dict__[name]] if name in module.__dict__ else []))

    def assign(self, module: nn.Module, name: str, value: Any) -> None:
        self.note(module, name)
        module.__dict__[name] = value

    def override(self, module: nn.Module, forward: inject.Forward) -> None:
        """Have `forward` called in place of `module.forward`."""
        self.assign(module, "forward", forward)

    def add(self, owner: nn.Module, name: str, value: nn.Module | nn.Parameter) -> None:
        if hasattr(owner, name):
            raise ValueError(f"a layer of the model has an attribute {name!r} already")
        setattr(owner, name, value)
        self.added.append((owner, name))

    def revert(self) -> None:
        for module, name, value in reversed(self.attributes):
            module.__dict__.pop(name, None)
            if value:
                module.__dict__[name] = value[0]
        for owner, name in self.added:
            delattr(owner, name)
        for owner, name, module in self.replaced:
            setattr(owner, name, module)
        for parameter, flag in self.flags:
            parameter.requires_grad_(flag)


def adapt(plan: Plan, undo: Undo) -> Iterator[nn.Parameter]:
    """AAT's S adapter after the attention and M adapter beside the MLP; Houlsby's in series after both."""
    for layer in plan.layers:
        if plan.method != "aat_m":
            yield from _adapt_attention(plan, layer, undo)
        if plan.method == "houlsby":
            yield from _append(plan, layer, layer.get_submodule(plan.description.layer_mlp[1]), "mlp", undo)
        elif plan.method != "aat_s":
            yield from _adapt_mlp(plan, layer, undo)


def _adapt_attention(plan: Plan, layer: nn.Module, undo: Undo) -> Iterator[nn.Parameter]:
    row = plan.description
    if "attention" not in plan.rewritten:
        path = row.layer_attention_output if row.calls_projections else row.layer_attention
        return _append(plan, layer, layer.get_submodule(path), "attention", undo)
    adapter = _add_adapter(plan, layer, "attention", undo)
    projection: Any = layer.get_submodule(row.layer_attention_output)
    undo.override(projection, rewrite.SerialRewritten(projection, adapter))
    return adapter.parameters()


def _append(
    plan: Plan, layer: nn.Module, module: nn.Module, place: str, undo: Undo
) -> Iterator[nn.Parameter]:
    adapter = _add_adapter(plan, layer, place, undo)
    undo.override(module, inject.Serial(module.forward, adapter))
    return adapter.parameters()


def _adapt_mlp(plan: Plan, layer: nn.Module, undo: Undo) -> Iterator[nn.Parameter]:
    adapter = _add_adapter(plan, layer, "mlp", undo)
    first, second = (layer.get_submodule(path) for path in plan.description.layer_mlp)
    recomputed = plan.recompute != "none"
    if "mlp" in plan.rewritten:
        assert isinstance(first, nn.Linear)
        assert isinstance(second, nn.Linear)
        undo.override(first, rewrite.EntryRewritten(first, adapter))
        undo.override(second, rewrite.ExitRewritten(second, adapter, product_last=recomputed))
    else:
        handover = inject.Handover()
        undo.override(first, inject.ParallelEntry(first.forward, handover))
        undo.override(second, inject.ParallelExit(second.forward, handover, adapter, product_last=recomputed))
    return adapter.parameters()


def _add_adapter(plan: Plan, layer: nn.Module, place: str, undo: Undo) -> Adapter:
    adapter = Adapter(
        plan.width,
        plan.bottleneck,
        plan.activation,
        scale=plan.scale,
        # The M adapter is added to what the MLP makes.
        residual=place == "attention" or plan.method == "houlsby",
        backend=plan.backend,
    )
    nn.init.trunc_normal_(adapter.down_weight, std=0.02)
    adapter.to(**_placement(plan, layer)).train(layer.training)
    undo.add(layer, f"adapter_{place}", adapter)
    return adapter


def _placement(plan: Plan, layer: nn.Module) -> dict[str, Any]:
    """Device of the layer; its dtype, but float32 for half precision, which does not train well."""
    weight = layer.get_submodule(plan.description.layer_attention_output).get_parameter("weight")
    return {
        "device": weight.device,
        "dtype": torch.float64 if weight.dtype == torch.float64 else torch.float32,
    }


def add_prompts(plan: Plan, undo: Undo) -> Iterator[nn.Parameter]:
    """Learned tokens in front of the input of every layer (VPT-deep, arXiv 2203.12119); their outputs go."""
    for layer in plan.layers:
        prompt = torch.empty(plan.prompt_tokens, plan.width, **_placement(plan, layer))
        parameter = nn.Parameter(nn.init.trunc_normal_(prompt, std=0.02))
        undo.add(layer, "prompt", parameter)
        undo.override(layer, inject.Prompted(layer.forward, layer))
        yield parameter


def add_lora(plan: Plan, undo: Undo) -> Iterator[nn.Parameter]:
    """LoRA on the queries and values (arXiv 2106.09685), by peft."""
    from peft import LoraConfig, inject_adapter_in_model

    paths = (plan.description.layer_query, plan.description.layer_value)
    targets = [(layer, path) for layer in plan.layers for path in paths]
    names = {module: name for name, module in plan.model.named_modules()}
    for layer, path in targets:
        parent, _, leaf = path.rpartition(".")
        undo.replaced.append((layer.get_submodule(parent), leaf, layer.get_submodule(path)))
    undo.note(plan.model, "peft_config")
    config = LoraConfig(
        r=plan.rank,
        lora_alpha=plan.rank,
        target_modules=[names[layer.get_submodule(path)] for layer, path in targets],
    )
    inject_adapter_in_model(config, plan.model, adapter_name="lora")
    for layer, path in targets:
        for name, parameter in layer.get_submodule(path).named_parameters():
            if "lora_" in name:
                yield parameter


def thaw_all(plan: Plan, _undo: Undo) -> Iterator[nn.Parameter]:
    return plan.model.parameters()


def thaw_nothing(_plan: Plan, _undo: Undo) -> Iterator[nn.Parameter]:
    return iter(())


def thaw_layers(plan: Plan, _undo: Undo) -> Iterator[nn.Parameter]:
    for layer in plan.layers:
        yield from layer.parameters()


def thaw_biases(plan: Plan, _undo: Undo) -> Iterator[nn.Parameter]:
    """All biases of the encoder, those of its norms too (BitFit, arXiv 2106.10199)."""
    for name, parameter in plan.encoder.named_parameters():
        if name.rpartition(".")[2] == "bias":
            yield parameter


Installer = Callable[[Plan, Undo], Iterator[nn.Parameter]]
METHODS: dict[str, Installer] = {
    "aat_ms": adapt,
    "aat_m": adapt,
    "aat_s": adapt,
    "houlsby": adapt,
    "prompt": add_prompts,
    "lora": add_lora,
    "bitfit": thaw_biases,
    "partial": thaw_layers,
    "head": thaw_nothing,
    "full": thaw_all,
}
#: Methods with adapters.
ADAPTER_METHODS = tuple(name for name, install in METHODS.items() if install is adapt)


def add_recompute(plan: Plan, undo: Undo) -> None:
    """Have every layer of the plan recompute what `plan.recompute` says; comes after the method."""
    if plan.recompute == "none":
        return
    row = plan.description
    for layer in plan.layers:
        policy = None
        if plan.recompute == "selective":
            policy = recompute.Policy()
            for path in (row.layer_query, row.layer_key, row.layer_value):
                module = layer.get_submodule(path)
                undo.override(module, recompute.Kept(module.forward, policy))
        undo.override(layer, recompute.Recomputed(layer.forward, policy))


def peft_is_installed() -> bool:
    return importlib.util.find_spec("peft") is not None
