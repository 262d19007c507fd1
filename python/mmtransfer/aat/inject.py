"""What `prepare` puts in front of the `forward` of single modules of a model.

Each class is called in place of a module's `forward`, which it has as `inner`. They are objects and not
closures, so that a deep copy of the model refers to its own modules.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from mmkernels.nn import Adapter

Forward = Callable[..., Any]


class Serial:
    """`A + Adapter(A)` in place of the (first) output A of a module."""

    def __init__(self, inner: Forward, adapter: Adapter) -> None:
        self.inner, self.adapter = inner, adapter

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self.inner(*args, **kwargs)
        if isinstance(output, tuple):
            return self.adapter(output[0]), *output[1:]
        return self.adapter(output)


class Handover:
    """The input of an MLP, from its first linear layer to its second."""

    def __init__(self) -> None:
        self.value: torch.Tensor | None = None

    def take(self) -> torch.Tensor:
        value, self.value = self.value, None
        assert value is not None
        return value

    def __reduce__(self) -> tuple[type[Handover], tuple[()]]:
        # A forward pass that an error ended leaves a value, which must not go into copies of the model.
        return Handover, ()


class ParallelEntry:
    """The first linear layer of an MLP; its input is the adapter's too."""

    def __init__(self, inner: Forward, handover: Handover) -> None:
        self.inner, self.handover = inner, handover

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.handover.value = x
        return self.inner(x)


class ParallelExit:
    """The second linear layer of an MLP, plus the adapter of what entered the first.

    With `product_last` the layer comes after all that is kept for the backward pass, where recomputing stops;
    otherwise the adapter adds to the layer's result in its own pass.
    """

    def __init__(self, inner: Forward, handover: Handover, adapter: Adapter, *, product_last: bool) -> None:
        self.inner, self.handover, self.adapter = inner, handover, adapter
        self.product_last = product_last

    def __call__(self, z: torch.Tensor) -> torch.Tensor:
        x = self.handover.take()
        if self.product_last:
            return self.adapter(x) + self.inner(z)
        return self.adapter(x, residual=self.inner(z))


class Prompted:
    """A layer with learned tokens, its parameter `prompt` (P, D), in front of its input; their outputs go."""

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

    The new queries see what the first one sees: the masks of encoders are the same for all queries.
    """
    if mask is None:
        return None
    if mask.dim() == 4 and mask.shape[2] > 1:
        mask = torch.cat([mask[:, :, :1].expand(-1, -1, count, -1), mask], dim=2)
    visible: bool | int = 0 if mask.is_floating_point() else 1
    if mask.dim() == 2:
        visible = 1
    return nn.functional.pad(mask, (count, 0), value=visible)
