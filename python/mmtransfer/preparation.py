"""Prepare a model for its own training code: freeze it, and edit its encoder by a method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mmkernels.wrappers import chain, plain_name
from mmtransfer import registry, saving
from mmtransfer.encoders.checks import check_trainable, check_unquantised, is_packed
from mmtransfer.encoders.descriptions import ModelDescription
from mmtransfer.encoders.edit import Edit, check_editable
from mmtransfer.encoders.encoder import Encoder
from mmtransfer.encoders.precision import check_trained
from mmtransfer.encoders.watch import add_watch
from mmtransfer.method import Method

_RECORD = "_mmtransfer_prepared"


@dataclass
class Prepared:
    """The record of `prepare`; `print` shows the counts.

    Attributes:
        method: the method with its options.
        head: names of the submodules outside the encoder that stay trainable.
        edit: the changes of the encoder.
        trainable: names of the trainable parameters, as `named_parameters` of the model inside wrappers has
            them.
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
        """All that training changes or the method brings, by name.

        Trainable parameters, those that were thawed since, running statistics of batch norms, and the buffers
        of added modules and of the head.
        """
        model = self.edit.encoder.root
        names = [*self.trainable, *self.thawed()]
        known = dict(_named(model))
        if lost := [name for name in names if name not in known]:
            raise ValueError(
                f"{lost[0]}, which is trained since prepare, is gone; was its module replaced, pruned or "
                "parametrised? Do that before prepare"
            )
        tensors: dict[str, torch.Tensor] = {name: known[name] for name in names}
        for name, module in model.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                buffers = module.named_buffers()
                tensors |= {f"{plain_name(name)}.{buffer}": value for buffer, value in buffers}
        brought = {id(buffer) for buffer in self.edit.added_buffers()}
        heads = tuple(f"{name}." for name in self.head)
        for name, value in model.state_dict(keep_vars=True).items():
            name = plain_name(name)
            if not isinstance(value, nn.Parameter) and (id(value) in brought or name.startswith(heads)):
                tensors[name] = value
        return tensors

    def thawed(self) -> list[str]:
        """Names of parameters that ask for gradients now and did not after `prepare`."""
        named = _named(self.edit.encoder.root)
        return [name for name, each in named if each.requires_grad and name not in self.trainable]

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
    below the lowest trained parameter record no autograd graph. Wrappers are looked through: `torch.compile`,
    peft, a module whose only child the model is. Prepare before DistributedDataParallel and FSDP; not for
    `torch.nn.DataParallel`, which runs several copies of a module at once.

    In training the prepared model says what would train it wrongly: reentrant gradient checkpointing (no
    input of a frozen layer asks for a gradient) and float16 raise a ValueError, adapters that
    `freeze_base_model()` froze afterwards are warned of. Parameters that are thawed afterwards are saved too.
    A model on the meta device may be prepared for its shapes; train one with loaded weights.

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
        ValueError: no description for the model's type, a model that is prepared already or in a parallel
            wrapper, an unknown method, option or name, a value out of range, a method that the model cannot
            have, weights that cannot be trained (quantised, sparse, float16), a trained adapter of peft, or
            parameters that may be a head and are not next to the encoder. The model is untouched.
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
    check_editable(model, encoder)
    heads = _find_heads(encoder, head)
    trained_head = _parameters_of_heads(encoder, heads)
    edit: Edit | None = None
    try:
        edit = found.edit(encoder)
        if edit.is_empty:
            # An empty edit leaves no mark and no flag, as several may share an encoder. A model in its own
            # training code must be marked, and must record no graph below its head.
            edit.revert()
            edit = Edit(encoder, found.name)
            with edit:
                edit.train([])
        for parameter in trained_head:
            parameter.requires_grad_(True)
        add_watch(edit, encoder, trained_head)
        prepared = _make_record(found, heads, edit)
        encoder.root.__dict__[_RECORD] = prepared
        saving.install(edit, prepared.trained_tensors())
        return prepared
    except BaseException:
        encoder.root.__dict__.pop(_RECORD, None)
        if edit is not None:
            saving.remove(edit)
            edit.revert()
        raise


def _make_record(method: Method, heads: list[str], edit: Edit) -> Prepared:
    named = {plain_name(name): each for name, each in edit.encoder.root.named_parameters()}
    names = tuple(name for name, parameter in named.items() if parameter.requires_grad)
    check_trained(named.items())
    if not names:
        raise ValueError(
            f"method {method.name!r} trains no part of the encoder, and the model has no head outside "
            "it; name one"
        )
    return Prepared(
        method=method,
        head=heads,
        edit=edit,
        trainable=names,
        trainable_parameters=sum(named[name].numel() for name in names),
        total_parameters=sum(parameter.numel() for parameter in named.values()),
    )


def is_prepared(model: nn.Module) -> bool:
    """Whether the model, or the one inside its wrappers, is prepared."""
    return any(_RECORD in module.__dict__ for module in chain(model))


def get_prepared(model: nn.Module) -> Prepared:
    """The record that `prepare` returned for this model, or for the one inside its wrappers.

    Raises:
        ValueError: the model is not prepared.
    """
    for module in chain(model):
        if _RECORD in module.__dict__:
            return module.__dict__[_RECORD]
    parts = [name for name, module in model.named_modules() if _RECORD in module.__dict__]
    where = f"; its part {parts[0]!r} is, give that" if parts else "; call mmtransfer.prepare on it first"
    raise ValueError(f"{type(model).__name__} is not prepared{where}")


def revert(model: nn.Module) -> None:
    """`Prepared.revert` of a prepared model."""
    get_prepared(model).revert()


def _find_heads(encoder: Encoder, head: str | Sequence[str] | None) -> list[str]:
    model = encoder.root
    if head is None:
        return [] if model is encoder.model or _has_decoder(model) else _find_neighbours(encoder)
    names = [head] if isinstance(head, str) else list(head)
    inside = {id(parameter) for parameter in encoder.model.parameters()}
    for name in names:
        if not _has_weights(model, name):
            children = ", ".join(child for child, _ in model.named_children())
            raise ValueError(f"head {name!r} has no parameters in the model, whose children are {children}")
        found = [id(each) for key, each in _named(model) if _is_inside(key, name)]
        if found and all(each in inside for each in found):
            raise ValueError(f"head {name!r} is inside the encoder, which the method trains")
    return names


def _has_weights(model: nn.Module, name: str) -> bool:
    """Whether there are parameters of this name, or a module with weights that are no parameters."""
    return any(_is_inside(key, name) for key, _ in [*_named(model), *model.named_buffers()]) or any(
        _is_inside(key, name) and is_packed(module) for key, module in model.named_modules()
    )


def _parameters_of_heads(encoder: Encoder, heads: list[str]) -> list[nn.Parameter]:
    """Those outside the encoder. ValueError for one that cannot be trained."""
    model = encoder.root
    inside = {id(parameter) for parameter in encoder.model.parameters()}
    modules = [module for name, module in model.named_modules() if plain_name(name) in heads]
    check_unquantised(modules, model, "a head of quantised weights cannot be trained")
    found = [
        each
        for name, each in _named(model)
        if id(each) not in inside and any(_is_inside(name, head) for head in heads)
    ]
    check_trainable(found, model)
    return found


def _named(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(plain_name(name), each) for name, each in model.named_parameters()]


def _has_decoder(model: nn.Module) -> bool:
    # Whisper's audio classifiers have the configuration of the whole model.
    return getattr(getattr(model, "config", None), "is_encoder_decoder", False) and any(
        name.rpartition(".")[2] == "decoder" for name, _ in model.named_modules()
    )


def _find_neighbours(encoder: Encoder) -> list[str]:
    """Direct children and parameters of the model that are outside the encoder.

    ValueError if there are more parameters outside, next to the encoder in one child: these may be a head.
    """
    model = encoder.root
    inside = {id(parameter) for parameter in encoder.model.parameters()}
    outside = [name for name, each in _named(model) if id(each) not in inside]
    children = [
        name
        for name, child in model.named_children()
        if not any(module is encoder.model for module in child.modules())
        and (
            any(_is_inside(each, name) for each in outside)
            or any(is_packed(part) for part in child.modules())
        )
    ]
    found = children + [name for name in outside if "." not in name]
    left = [name for name in outside if not any(_is_inside(name, each) for each in found)]
    if left:
        raise ValueError(
            f"{left[0]} is neither in the encoder nor in a direct child of {type(model).__name__} next to "
            "it; name the head (head=[...], the submodules that stay trainable; [] for none)"
        )
    return found


def _is_inside(parameter: str, module: str) -> bool:
    return parameter == module or parameter.startswith(f"{module}.")
