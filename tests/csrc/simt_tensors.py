"""Torch tensors in guarded memory, for kernels that run on the host SIMT runtime."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
import torch
from simt_build import Guarded
from torch import Tensor

#: Values of mmk::DType.
DTYPE_CODES = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 3}
HALF_DTYPES = (torch.float16, torch.bfloat16)


class GuardedTensors:
    """Allocates tensors between guard bytes: NaN until written; `check` finds writes past their ends."""

    def __init__(self) -> None:
        self._guards: list[Guarded] = []

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        guard = Guarded((int(np.prod(shape)) * dtype.itemsize,), np.uint8)
        self._guards.append(guard)
        if guard.array.size == 0:
            return torch.empty(tuple(shape), dtype=dtype)
        return torch.from_numpy(guard.array).view(dtype).reshape(tuple(shape))

    def of(self, values: Tensor, offset: int = 0) -> Tensor:
        """A copy whose first element is `offset` elements past a 256-byte boundary."""
        flat = self.empty((values.numel() + offset,), values.dtype)[offset:]
        return flat.reshape(values.shape).copy_(values)

    def check(self) -> None:
        for guard in self._guards:
            guard.check()


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None or tensor.numel() == 0 else tensor.data_ptr())


def pointers(tensors: Sequence[Tensor | None]) -> np.ndarray:
    return np.array([0 if t is None else t.data_ptr() for t in tensors], np.uint64)


def integers(*values: int) -> np.ndarray:
    return np.array(values, np.int64)
