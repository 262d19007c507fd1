"""A token that matches any audio, for transcripts that leave something out."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.ops._common import check_floating, check_tensor


def with_wildcard(log_probs: Tensor, *, penalty: float = 0.1) -> Tensor:
    """``log_probs (B, T, C)`` with a class more, ``(B, T, C + 1)``, almost as likely as the best of a frame.

    A target of :func:`mmkernels.ctc_align` may then hold the token ``C`` wherever the transcript may miss
    words: it takes one frame or more, of any tokens and blanks. Two in a row need a blank between them, as
    all tokens that repeat. Text that the audio lacks has no such token: each token of a target takes a frame.

    Equivalent to::

        out = torch.cat([log_probs, log_probs.amax(2, keepdim=True) - penalty], 2)

    Args:
        log_probs: ``(B, T, C)``, of any floating dtype.
        penalty: in nats for each frame of a wildcard. With 0, neighbouring words may lose frames to it.

    Gradients flow through the best class of a frame.
    """
    check_tensor("with_wildcard", "log_probs", log_probs)
    check_floating("with_wildcard", "log_probs", log_probs)
    if log_probs.dim() != 3:
        raise ValueError(f"with_wildcard: log_probs must be (B, T, C), got shape {tuple(log_probs.shape)}")
    return torch.cat([log_probs, log_probs.max(2, keepdim=True).values - penalty], 2)
