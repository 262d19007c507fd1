"""The torch op behind :func:`mmkernels.monotonic_align`; lengths are int64."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels import _library


def _forward_fake(log_probs: Tensor, frame_lengths: Tensor | None, token_lengths: Tensor | None) -> Tensor:
    batch, _, tokens = log_probs.shape
    return log_probs.new_empty((batch, tokens), dtype=torch.int64)


_library.define(
    "monotonic_align_fwd",
    "Tensor log_probs, Tensor? frame_lengths, Tensor? token_lengths",
    "Tensor",
    _forward_fake,
    "mmkernels.ops.monotonic_align.triton",
)

_ops = torch.ops.mmkernels
#: backend -> (forward op,)
OPS = {
    "native": (_ops.monotonic_align_fwd.default,),
    "triton": (_ops.monotonic_align_fwd_triton.default,),
}
