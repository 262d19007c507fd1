"""Prepare a model for its own training code: freeze it, and edit its encoder by a method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mmtransfer import registry, saving
from mmtransfer.encoders.descriptions import ModelDescription
from mmtransfer.encoders.edit import Edit
from mmtransfer.encoders.encoder import Encoder
from mmtransfer.method import Method

_RECORD = "_mmtransfer_prepared"


@dataclass
class Prepared:
    """The record of `prepare`; `print` shows the counts.

    Attributes:
        method: the method with its options.
        head: names of the submodules outside the encoder that stay trainable.
        edit: the changes of the encoder.
        trainable: names of the trainable parameters, as the model's `named_parameters` has them.
        trainable_parameters, total_parameters: how many numbers those are, and how many the model now has.
    """

    method: Method
    head: list[str]
    edit: Edit
    trainable: tuple[str, ...]
    trainable_parameters: int
    total_parameters: int

    def revert(self) -> None:
        """Give the model its forwards and `requires_grad` flags back; the method's parameters are dropped.

        The head, and weights of the model that the method trained, keep their values.
        """
        model = self.edit.encoder.root
        if model.__dict__.get(_RECORD) is not self:
            raise ValueError("this preparation was reverted before")
        saving.remove(self.edit)
        self.edit.revert()
        del model.__dict__[_RECORD]

    def trained_tensors(self) -> dict[str, torch.Tensor]:
        """All that training changes, by name: trainable parameters, and running statistics of batch norms."""
        model = self.edit.encoder.root
        tensors: dict[str, torch.Tensor] = {name: model.get_parameter(name) for name in self.trainable}
        for name, module in model.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                tensors |= {f"{name}.{buffer}": value for buffer, value in module.named_buffers()}
        return tensors

    def __str__(self) -> str:
        share = 100 * self.trainable_parameters / max(self.total_parameters, 1)
        return (
            f"{self.method.name}: {self.trainable_parameters:,} of {self.total_parameters:,} parameters "
            f"({share:.3f} %) are trained"
        )


def prepare(
    model: nn.Module,
    method: str | Method,
    *,
    head: str | Sequence[str] | None = None,
    description: ModelDescription | None = None,
    **options: Any,
) -> Prepared:
    """Freeze `model` in place, except for its head, and edit and train its encoder by `method`.

    For training code that exists: the model keeps its class, its `forward` and its head. New parameters are
    children of the layers (`...adapter_mlp.*`, `...prompt`), float32 (float64 in a float64 model). Layers
    below the lowest trained parameter record no autograd graph. Prepare before `torch.compile`, DDP or FSDP.
    Not for `torch.nn.DataParallel`, which runs several copies of a module at once. Gradient checkpointing of
    transformers must be the non-reentrant one (its default): no input of a frozen layer asks for a gradient.

    Args:
        model: of a type in `mmtransfer.encoders.DESCRIPTIONS`, or with its `description`.
        method: a `Method` or its name: `"aat-ms"`, `"lora"`, `"bitfit"`; `mmtransfer methods` lists them.
        head: names of submodules (or parameters) that stay trainable; by default the direct children of the
            model (and its parameters) outside its encoder, unless it has a decoder, without what the encoder
            shares.
        description: where things are in a model that is not in the table, or not of transformers.
        options: fields of the method, such as `bottleneck=64`.

    Raises:
        TypeError: `model` is no module, or not one of transformers and without a description.
        ValueError: no description for the model's type, a model that is prepared already, an unknown method,
            option or name, a value out of range, or a method that the model cannot have. The model is
            untouched.
        ImportError: a package that the method needs is missing.
    """
    found = registry.find(method, **options)
    if any(part.has_readout for part in found.parts()):
        raise ValueError(
            f"{found.name} has a readout, which a model with its own forward has no place for; "
            "build an AdaptedModel with it"
        )
    encoder = Encoder(model, description)
    if is_prepared(model):
        raise ValueError(
            f"model is prepared already, with {get_prepared(model).method.name!r}; revert that first"
        )
    heads = _find_heads(encoder, head)
    base = {id(parameter) for parameter in model.parameters()}
    edit = found.edit(encoder)
    if edit.is_empty:
        # An empty edit leaves no mark and no flag, as several may share an encoder. A model in its own
        # training code must be marked, and must record no graph below its head.
        edit.revert()
        with Edit(encoder, found.name) as edit:
            pass
    inside = {id(parameter) for parameter in encoder.model.parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) in base - inside and any(_is_inside(name, each) for each in heads):
            parameter.requires_grad_(True)
    named = dict(model.named_parameters())
    names = tuple(name for name, parameter in named.items() if parameter.requires_grad)
    if not names:
        edit.revert()
        raise ValueError(
            f"method {found.name!r} trains no part of the encoder, and the model has no head outside "
            "it; name one"
        )
    prepared = Prepared(
        method=found,
        head=heads,
        edit=edit,
        trainable=names,
        trainable_parameters=sum(named[name].numel() for name in names),
        total_parameters=sum(parameter.numel() for parameter in named.values()),
    )
    model.__dict__[_RECORD] = prepared
    saving.install(edit, prepared.trained_tensors())
    return prepared


def is_prepared(model: nn.Module) -> bool:
    return _RECORD in model.__dict__


def get_prepared(model: nn.Module) -> Prepared:
    """The record that `prepare` returned for this model.

    Raises:
        ValueError: the model is not prepared.
    """
    if not is_prepared(model):
        raise ValueError(f"{type(model).__name__} is not prepared; call mmtransfer.prepare on it first")
    return model.__dict__[_RECORD]


def revert(model: nn.Module) -> None:
    """`Prepared.revert` of a prepared model."""
    get_prepared(model).revert()


def _find_heads(encoder: Encoder, head: str | Sequence[str] | None) -> list[str]:
    model = encoder.root
    if head is None:
        return [] if model is encoder.model or _has_decoder(model) else _find_neighbours(encoder)
    names = [head] if isinstance(head, str) else list(head)
    parameters = [name for name, _ in model.named_parameters()]
    inside = {id(parameter) for parameter in encoder.model.parameters()}
    for name in names:
        if not any(_is_inside(parameter, name) for parameter in parameters):
            children = ", ".join(child for child, _ in model.named_children())
            raise ValueError(f"head {name!r} has no parameters in the model, whose children are {children}")
        if all(id(p) in inside for key, p in model.named_parameters() if _is_inside(key, name)):
            raise ValueError(f"head {name!r} is inside the encoder, which the method trains")
    return names


def _has_decoder(model: nn.Module) -> bool:
    # Whisper's audio classifiers have the configuration of the whole model.
    return getattr(getattr(model, "config", None), "is_encoder_decoder", False) and any(
        name.rpartition(".")[2] == "decoder" for name, _ in model.named_modules()
    )


def _find_neighbours(encoder: Encoder) -> list[str]:
    """Direct children and parameters of the model that are outside the encoder."""
    model = encoder.root
    inside = {id(parameter) for parameter in encoder.model.parameters()}
    children = [
        name
        for name, child in model.named_children()
        if not any(module is encoder.model for module in child.modules())
        and any(id(parameter) not in inside for parameter in child.parameters())
    ]
    return children + [name for name, p in model.named_parameters(recurse=False) if id(p) not in inside]


def _is_inside(parameter: str, module: str) -> bool:
    return parameter == module or parameter.startswith(f"{module}.")
