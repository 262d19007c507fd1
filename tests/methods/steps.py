"""Errors at every step of a change of a model: at each line of the package, at each call that changes one."""

from __future__ import annotations

import functools
import linecache
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch import nn

import mmkernels
import mmtransfer
from mmtransfer.encoders import Edit

_PACKAGES = tuple(str(Path(str(each.__file__)).parent) for each in (mmkernels, mmtransfer))


class BrokenStepError(BaseException):
    """Raised at one step; not an Exception, like an interruption by the keyboard."""


_REVERT, _SETATTR = Edit.revert.__code__, nn.Module.__setattr__.__code__
UNPROTECTED = ("__enter__", "__exit__", "edit", "revert")

#: A line, and which time it is met.
Step = tuple[CodeType, int, int]


class Steps:
    """Lists the lines of mmtransfer that run, and the attributes that modules are given, while it is active;
    raises at `broken`, which is one of `each` of an earlier list, and then lists nothing.

    Taking an edit back is no step. Nor are the lines of a `with` statement and of the methods that it calls:
    Python runs some of them outside the statement's protection.
    """

    def __init__(self, broken: Step | None = None) -> None:
        self.places: list[tuple[CodeType, int]] = []
        self._code, self._line, self._left = broken or (None, 0, 0)
        self._reverting = 0

    def __enter__(self) -> Steps:
        sys.settrace(self._enter_frame)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def each(self) -> list[Step]:
        """Each line, the first and the last time that it is met."""
        times = Counter((id(code), line) for code, line in self.places)
        lines = {(id(code), line): (code, line) for code, line in self.places}
        return [(*lines[key], time) for key, count in times.items() for time in sorted({1, count})]

    def _enter_frame(self, frame: FrameType, event: str, _arg: Any) -> Any:
        code = frame.f_code
        if code is _REVERT:
            self._reverting += 1
            return self._leave_revert
        if self._reverting:
            return None
        if code is _SETATTR and frame.f_back is not None:
            self._step(frame.f_back)
        # Lines take most of the time: where one is to raise, no other code has to report its own.
        if self._code is not None and code is not self._code:
            return None
        if "mmtransfer" not in code.co_filename or code.co_name in UNPROTECTED:
            return None
        return self._enter_line

    def _leave_revert(self, frame: FrameType, event: str, _arg: Any) -> Any:
        self._reverting -= event == "return"
        return self._leave_revert

    def _enter_line(self, frame: FrameType, event: str, _arg: Any) -> Any:
        # A generator of before may go on while an edit is taken back.
        if event == "line" and not self._reverting and not _is_with(frame.f_code.co_filename, frame.f_lineno):
            self._step(frame)
        return self._enter_line

    def _step(self, frame: FrameType) -> None:
        if self._code is None:
            self.places.append((frame.f_code, frame.f_lineno))
        elif frame.f_code is self._code and frame.f_lineno == self._line:
            self._left -= 1
            if self._left == 0:
                raise BrokenStepError


@functools.cache
def _is_with(file: str, line: int) -> bool:
    return linecache.getline(file, line).lstrip().startswith("with ")


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
        self.places: list[Any] = []
        self._originals: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> Changes:
        for owner, name in CHANGES:
            original = getattr(owner, name)
            self._originals.append((owner, name, owner.__dict__.get(name)))
            setattr(owner, name, self._counted(name, original))
        return self

    def __exit__(self, *_: object) -> None:
        for owner, name, original in self._originals:
            if original is None:
                delattr(owner, name)
            else:
                setattr(owner, name, original)

    def each(self) -> list[int]:
        """The numbers of the first and the last call from each place."""
        first = {place: number for number, place in reversed([*enumerate(self.places)])}
        last = {place: number for number, place in enumerate(self.places)}
        return sorted({*first.values(), *last.values()})

    def _counted(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            number, self.count = self.count, self.count + 1
            broken = number == self.broken
            if self.broken is None:
                self.places.append((name, *_callers(sys._getframe(1))))
            if broken and not self.after:
                raise BrokenStepError
            result = original(*args, **kwargs)
            if broken:
                raise BrokenStepError
            return result

        return call


def _callers(frame: FrameType) -> list[Any]:
    """The line of a call, and the line of the packages that it comes from."""
    above: FrameType | None = frame
    while above is not None and not above.f_code.co_filename.startswith(_PACKAGES):
        above = above.f_back
    return [None if each is None else (id(each.f_code), each.f_lineno) for each in (frame, above)]
