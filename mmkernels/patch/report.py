"""The report of ``accelerate``: the changes to a model, and how to undo them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from torch import nn


class Replaced(NamedTuple):
    """A module that now uses a kernel."""

    name: str
    """Qualified name in the model given to ``accelerate``; empty for the model itself."""
    class_name: str
    what: str


class Skipped(NamedTuple):
    """A recognised module that does not use a kernel, and the reason."""

    name: str
    reason: str


class Note(NamedTuple):
    """A remark on a module: a setting with which training fails, or a near miss."""

    name: str
    text: str


@dataclass(frozen=True)
class Swap:
    """One module whose class is replaced."""

    name: str
    module: nn.Module
    original: type[nn.Module]
    accelerated: type[nn.Module]
    what: str
    forward: object
    """A forward that was set on the instance before (by a device map, for example), else None."""

    @classmethod
    def of(cls, name: str, module: nn.Module, accelerated: type[nn.Module], what: str) -> Swap:
        return cls(name, module, type(module), accelerated, what, vars(module).get("forward"))

    def apply(self) -> None:
        self.module.__class__ = self.accelerated

    def obstacle(self) -> str | None:
        """The reason why reverting cannot restore the module exactly, or None."""
        if type(self.module) is self.original:
            return None
        if type(self.module) is not self.accelerated:
            return f"its class is now {type(self.module).__qualname__}, changed after accelerate()"
        if vars(self.module).get("forward") is not self.forward:
            return "its forward was wrapped on the instance after accelerate(); remove that wrapper first"
        return None

    def revert(self) -> None:
        self.module.__class__ = self.original


@dataclass
class Report:
    """Result of ``accelerate``; its text has one line for each replaced or skipped module, and each note.

    Attributes:
        replaced: the modules that use a kernel now.
        skipped: the modules that were recognised and not replaced, each with the reason.
        notes: settings of replaced modules with which training will fail; where no module was recognised, the
            modules that came near.
    """

    replaced: list[Replaced] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    _swaps: list[Swap] = field(default_factory=list, repr=False)

    def revert(self) -> None:
        """Give every replaced module its own class back. Reverting twice is allowed.

        Raises:
            RuntimeError: a module was changed further after ``accelerate`` (its class, or a ``forward`` set
                on the instance), so that the earlier state cannot be restored; then no module is reverted.
        """
        obstacles = [f"{_display(swap.name)}: {why}" for swap in self._swaps if (why := swap.obstacle())]
        if obstacles:
            raise RuntimeError("cannot revert " + "; ".join(obstacles))
        for swap in self._swaps:
            swap.revert()

    def __str__(self) -> str:
        lines = [f"mmkernels.accelerate: {len(self.replaced)} replaced, {len(self.skipped)} skipped"]
        lines += [
            f"  replaced {_display(name)} ({class_name}): {what}" for name, class_name, what in self.replaced
        ]
        lines += [f"  skipped  {_display(name)}: {reason}" for name, reason in self.skipped]
        lines += [f"  note     {_display(name)}: {text}" for name, text in self.notes]
        return "\n".join(lines)


def _display(name: str) -> str:
    return name or "(model)"
