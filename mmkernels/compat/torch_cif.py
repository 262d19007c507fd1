"""``torch_cif.cif_function`` on :func:`mmkernels.cif`."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.ops.cif import cif


def cif_function(
    inputs: Tensor,
    alpha: Tensor,
    beta: float = 1.0,
    tail_thres: float = 0.5,
    padding_mask: Tensor | None = None,
    target_lengths: Tensor | None = None,
    eps: float = 1e-4,
    unbound_alpha: bool = False,
) -> dict[str, list[Tensor]]:
    """``torch_cif.cif_function``: continuous integrate-and-fire.

    =======================  ==========================================  =====================================
    subject                  torch-cif 0.2.0                             here
    =======================  ==========================================  =====================================
    half precision           loses tokens from 257 on                    sums in float64
    sum of scaled weights    ``beta * target_length + eps``, which       ``beta * target_length``; ``eps``
                             leaves a trace of a further token           bounds the check of ``alpha`` alone
    padding of ``cif_out``   the trace                                   zeros
    weights all zero         NaN, and an index out of bounds             tokens of zeros
    delay of the tail        of the part that is there, also where no    the mean of its frames; 0 past the
                             token fires                                 tokens
    gradient of the tail     without that of its scaling                 exact
    ``beta`` other than 1    ``tail_thres`` is a weight                  the same
    memory, host             the frames three times over; 9 waits for    the result; one wait, or none with
                             a GPU in a call                             targets on the CPU
    keys of the result       also indices and weights of its scatters    those below
    =======================  ==========================================  =====================================

    Args:
        inputs: ``(N, S, C)`` frames.
        alpha: ``(N, S)`` weights, in [0, 1] unless ``unbound_alpha``.
        beta: sum of the weights of a token.
        tail_thres: without targets, the rest of the weights that fires one more token.
        padding_mask: ``(N, S)``, true at padding, which lies on the right.
        target_lengths: ``(N,)``: tokens of each utterance.

    Returns:
        A dict of lists of one tensor: ``cif_out (N, T, C)``, ``cif_lengths (N,)``, ``alpha_sum (N,)`` before
        the scaling, ``delays (N, T)``: the mean of the frame numbers, from 1 on, of each token,
        ``tail_weights (N,)`` (an empty list with targets), ``scaled_alpha`` and ``cumsum_alpha (N, S)``.

    Raises:
        ValueError: on the CPU, weights outside [0, 1], and padding that is not on the right; and as
            :func:`mmkernels.cif`.
    """
    weights = alpha.float() if alpha.dtype in (torch.float16, torch.bfloat16) else alpha
    lengths = None
    if padding_mask is not None:
        padding = padding_mask.bool()
        lengths = (~padding).sum(1)
        weights = weights.masked_fill(padding, 0)
    if alpha.is_cpu and not torch.compiler.is_compiling():
        _check(weights, padding_mask, lengths, None if unbound_alpha else eps)
    threshold = tail_thres / beta
    found = cif(
        inputs, weights, beta=beta, lengths=lengths, target_lengths=target_lengths, tail_threshold=threshold
    )
    total = weights.sum(1)
    scaled = weights
    if target_lengths is not None:
        wanted = beta * target_lengths.to(weights)
        scaled = weights * torch.where(total > 0, wanted / total, 0.0)[:, None]
    # The same op, on frames that hold their number.
    frame = torch.arange(1, inputs.shape[1] + 1, device=inputs.device, dtype=weights.dtype) / beta
    delays = cif(
        frame[None, :, None].expand(inputs.shape[0], -1, 1),
        scaled,
        beta=beta,
        lengths=lengths,
        tail_threshold=threshold,
        max_length=found.features.shape[1],
    ).features[..., 0]
    tail = [] if target_lengths is not None else [torch.remainder(total.double(), beta).to(inputs.dtype)]
    return {
        "cif_out": [found.features],
        "cif_lengths": [found.lengths],
        "alpha_sum": [total.to(alpha.dtype)],
        "delays": [delays.to(inputs.dtype)],
        "tail_weights": tail,
        "scaled_alpha": [scaled],
        "cumsum_alpha": [scaled.cumsum(1)],
    }


def _check(weights: Tensor, padding_mask: Tensor | None, lengths: Tensor | None, eps: float | None) -> None:
    if eps is not None and weights.numel() > 0:
        low, high = (float(value) for value in torch.aminmax(weights.detach()))
        if not (low >= -eps and high <= 1 + eps):
            raise ValueError(
                f"cif_function: alpha must lie in [0, 1], got values from {low:g} to {high:g}; unbound_alpha "
                "allows others"
            )
    if padding_mask is not None and lengths is not None:
        inside = torch.arange(padding_mask.shape[1]) < lengths[:, None]
        if not torch.equal(inside, ~padding_mask.bool()):
            raise ValueError("cif_function: padding_mask must be true on the right alone, behind all frames")
