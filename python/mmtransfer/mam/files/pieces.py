"""Pieces of tensors: read, sum, write."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import mmkernels
from mmtransfer.data.errors import DataError

from .checkpoint import Stored
from .plan import FLOATS, Entry, Patch
from .streams import PIECE, TORCH, Reader, write_at

#: Bytes of the work that a thread takes at a time.
_PORTION = 32 << 20
#: Weights of two tensors whose sum is this close to 1 are an interpolation.
_CLOSE = 1e-9

#: Held for a tensor that is in memory as a whole: one at a time.
_whole = threading.Lock()


@dataclass(frozen=True)
class Piece:
    """Elements `[begin, end)` of a tensor, and where the tensor begins in an open file.

    For a copy they are counted in bytes.
    """

    entry: Entry
    file: int
    start: int
    begin: int
    end: int


def cut(entry: Entry, file: int, start: int) -> Iterator[Piece]:
    """A tensor in portions of work; whole where matrices in it are patched."""
    length = entry.size if entry.is_copy else entry.elements
    portions = 1 if entry.patches else -(-entry.size // _PORTION)
    step = max(-(-length // max(portions, 1)), 1)
    for begin in range(0, length, step):
        yield Piece(entry, file, start, begin, min(begin + step, length))


def write_piece(piece: Piece, reader: Reader, stop: threading.Event) -> int:
    """Write a portion; the number of its bytes. Ends early once `stop` is set."""
    if piece.entry.is_copy:
        return _copy(piece, reader, stop)
    if piece.entry.patches:
        with _whole:
            return _patch(piece, reader)
    return _sum(piece, reader, stop)


def _copy(piece: Piece, reader: Reader, stop: threading.Event) -> int:
    stored = piece.entry.terms[0].stored
    buffer = torch.empty(PIECE, dtype=torch.uint8)
    for begin in range(piece.begin, piece.end, PIECE):
        if stop.is_set():
            break
        part = buffer[: min(PIECE, piece.end - begin)]
        reader.read(stored, begin, part)
        write_at(piece.file, part, piece.start + begin)
    return piece.end - piece.begin


def _sum(piece: Piece, reader: Reader, stop: threading.Event) -> int:
    entry = piece.entry
    width = FLOATS[entry.dtype]
    widths = [FLOATS[term.stored.dtype] for term in entry.terms]
    count = PIECE // max(width, *widths)
    buffers = [torch.empty(count * each, dtype=torch.uint8) for each in widths]
    result = torch.empty(count, dtype=TORCH[entry.dtype])
    weights = [term.weight for term in entry.terms]
    for begin in range(piece.begin, piece.end, count):
        if stop.is_set():
            break
        length = min(count, piece.end - begin)
        tensors = []
        for term, each, buffer in zip(entry.terms, widths, buffers, strict=True):
            part = buffer[: length * each]
            reader.read(term.stored, begin * each, part)
            tensors.append(part.view(TORCH[term.stored.dtype]))
        out = weighted_sum(tensors, weights, result[:length])
        _check_range(entry, tensors, out)
        write_at(piece.file, out, piece.start + begin * width)
    return (piece.end - piece.begin) * width


def weighted_sum(tensors: list[Tensor], weights: list[float], out: Tensor) -> Tensor:
    """The sum into `out`, computed in float32 (float64 where a tensor is) and rounded once."""
    if len(tensors) == 1 and weights[0] == 1:
        return out.copy_(tensors[0])
    wide = torch.float64 if torch.float64 in (out.dtype, *(each.dtype for each in tensors)) else torch.float32
    if len(tensors) == 2 and abs(sum(weights) - 1) < _CLOSE:
        return interpolate(tensors[0], tensors[1], weights[1], out, wide)
    total = tensors[0].to(wide) * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total.add_(tensor.to(wide), alpha=weight)
    return out.copy_(total)


def interpolate(target: Tensor, source: Tensor, lam: float, out: Tensor, wide: torch.dtype) -> Tensor:
    """`(1 - lam) * target + lam * source` into `out`."""
    if wide == torch.float64:
        # The op takes float64 from both sides alone.
        pair = [target.to(wide)], [source.to(wide)]
        return out.copy_(mmkernels.merge(*pair, torch.tensor([lam], dtype=wide))[0])
    mmkernels.merge([target], [source], torch.tensor([lam]), dtype=out.dtype, out=[out])
    return out


def _check_range(entry: Entry, tensors: list[Tensor], out: Tensor) -> None:
    """DataError for a finite value that float16 cannot hold; wider dtypes hold all that models have."""
    if entry.dtype != "F16" or all(tensor.dtype == torch.float16 for tensor in tensors):
        return
    if not torch.isfinite(out).all() and all(torch.isfinite(tensor).all() for tensor in tensors):
        raise DataError(
            f"{entry.name} has values beyond those of float16, which would become infinite; give dtype: "
            "bfloat16 or float32"
        )


def _patch(piece: Piece, reader: Reader) -> int:
    """A tensor in memory, with its matrices merged one after the other."""
    entry = piece.entry
    own = reader.read_whole(entry.terms[0].stored)
    result = own.to(TORCH[entry.dtype])
    # The three parts of a fused tensor are read once.
    read = functools.lru_cache(maxsize=1)(reader.read_whole)
    for patch in entry.patches:
        source = _source_of(patch, own, read)
        _merge(patch, own, source, result)
        _check_range(entry, [own, source], result)
    write_at(piece.file, result, piece.start)
    return entry.size


def _source_of(patch: Patch, own: Tensor, read: Callable[[Stored], Tensor]) -> Tensor:
    """The matrix of the source, as it is merged into one of the target's tensor."""
    # Imported here: a linear merge needs no transformers, which takes seconds.
    from mmtransfer.mam.merging import fit
    from mmtransfer.mam.sources import match_scale

    target = patch.target.select(own)
    if patch.stored is None or patch.source is None:
        return torch.zeros_like(target)
    source = patch.source.select(read(patch.stored))
    return fit(match_scale(source, target) if patch.match_rms else source, target)


def _merge(patch: Patch, own: Tensor, source: Tensor, result: Tensor) -> None:
    """Write the interpolation of one matrix into its place in the result."""
    target, place = patch.target.select(own), patch.target.select(result)
    wide = torch.float64 if torch.float64 in (target.dtype, place.dtype) else torch.float32
    merged = (
        place if place.is_contiguous() else torch.empty_like(place, memory_format=torch.contiguous_format)
    )
    interpolate(target, source, patch.lam, merged, wide)
    if merged is not place:
        place.copy_(merged)
