"""The adapters of AAT inside the products of the frozen layers next to them; equal, not approximate.

M adapter: where the MLP has the same activation, `[W2 | s V2] act([W1 ; V1] h + [b1 ; c1]) + (b2 + s c2)` is
the MLP and the adapter in two products instead of four. S adapter: its hidden layer is a linear function of
the output projection's input, so `[W_o ; V1 W_o]` gives both at once.

The stacked weights are made in each call, in the dtype of the product; where autocast would cast the
weights that is a copy it makes too, elsewhere it is extra work. Gradients are computed for the adapter's part
only (and for a frozen part that was thawed).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from mmkernels.activations import ACTIVATIONS
from mmkernels.nn import Adapter
from mmtransfer.encoders.autocast import autocast_dtype, without_autocast


class SerialRewritten:
    """The output projection with its S adapter."""

    def __init__(self, linear: nn.Linear, adapter: Adapter) -> None:
        self.linear, self.adapter = linear, adapter

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        linear, adapter = self.linear, self.adapter
        x = _autocast(x)
        with without_autocast(x.device.type):
            down, shift = _compose(adapter, linear)
            y = _stacked_rows(x, linear.weight, linear.bias, down, shift)
            # A view would keep all of y for the backward pass.
            hidden = y[..., linear.out_features :].contiguous()
            hidden = ACTIVATIONS[adapter.activation](hidden)
            up, up_bias = _scaled_up(adapter, x.dtype)
            return y[..., : linear.out_features] + F.linear(hidden, up, up_bias)


class EntryRewritten:
    """The first linear layer of an MLP with the down-projection of its M adapter below its own rows."""

    def __init__(self, linear: nn.Linear, adapter: Adapter) -> None:
        self.linear, self.adapter = linear, adapter

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x = _autocast(x)
        linear, adapter = self.linear, self.adapter
        assert adapter.down_bias is not None
        with without_autocast(x.device.type):
            return _stacked_rows(x, linear.weight, linear.bias, adapter.down_weight, adapter.down_bias)


class ExitRewritten:
    """The second linear layer of an MLP with the up-projection of its M adapter as further columns.

    With `product_last` the two are separate products, the frozen one after all that is kept for the backward
    pass, where recomputing stops.
    """

    def __init__(self, linear: nn.Linear, adapter: Adapter, *, product_last: bool) -> None:
        self.linear, self.adapter, self.product_last = linear, adapter, product_last

    def __call__(self, z: torch.Tensor) -> torch.Tensor:
        z = _autocast(z)
        with without_autocast(z.device.type):
            up, up_bias = _scaled_up(
                self.adapter, torch.float64 if z.dtype == torch.float64 else torch.float32
            )
            bias = up_bias if self.linear.bias is None else self.linear.bias.to(up_bias.dtype) + up_bias
            if self.product_last:
                own = self.linear.in_features
                added = F.linear(z[..., own:], up.to(z.dtype), bias.to(z.dtype))
                return added + F.linear(z[..., :own], self.linear.weight.to(z.dtype))
            return _stacked_columns(z, self.linear.weight, up, bias)


def _autocast(x: torch.Tensor) -> torch.Tensor:
    """As `torch.nn.functional.linear` casts its input."""
    dtype = autocast_dtype(x.device.type)
    return x if dtype is None or x.dtype == torch.float64 else x.to(dtype)


def _compose(adapter: Adapter, linear: nn.Linear) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of the down-projection of `linear`'s output, as functions of `linear`'s input."""
    assert adapter.down_bias is not None
    down = adapter.down_weight
    weight = down @ linear.weight.to(down.dtype)
    if linear.bias is None:
        return weight, adapter.down_bias
    return weight, torch.addmv(adapter.down_bias, down, linear.bias.to(down.dtype))


def _scaled_up(adapter: Adapter, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    assert adapter.up_bias is not None
    return (adapter.scale * adapter.up_weight).to(dtype), (adapter.scale * adapter.up_bias).to(dtype)


def _is_transformed() -> bool:
    """Whether this runs inside `torch.func` or forward mode, which the functions below do not serve."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _stacked_rows(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    rows: torch.Tensor,
    rows_bias: torch.Tensor,
) -> torch.Tensor:
    """`x @ [weight ; rows]^T + [bias ; rows_bias]`."""
    if _is_transformed():
        own = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        return torch.cat([own, F.linear(x, rows.to(x.dtype), rows_bias.to(x.dtype))], -1)
    return _StackedRows.apply(x, weight, bias, rows, rows_bias)


def _stacked_columns(
    z: torch.Tensor, weight: torch.Tensor, columns: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """`z @ [weight | columns]^T + bias`."""
    if _is_transformed():
        return F.linear(z, torch.cat([weight.to(z.dtype), columns.to(z.dtype)], 1), bias.to(z.dtype))
    return _StackedColumns.apply(z, weight, columns, bias)


class _StackedRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        rows: torch.Tensor,
        rows_bias: torch.Tensor,
    ) -> torch.Tensor:
        wants_weights = any(ctx.needs_input_grad[1:])
        ctx.save_for_backward(x if wants_weights else None, weight, rows)
        first = weight.new_zeros(weight.shape[0]) if bias is None else bias
        return F.linear(x, _cat([weight, rows], 0, x.dtype), _cat([first, rows_bias], 0, x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, rows = ctx.saved_tensors
        need_x, need_weight, need_bias, need_rows, need_rows_bias = ctx.needs_input_grad
        own, added = grad.flatten(0, -2).split([weight.shape[0], rows.shape[0]], dim=1)
        return (
            grad @ _cat([weight, rows], 0, grad.dtype) if need_x else None,
            (own.T @ x.flatten(0, -2)).to(weight.dtype) if need_weight else None,
            own.sum(0, dtype=weight.dtype) if need_bias else None,
            (added.T @ x.flatten(0, -2)).to(rows.dtype) if need_rows else None,
            added.sum(0, dtype=rows.dtype) if need_rows_bias else None,
        )


class _StackedColumns(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, z: torch.Tensor, weight: torch.Tensor, columns: torch.Tensor, bias: torch.Tensor
    ) -> torch.Tensor:
        _, need_weight, need_columns, _ = ctx.needs_input_grad
        own = weight.shape[1]
        # Only the columns whose factor is trained; a view would keep all of z.
        added = z[..., own:].contiguous() if need_columns else None
        ctx.save_for_backward(z[..., :own] if need_weight else None, added, weight, columns)
        return F.linear(z, _cat([weight, columns], 1, z.dtype), bias.to(z.dtype))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if torch.is_grad_enabled():
            # Only parts of z are saved, and nothing leads from them to z.
            raise RuntimeError(
                "rewrite=True has first derivatives only; prepare with rewrite=False for others"
            )
        own, added, weight, columns = ctx.saved_tensors
        need_z, need_weight, need_columns, need_bias = ctx.needs_input_grad
        rows = grad.flatten(0, -2)
        return (
            grad @ _cat([weight, columns], 1, grad.dtype) if need_z else None,
            (rows.T @ own.flatten(0, -2)).to(weight.dtype) if need_weight else None,
            (rows.T @ added.flatten(0, -2)).to(columns.dtype) if need_columns else None,
            rows.sum(0, dtype=columns.dtype) if need_bias else None,
        )


def _cat(parts: list[torch.Tensor], dim: int, dtype: torch.dtype) -> torch.Tensor:
    """`torch.cat` and the cast in one pass; in two where gradients of a gradient are wanted."""
    if torch.is_grad_enabled():
        return torch.cat([part.to(dtype) for part in parts], dim)
    sizes = [part.shape[dim] for part in parts]
    shape = [*parts[0].shape]
    shape[dim] = sum(sizes)
    stacked = parts[0].new_empty(shape, dtype=dtype)
    for place, part in zip(stacked.split(sizes, dim), parts, strict=True):
        place.copy_(part)
    return stacked
