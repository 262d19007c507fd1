"""Launchers of the norm product's Triton kernels, see :mod:`mmkernels.ops._norm_product_kernels`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from mmkernels.ops._common import accumulate_dtype
from mmkernels.ops._norm_product_kernels import (
    norm_product_dx_kernel,
    norm_product_fold_kernel,
    norm_product_fwd_kernel,
    norm_product_gradient_kernel,
    norm_product_unfold_kernel,
)
from mmkernels.ops._triton import (
    dense_rows,
    expect,
    expect_optional,
    library_multiplies,
    multiply_into,
    parameter_dtype,
    product_grid,
    product_options,
    row_block,
)

GRADIENT_ROWS = 64
GRADIENT_COLUMNS = 64
UNFOLD_ROWS = 16
UNFOLD_COLUMNS = 64


@dataclass(frozen=True)
class Inputs:
    """The operands of both directions, in the layout that the kernels take. Parameters have one dtype, that
    of ``x`` or of its sums."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None

    @classmethod
    def checked(
        cls,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
    ) -> Inputs:
        if x.dim() != 3 or weight.dim() != 3:
            raise ValueError(f"x, weight: expected 3 dimensions, got {x.dim()} and {weight.dim()}")
        _, taps, inputs = x.shape
        outputs, dtype = weight.shape[1], parameter_dtype("weight", weight, x)
        return cls(
            dense_rows(x),
            expect("weight", weight, (taps, outputs, inputs), dtype, x.device),
            expect_optional("bias", bias, (taps, outputs), dtype, x.device),
            expect_optional("norm_weight", norm_weight, (taps, inputs), dtype, x.device),
            expect_optional("norm_bias", norm_bias, (taps, inputs), dtype, x.device),
        )

    @property
    def norm(self) -> bool:
        """Whether there is a LayerNorm; rows without elements have no statistics."""
        return self.norm_weight is not None and self.x.shape[2] > 0

    @property
    def accumulate(self) -> torch.dtype:
        """Of statistics and sums."""
        return accumulate_dtype(self.x.dtype)

    def new_sums(self, *shape: int) -> Tensor:
        return self.x.new_empty(shape, dtype=self.accumulate)

    def fold(self) -> tuple[Tensor, Tensor, Tensor]:
        """``Vc`` in the type of ``x``, ``b'``, and with a LayerNorm the row sums of ``Vc``."""
        taps, outputs, inputs = self.weight.shape
        as_it_is = self.norm_weight is None and self.weight.dtype == self.x.dtype
        folded_weight = None if as_it_is else self.x.new_empty(self.weight.shape)
        folded_bias = self.new_sums(taps, outputs)
        weight_sum = self.new_sums(taps, outputs)
        block, warps = row_block(inputs)
        norm_product_fold_kernel[(taps * outputs,)](
            self.weight,
            self.bias,
            self.norm_weight,
            self.norm_bias,
            folded_weight,
            folded_bias,
            weight_sum,
            outputs,
            WIDTH=inputs,
            BLOCK_C=block,
            num_warps=warps,
        )
        return self.weight if folded_weight is None else folded_weight, folded_bias, weight_sum


def write_output(
    args: Inputs, stats: Tensor | None, activation: int, y: Tensor, preactivation: Tensor | None
) -> None:
    """Writes ``y``, and the value before the activation where ``preactivation`` is given.

    Args:
        args: the operands.
        stats: mean and 1 / deviation of each row, ``(rows, taps, 2)``; not read without a LayerNorm.
        activation: code of the activation.
        y: output ``(rows, taps, outputs)``, contiguous, in the dtype of ``x``.
        preactivation: output of the same layout, or None.
    """
    rows, taps, outputs = y.shape
    folded_weight, folded_bias, weight_sum = args.fold()
    by_library = library_multiplies(y.dtype)
    if by_library:
        multiply_into(y.transpose(0, 1), args.x.transpose(0, 1), folded_weight.mT)
    norm_product_fwd_kernel[product_grid(rows, outputs, taps)](
        None if by_library else args.x,
        None if by_library else folded_weight,
        folded_bias,
        weight_sum,
        stats if args.norm else None,
        y,
        preactivation,
        rows,
        taps,
        outputs,
        args.x.stride(0),
        args.x.stride(1),
        WIDTH=args.x.shape[2],
        ACTIVATION=activation,
        **product_options(),
    )


def write_scaled_gradient(
    args: Inputs,
    grad: Tensor,
    value: Tensor,
    stats: Tensor,
    folded_bias: Tensor | None,
    activation: int,
    scaled_grad: Tensor | None,
    pull: Tensor | None,
) -> Tensor:
    """The first step backwards, from ``dL/dy``; returns the gradient of ``b'``, ``(taps, outputs)`` sums.

    Args:
        args: the operands.
        grad: ``dL/dy (rows, taps, outputs)``, contiguous.
        value: the value before the activation, of the same layout; ``y`` itself serves for relu and none.
        stats: as in ``write_output``.
        folded_bias: ``b'`` of ``Inputs.fold``; needed for ``pull`` only.
        activation: code of the activation.
        scaled_grad: output ``g = dL/dz * rstd`` in the dtype of ``x``, or None.
        pull: output ``(rows, taps)``: the factor of ``x - mean`` in ``dL/dx``, or None.
    """
    rows, taps, outputs = value.shape
    chunks = triton.cdiv(rows, GRADIENT_ROWS)
    partial_bias = args.new_sums(chunks, taps, outputs)
    norm_product_gradient_kernel[(chunks, taps)](
        grad,
        value,
        stats if args.norm else None,
        folded_bias,
        scaled_grad,
        pull,
        partial_bias,
        rows,
        taps,
        args.x.shape[2],
        OUTPUTS=outputs,
        ACTIVATION=activation,
        BLOCK_ROWS=GRADIENT_ROWS,
        BLOCK_O=GRADIENT_COLUMNS,
    )
    return partial_bias.sum(0)


def write_input_gradient(
    args: Inputs,
    scaled_grad: Tensor,
    folded_weight: Tensor | None,
    stats: Tensor,
    pull: Tensor | None,
    dx: Tensor,
    addend: Tensor | None = None,
) -> None:
    """Writes ``dx = g Vc - pull * (x - mean)``, rounded once; ``addend``, of its layout, is added before.

    ``scaled_grad``, ``stats`` and ``pull`` are those of ``write_scaled_gradient``, ``folded_weight`` is
    ``Vc`` of ``Inputs.fold``.
    """
    rows, taps, inputs = dx.shape
    by_library = library_multiplies(dx.dtype)
    if by_library:
        assert folded_weight is not None
        multiply_into(dx.transpose(0, 1), scaled_grad.transpose(0, 1), folded_weight)
    norm_product_dx_kernel[product_grid(rows, inputs, taps)](
        scaled_grad,
        None if by_library else folded_weight,
        args.x,
        stats if args.norm else None,
        pull,
        addend,
        dx,
        rows,
        taps,
        inputs,
        args.x.stride(0),
        args.x.stride(1),
        OUTPUTS=scaled_grad.shape[2],
        **product_options(),
    )


def unfold(
    args: Inputs,
    product: Tensor,
    d_bias: Tensor,
    d_weight: Tensor,
    d_norm_weight: Tensor,
    d_norm_bias: Tensor,
) -> None:
    """Gradients of the parameters of a folded LayerNorm from those of the folded product.

    Args:
        args: the operands.
        product: ``dVc = g^T x (taps, outputs, inputs)``, in the dtype of sums, as ``d_bias``.
        d_bias: the gradient of ``b'``, ``(taps, outputs)``.
        d_weight: output, of the shape of ``product`` and, as the other two, in the dtype of the parameters.
        d_norm_weight: output ``(taps, inputs)``, or without elements where it is not wanted.
        d_norm_bias: output, as ``d_norm_weight``.
    """
    taps, outputs, inputs = args.weight.shape
    need_norm = d_norm_weight.numel() > 0
    norm_product_unfold_kernel[(triton.cdiv(inputs, UNFOLD_COLUMNS), taps)](
        product,
        product.mean(2),
        d_bias,
        args.weight,
        args.norm_weight,
        args.norm_bias,
        d_weight,
        d_norm_weight if need_norm else None,
        d_norm_bias if need_norm else None,
        inputs,
        OUTPUTS=outputs,
        BLOCK_O=UNFOLD_ROWS,
        BLOCK_C=UNFOLD_COLUMNS,
    )
