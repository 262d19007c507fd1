"""``torch_scatter.segment_csr`` on :func:`mmkernels.segment_pool`."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.ops.segment_pool import segment_pool

_REDUCTIONS = ("sum", "add", "mean", "min", "max")


def segment_csr(src: Tensor, indptr: Tensor, out: Tensor | None = None, reduce: str = "sum") -> Tensor:
    """``torch_scatter.segment_csr``: reduce the segments ``[indptr[j], indptr[j + 1])`` of a dimension.

    ====================  =======================================  =======================================
    subject               torch-scatter 2.1.2                      here
    ====================  =======================================  =======================================
    frames outside        the gradient is memory that nobody       the gradient is 0
    every segment         wrote
    mean, backward        fails where the last pointer is not      works
                          the number of frames
    half precision        CUDA adds in half precision              float32 everywhere
    torch.compile         breaks the graph                         ``fullgraph=True``
    integers              taken                                    a TypeError that says so
    installation          minutes of compiling for each release    with mmkernels
    ====================  =======================================  =======================================

    Args:
        src: floating point; the segments lie along dimension ``indptr.dim() - 1``.
        indptr: int64 (or int32) pointers, non-decreasing along the last dimension; its leading dimensions are
            those of ``src``, or 1.
        out: written, and returned, where given; there is no gradient then.
        reduce: "sum" ("add"), "mean", "min" or "max". Segments without frames give 0.

    Returns:
        ``src`` with ``indptr.shape[-1] - 1`` entries in that dimension.

    Raises:
        TypeError, ValueError: shapes that do not match, pointers that decrease or leave the dimension (read
            on the CPU), an unknown reduction.
    """
    if not isinstance(src, Tensor) or not isinstance(indptr, Tensor):
        raise TypeError("segment_csr: src and indptr must be tensors")
    if reduce not in _REDUCTIONS:
        raise ValueError(f"segment_csr: reduce must be one of {', '.join(_REDUCTIONS)}, got {reduce!r}")
    dimension = indptr.dim() - 1
    if dimension < 0 or src.dim() <= dimension or indptr.shape[-1] == 0:
        raise ValueError(
            "segment_csr: indptr must have a pointer or more along its last dimension, and at most as many "
            f"dimensions as src, got shapes {tuple(indptr.shape)} and {tuple(src.shape)}"
        )
    before, after = src.shape[:dimension], src.shape[dimension + 1 :]
    try:
        pointers = indptr.expand(*before, indptr.shape[-1])
    except RuntimeError:
        raise ValueError(
            f"segment_csr: the leading dimensions of indptr, {tuple(indptr.shape[:-1])}, must be those of "
            f"src, {tuple(before)}, or 1"
        ) from None
    rows, columns = before.numel(), after.numel()
    frames = src.reshape(rows, src.shape[dimension], columns)
    ends = pointers.reshape(rows, indptr.shape[-1])
    # The frames before the first pointer are a segment too, which is dropped.
    pooled = _pool(frames, ends, reduce)[:, 1:].reshape(*before, indptr.shape[-1] - 1, *after)
    if out is None:
        return pooled
    if out.shape != pooled.shape:
        raise ValueError(f"segment_csr: out must have shape {tuple(pooled.shape)}, got {tuple(out.shape)}")
    with torch.no_grad():
        return out.copy_(pooled)


def _pool(frames: Tensor, ends: Tensor, reduce: str) -> Tensor:
    if reduce == "min":
        return -segment_pool(-frames, ends, reduce="max")
    return segment_pool(frames, ends, reduce="sum" if reduce == "add" else reduce)
