"""Recomputing changes no value, and brings what a block keeps for the backward pass under its bound."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from aat_models import build, encode, gradients, prepared
from tiny_encoders import TINY
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import ASTConfig, ASTModel

from mmtransfer import aat, models

BATCH, TOKENS, WIDTH = 1, 146, 768


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("model_type", TINY)
def test_values_and_gradients_are_the_same(model_type, recompute):
    plain = build(model_type)
    kept, again = prepared(plain), prepared(plain, recompute=recompute)
    torch.testing.assert_close(encode(again), encode(kept))
    wanted, found = gradients(kept), gradients(again)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_dropout_is_the_same_the_second_time(recompute):
    plain = build("audio-spectrogram-transformer", hidden_dropout_prob=0.5)
    models_ = [prepared(plain, recompute=option).train() for option in ("none", recompute)]
    found = []
    for model in models_:
        torch.manual_seed(3)
        found.append(gradients(model))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, msg=name)


def test_attention_runs_once_and_the_first_product_of_the_mlp_twice():
    model = prepared(build("audio-spectrogram-transformer"), recompute="selective")
    calls = CountedOps()
    with calls:
        gradients(model)
    layer = models.get_layers(model)[0]
    assert calls.count["_scaled_dot_product_flash_attention_for_cpu"] == 4
    shape = (layer.mlp.fc1.in_features, layer.mlp.fc1.out_features)
    assert calls.products[shape] == 8
    # Queries, keys, values once each, the output projection twice.
    assert calls.products[(16, 16)] == 4 * (3 + 2)


class CountedOps(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count: dict[str, int] = {}
        self.products: dict[tuple[int, ...], int] = {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op.overloadpacket.__name__
        self.count[name] = self.count.get(name, 0) + 1
        if name == "addmm":
            shape = tuple(args[2].shape)
            self.products[shape] = self.products.get(shape, 0) + 1
        return op(*args, **(kwargs or {}))


class LiveStorages(TorchDispatchMode):
    """Every storage that is made while it is active, to see which of them are held on to."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        output = op(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return output

    def held(self) -> int:
        return sum(size for reference, size in self.made.values() if not reference.expired())


@pytest.fixture(scope="module")
def blocks() -> ASTModel:
    """Two blocks of the paper's size."""
    torch.manual_seed(0)
    return ASTModel(ASTConfig(num_hidden_layers=2, max_length=128))


def bytes_per_token_and_channel(model: nn.Module) -> tuple[float, float]:
    """What the second block holds on to after its forward pass, and what of it autograd saved.

    Block input and block output are one residual stream: the output is counted, the input is the first
    block's. Autocast's copies of weights are dropped before counting.
    """
    saved: dict[int, int] = {}
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}

    def pack(tensor: torch.Tensor) -> Any:
        storage = tensor.untyped_storage()
        # Of as many elements as a tensor over the tokens has at the least.
        if storage._cdata not in weights and any(TOKENS in (n, n // BATCH) for n in tensor.shape):
            saved[storage._cdata] = storage.nbytes()
        return tensor

    live = LiveStorages()
    first, second = models.get_layers(model)
    x = torch.randn(BATCH, TOKENS, WIDTH)
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        x = first(x)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), live:
            y = second(x)
    assert y.requires_grad
    rows = BATCH * TOKENS * WIDTH
    copies = sum(
        size
        for reference, size in live.made.values()
        if not reference.expired() and size % (2 * WIDTH) == 0 and is_copy_of_a_weight(size)
    )
    return (live.held() - copies) / rows, sum(saved.values()) / rows


def is_copy_of_a_weight(size: int) -> bool:
    """bfloat16 copies of the frozen weights, which the graph holds for the gradient of their input."""
    return size // 2 in {WIDTH * WIDTH, 4 * WIDTH * WIDTH, WIDTH * WIDTH // 4}


@pytest.mark.parametrize(
    ("options", "low", "high"),
    [
        ({"recompute": "selective"}, 11.9, 12.2),
        ({"recompute": "selective", "rewrite": True}, 11.9, 12.2),
        ({"recompute": "full"}, 3.9, 4.1),
        ({"rewrite": True}, 27.9, 28.2),
        ({}, 28.9, 30.2),
    ],
)
def test_bytes_of_a_block(blocks, options, low, high):
    handle = aat.prepare(blocks, backend="reference", **options)
    try:
        held, saved = bytes_per_token_and_channel(blocks)
    finally:
        handle.revert()
    assert low <= held <= high
    if "recompute" not in options:
        # Checkpointing keeps its tensors outside of autograd's hooks; without it the two agree.
        assert abs(saved - held) < 0.1
    else:
        assert saved <= held
