"""``nn.Sequential([LayerNorm,] down, activation, up)`` modules that the user names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from mmkernels.patch.bottleneck import Bottleneck, Mismatch, check_intact, find_bottleneck
from mmkernels.patch.recogniser import Recogniser, Unsupported


class SequentialAdapter(Recogniser):
    """The bottleneck without residual, which the caller of the ``Sequential`` adds."""

    what = "Sequential of down-projection, activation, up-projection -> adapter"
    method = "forward"

    def claims(self, module: nn.Module) -> bool:
        return False  # Only the user knows that such a Sequential is an adapter.

    def check(self, module: nn.Module) -> None:
        cls = type(module)
        if isinstance(module, torch.jit.ScriptModule):
            raise Mismatch("it is a TorchScript module, whose code is fixed")
        if not isinstance(module, nn.Sequential):
            raise Mismatch(f"it is a {cls.__name__}, not a torch.nn.Sequential")
        if cls.forward is not nn.Sequential.forward:
            raise Mismatch(f"its class {cls.__name__} overrides forward")
        find_bottleneck(module)
        if "forward" in vars(module):
            raise Unsupported("forward is overridden on the instance, by a hook or a wrapper")
        check_intact(module.named_children())

    def override(self, cls: type[Any]) -> Callable[..., Any]:
        original = cls.forward

        def forward(self: Any, input: Any) -> Any:
            bottleneck = _intact_bottleneck(self)
            if bottleneck is not None and bottleneck.serves(input):
                return bottleneck(input)
            return original(self, input)

        return forward


def _intact_bottleneck(module: nn.Sequential) -> Bottleneck | None:
    """The parts, or None. Looked up on each call: layers may be replaced or hooked after ``accelerate``."""
    try:
        bottleneck = find_bottleneck(module)
        check_intact(module.named_children())
    except Unsupported:
        return None
    return bottleneck
