"""Errors at every step of a change of a model: at each line of the package, at each call that changes one."""

from __future__ import annotations

import linecache
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import nn

from mmtransfer.encoders import Edit


class BrokenStepError(BaseException):
    """Raised at one step; not an Exception, like an interruption by the keyboard."""


UNPROTECTED = ("__enter__", "__exit__", "edit", "revert")


class Steps:
    """Lists the lines of mmtransfer that run, and the attributes that modules are given, while it is active;
    raises at the one of an index.

    Taking an edit back is no step. Nor are the lines of a `with` statement and of the methods that it calls:
    Python runs some of them outside the statement's protection.
    """

    def __init__(self, broken: int | None = None) -> None:
        self.broken = broken
        self.places: list[Any] = []

    def __enter__(self) -> Steps:
        sys.settrace(self._enter_frame)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def each(self) -> list[int]:
        """The indices at which a place is met for the first or the last time."""
        first = {place: index for index, place in reversed([*enumerate(self.places)])}
        last = {place: index for index, place in enumerate(self.places)}
        return sorted({*first.values(), *last.values()})

    def _enter_frame(self, frame: FrameType, event: str, _arg: Any) -> Any:
        code = frame.f_code
        if code is nn.Module.__setattr__.__code__ and frame.f_back is not None:
            self._step(frame.f_back)
        if "mmtransfer" not in code.co_filename or code.co_name in UNPROTECTED:
            return None
        return self._enter_line

    def _enter_line(self, frame: FrameType, event: str, _arg: Any) -> Any:
        if event == "line" and not _is_with(frame):
            self._step(frame)
        return self._enter_line

    def _step(self, frame: FrameType) -> None:
        above: FrameType | None = frame
        while above is not None:
            if above.f_code is Edit.revert.__code__:
                return
            above = above.f_back
        self.places.append((frame.f_code, frame.f_lineno))
        if len(self.places) - 1 == self.broken:
            raise BrokenStepError


def _is_with(frame: FrameType) -> bool:
    return linecache.getline(frame.f_code.co_filename, frame.f_lineno).lstrip().startswith("with ")


#: Functions that change a module or a parameter.
CHANGES: tuple[tuple[Any, str], ...] = (
    (nn.Module, "__setattr__"),
    (nn.Module, "__delattr__"),
    (nn.Module, "register_parameter"),
    (nn.Module, "add_module"),
    (nn.Module, "register_forward_pre_hook"),
    (nn.Module, "register_forward_hook"),
    (nn.Module, "train"),
    (nn.Module, "_apply"),
    (torch.Tensor, "requires_grad_"),
    (torch.Tensor, "copy_"),
)


class Changes:
    """Counts the calls that change something while it is active; raises before or after the one of a number.

    After that nothing is counted: the calls are those that take changes back.
    """

    def __init__(self, broken: int | None = None, *, after: bool = False) -> None:
        self.broken, self.after = broken, after
        self.count = 0
        self._originals: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> Changes:
        for owner, name in CHANGES:
            original = getattr(owner, name)
            self._originals.append((owner, name, owner.__dict__.get(name)))
            setattr(owner, name, self._counted(original))
        return self

    def __exit__(self, *_: object) -> None:
        for owner, name, original in self._originals:
            if original is None:
                delattr(owner, name)
            else:
                setattr(owner, name, original)

    def _counted(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            number, self.count = self.count, self.count + 1
            broken = number == self.broken
            if broken and not self.after:
                raise BrokenStepError
            result = original(*args, **kwargs)
            if broken:
                raise BrokenStepError
            return result

        return call
