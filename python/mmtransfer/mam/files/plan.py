"""The plan of a merge: each tensor of the result, and the stored tensors that it is made of."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .checkpoint import Checkpoint, Stored

if TYPE_CHECKING:
    # A linear merge needs no transformers, which takes seconds to import.
    from mmtransfer.mam.projections import Projection

#: Floating-point dtypes that can be merged, with the bytes of an element.
FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True)
class Term:
    """A stored tensor and its weight in a sum."""

    stored: Stored
    weight: float


@dataclass(frozen=True)
class Patch:
    """A matrix in a tensor of the result, interpolated with a source's.

    Attributes:
        target: where the matrix is in the tensor.
        stored, source: the tensor with the source's matrix, and where it is in that; None for a bias that the
            source lacks, which is one of zeros.
        lam: weight of the source.
        match_rms: scale the source's matrix to the root mean square of the target's.
    """

    target: Projection
    stored: Stored | None
    source: Projection | None
    lam: float
    match_rms: bool


@dataclass(frozen=True)
class Entry:
    """A tensor of the result: a weighted sum of stored tensors of its shape, with patched matrices in it.

    One term of weight 1 is a copy; `dtype` is that of the result, as safetensors writes it.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    terms: tuple[Term, ...]
    patches: tuple[Patch, ...] = ()

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """Bytes in the result."""
        return self.elements * FLOATS[self.dtype] if self.dtype in FLOATS else self.terms[0].stored.size

    @property
    def is_copy(self) -> bool:
        """Whether its bytes are those of the one stored tensor."""
        return self.keeps_values and self.terms[0].stored.dtype == self.dtype

    @property
    def keeps_values(self) -> bool:
        """Whether it is one stored tensor, perhaps in another dtype."""
        return len(self.terms) == 1 and self.terms[0].weight == 1 and not self.patches


@dataclass(frozen=True)
class Plan:
    """A merge that can be carried out.

    Attributes:
        target: whose configuration and other files the result has.
        inputs: all checkpoints, which must not be written over.
        entries: the tensors of the result, in the order of the target's files.
        dtype: of the result, where the recipe has one.
        notes: sentences about tensors that are left as they are.
    """

    target: Checkpoint
    inputs: tuple[Checkpoint, ...]
    entries: tuple[Entry, ...]
    dtype: str | None
    notes: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        return sum(entry.size for entry in self.entries)


def result_dtype(stored: Stored, dtype: str | None) -> str:
    """The dtype of a tensor of the result: the recipe's for floating-point tensors, else the target's."""
    return dtype if dtype is not None and stored.dtype in FLOATS else stored.dtype
