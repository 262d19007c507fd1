"""Modules and helpers around ``mmkernels.layer_mix``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmkernels.ops.layer_mix import layer_mix


class LayerMix(nn.Module):
    """Learnable weighted sum over the layers of a frozen or trained encoder, without a stacked copy.

    ``sum_l w[l] * N(layers[l])``, ``w = softmax(weights)`` (SUPERB, arXiv 2105.01051, Eq. 1) or ``w =
    weights``; ``N`` is the identity, or LayerNorm over the last dimension of each layer. Training starts from
    the mean of the layers.

    Equivalent to (for a ``LayerMix`` named ``module``)::

        h = torch.stack(layers)  # (L, ..., D); with norm: F.layer_norm(h, h.shape[-1:], eps=module.eps)
        w = module.weights.softmax(dim=-1)  # with softmax=False: module.weights
        out = torch.tensordot(w, h, dims=1)

    Args:
        num_layers: number of layers L, 1 to 64.
        dim: width D of the layers; needed for ``affine`` only.
        norm: normalise each layer first.
        affine: a learnable gain and bias for each layer's normalisation.
        softmax: pass ``weights`` through a softmax.
        eps: added to the variance.
        backend: passed to ``mmkernels.layer_mix``.

    Parameters: ``weights (L,)``; with ``affine`` also ``norm_weight (L, D)`` (ones) and ``norm_bias (L, D)``
        (zeros).
    """

    def __init__(
        self,
        num_layers: int,
        dim: int | None = None,
        norm: bool = False,
        affine: bool = False,
        softmax: bool = True,
        eps: float = 1e-5,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"num_layers must be at least 1, got {num_layers}")
        if affine and not norm:
            raise ValueError("affine=True needs norm=True: gain and bias are those of the LayerNorm")
        if affine and dim is None:
            raise ValueError("affine=True needs dim, the width of the layers")
        self.num_layers, self.dim, self.norm, self.softmax = num_layers, dim, norm, softmax
        self.eps, self.backend = eps, backend
        self.weights = nn.Parameter(torch.empty(num_layers))
        self.norm_weight = nn.Parameter(torch.empty(num_layers, dim)) if affine and dim is not None else None
        self.norm_bias = nn.Parameter(torch.empty(num_layers, dim)) if affine and dim is not None else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weights, 0.0 if self.softmax else 1.0 / self.num_layers)
        if self.norm_weight is not None and self.norm_bias is not None:
            nn.init.ones_(self.norm_weight)
            nn.init.zeros_(self.norm_bias)

    def forward(self, layers: Sequence[Tensor] | Tensor, lengths: Tensor | None = None) -> Tensor:
        """Mix L tensors ``(..., D)`` (or one ``(L, ..., D)``) into one ``(..., D)``.

        Layers of different dtypes, as autocast produces them, are promoted to their common dtype, which is
        that of the result. Frames past ``lengths``, integers of shape ``layers[0].shape[:-2]``, are not read
        and are zero in the result.
        """
        return layer_mix(
            promote_layers(layers),
            self.weights.softmax(dim=-1) if self.softmax else self.weights,
            norm=self.norm,
            eps=self.eps,
            norm_weight=self.norm_weight,
            norm_bias=self.norm_bias,
            lengths=lengths,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return (
            f"{self.num_layers}, dim={self.dim}, norm={self.norm}, affine={self.norm_weight is not None}, "
            f"softmax={self.softmax}, eps={self.eps}"
        )


def promote_layers(layers: Sequence[Tensor] | Tensor) -> Sequence[Tensor] | Tensor:
    """Layers of one dtype, promoted as ``torch.stack`` does it."""
    if isinstance(layers, Tensor) or all(layer.dtype == layers[0].dtype for layer in layers):
        return layers
    dtype = layers[0].dtype
    for layer in layers[1:]:
        dtype = torch.promote_types(dtype, layer.dtype)
    return [layer.to(dtype) for layer in layers]


def softmax_layer_mix(
    layers: Sequence[Tensor], logits: Tensor, *, norm: bool = False, lengths: Tensor | None = None
) -> Tensor:
    """``(stack(layers) * softmax(logits)).sum()`` by ``layer_mix``, with the same dtype of the result.

    That product promotes: float32 weights and bfloat16 layers give float32. The sum itself is rounded once,
    to the layers' dtype, or computed in float64 where the weights are.
    """
    weights = torch.softmax(logits, dim=-1)
    wide = [layer.double() for layer in layers] if weights.dtype == torch.float64 else layers
    mixed = layer_mix(promote_layers(wide), weights, norm=norm, lengths=lengths)
    return mixed.to(torch.promote_types(mixed.dtype, weights.dtype))
