"""The public function :func:`cif`: checks, choice of backend, gradients."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mmkernels.ops import _common, _derivatives, _inference, _lengths
from mmkernels.ops.cif import reference
from mmkernels.ops.cif.result import CIF
from mmkernels.ops.cif.schema import OPS

_OP = "cif"


class _Cif(torch.autograd.Function):
    """Arguments: the backend, and the one asked for; then those of the op in the order of its schema."""

    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        asked: str,
        x: Tensor,
        alpha: Tensor,
        lengths: Tensor | None,
        target_lengths: Tensor | None,
        beta: float,
        tail_threshold: float,
        max_length: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        inputs = (x, alpha, lengths, target_lengths, beta, tail_threshold, max_length)
        features, counts, ends, *plan = OPS[backend][0](*inputs)
        ctx.save_for_backward(x, alpha, lengths, target_lengths, counts, *plan)
        ctx.options = backend, asked, beta, tail_threshold, max_length
        ctx.mark_non_differentiable(counts, ends)
        return features, counts, ends

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        saved = _common.saved_tensors(_OP, ctx)
        x, alpha, lengths, target_lengths, *plan = saved
        backend, asked, beta, tail_threshold, max_length = ctx.options
        need_x, need_alpha = ctx.needs_input_grad[2:4]
        nothing = (None,) * 5
        if _derivatives.beyond_kernels(grad):

            def features(x: Tensor, alpha: Tensor) -> Tensor:
                return reference.cif(
                    x,
                    alpha,
                    beta=beta,
                    lengths=lengths,
                    target_lengths=target_lengths,
                    tail_threshold=tail_threshold,
                    max_length=max_length,
                ).features

            needed = (need_x, need_alpha)
            found = _derivatives.reference_gradients(_OP, asked, features, (x, alpha), needed, grad)
            return (None, None, *found, *nothing)
        scaled = target_lengths is not None
        dx, d_alpha = OPS[backend][1](grad, x, alpha, lengths, *plan, beta, scaled, need_x, need_alpha)
        return (None, None, dx if need_x else None, d_alpha if need_alpha else None, *nothing)


def cif(
    x: Tensor,
    alpha: Tensor,
    *,
    beta: float = 1.0,
    lengths: Tensor | None = None,
    target_lengths: Tensor | None = None,
    tail_threshold: float = 0.5,
    max_length: int | None = None,
    backend: str = "auto",
) -> CIF:
    """Continuous integrate-and-fire: frames are added up, weighted by ``alpha``, until the weights reach
    ``beta``; then a token fires, and the rest of that frame's weight goes to the next one.

    With ``C[t]`` the cumulative sum of the weights, frame t has the part ``[C[t-1], C[t]]`` of the line, and
    token j the part ``[j beta, (j+1) beta]``: their overlap is the weight of the frame in the token. A frame
    may be in several tokens.

    Equivalent to, for one utterance ``(T, D)`` of which ``max_length`` tokens fire, without a tail::

        C, j = alpha.cumsum(0)[:, None], beta * torch.arange(max_length).to(alpha)
        overlap = C.clamp(max=j + beta) - (C - alpha[:, None]).clamp(min=j)
        out = overlap.clamp(min=0).T @ x

    Args:
        x: ``(B, T, D)``: frames; float32, float16 or bfloat16, on the CPU float64 too. Any strides; copied
            once where its last dimension is not dense.
        alpha: ``(B, T)``: weights, not negative, usually a sigmoid's; they need not be below 1. Any floating
            dtype. Their cumulative sums are in float64, and weights and sums of frames in float32 (float64
            for float64 frames): tokens are not lost in half precision, however many.
        beta: Sum of the weights of a token, positive.
        lengths: ``(B,)`` integers: valid frames of each utterance. Later ones are not read, and get no
            gradient.
        target_lengths: ``(B,)`` integers: tokens that each utterance must have, as in training. Its weights
            are scaled to the sum ``beta * target_length``, and the last token ends with the last frame. An
            utterance whose weights are all zero gets tokens of zeros.
        tail_threshold: Without ``target_lengths``: the rest of the weights after the last token fires one
            more if it is at least this share of ``beta``; its weights are scaled to the sum ``beta``. From 1
            on, none does.
        max_length: M, the tokens of the result; further ones are dropped. By default the largest of the
            target lengths, or of the numbers of tokens; reading that number makes the host wait for a GPU,
            and breaks a graph of ``torch.compile``.
        backend: ``"auto"``, ``"native"`` (compiled), ``"triton"`` or ``"reference"``.

    Returns:
        ``CIF(features, lengths, ends)``: features ``(B, M, D)`` of x's dtype, zero past the utterance's
        tokens; lengths ``(B,)`` int64, the tokens of each utterance, at most M; ends ``(B, M)`` int64, for
        each token the frame in which it fires + 1, and past ``lengths`` the utterance's frames.

    Gradients flow to ``x`` and ``alpha``, exact in both modes, also through the scaling of weights and of the
    tail. Where a token fires exactly at the end of a frame, the gradient is that of more weight. x and alpha
    are kept for the backward pass, not copied. Forward mode, ``torch.func`` and gradients of gradients are
    the reference's: ``"auto"`` takes it by itself, a kernel asked for by name raises.

    Raises:
        TypeError: A value of the wrong type or dtype.
        ValueError: Shapes, devices or options that do not fit, or a backend that cannot serve; on the CPU
            also lengths outside ``[0, T]``, negative target lengths, and weights that are negative or not
            finite. On CUDA, where reading values would wait for the device, and under ``torch.compile`` and
            ``torch.func``, lengths are clamped, and the kernels take such weights as 0.
        RuntimeError: In the backward pass: an input was overwritten since the forward pass.

    Source: Dong and Xu, CIF (arXiv 1905.11235); the scaling of the tail is that of torch-cif.
    """
    beta, tail_threshold = _check_options(beta, tail_threshold, max_length)
    _check_inputs(x, alpha)
    lengths = _lengths.check_lengths(_OP, "lengths", lengths, "x", x, x.shape[1])
    target_lengths = _lengths.check_lengths(_OP, "target_lengths", target_lengths, "x", x, None)
    _check_alpha(alpha, lengths)
    asked = backend
    if forward_ad._current_level >= 0 or _derivatives.transforms_active():
        tensors = (x, alpha, lengths, target_lengths)
        backend = _derivatives.backend_in_transforms(_OP, backend, tensors)
    backend = _common.choose_backend(_OP, backend, x)
    if backend == "reference":
        return reference.cif(
            x,
            alpha,
            beta=beta,
            lengths=lengths,
            target_lengths=target_lengths,
            tail_threshold=tail_threshold,
            max_length=max_length,
        )
    if max_length is None:
        max_length = _most_tokens(alpha, lengths, target_lengths, beta, tail_threshold)
    accumulate = _common.accumulate_dtype(x.dtype)
    if alpha.dtype != accumulate:
        alpha = alpha.to(accumulate)
    inputs = (x, alpha, lengths, target_lengths, beta, tail_threshold, max_length)
    if _common.needs_gradient(x, alpha):
        return CIF(*_inference.apply(_Cif, x, backend, asked, *inputs))
    return CIF(*OPS[backend][0](*inputs)[:3])


def _most_tokens(
    alpha: Tensor, lengths: Tensor | None, target_lengths: Tensor | None, beta: float, tail_threshold: float
) -> int:
    """The largest number of tokens of an utterance, read from the device."""
    if alpha.shape[0] == 0:
        return 0
    if target_lengths is not None:
        return max(int(target_lengths.max()), 0)
    weights = alpha.detach().double()
    if lengths is not None:
        weights = weights.masked_fill(
            torch.arange(alpha.shape[1], device=alpha.device) >= lengths[:, None], 0
        )
    total = weights.sum(1)
    whole = (total / beta).floor()
    rest = total - whole * beta
    return int((whole + ((rest >= tail_threshold * beta) & (rest > 0))).max())


def _check_options(beta: float, tail_threshold: float, max_length: int | None) -> tuple[float, float]:
    for name, value in (("beta", beta), ("tail_threshold", tail_threshold)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{_OP}: {name} must be a number, got {type(value).__name__}")
    if not 0 < beta < math.inf:
        raise ValueError(f"{_OP}: beta must be positive and finite, got {beta}")
    if not tail_threshold >= 0:
        raise ValueError(f"{_OP}: tail_threshold must not be negative, got {tail_threshold}")
    if max_length is not None:
        if isinstance(max_length, bool) or not isinstance(max_length, (int, torch.SymInt)):
            raise TypeError(f"{_OP}: max_length must be an integer, got {type(max_length).__name__}")
        if max_length < 0:
            raise ValueError(f"{_OP}: max_length must not be negative, got {max_length}")
    return float(beta), float(tail_threshold)


def _check_inputs(x: Tensor, alpha: Tensor) -> None:
    for name, tensor in (("x", x), ("alpha", alpha)):
        _common.check_tensor(_OP, name, tensor)
        _common.check_floating(_OP, name, tensor)
    if x.dim() != 3:
        raise ValueError(f"{_OP}: x must be (B, T, D), got shape {tuple(x.shape)}")
    if alpha.shape != x.shape[:2]:
        raise ValueError(
            f"{_OP}: alpha must have shape {tuple(x.shape[:2])}, one weight for each frame of x, "
            f"got {tuple(alpha.shape)}"
        )
    if alpha.device != x.device:
        raise ValueError(f"{_OP}: alpha is on {alpha.device}, x is on {x.device}")


def _check_alpha(alpha: Tensor, lengths: Tensor | None) -> None:
    if not _lengths.readable(alpha):
        return
    wrong = ~((alpha >= 0) & (alpha < math.inf))
    if not wrong.any():
        return
    if lengths is not None:
        wrong &= torch.arange(alpha.shape[1]) < lengths[:, None]
    if (place := _lengths.first_place(wrong)) is not None:
        row, frame = place
        raise ValueError(
            f"{_OP}: alpha must be finite and not negative, got {float(alpha[row, frame])} in row {row} of "
            f"the batch at frame {frame}"
        )
