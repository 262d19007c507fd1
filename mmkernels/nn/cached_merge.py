"""Merging once for many uses: results whose graph any number of backward passes may go through."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mmkernels.nn.merge import constrain
from mmkernels.ops import _common, _derivatives
from mmkernels.ops.merge import merge, reference
from mmkernels.ops.merge.schema import OPS


@dataclass
class Block:
    """Pairs that have one node in the graph, such as the matrices of a layer.

    Attributes:
        weights: ``(G,)``, as they are trained; before the constraint.
        target: the tensors that a share of the source is merged into.
        source: as many, of the same shapes; no gradient flows to them.
        groups: for each pair the index of its entry of ``weights``.
        passed: whether a backward pass has gone through the node.
    """

    weights: Tensor
    target: list[Tensor]
    source: list[Tensor]
    groups: list[int]
    passed: bool = False


def can_reuse() -> bool:
    """Whether results may be kept from one call to the next: not while a graph is traced, and not inside
    ``torch.func`` and forward mode, whose tensors mean something in their own transform alone."""
    return not (
        torch.compiler.is_compiling() or _derivatives.transforms_active() or forward_ad._current_level >= 0
    )


def merge_blocks(
    blocks: Sequence[Block],
    *,
    constraint: str = "none",
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> list[list[Tensor]]:
    """Merge the pairs of all blocks in one call of ``mmkernels.merge``, for forward passes until a tensor
    changes.

    In the graph each block is one node. It keeps the tensors themselves and no memory for them, so several
    backward passes may go through it, as in gradient accumulation; each adds the gradients of ``target`` and
    ``weights``. A block whose results nobody used costs nothing.

    Args:
        blocks: their tensors; all on one device.
        constraint: of the weights: "none", "clamp" or "sigmoid".
        dtype: of the results; by default their targets'.
        backend: of ``mmkernels.merge``.

    Returns:
        The results of each block.

    Raises:
        RuntimeError: in a backward pass, if a tensor was overwritten since the results were made.
    """
    target = [tensor for block in blocks for tensor in block.target]
    source = [tensor for block in blocks for tensor in block.source]
    with torch.no_grad():
        weights = torch.cat([constrain(block.weights.detach(), constraint) for block in blocks])
        starts, start = [], 0
        for block in blocks:
            starts.append(start)
            start += block.weights.shape[0]
        groups = [first + g for first, block in zip(starts, blocks, strict=True) for g in block.groups]
        results = iter(merge(target, source, weights, groups=groups, dtype=dtype, backend=backend))
    merged = []
    for block in blocks:
        own = [next(results) for _ in block.target]
        if _common.needs_gradient(block.weights, *block.target):
            # The node is told of results that are there already.
            own = list(_Node.apply(own, block, (constraint, dtype, backend), block.weights, *block.target))
        merged.append(own)
    return merged


class _Node(torch.autograd.Function):
    """Arguments: the results, the block, the options, the weights and the targets."""

    @staticmethod
    def forward(
        ctx: Any,
        results: list[Tensor],
        block: Block,
        options: tuple[str, torch.dtype | None, str],
        weights: Tensor,
        *target: Tensor,
    ) -> tuple[Tensor, ...]:
        # Not save_for_backward, whose tensors are gone after the first backward pass. They are parameters and
        # buffers, which live as long as the module, and no function of the results: there is no cycle.
        ctx.block, ctx.options = block, options
        ctx.versions = _versions(block)
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        block = ctx.block
        block.passed = True
        _check_versions(block, ctx.versions)
        need_weights, *need_targets = ctx.needs_input_grad[3:]
        used = [
            index
            for index, grad in enumerate(grads)
            if grad is not None and (need_weights or need_targets[index])
        ]
        d_target: list[Tensor | None] = [None] * len(block.target)
        d_weights = None
        if used:
            some: Any = [grads[index] for index in used]
            need = [need_targets[index] for index in used]
            d_weights, found = _gradients(some, _select(block, used), ctx.options, need_weights, need)
            for index, gradient in zip(used, found, strict=True):
                d_target[index] = gradient
        return None, None, None, d_weights, *d_target


def _select(block: Block, used: Sequence[int]) -> Block:
    return Block(
        block.weights,
        [block.target[index] for index in used],
        [block.source[index] for index in used],
        [block.groups[index] for index in used],
    )


def _gradients(
    grads: list[Tensor],
    block: Block,
    options: tuple[str, torch.dtype | None, str],
    need_weights: bool,
    need_target: list[bool],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Of the weights, and of each target."""
    constraint, dtype, asked = options
    backend = _common.choose_backend("merge", asked, block.target[0])
    beyond = _derivatives.beyond_kernels(*grads)
    if backend == "reference" or beyond or not _kernels_take(block, grads):

        def merged(weights: Tensor, *target: Tensor) -> list[Tensor]:
            lam = constrain(weights, constraint)
            return reference.merge(target, block.source, lam, groups=block.groups, dtype=dtype)

        tensors, needed = (block.weights, *block.target), (need_weights, *need_target)
        d_weights, *d_target = _derivatives.reference_gradients(
            "merge", asked if beyond and asked != "reference" else "auto", merged, tensors, needed, grads
        )
        return d_weights, d_target
    wide = _common.accumulate_dtype(block.target[0].dtype)
    lam = constrain(block.weights.detach(), constraint)
    places = [place for place, need in enumerate(need_target) if need]
    arguments: Any = (grads, block.target, block.source, lam.to(wide), block.groups, need_weights, places, [])
    d_lam, of_places, _ = OPS[backend][2](*arguments)
    by_place = dict(zip(places, of_places, strict=True))
    d_weights = _through_constraint(d_lam, block.weights, constraint) if need_weights else None
    return d_weights, [by_place.get(place) for place in range(len(need_target))]


def _through_constraint(d_lam: Tensor, weights: Tensor, constraint: str) -> Tensor:
    """The gradient of the weights, from that of the shares of the source."""
    if constraint == "none":
        return d_lam.to(weights.dtype)
    with torch.enable_grad():
        own = weights.detach().requires_grad_()
        lam = constrain(own, constraint)
    (gradient,) = torch.autograd.grad(lam, own, d_lam.to(lam.dtype))
    return gradient


def _kernels_take(block: Block, grads: Sequence[Tensor]) -> bool:
    """Whether the backward op takes the dtypes: one for all targets, one for all sources, one half type."""
    kinds = [{tensor.dtype for tensor in tensors} for tensors in (block.target, block.source, grads)]
    halves = {torch.float16, torch.bfloat16} & set().union(*kinds)
    return all(len(kind) == 1 for kind in kinds) and len(halves) < 2


def _versions(block: Block) -> list[int]:
    # Tensors of inference mode have none.
    tensors = (block.weights, *block.target, *block.source)
    return [-1 if tensor.is_inference() else tensor._version for tensor in tensors]


def _check_versions(block: Block, versions: list[int]) -> None:
    if _versions(block) != versions:
        raise RuntimeError(
            "merge: a target, a source or a weight was overwritten between the forward and the backward "
            "pass, which reads it and keeps no copy; call backward before the optimiser's step, or run the "
            "forward pass again"
        )
