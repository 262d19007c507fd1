"""Module around ``mmkernels.adapter``."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mmkernels.activations import ACTIVATIONS
from mmkernels.ops.adapter import adapter


class Adapter(nn.Module):
    """A bottleneck adapter: ``residual + scale * (act(LN(x) @ down^T + down_bias) @ up^T + up_bias)``.

    It starts as the identity, because the up-projection is zero: the frozen model gives its own results.

    Equivalent to (for an ``Adapter`` named ``module``; ``F`` is ``torch.nn.functional``)::

        h = x  # with norm=True: F.layer_norm(x, x.shape[-1:], module.norm_weight, module.norm_bias)
        h = ACTIVATIONS[module.activation](F.linear(h, module.down_weight, module.down_bias))
        out = x + module.scale * F.linear(h, module.up_weight, module.up_bias)

    Args:
        width: width D of the features.
        bottleneck: width d of the hidden layer.
        activation: ``"relu"``, ``"gelu"``, ``"gelu_tanh"``, ``"silu"`` or ``"none"``.
        norm: LayerNorm with gain and shift in front of the down-projection.
        bias: whether the projections have biases.
        scale: constant factor of the adapter's output.
        residual: whether to add the input to the output, if :meth:`forward` is given no other residual.
        eps: added to the variance.
        backend: passed to ``mmkernels.adapter``.

    Parameters: ``down_weight (d, D)``, ``down_bias (d,)``, ``up_weight (D, d)``, ``up_bias (D,)``,
    ``norm_weight (D,)``, ``norm_bias (D,)``: ``2 D d + D + d`` numbers, and ``2 D`` more with LayerNorm.
    Of any floating dtype; they may stay in float32 with activations in half precision.

    The input is kept for the backward pass, not copied: overwriting it in between is an error there.

    Raises:
        ValueError: a width or bottleneck below 1, or an unknown activation.

    Source: Houlsby et al. (arXiv 1902.00751); AAT (arXiv 2401.10544) with gelu, a bottleneck of D / 4 and no
    LayerNorm; HFF (arXiv 2211.02712) with relu and LayerNorm.
    """

    def __init__(
        self,
        width: int,
        bottleneck: int,
        activation: str = "relu",
        norm: bool = False,
        bias: bool = True,
        scale: float = 1.0,
        residual: bool = True,
        eps: float = 1e-5,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        for name, value in (("width", width), ("bottleneck", bottleneck)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        self.width, self.bottleneck = width, bottleneck
        self.activation, self.scale, self.residual = activation, scale, residual
        self.eps, self.backend = eps, backend
        self.down_weight = nn.Parameter(torch.empty(bottleneck, width))
        self.down_bias = nn.Parameter(torch.empty(bottleneck)) if bias else None
        self.up_weight = nn.Parameter(torch.empty(width, bottleneck))
        self.up_bias = nn.Parameter(torch.empty(width)) if bias else None
        self.norm_weight = nn.Parameter(torch.empty(width)) if norm else None
        self.norm_bias = nn.Parameter(torch.empty(width)) if norm else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.down_weight, a=math.sqrt(5))
        nn.init.zeros_(self.up_weight)
        for shift in (self.down_bias, self.up_bias, self.norm_bias):
            if shift is not None:
                nn.init.zeros_(shift)
        if self.norm_weight is not None:
            nn.init.ones_(self.norm_weight)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Adapt ``x``.

        Args:
            x: ``(..., width)``, float32, float16 or bfloat16; on the CPU float64 too.
            residual: added to the result, of the shape of ``x``; of its dtype, or float32. Without it, ``x``
                is added if the module has ``residual=True``.

        Returns:
            A tensor of the shape of ``x`` and the dtype of the residual (of ``x`` without one). Under
            autocast the adapter computes in the autocast dtype, and the residual keeps its dtype.

        Raises:
            TypeError: a dtype that ``mmkernels.adapter`` does not take.
            ValueError: a shape or device that does not match, or a backend that cannot serve.
        """
        if residual is None and self.residual:
            residual = x
        return adapter(
            x,
            self.down_weight,
            self.down_bias,
            self.up_weight,
            self.up_bias,
            residual=residual,
            scale=self.scale,
            activation=self.activation,
            norm_weight=self.norm_weight,
            norm_bias=self.norm_bias,
            eps=self.eps,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return (
            f"width={self.width}, bottleneck={self.bottleneck}, activation={self.activation!r}, "
            f"norm={self.norm_weight is not None}, bias={self.down_bias is not None}, scale={self.scale}, "
            f"residual={self.residual}, eps={self.eps}"
        )
