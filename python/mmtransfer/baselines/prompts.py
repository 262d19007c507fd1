"""Learned tokens in front of the input of a layer (VPT-deep, arXiv 2203.12119)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mmtransfer.encoders.edit import Forward


class Prompted:
    """A layer with learned tokens, its parameter `prompt` (P, D), in front of its input; their outputs are
    dropped."""

    def __init__(self, inner: Forward, layer: nn.Module) -> None:
        self.inner, self.layer = inner, layer

    def __call__(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        prompt = self.layer.get_parameter("prompt")
        count = prompt.shape[0]
        if args:
            args = (_widen_mask(args[0], count), *args[1:])
        elif "attention_mask" in kwargs:
            kwargs = {**kwargs, "attention_mask": _widen_mask(kwargs["attention_mask"], count)}
        tokens = prompt.to(hidden_states.dtype).expand(hidden_states.shape[0], -1, -1)
        output = self.inner(torch.cat([tokens, hidden_states], dim=1), *args, **kwargs)
        if isinstance(output, tuple):
            return output[0][:, count:], *output[1:]
        return output[:, count:]


def _widen_mask(mask: torch.Tensor | None, count: int) -> torch.Tensor | None:
    """A mask `(B, N)` of valid tokens or `(B, H, 1 or N, N)` of visible keys, `count` visible ones in front.

    The new queries see the keys of the first one: the masks of encoders are the same for all queries.
    """
    if mask is None:
        return None
    if mask.dim() == 4 and mask.shape[2] > 1:
        mask = torch.cat([mask[:, :, :1].expand(-1, -1, count, -1), mask], dim=2)
    visible: bool | int = 0 if mask.is_floating_point() else 1
    if mask.dim() == 2:
        visible = 1
    return nn.functional.pad(mask, (count, 0), value=visible)
