"""The valid frames of several encoder layers, packed; the encoder writes them, a readout reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.autograd import forward_ad


@dataclass(frozen=True)
class Taps:
    """Outputs of L encoder layers for the N valid frames of B utterances.

    Build one from stored features with `Taps.pack`, for instance from those of several utterances that
    `split` has taken apart.

    Attributes:
        features: `(N, L, C)`, contiguous, utterance after utterance; with a graph if the encoder's layers had
            one.
        lengths: `(B,)` int64 frames per utterance, on the features' device; they sum to N.
        steps: T, the padded length, at least the largest of `lengths`.
        index: `(N,)` int64 positions of the frames in the flattened `(B, T)` grid; None if N = B * T.
    """

    features: torch.Tensor
    lengths: torch.Tensor
    steps: int
    index: torch.Tensor | None

    @classmethod
    def pack(cls, features: torch.Tensor, lengths: torch.Tensor) -> Taps:
        """Taps of features `(N, L, C)` of utterances of `lengths` (B,) frames; T is the longest."""
        if features.dim() != 3:
            raise ValueError(f"features must be (N, L, C), got shape {tuple(features.shape)}")
        check_lengths("lengths", lengths)
        counts = lengths.to("cpu", torch.int64)
        if counts.numel() and int(counts.min()) < 0:
            raise ValueError(f"lengths must be >= 0, got {counts.tolist()}")
        if int(counts.sum()) != features.shape[0]:
            raise ValueError(
                f"lengths must sum to the {features.shape[0]} frames of features, got {int(counts.sum())}"
            )
        steps = int(counts.max()) if counts.numel() else 0
        index = frame_index(counts, steps)
        return cls(
            features=features,
            lengths=counts.to(features.device),
            steps=steps,
            index=None if index is None else index.to(features.device),
        )

    def scatter(self, y: torch.Tensor) -> torch.Tensor:
        """Put per-frame values `(N, C_out)` back into a batch `(B, T, C_out)` with zeros past each length.

        Differentiable; every gradient is a plain gather, so the result is deterministic.
        """
        if y.dim() != 2 or y.shape[0] != self.features.shape[0]:
            raise ValueError(f"y must be ({self.features.shape[0]}, C_out), got shape {tuple(y.shape)}")
        batch = self.lengths.shape[0]
        if self.index is not None:
            y = y.new_zeros(batch * self.steps, y.shape[1]).index_copy(0, self.index, y)
        return y.view(batch, self.steps, y.shape[1])

    def split(self) -> tuple[torch.Tensor, ...]:
        """The features of each utterance, B views `(lengths[b], L, C)`; moves the lengths to the host."""
        return self.features.split(self.lengths.tolist())

    def to(self, *args: Any, **kwargs: Any) -> Taps:
        """Taps with the features moved or cast as `Tensor.to` does; lengths and index follow the device."""
        features = self.features.to(*args, **kwargs)
        return replace(
            self,
            features=features,
            lengths=self.lengths.to(features.device),
            index=None if self.index is None else self.index.to(features.device),
        )


def attach_states(
    features: torch.Tensor, index: torch.Tensor | None, states: Mapping[int, torch.Tensor]
) -> torch.Tensor:
    """The features, already written, as a function of the states `(B, T, C)` that slots were written from.

    Writing slots under autograd would copy the gradient of the whole buffer once per slot. Here it is handed
    out as views, or scattered by `index` where padding was dropped. Slots not among `states` are constants.
    """
    if not states:
        return features
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return _stacked(features, index, states)
    return _StatesInSlots.apply(features, index, tuple(states), *states.values())


def _stacked(
    features: torch.Tensor, index: torch.Tensor | None, states: Mapping[int, torch.Tensor]
) -> torch.Tensor:
    """The same by statements of torch, which have every derivative."""
    slots = list(features.detach().unbind(1))
    for slot, state in states.items():
        rows = state.reshape(-1, state.shape[-1])
        slots[slot] = rows if index is None else rows[index]
    return torch.stack(slots, 1)


class _StatesInSlots(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features: torch.Tensor,
        index: torch.Tensor | None,
        slots: tuple[int, ...],
        *states: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(index)
        ctx.slots, ctx.shape = slots, states[0].shape
        return features

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (index,) = ctx.saved_tensors
        batch, steps, width = ctx.shape
        d_states = [grad[:, slot] for slot in ctx.slots]
        if index is not None:
            d_states = [d.new_zeros(batch * steps, width).index_copy(0, index, d) for d in d_states]
        return None, None, None, *(d.reshape(ctx.shape) for d in d_states)


def frame_index(lengths: torch.Tensor, steps: int) -> torch.Tensor | None:
    """Positions of the valid frames in a flattened `(B, steps)` grid; None if all are valid."""
    valid = torch.arange(steps, device=lengths.device) < lengths.unsqueeze(1)
    return None if bool(valid.all()) else valid.flatten().nonzero().squeeze(1)


def check_lengths(name: str, lengths: torch.Tensor) -> None:
    """Raise unless `lengths` is a one-dimensional integer tensor."""
    if not isinstance(lengths, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(lengths).__name__}")
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise TypeError(f"{name} must have an integer dtype, got {lengths.dtype}")
    if lengths.dim() != 1:
        raise ValueError(f"{name} must be (B,), got shape {tuple(lengths.shape)}")
