"""The definition of :func:`mmkernels.ctc_align` in plain torch, written for reading."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.ops._common import accumulate_dtype
from mmkernels.ops.ctc_align.schema import RESCALE

NEVER = -torch.inf


def ctc_align(
    log_probs: Tensor,
    targets: Tensor,
    input_lengths: Tensor | None = None,
    target_lengths: Tensor | None = None,
    blank: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """``(paths, ends, totals)`` of a batch; see :class:`mmkernels.ops.ctc_align.alignment.Alignment`.

    ``log_probs (B, T, C)``, ``targets (B, U)``, lengths ``(B,)`` -> paths ``(B, T)``, ends ``(B, U)``, totals
    ``(B,)``: ``argmax_s sum_t log_probs[t, label(s_t)]`` over the monotonic paths s through the states.

    The arguments are those of :func:`mmkernels.ctc_align`, unchecked; lengths outside the padded sizes act as
    clamped, tokens that are the blank or no class as impossible. A target of U tokens has 2 U + 1 states:
    blank, token, blank, token, ..., blank. ``best[s]`` is the score of the best path that is in state s now.
    Of equal predecessors the one of the smallest advance is taken.
    """
    batch, frames, classes = log_probs.shape
    device, tokens = log_probs.device, targets.shape[1]
    length = _lengths(input_lengths, log_probs, frames)
    target_length = _lengths(target_lengths, log_probs, tokens)

    states = torch.arange(2 * tokens + 1, device=device)
    is_token = states % 2 == 1
    labels = torch.full_like(states, blank).expand(batch, -1)
    labels = torch.where(is_token, _every_second(targets), labels)
    inside = states <= 2 * target_length[:, None]
    impossible = is_token & ((labels == blank) | (labels < 0) | (labels >= classes))
    previous_token = torch.cat([labels.new_full((batch, 2), -1), labels], 1)[:, : 2 * tokens + 1]
    skips = is_token & (states >= 2) & (labels != previous_token)

    emissions = log_probs.detach().to(accumulate_dtype(log_probs.dtype))
    emissions = torch.where(emissions < torch.inf, emissions, NEVER)  # NaN and +inf are no log-probabilities
    emissions = emissions.gather(2, labels.clamp(0, classes - 1)[:, None].expand(-1, frames, -1))
    emissions = torch.where((inside & ~impossible)[:, None], emissions, NEVER)

    best = torch.where(states == 0, 0.0, NEVER).to(emissions).expand(batch, -1)
    advances = []
    for t in range(frames):
        one, two = _shifted(best, 1), torch.where(skips, _shifted(best, 2), NEVER)
        advance = torch.where((two > one) & (two > best), 2, (one > best).long())
        moved = torch.where(advance == 2, two, torch.where(advance == 1, one, best)) + emissions[:, t]
        if (t + 1) % RESCALE == 0:
            moved = moved - _largest(moved, states, t, length, target_length)
        best = torch.where(t < length[:, None], moved, best)
        advances.append(advance)

    in_blank, in_token = _at(best, 2 * target_length), _at(best, 2 * target_length - 1)
    state = 2 * target_length - ((target_length > 0) & ~(in_blank > in_token)).long()
    feasible = torch.maximum(in_blank, in_token) > NEVER
    return _backtrace(log_probs, labels, advances, state, feasible, length, target_length)


def _backtrace(
    log_probs: Tensor,
    labels: Tensor,
    advances: list[Tensor],
    state: Tensor,
    feasible: Tensor,
    length: Tensor,
    target_length: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    paths, entered = [], []
    for t in range(len(advances) - 1, -1, -1):
        valid = feasible & (t < length)
        advance = torch.where(valid, _at(advances[t], state), 0)
        paths.append(torch.where(valid, _at(labels, state), -1))
        entered.append(torch.where(valid, state, -1))
        state = state - advance
    batch, frames = labels.shape[0], len(advances)
    path = torch.stack(paths[::-1], 1) if paths else labels.new_zeros((batch, 0))
    states = torch.stack(entered[::-1], 1) if paths else labels.new_zeros((batch, 0))

    # A token ends where the next one begins: before that, all frames are in earlier states.
    next_token = 2 * torch.arange(1, labels.shape[1] // 2 + 1, device=labels.device) + 1
    ends = ((states[:, None] < next_token[:, None]) & (states[:, None] >= 0)).sum(2)

    wide = log_probs.detach().double()
    scores = wide.gather(2, path.clamp_min(0)[..., None])[..., 0] if frames else wide.new_zeros((batch, 0))
    total = torch.where(path >= 0, scores, 0.0).sum(1)
    total = torch.where(feasible, total, NEVER).to(accumulate_dtype(log_probs.dtype))
    return path, ends, total


def _lengths(lengths: Tensor | None, log_probs: Tensor, most: int) -> Tensor:
    if lengths is None:
        return torch.full((log_probs.shape[0],), most, dtype=torch.int64, device=log_probs.device)
    return lengths.to(torch.int64).clamp(0, most)


def _every_second(targets: Tensor) -> Tensor:
    """``(B, 2 U + 1)``, with the tokens at odd places."""
    tokens = targets.to(torch.int64)
    pairs = torch.stack([tokens, tokens], 2).flatten(1)
    return torch.cat([pairs, pairs.new_zeros((pairs.shape[0], 1))], 1)


def _shifted(best: Tensor, by: int) -> Tensor:
    """The scores of the states ``by`` places before."""
    before = best.new_full((best.shape[0], by), NEVER)
    return torch.cat([before, best], 1)[:, : best.shape[1]]


def _at(values: Tensor, state: Tensor) -> Tensor:
    return values.gather(1, state.clamp_min(0)[:, None])[:, 0]


def _largest(best: Tensor, states: Tensor, t: int, length: Tensor, target_length: Tensor) -> Tensor:
    """The largest score of the states that paths from the start to the end can be in; 0 if there is none."""
    pair = states // 2
    from_start, to_end = pair <= t, pair >= (target_length - length + t)[:, None]
    largest = torch.where(from_start & to_end, best, NEVER).amax(1, keepdim=True)
    return torch.where(largest > NEVER, largest, 0.0)
