"""``maximum_path`` of VITS' package ``monotonic_align`` on :func:`mmkernels.monotonic_align`."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.ops.monotonic_align import monotonic_align


def maximum_path(neg_cent: Tensor, mask: Tensor) -> Tensor:
    """``monotonic_align.maximum_path`` of VITS: the best monotonic path between frames and tokens.

    ==============  =======================================  =============================================
    subject         VITS                                     here
    ==============  =======================================  =============================================
    device          a copy to the host and back              the device of the input, without waiting
    memory          a float32 score of each cell             1 bit of each cell
    dtypes          sums in float32                          the same, float64 for float64
    equal scores    the path stays at a token                the path advances
    fewer frames    a path that lacks the first tokens       an error on the CPU, zeros on CUDA
    than tokens
    ==============  =======================================  =============================================

    Args:
        neg_cent: ``(B, T, U)`` scores of T frames and U tokens.
        mask: ``(B, T, U)``, 1 at valid cells: the first frames and tokens of each utterance.

    Returns:
        ``(B, T, U)`` in the dtype of ``neg_cent``: 1 at the token of each frame, elsewhere 0.

    Raises:
        TypeError, ValueError: as :func:`mmkernels.monotonic_align`.
    """
    if not isinstance(mask, Tensor) or mask.shape != neg_cent.shape or mask.dim() != 3:
        raise ValueError(
            f"maximum_path: neg_cent and mask must both have shape (B, T, U), got "
            f"{tuple(neg_cent.shape)} and {tuple(getattr(mask, 'shape', ()))}"
        )
    valid = mask != 0
    # Of an utterance without frames or tokens nothing is valid.
    durations = monotonic_align(neg_cent, valid.any(2).sum(1), valid.any(1).sum(1))
    ends = durations.cumsum(1)[:, None]
    frame = torch.arange(neg_cent.shape[1], device=neg_cent.device)[:, None]
    path = (frame < ends) & (frame >= ends - durations[:, None])
    return path.to(neg_cent.dtype)
