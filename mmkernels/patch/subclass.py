"""The class of an accelerated module: a subclass of its original class with a few methods overridden."""

from __future__ import annotations

import types
from typing import Any

from torch import nn

from mmkernels.patch.recogniser import Recogniser, Unsupported

_ORIGINAL = "_mmkernels_original_class"
_RECOGNISER = "_mmkernels_recogniser"
_accelerated_classes: dict[tuple[Any, Recogniser, Any], type[nn.Module]] = {}


def original_class(cls: type[nn.Module]) -> type[nn.Module] | None:
    """The class that an accelerated class, or a subclass of one, comes from; None for any other class."""
    return getattr(cls, _ORIGINAL, None)


def recogniser_of(cls: type[nn.Module]) -> Recogniser | None:
    """The recogniser that made an accelerated class; None for any other class."""
    return getattr(cls, _RECOGNISER, None)


def accelerated_class(base: type[nn.Module], recogniser: Recogniser) -> type[nn.Module]:
    """``base`` with the recogniser's method. Cached, so that modules of one class stay of one class.

    A method that was set on the class since (a patch of another package) makes another class.
    """
    key = base, recogniser, getattr(base, recogniser.method, None)
    if key not in _accelerated_classes:
        _accelerated_classes[key] = _derive(base, recogniser)
    return _accelerated_classes[key]


def _derive(base: type[nn.Module], recogniser: Recogniser) -> type[nn.Module]:
    def reduce_ex(self: nn.Module, protocol: int) -> Any:
        # Its name is that of the original class, so pickle the two objects that it is derived from.
        reduced = super(accelerated, self).__reduce_ex__(max(int(protocol), 2))
        if type(self) is not accelerated or isinstance(reduced, str) or reduced[1] != (accelerated,):
            return reduced
        return (_restore, (base, recogniser), *reduced[2:])

    namespace: dict[str, Any] = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": reduce_ex,
        _ORIGINAL: base,
        _RECOGNISER: recogniser,
        recogniser.method: recogniser.override(base),
    }
    accelerated: type[Any] = types.new_class(
        base.__name__, (base,), exec_body=lambda scope: scope.update(namespace)
    )
    return accelerated


def _restore(base: type[nn.Module], recogniser: Recogniser) -> nn.Module:
    """An empty accelerated module for unpickling; of the original class if none can be derived here."""
    try:
        cls = accelerated_class(base, recogniser)
    except Unsupported:
        cls = base
    return cls.__new__(cls)
