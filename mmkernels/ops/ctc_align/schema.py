"""The torch op behind :func:`mmkernels.ctc_align`: paths, ends and totals; targets and lengths are int64."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels import _library
from mmkernels.ops._common import accumulate_dtype

#: Frames after which the largest score is subtracted from all; the same in all backends, so that they round
#: alike.
RESCALE = 32
#: The Triton kernel keeps all states of an utterance in the registers of one program.
MOST_TRITON_TOKENS = 8191


def _forward_fake(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Tensor | None,
    target_lengths: Tensor | None,
    blank: int,
) -> tuple[Tensor, Tensor, Tensor]:
    if log_probs.dim() != 3 or targets.dim() != 2:
        raise RuntimeError("expected log_probs (batch, frames, classes) and targets (batch, tokens)")
    batch, frames, _ = log_probs.shape
    return (
        log_probs.new_empty((batch, frames), dtype=torch.int64),
        log_probs.new_empty((batch, targets.shape[1]), dtype=torch.int64),
        log_probs.new_empty((batch,), dtype=accumulate_dtype(log_probs.dtype)),
    )


_library.define(
    "ctc_align_fwd",
    "Tensor log_probs, Tensor targets, Tensor? input_lengths, Tensor? target_lengths, int blank",
    "(Tensor, Tensor, Tensor)",
    _forward_fake,
    "mmkernels.ops.ctc_align.triton",
)

_ops = torch.ops.mmkernels
#: backend -> (forward op,)
OPS = {
    "native": (_ops.ctc_align_fwd.default,),
    "triton": (_ops.ctc_align_fwd_triton.default,),
}
