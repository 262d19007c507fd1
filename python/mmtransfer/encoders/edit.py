"""Reversible changes inside an encoder: the one mechanism behind every method that trains in it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar, copy_context
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import nn

from .checks import (
    FLOATING,
    check_loaded,
    check_not_parallel,
    check_nothing_trained_inside,
    check_trainable,
)
from .encoder import Encoder
from .freezing import Hold, get_holds, set_holds

Forward = Callable[..., Any]
T = TypeVar("T")
#: Whether a checkpoint is being loaded, which brings the values of all that an edit adds.
restoring: ContextVar[bool] = ContextVar("mmtransfer_restoring", default=False)
#: On the encoder's module while an edit is in force: the name of the method.
_MARK = "_mmtransfer_edit"


class Edit:
    """The changes that a method makes in an encoder, and the parameters that it trains there.

    As a context manager it freezes the model, lets the body make its changes, and takes all of them back if
    the body raises:

        with Edit(encoder, "my-method") as edit:
            for layer in encoder.select(None):
                scale = edit.add(layer, "scale", nn.Parameter(torch.ones(1)))
                edit.override(layer, Scaled(layer.forward, scale))

    A replacement of a `forward` should be an object and not a closure: a deep copy of the model then
    refers to the modules of the copy.

    Args:
        encoder: where the changes are made; all parameters of its root model are frozen.
        name: of the method, for messages.

    Attributes:
        parameters: those that are trained, in the order in which they were given.

    Raises:
        ValueError: the model is edited already. It is untouched.
    """

    def __init__(self, encoder: Encoder, name: str) -> None:
        check_unedited(encoder.root)
        check_loaded(encoder.root)
        self.encoder, self.name = encoder, name
        self.parameters: list[nn.Parameter] = []
        self._changed = self._in_force = False
        # The last item is a list of the value that the attribute had, empty where there was none.
        self._attributes: list[tuple[nn.Module, str, list[Any]]] = []
        self._added: list[tuple[nn.Module, str]] = []
        self._replaced: list[tuple[nn.Module, str, nn.Module]] = []
        self._hooks: list[tuple[nn.Module, Forward]] = []
        self._hold = Hold()

    @classmethod
    def nothing(cls, encoder: Encoder) -> Edit:
        """Freeze the model and change nothing: its features can be computed once and stored."""
        edit = cls(encoder, "nothing")
        try:
            edit._hold.freeze(encoder.model, encoder.root.parameters())
            return edit
        except BaseException:
            edit.revert()
            raise

    def __enter__(self) -> Edit:
        try:
            self._note(self.encoder.model, _MARK)
            self.encoder.model.__dict__[_MARK] = self.name
            self._in_force = True
            self._hold.freeze(self.encoder.model, self.encoder.root.parameters())
        except BaseException:
            self.revert()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.revert()
            return
        try:
            for parameter in self.parameters:
                parameter.requires_grad_(True)
            self._freeze_inputs()
        except BaseException:
            self.revert()
            raise

    @property
    def is_empty(self) -> bool:
        """Whether the encoder computes as before and nothing in it is trained."""
        return not (self._changed or self.parameters)

    def adds_to(self, module: nn.Module) -> bool:
        """Whether a child of the module was added or replaced."""
        inside = set(module.modules())
        return any(owner in inside for owner, *_ in (*self._added, *self._replaced))

    def added_buffers(self) -> Iterator[torch.Tensor]:
        """The buffers of the modules that were added, such as projections that are drawn once and frozen."""
        for owner, name in self._added:
            if isinstance(added := getattr(owner, name), nn.Module):
                yield from added.buffers()

    def check_alone(self) -> None:
        """Raise a ValueError if another edit of the encoder is in force."""
        if not self._in_force and (name := self.encoder.model.__dict__.get(_MARK)) is not None:
            raise ValueError(
                f"the encoder has been edited elsewhere, by method {name!r}; revert that first, or edit a "
                "copy of the model"
            )

    def train(self, parameters: Iterable[nn.Parameter]) -> None:
        """Have these parameters of the model trained.

        ValueError for one that cannot be: quantised, sparse, not initialised.
        """
        known = {id(parameter) for parameter in self.parameters}
        new = {id(parameter): parameter for parameter in parameters if id(parameter) not in known}
        check_trainable(new.values(), self.encoder.root)
        self.parameters += new.values()

    def add(self, owner: nn.Module, name: str, value: Any) -> Any:
        """Make a module or a parameter a child of `owner`, train it, and return it.

        ValueError if `owner` has an attribute of this name.
        """
        if hasattr(owner, name):
            raise ValueError(f"a layer of the model has an attribute {name!r} already")
        self._added.append((owner, name))
        self._changed = True
        setattr(owner, name, value)
        self.train([value] if isinstance(value, nn.Parameter) else value.parameters())
        return value

    def override(self, module: nn.Module, forward: Forward) -> None:
        """Have `forward` called in place of `module.forward`."""
        self._note(module, "forward")
        module.__dict__["forward"] = forward
        self._changed = True

    def note(self, module: nn.Module, name: str) -> None:
        """Have `revert` restore a plain attribute of the module, which the edit is about to change."""
        self._note(module, name)
        self._changed = True

    def _note(self, module: nn.Module, name: str) -> None:
        self._attributes.append((module, name, [module.__dict__[name]] if name in module.__dict__ else []))

    def note_child(self, parent: nn.Module, name: str) -> None:
        """Have `revert` restore a child module, which is about to be replaced."""
        self._replaced.append((parent, name, parent.get_submodule(name)))
        self._changed = True

    def hook(self, module: nn.Module, hook: Forward) -> None:
        """Have `hook(module, inputs)` called before the module's forward; see `register_forward_pre_hook`."""
        self._hooks.append((module, hook))
        module.register_forward_pre_hook(hook)

    def place(self, layer: nn.Module) -> dict[str, Any]:
        """Device and dtype of new parameters of a layer: float64 in float64, else float32.

        Half precision would lose the small steps of an optimiser.
        """
        tensors = [*layer.parameters(), *self.encoder.model.parameters()]
        # Quantised weights have other dtypes.
        dtype = next((each.dtype for each in tensors if each.dtype in FLOATING), torch.float32)
        return {"device": tensors[0].device, "dtype": torch.promote_types(dtype, torch.float32)}

    def revert(self) -> None:
        """Take everything back: forwards, children, `requires_grad` flags; added parameters are dropped.

        Trained weights of the model keep their values. Parameters that another edit froze too stay frozen.
        """
        for module, name, value in reversed(self._attributes):
            module.__dict__.pop(name, None)
            if value:
                module.__dict__[name] = value[0]
        for owner, name in self._added:
            # It is listed before it is there.
            if hasattr(owner, name):
                delattr(owner, name)
        for owner, name, module in self._replaced:
            setattr(owner, name, module)
        for module, hook in self._hooks:
            for key in [key for key, each in module._forward_pre_hooks.items() if each == hook]:
                del module._forward_pre_hooks[key]
        self._hold.release(self.encoder.model)
        self.parameters, self._changed, self._in_force = [], False, False
        self._attributes, self._added, self._replaced, self._hooks = [], [], [], []

    def _freeze_inputs(self) -> None:
        """Have frozen parts record no graph.

        In training the convolutions of the wav2vec2 family ask for the gradient of their input, unless this
        flag is off; everything up to the lowest trained parameter would be kept for the backward pass.
        """
        for module in self.encoder.model.modules():
            trained = any(parameter.requires_grad for parameter in module.parameters())
            if module.__dict__.get("_requires_grad") and not trained:
                self._note(module, "_requires_grad")
                module.__dict__["_requires_grad"] = False


def restored(build: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """`build(*args, **kwargs)`, whose edits leave the values of additions to a checkpoint."""
    # In a separate context: no error and no interruption can leave `restoring` set for other models.
    context = copy_context()
    context.run(restoring.set, True)
    return context.run(build, *args, **kwargs)


@contextlib.contextmanager
def untouched_on_error(model: nn.Module) -> Iterator[None]:
    """Give the model back as it was, dtypes, modes and `requires_grad` flags too, if the body raises."""
    parameters = [(each, each.data, each.requires_grad) for each in model.parameters()]
    buffers = [(each, dict(each._buffers), each.training) for each in model.modules()]
    holds = get_holds(model)
    try:
        yield
    except BaseException:
        for parameter, data, flag in parameters:
            parameter.data = data
            parameter.requires_grad_(flag)
        for module, values, training in buffers:
            module._buffers.update(values)
            module.training = training
        set_holds(model, holds)
        raise


def check_editable(model: nn.Module, encoder: Encoder) -> None:
    """Raise a ValueError unless `model`, as it was given, and its encoder can be changed and trained."""
    check_unedited(encoder.root)
    check_loaded(encoder.root)
    check_not_parallel(model)
    check_nothing_trained_inside(encoder.model)


def check_unedited(model: nn.Module) -> None:
    """Raise a ValueError if the model, or a part of it, is edited."""
    for name, module in model.named_modules():
        if _MARK in module.__dict__:
            where = f" in its part {name!r}" if name else ""
            raise ValueError(
                f"model is edited already, by method {module.__dict__[_MARK]!r}{where}; revert that first"
            )


def check_layers(encoder: Encoder, layers: Iterable[nn.Module]) -> None:
    """Raise a ValueError unless the layers have the projections and MLP that the description names."""
    row = encoder.description
    paths = (row.layer_query, row.layer_key, row.layer_value, row.layer_attention_output, *row.layer_mlp)
    for index, layer in enumerate(layers):
        for path in (row.layer_attention, *paths):
            try:
                layer.get_submodule(path)
            except AttributeError as error:
                raise ValueError(f"layer {index} does not fit the description: {error}") from None
        output = layer.get_submodule(row.layer_attention_output)
        # GPT-2's transposed layers call it nf.
        if int(getattr(output, "out_features", getattr(output, "nf", 0))) < 1:
            raise ValueError(f"layer {index}: {row.layer_attention_output!r} is not a linear layer")
