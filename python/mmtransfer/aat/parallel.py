"""The M adapter next to an MLP: it takes the MLP's input and adds to its output.

Each class is called in place of a module's `forward`, which it has as `inner`; see `encoders.Edit`.
"""

from __future__ import annotations

import threading

import torch

from mmkernels.nn import Adapter
from mmtransfer.encoders.edit import Forward


class Handover(threading.local):
    """The input of an MLP, from its first linear layer to its second; threads may share the model."""

    value: torch.Tensor | None = None

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
