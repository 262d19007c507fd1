"""``torchaudio.functional.forced_align`` and ``merge_tokens`` on :func:`mmkernels.ctc_align`."""

from __future__ import annotations

from itertools import groupby

import torch
from torch import Tensor

from mmkernels.ops.ctc_align import ctc_align
from mmkernels.ops.ctc_align.alignment import TokenSpan


def forced_align(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Tensor | None = None,
    target_lengths: Tensor | None = None,
    blank: int = 0,
) -> tuple[Tensor, Tensor]:
    """``torchaudio.functional.forced_align``: the token of each frame on the best CTC path, and its score.

    ================  ==============================  ====================================================
    subject           torchaudio 2.11                 here
    ================  ==============================  ====================================================
    batch             one utterance                   any; padding has token -1 and score 0
    dtypes            float16, float32, float64       bfloat16 too; sums in float32 (float64 for float64)
    equal scores      CUDA may return a path that     the best path, the same on every device
                      is not the best
    empty target      undefined                       blanks
    no path           an error                        the same on the CPU; on CUDA, tokens of -1, without
                                                      waiting for the device
    gradient          none                            of the scores
    checks on CUDA    copy values to the host         read no value
    ================  ==============================  ====================================================

    Args:
        log_probs: ``(B, T, C)``.
        targets: ``(B, U)`` int32 or int64, without blanks.
        input_lengths: ``(B,)``; by default T.
        target_lengths: ``(B,)``; by default U.
        blank: the class of blanks.

    Returns:
        ``(paths, scores)``: ``(B, T)`` in the dtype of ``targets``, and ``(B, T)`` in that of ``log_probs``.

    Raises:
        RuntimeError: on the CPU, an utterance without a path.
        TypeError, ValueError: as :func:`mmkernels.ctc_align`.
    """
    found = ctc_align(log_probs, targets, input_lengths, target_lengths, blank=blank)
    if log_probs.is_cpu and not torch.compiler.is_compiling() and not bool(found.feasible.all()):
        row = int((~found.feasible).nonzero()[0])
        frames = log_probs.shape[1] if input_lengths is None else int(input_lengths[row])
        tokens = targets.shape[1] if target_lengths is None else int(target_lengths[row])
        raise RuntimeError(
            f"forced_align: no path for utterance {row}: it has {frames} frames for {tokens} tokens and the "
            "blanks between equal ones, or every path has a score of -inf"
        )
    return found.paths.to(targets.dtype), found.scores.to(log_probs.dtype)


def merge_tokens(tokens: Tensor, scores: Tensor, blank: int = 0) -> list[TokenSpan]:
    """``torchaudio.functional.merge_tokens``: the frames and the mean score of each token of a path.

    Takes one utterance of ``forced_align``, ``(T,)`` each; padding (-1) is left out. The difference: values
    are copied to the host once, not span by span.

    Raises:
        ValueError: shapes other than ``(T,)`` and ``(T,)``.
    """
    if tokens.dim() != 1 or scores.shape != tokens.shape:
        raise ValueError(
            "merge_tokens: tokens and scores must both have shape (T,), got "
            f"{tuple(tokens.shape)} and {tuple(scores.shape)}"
        )
    values = scores.detach().double().tolist()
    spans, start = [], 0
    for token, frames in groupby(tokens.tolist()):
        end = start + len(list(frames))
        if token not in (blank, -1):
            spans.append(TokenSpan(token, start, end, sum(values[start:end]) / (end - start)))
        start = end
    return spans
