"""The public function :func:`monotonic_align`: checks and choice of backend."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mmkernels.ops import _common, _derivatives, _lengths
from mmkernels.ops.monotonic_align import reference
from mmkernels.ops.monotonic_align.schema import OPS

_OP = "monotonic_align"


def monotonic_align(
    log_probs: Tensor,
    frame_lengths: Tensor | None = None,
    token_lengths: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Monotonic alignment search: the frames of each token on the best path, for a batch in one launch.

    A path gives every frame one token. It starts at the first token, ends at the last one, and from one frame
    to the next stays or advances by one token, so that each token has at least one frame. The best path has
    the largest sum of log-probabilities. With ``Q[t, u] = log_probs[t, u] + max(Q[t-1, u], Q[t-1, u-1])`` the
    predecessor of (t, u) on it is (t-1, u-1) if ``Q[t-1, u-1] >= Q[t-1, u]``, else (t-1, u): where both are
    equally good, the path advances, as in ESPnet and in the aligner of UnitY2. (Glow-TTS and VITS stay there;
    their durations are the same where no two scores are equal.)

    Equivalent to, for one utterance of shape ``(T, U)``, among all paths::

        starts = torch.combinations(torch.arange(1, T), U - 1)  # of every token but the first
        tokens = (torch.arange(T) >= starts[:, :, None]).sum(1)  # of each frame
        scores = log_probs[torch.arange(T), tokens].sum(1)
        out = tokens[scores.argmax()].bincount()

    Args:
        log_probs: ``(B, T, U)``: of T frames and U tokens; float32, float16 or bfloat16, on the CPU float64
            too. Any strides: where tokens are not neighbours in memory, as in a transposed tensor, it is
            copied once. Values need not be normalised, and may be -inf. Sums are in float32 (float64 for
            float64). A row with a NaN within its lengths has no path.
        frame_lengths: ``(B,)`` integers: valid frames of each utterance; T if not given.
        token_lengths: ``(B,)`` integers: valid tokens of each utterance; U if not given.
        backend: ``"auto"``, ``"native"`` (compiled), ``"triton"`` or ``"reference"``.

    Returns:
        ``(B, U)`` int64: frames of each token, which sum to the utterance's frames; 0 for padding, and for
        all tokens of an utterance without tokens or without a path. ``durations.cumsum(1)`` are the exclusive
        ends of the tokens in frames.

    Gradients: none, durations are integers. An utterance has the same durations on every backend, and in
    every batch. In ``torch.func`` the reference serves.

    Raises:
        TypeError: A value of the wrong type or dtype.
        ValueError: Shapes or devices that do not match, or a backend that cannot serve; on the CPU also
            lengths outside ``[0, T]`` and ``[0, U]``, and an utterance without a path: with fewer frames than
            tokens, or a NaN. On CUDA, where reading values would wait for the device, and under
            ``torch.compile`` and ``torch.func``, lengths are clamped, and durations of an utterance without a
            path are 0.

    Source: Kim et al., Glow-TTS (arXiv 2005.11129), section 3.2 and algorithm 1; the aligner of UnitY2 in
    Seamless (arXiv 2312.05187).
    """
    _common.check_tensor(_OP, "log_probs", log_probs)
    _common.check_floating(_OP, "log_probs", log_probs)
    if log_probs.dim() != 3:
        raise ValueError(f"{_OP}: log_probs must be (B, T, U), got shape {tuple(log_probs.shape)}")
    _, frames, tokens = log_probs.shape
    frame_lengths = _lengths.check_lengths(
        _OP, "frame_lengths", frame_lengths, "log_probs", log_probs, frames
    )
    token_lengths = _lengths.check_lengths(
        _OP, "token_lengths", token_lengths, "log_probs", log_probs, tokens
    )
    if forward_ad._current_level >= 0 or _derivatives.transforms_active():
        tensors = (log_probs, frame_lengths, token_lengths)
        backend = _derivatives.backend_in_transforms(_OP, backend, tensors)
    backend = _common.choose_backend(_OP, backend, log_probs)
    log_probs = log_probs.detach()
    if not _lengths.readable(log_probs):
        return _durations(backend, log_probs, frame_lengths, token_lengths)
    _check_feasible(log_probs, frame_lengths, token_lengths)
    durations = _durations(backend, log_probs, frame_lengths, token_lengths)
    _check_found(durations, log_probs, frame_lengths, token_lengths)
    return durations


def _durations(
    backend: str, log_probs: Tensor, frame_lengths: Tensor | None, token_lengths: Tensor | None
) -> Tensor:
    if backend == "reference":
        return reference.monotonic_align(log_probs, frame_lengths, token_lengths)
    out: Tensor = OPS[backend][0](log_probs, frame_lengths, token_lengths)
    return out


def _given(lengths: Tensor | None, log_probs: Tensor, dimension: int) -> Tensor:
    if lengths is not None:
        return lengths
    return torch.full(log_probs.shape[:1], log_probs.shape[dimension])


def _check_feasible(log_probs: Tensor, frame_lengths: Tensor | None, token_lengths: Tensor | None) -> None:
    frames, tokens = _given(frame_lengths, log_probs, 1), _given(token_lengths, log_probs, 2)
    if (place := _lengths.first_place(frames < tokens)) is not None:
        row = place[0]
        raise ValueError(
            f"{_OP}: every token needs a frame, but row {row} of the batch has {int(frames[row])} frames for "
            f"{int(tokens[row])} tokens"
        )


def _check_found(
    durations: Tensor, log_probs: Tensor, frame_lengths: Tensor | None, token_lengths: Tensor | None
) -> None:
    """Feasible rows without durations have a NaN."""
    tokens = _given(token_lengths, log_probs, 2)
    lost = (tokens > 0) & (durations.sum(1) == 0)
    if (place := _lengths.first_place(lost)) is not None:
        row = place[0]
        frames = int(_given(frame_lengths, log_probs, 1)[row])
        frame, token = log_probs[row, :frames, : int(tokens[row])].isnan().nonzero()[0].tolist()
        raise ValueError(
            f"{_OP}: log_probs must not be NaN within the lengths, but are in row {row} of the batch at "
            f"frame {frame}, token {token}"
        )
