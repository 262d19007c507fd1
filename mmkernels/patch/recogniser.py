"""The interface of one kind of replacement."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn


class Unsupported(Exception):
    """The recogniser claims the module, but it must not be replaced; the message is the reason."""


class Recogniser(ABC):
    """One kind of slow fragment: how to find it, and the methods that replace it.

    Recognisers have no state, so two of the same class are equal: they key the cache of accelerated classes
    and travel in pickles of accelerated modules.
    """

    what: str
    """The fragment and its replacement, for the report."""
    method: str
    """The method that the accelerated class overrides."""

    @abstractmethod
    def claims(self, module: nn.Module) -> bool:
        """Whether the module holds such a fragment, supported or not. Called for every module: be cheap."""

    @abstractmethod
    def check(self, module: nn.Module) -> None:
        """Raise ``Unsupported`` when this instance must not be replaced."""

    def exceptions(self, module: nn.Module) -> Iterable[tuple[str, str]]:
        """Submodules (name, reason) that a replaced module still runs itself, for the report."""
        return ()

    def covers(self, module: nn.Module) -> Iterable[nn.Module]:
        """Submodules that a replaced module computes: they are neither replaced nor listed themselves."""
        return ()

    def notes(self, module: nn.Module) -> Iterable[str]:
        """Remarks on a replaced module, for the report."""
        return ()

    @abstractmethod
    def override(self, cls: type[Any]) -> Callable[..., Any]:
        """The overriding method for a claimed module's class; raise ``Unsupported`` if it is unknown."""

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other)

    def __hash__(self) -> int:
        return hash(type(self))
