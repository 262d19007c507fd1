"""Freezing that several owners share: a parameter is frozen until the last of them lets it go."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import nn

#: On an encoder that is frozen: its `_Holds`.
_HOLDS = "_mmtransfer_holds"


class Hold:
    """One owner's claim that parameters are frozen, and the flags that they had before any owner froze them.

    A hold that is dropped without `release` counts no more.
    """

    def __init__(self) -> None:
        self._flags: list[tuple[nn.Parameter, bool]] = []

    def freeze(self, encoder: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
        """Freeze the parameters, on behalf of this hold; `encoder` is where other holds of them are found."""
        holds = encoder.__dict__.setdefault(_HOLDS, _Holds())
        original = {id(each): flag for hold in holds.alive() for each, flag in hold._flags}
        self._flags = [(each, original.get(id(each), each.requires_grad)) for each in parameters]
        holds.add(self)
        for each, _ in self._flags:
            each.requires_grad_(False)

    def release(self, encoder: nn.Module) -> None:
        """Give the parameters their flags back, but for those that others hold, which stay frozen."""
        holds = encoder.__dict__.get(_HOLDS, _Holds())
        holds.drop(self)
        kept = {id(each) for hold in holds.alive() for each, _ in hold._flags}
        for each, flag in self._flags:
            each.requires_grad_(flag and id(each) not in kept)
        self._flags = []
        if not holds.alive():
            encoder.__dict__.pop(_HOLDS, None)


def get_holds(encoder: nn.Module) -> list[Hold]:
    """The holds of the encoder's parameters, the oldest first."""
    return encoder.__dict__.get(_HOLDS, _Holds()).alive()


def set_holds(encoder: nn.Module, holds: list[Hold]) -> None:
    """Have these hold the encoder's parameters and no others, whatever the flags are."""
    encoder.__dict__.pop(_HOLDS, None)
    if holds:
        encoder.__dict__[_HOLDS] = _Holds(holds)


class _Holds:
    """Weak references to holds. A copy of the model refers to the copies of those that are copied with it."""

    def __init__(self, holds: Iterable[Hold] = ()) -> None:
        self._references = [weakref.ref(hold) for hold in holds]

    def alive(self) -> list[Hold]:
        return [hold for reference in self._references if (hold := reference()) is not None]

    def add(self, hold: Hold) -> None:
        self._references = [weakref.ref(each) for each in [*self.alive(), hold]]

    def drop(self, hold: Hold) -> None:
        self._references = [weakref.ref(each) for each in self.alive() if each is not hold]

    def __reduce__(self) -> tuple[Any, ...]:
        return _Holds, (self.alive(),)
