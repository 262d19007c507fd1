"""Layers that keep less for the backward pass, and compute the rest again when it comes.

Bytes per token and channel that a block of AAT^MS (768 wide, GELU, pre-norm) keeps under bf16 autocast with a
float32 residual stream, as tests/methods/test_recompute.py measures them:

- `none`: 29 with the kernels of `mmkernels.adapter`, 28 rewritten (the paper's way: 30).
- `selective`: 12, the block's input 4, queries, keys and values 6, the attention's result 2. Recomputed:
  norms, output projection, S adapter, the MLP's first product and activation, the M adapter.
- `full`: 4, the block's input; the layer is computed again, but for the MLP's second product.

Not under `torch.compile`, which makes this choice itself.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers import Cache

from .edit import Edit, Forward
from .encoder import Encoder

RECOMPUTE = ("none", "selective", "full")

_aten = torch.ops.aten
_PRODUCTS = {_aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.linear.default}
_ATTENTION = {
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_fused_attention_overrideable.default,
}


class Policy(threading.local):
    """Keeps the results of attention, and those of products while `products` is set, in this thread."""

    products = False

    def __call__(self, _context: Any, op: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
        keep = op in _ATTENTION or (self.products and op in _PRODUCTS)
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    def __reduce__(self) -> tuple[type[Policy], tuple[()]]:
        return Policy, ()


class Kept:
    """A linear layer whose product the policy keeps."""

    def __init__(self, inner: Forward, policy: Policy) -> None:
        self.inner, self.policy = inner, policy

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.policy.products = True
        try:
            return self.inner(x)
        finally:
            self.policy.products = False


class Recomputed:
    """A layer that is computed again in the backward pass, but for tensors that the policy keeps."""

    def __init__(self, inner: Forward, policy: Policy | None) -> None:
        self.inner, self.active = inner, True
        self.options: dict[str, Any] = {}
        if policy is not None:
            self.options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, policy)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not (self.active and torch.is_grad_enabled()):
            return self.inner(*args, **kwargs)
        if any(isinstance(each, Cache) for each in (*args, *kwargs.values())):
            raise ValueError(
                "a layer that is computed again would add its keys and values to the cache twice; call the "
                "model with use_cache=False, or set model.config.use_cache = False"
            )
        return checkpoint(self.inner, *args, use_reentrant=False, **self.options, **kwargs)


def add_recompute(edit: Edit, encoder: Encoder, layers: list[nn.Module], kind: str) -> None:
    """Have `layers` recompute as `kind` of `RECOMPUTE` says; comes after all other changes of them."""
    if kind == "none":
        return
    description = encoder.description
    for layer in layers:
        policy = None
        if kind == "selective":
            policy = Policy()
            # Where one module makes all three, it is there once.
            paths = (description.layer_query, description.layer_key, description.layer_value)
            for path in dict.fromkeys(paths):
                module = layer.get_submodule(path)
                edit.override(module, Kept(module.forward, policy))
        edit.override(layer, Recomputed(layer.forward, policy))


def find_recomputed(layers: Iterable[nn.Module]) -> list[Recomputed]:
    """The forwards of those layers that `add_recompute` changed."""
    forwards = (layer.__dict__.get("forward") for layer in layers)
    return [forward for forward in forwards if isinstance(forward, Recomputed)]
