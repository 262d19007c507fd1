"""The public function :func:`ctc_align`: checks, choice of backend, scores with gradients."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mmkernels.ops import _common, _derivatives, _inference, _lengths
from mmkernels.ops.ctc_align import reference
from mmkernels.ops.ctc_align.alignment import Alignment
from mmkernels.ops.ctc_align.schema import MOST_TRITON_TOKENS, OPS


def ctc_align(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Tensor | None = None,
    target_lengths: Tensor | None = None,
    *,
    blank: int = 0,
    backend: str = "auto",
) -> Alignment:
    """CTC forced alignment: the best path of each utterance through its own target (Viterbi).

    Batched and ragged, in one launch. An utterance has the same result, bit for bit, alone and in any batch,
    and the same path in all backends: of equal paths, seen from the end, the one that ends in the last token
    rather than in the blank behind it, and then at each frame the one that comes from the nearest state. That
    is the rule of torchaudio's CPU kernel; its CUDA kernel may return a path that is not the best when two
    scores are equal. Scores are added in float32 (float64 for float64), and the largest is subtracted every
    32 frames, so that hours of audio lose no precision.

    Equivalent to, for one short utterance (``itertools`` imported)::

        frames, target = range(log_probs.shape[1]), targets[0].tolist()
        tried = itertools.product(range(log_probs.shape[2]), repeat=len(frames))
        paths = [p for p in tried if [k for k, _ in itertools.groupby(p) if k != blank] == target]
        out = max(paths, key=lambda path: float(log_probs[0, frames, path].sum()))  # paths[0]

    Args:
        log_probs: ``(B, T, C)``, the log-probabilities of C classes in each frame: float32, float16,
            bfloat16, on the CPU float64 too. Any strides; if the last dimension is not dense, it is copied
            once. NaN and +inf count as -inf. Values that are all between 0 and 1 are probabilities, which
            need a logarithm: on the CPU, a warning, by a look at two frames of each utterance.
        targets: ``(B, U)`` int32 or int64: the tokens of each utterance, without blanks. For words that a
            transcript may miss, see ``mmkernels.ops.ctc_align.with_wildcard``.
        input_lengths: ``(B,)`` integers: valid frames of each utterance; by default T.
        target_lengths: ``(B,)`` integers: valid tokens; by default U.
        blank: The class of blanks.
        backend: ``"auto"``, ``"native"`` (compiled), ``"triton"`` (at most 8,191 tokens) or
            ``"reference"``.

    Returns:
        An :class:`Alignment`: ``paths (B, T)`` and ``ends (B, U)`` (int64), ``scores (B, T)`` and
        ``total (B,)`` (float32, float64 for float64), ``feasible (B,)``. An utterance without a path, because
        it has fewer frames than tokens and repeats, or because every path has a score of -inf, is reported in
        ``feasible``: its paths are -1, its scores and ends 0, its total -inf. The others are unaffected.

    Gradients flow from ``scores`` to ``log_probs``: 1 at the path, of any order. The path itself has none.
    ``torch.func`` and forward mode run the reference: ``"auto"`` takes it by itself, a kernel asked for by
    name raises.

    Kernels keep the scores of few frames and compute the others again on the way back: on the CPU less than
    150 MB for an hour of audio; on CUDA 1 bit for each frame and state, above 1,987 tokens a quarter: 450 MB
    for an hour (Triton: 4 bits).

    Raises:
        TypeError: A value of the wrong type or dtype.
        ValueError: Shapes or devices that do not match; a backend that cannot serve; on the CPU, where values
            can be read, lengths outside the padded sizes, and tokens that are blank or no class. On CUDA,
            under ``torch.compile`` and in ``torch.func``, such lengths are clamped, and an utterance with
            such a token is infeasible.

    Source: Graves et al., Connectionist Temporal Classification (2006), section 4.1, with the maximum in
    place of the sum.
    """
    _check(log_probs, targets, blank)
    input_lengths, target_lengths = (
        _lengths.check_lengths("ctc_align", name, lengths, "log_probs", log_probs, most)
        for name, lengths, most in (
            ("input_lengths", input_lengths, log_probs.shape[1]),
            ("target_lengths", target_lengths, targets.shape[1]),
        )
    )
    if _lengths.readable(log_probs):
        _check_tokens(targets, target_lengths, blank, log_probs.shape[2])
        _warn_of_probabilities(log_probs, input_lengths)
    if forward_ad._current_level >= 0 or _derivatives.transforms_active():
        tensors = (log_probs, targets, input_lengths, target_lengths)
        backend = _derivatives.backend_in_transforms("ctc_align", backend, tensors)
    backend = _choose_backend(backend, log_probs, targets.shape[1])

    arguments = (log_probs.detach(), targets.to(torch.int64), input_lengths, target_lengths, blank)
    run = reference.ctc_align if backend == "reference" else OPS[backend][0]
    paths, ends, total = run(*arguments)
    return Alignment(paths, _scores(log_probs, paths), ends, total, total > -torch.inf, blank)


def _choose_backend(backend: str, log_probs: Tensor, tokens: int) -> str:
    chosen = _common.choose_backend("ctc_align", backend, log_probs)
    if chosen != "triton" or tokens <= MOST_TRITON_TOKENS:
        return chosen
    if backend == "auto":
        return "reference"
    raise ValueError(
        f"ctc_align: backend='triton' cannot be used: its kernel takes targets of at most "
        f"{MOST_TRITON_TOKENS} tokens, got {tokens}"
    )


def _scores(log_probs: Tensor, paths: Tensor) -> Tensor:
    wide = _common.accumulate_dtype(log_probs.dtype)
    if paths.shape[1] == 0:
        return _inference.widened(log_probs.sum(2), wide)
    along = log_probs.gather(2, paths.clamp_min(0)[..., None])[..., 0]
    return torch.where(paths >= 0, _inference.widened(along, wide), 0.0)


def _check(log_probs: Tensor, targets: Tensor, blank: int) -> None:
    op = "ctc_align"
    _common.check_tensor(op, "log_probs", log_probs)
    _common.check_tensor(op, "targets", targets)
    _common.check_floating(op, "log_probs", log_probs)
    if log_probs.dim() != 3:
        raise ValueError(
            f"{op}: log_probs must be (B, T, C), got shape {tuple(log_probs.shape)}; "
            "for one utterance give log_probs[None] and targets[None]"
        )
    if targets.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{op}: targets must be int32 or int64, got {targets.dtype}")
    if targets.dim() != 2 or targets.shape[0] != log_probs.shape[0]:
        raise ValueError(
            f"{op}: targets must be (B, U) with B = {log_probs.shape[0]} as in log_probs, "
            f"got shape {tuple(targets.shape)}"
        )
    if targets.device != log_probs.device:
        raise ValueError(f"{op}: targets is on {targets.device}, log_probs is on {log_probs.device}")
    if not isinstance(blank, int) or isinstance(blank, bool):
        raise TypeError(f"{op}: blank must be an int, got {type(blank).__name__}")
    if not 0 <= blank < log_probs.shape[2]:
        raise ValueError(f"{op}: blank must be a class in [0, {log_probs.shape[2]}), got {blank}")


def _check_tokens(targets: Tensor, target_lengths: Tensor | None, blank: int, classes: int) -> None:
    wrong = (targets == blank) | (targets < 0) | (targets >= classes)
    if not wrong.any():
        return
    if target_lengths is not None:
        wrong &= torch.arange(targets.shape[1]) < target_lengths[:, None]
    place = _lengths.first_place(wrong)
    if place is None:
        return
    row, position = place
    token = int(targets[place])
    meaning = "the blank" if token == blank else f"not a class in [0, {classes})"
    raise ValueError(
        f"ctc_align: targets[{row}, {position}] is {token}, which is {meaning}; targets hold tokens without "
        "blanks, and padding lies past target_lengths"
    )


def _warn_of_probabilities(log_probs: Tensor, input_lengths: Tensor | None) -> None:
    """From the first frame and the middle one of each utterance: a look at all values would take longer than
    the alignment. Zeros alone may be padding; a logarithm of a probability is never above zero."""
    values = log_probs.detach()
    if values.numel() == 0 or values.shape[2] < 2:
        return
    if input_lengths is None:
        seen = [values[:, 0], values[:, values.shape[1] // 2]]
    else:
        rows = input_lengths.nonzero()[:, 0]
        seen = [values[rows, 0], values[rows, input_lengths[rows] // 2]]
    ranges = [torch.aminmax(frames) for frames in seen if frames.numel() > 0]
    if ranges and all(low >= 0 and high <= 1 for low, high in ranges) and any(high > 0 for _, high in ranges):
        warnings.warn(
            "ctc_align: log_probs look like probabilities: all values of the first and the middle frames are "
            "between 0 and 1; give torch.log_softmax of the logits",
            stacklevel=3,
        )
