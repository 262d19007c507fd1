"""Vectors of speech in the space of a language model's embeddings: their width, and if they are finite."""

from __future__ import annotations

import torch

from mmtransfer.encoders.taps import Taps

#: In predictions, for an utterance with NaN or infinity.
NOT_FINITE = -2


def check_width(dim: int, width: int) -> None:
    """ValueError unless vectors have the width of the language model's embeddings."""
    if dim != width:
        raise ValueError(
            f"the vectors of speech have {dim} numbers and the embeddings of the language model {width}; "
            f"give the method a width of {width}"
        )


def find_sound(frames: torch.Tensor, taps: Taps) -> torch.Tensor:
    """`(B,)`: whether all vectors of an utterance are finite."""
    wrong = ~frames.isfinite().all(dim=-1, keepdim=True)
    return ~taps.scatter(wrong.to(torch.int32)).bool().any(dim=1).squeeze(-1)


def check_finite(frames: torch.Tensor, taps: Taps) -> None:
    """NotFiniteError for a vector with NaN or infinity; on the CPU, where looking does not wait."""
    from mmtransfer.training.finite import NotFiniteError

    if frames.is_cuda or bool((sound := find_sound(frames, taps)).all()):
        return
    row = int((~sound).nonzero()[0])
    raise NotFiniteError(f"the vectors of utterance {row} of the batch are not finite")
