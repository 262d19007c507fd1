"""Tensors from and to files in pieces: a few megabytes of memory, however large the tensors are."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from .checkpoint import Stored

TORCH = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
#: Bytes of a piece: two pieces and the result fit into the second level of caches.
PIECE = 1 << 20


class Reader:
    """Open files, read at any place by any thread; closed at the end of a `with`."""

    def __init__(self) -> None:
        self._files: dict[Path, int] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._files:
            os.close(self._files.popitem()[1])

    def read(self, stored: Stored, begin: int, buffer: Tensor) -> None:
        """Fill a buffer (uint8, contiguous) with the bytes of a tensor from `begin` on."""
        with self._lock:
            if stored.path not in self._files:
                self._files[stored.path] = os.open(stored.path, os.O_RDONLY | os.O_CLOEXEC)
            file = self._files[stored.path]
        view, place = buffer.numpy().data, stored.start + begin
        while len(view):
            count = os.preadv(file, [view], place)
            if not count:
                raise OSError(
                    f"{stored.path} ends in the middle of {stored.name}; it changed during the merge"
                )
            view, place = view[count:], place + count

    def read_whole(self, stored: Stored) -> Tensor:
        """A tensor in memory."""
        buffer = torch.empty(stored.size, dtype=torch.uint8)
        self.read(stored, 0, buffer)
        return buffer.view(TORCH[stored.dtype]).view(stored.shape)

    def equal(self, first: Stored, second: Stored) -> bool:
        """Whether two tensors have the same bytes."""
        if first.size != second.size:
            return False
        pieces = [torch.empty(PIECE, dtype=torch.uint8) for _ in range(2)]
        for begin in range(0, first.size, PIECE):
            ours, theirs = (piece[: min(PIECE, first.size - begin)] for piece in pieces)
            self.read(first, begin, ours)
            self.read(second, begin, theirs)
            if not torch.equal(ours, theirs):
                return False
        return True


def write_at(file: int, buffer: Tensor, place: int) -> None:
    """Write the bytes of a contiguous tensor to an open file."""
    view = buffer.view(torch.uint8).view(-1).numpy().data
    while len(view):
        count = os.pwrite(file, view, place)
        view, place = view[count:], place + count
