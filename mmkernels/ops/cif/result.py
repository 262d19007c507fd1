"""The result of :func:`mmkernels.cif`."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class CIF(NamedTuple):
    """Tokens that continuous integrate-and-fire makes of frames.

    Attributes:
        features: ``(B, M, D)``, the weighted sums of the frames; zero past ``lengths``.
        lengths: ``(B,)`` int64, tokens of each utterance, at most M.
        ends: ``(B, M)`` int64, for each token the frame in which it fires + 1: exclusive ends,
            non-decreasing; past ``lengths`` the utterance's frames.
    """

    features: Tensor
    lengths: Tensor
    ends: Tensor
