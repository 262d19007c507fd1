"""Module around ``mmkernels.layer_project``."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mmkernels.activations import ACTIVATIONS
from mmkernels.ops.layer_project import layer_project


class LayerProject(nn.Module):
    """One projection per tapped layer: ``act(Linear_l(LayerNorm_l(x[:, l])))``, all taps in one product.

    The feature projectors of one level of hierarchical feature fusion (HFF, arXiv 2211.02712): the result,
    viewed as ``(N, taps // 2, 2 * out_features)``, is the pairwise concatenation that the next level
    projects.

    Equivalent to (for a ``LayerProject`` named ``module``; ``F`` is ``torch.nn.functional``)::

        h = F.layer_norm(x, x.shape[-1:], eps=module.eps) * module.norm_weight + module.norm_bias
        z = torch.einsum("nlc,loc->nlo", h, module.weight) + module.bias
        out = ACTIVATIONS[module.activation](z)  # of mmkernels.activations

    Args:
        taps: number of taps L.
        in_features: width C of a tap.
        out_features: width of each projection.
        bias: whether the linear maps have a bias.
        norm: LayerNorm with gain and bias in front of each linear map.
        activation: ``"relu"``, ``"gelu"``, ``"gelu_tanh"``, ``"silu"`` or ``"none"``.
        eps: added to the variance.
        backend: passed to ``mmkernels.layer_project``.

    Parameters: ``weight (L, out_features, C)``, ``bias (L, out_features)``, ``norm_weight (L, C)``,
    ``norm_bias (L, C)``; each tap starts as a new ``nn.LayerNorm`` and a new ``nn.Linear``.

    The input is kept for the backward pass, not copied: overwriting it in between is an error there.

    Raises:
        ValueError: a size below 1, or an unknown activation.
    """

    def __init__(
        self,
        taps: int,
        in_features: int,
        out_features: int,
        bias: bool = True,
        norm: bool = True,
        activation: str = "relu",
        eps: float = 1e-5,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        for name, value in (("taps", taps), ("in_features", in_features), ("out_features", out_features)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        self.taps, self.in_features, self.out_features = taps, in_features, out_features
        self.activation, self.eps, self.backend = activation, eps, backend
        self.weight = nn.Parameter(torch.empty(taps, out_features, in_features))
        self.bias = nn.Parameter(torch.empty(taps, out_features)) if bias else None
        self.norm_weight = nn.Parameter(torch.empty(taps, in_features)) if norm else None
        self.norm_bias = nn.Parameter(torch.empty(taps, in_features)) if norm else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        # nn.Linear's rule for each tap; the fan-in of the stacked tensor would count the other taps.
        bound = 1.0 / math.sqrt(self.in_features)
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)
        if self.norm_weight is not None and self.norm_bias is not None:
            nn.init.ones_(self.norm_weight)
            nn.init.zeros_(self.norm_bias)

    def forward(self, x: Tensor) -> Tensor:
        """Project ``x (N, L, in_features)``, N being frames, to a contiguous ``(N, L, out_features)``."""
        return layer_project(
            x,
            self.weight,
            self.bias,
            norm_weight=self.norm_weight,
            norm_bias=self.norm_bias,
            eps=self.eps,
            activation=self.activation,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return (
            f"taps={self.taps}, in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, norm={self.norm_weight is not None}, "
            f"activation={self.activation!r}, eps={self.eps}"
        )
