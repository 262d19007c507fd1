"""Drop-in for ``s3prl.nn.Featurizer``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from mmkernels.nn.layer_mix import softmax_layer_mix


class Upstream(Protocol):
    """The attributes of an upstream that a ``Featurizer`` reads; ``s3prl.nn.S3PRLUpstream`` has them."""

    @property
    def num_layers(self) -> int: ...
    @property
    def hidden_sizes(self) -> Sequence[int]: ...
    @property
    def downsample_rates(self) -> Sequence[int]: ...


class Featurizer(nn.Module):
    """Softmax-weighted sum of the hidden states of an upstream, without a stacked copy.

    A drop-in for ``s3prl.nn.Featurizer``: same arguments, parameter (``weights``, zeros), ``state_dict`` and
    result. A single layer is returned as it is, without a parameter. Where s3prl fails in an assertion, a
    ``ValueError`` says why; a selection of one layer, with which s3prl fails, gives that layer. Layers in
    half precision beside float32 weights give a float32 result and exact gradients, as in s3prl, at the price
    of a float32 copy of each layer; ``module.to(layer.dtype)`` saves the copies. Other layers are kept for
    the backward pass, not copied: overwriting one in between, which the stacked copy of s3prl allows, is an
    error there.

    Equivalent to (for a ``Featurizer`` named ``module``, all layers selected)::

        h = torch.stack(all_hs)  # (L, B, T, D); with normalize: F.layer_norm(h, h.shape[-1:])
        w = module.weights.softmax(dim=-1)
        out = torch.tensordot(w, h, dims=1), all_lens[0]

    Args:
        upstream: an object with ``num_layers``, ``hidden_sizes`` and ``downsample_rates`` (equal for all
            layers), of which no reference is kept; or the number of layers, together with ``hidden_size`` and
            ``downsample_rate``.
        layer_selections: indices of the layers to mix; all by default.
        normalize: LayerNorm (no affine) of each layer before the sum. SUPERB leaves it off.
        hidden_size: width of the layers, where ``upstream`` is a number.
        downsample_rate: input samples per frame, where ``upstream`` is a number; 320 for wav2vec2-like
            encoders at 16 kHz.
        skip_padding: do not read frames past the lengths, and return zeros there: time and memory traffic
            then depend on the valid frames only. Off by default, because s3prl mixes padding too; code that
            respects the lengths sees no difference.
    """

    def __init__(
        self,
        upstream: Upstream | int,
        layer_selections: Sequence[int] | None = None,
        normalize: bool = False,
        *,
        hidden_size: int | None = None,
        downsample_rate: int | None = None,
        skip_padding: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(upstream, int):
            if hidden_size is None or downsample_rate is None:
                raise ValueError(
                    "hidden_size and downsample_rate are needed where upstream is a number of layers"
                )
            self.num_layers = upstream
        else:
            if hidden_size is not None or downsample_rate is not None:
                raise ValueError(
                    "hidden_size and downsample_rate come from upstream; omit them, or give a layer count"
                )
            self.num_layers = upstream.num_layers
            hidden_size = _common(upstream.hidden_sizes, "hidden_sizes")
            downsample_rate = _common(upstream.downsample_rates, "downsample_rates")
        self._output_size, self._downsample_rate = hidden_size, downsample_rate
        self.normalize, self.skip_padding = normalize, skip_padding
        if self.num_layers > 1:
            self.layer_selections = _selected(layer_selections, self.num_layers)
            self.weights = nn.Parameter(torch.zeros(len(self.layer_selections)))

    @property
    def output_size(self) -> int:
        """Width of the result."""
        return self._output_size

    @property
    def downsample_rate(self) -> int:
        """Input samples per frame of the result."""
        return self._downsample_rate

    def forward(self, all_hs: Sequence[Tensor], all_lens: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Mix the selected layers.

        Args:
            all_hs: hidden states, each ``(B, T, D)``; those that ``layer_selections`` does not name are
                ignored, however many there are. A single one is returned as it is.
            all_lens: valid frames, one ``(B,)`` for each layer; they are equal, and the first selected is
                returned.

        Returns:
            The mix ``(B, T, D)`` and its lengths ``(B,)``.

        Raises:
            ValueError: a selected layer is missing; turn off layer drop in training.
        """
        if len(all_hs) == 1:
            return all_hs[0], all_lens[0]
        layers = self._select(all_hs, "all_hs")
        lengths = self._select(all_lens, "all_lens")[0]
        valid = lengths.to(layers[0].device).clamp(max=layers[0].shape[1]) if self.skip_padding else None
        return softmax_layer_mix(layers, self.weights, norm=self.normalize, lengths=valid), lengths

    def _select(self, values: Sequence[Tensor], name: str) -> list[Tensor]:
        """The selected entries in the order of the layers, whatever that of ``layer_selections``."""
        if not hasattr(self, "layer_selections"):
            raise ValueError(f"{name} must have one layer, as the upstream has, got {len(values)}")
        selected = [value for index, value in enumerate(values) if index in self.layer_selections]
        if len(selected) != len(self.weights):
            raise ValueError(
                f"{name} must have the layers {list(self.layer_selections)}, which the {len(self.weights)} "
                f"weights belong to, got {len(values)} entries; turn off layer drop, if that changes the "
                "number of layers in training"
            )
        return selected

    def extra_repr(self) -> str:
        selections = getattr(self, "layer_selections", None)
        return (
            f"{self.num_layers}, layer_selections={selections}, normalize={self.normalize}, "
            f"hidden_size={self.output_size}, downsample_rate={self.downsample_rate}, "
            f"skip_padding={self.skip_padding}"
        )


def _common(values: Sequence[int], name: str) -> int:
    if len(set(values)) != 1:
        raise ValueError(f"{name} of the upstream must be equal for all layers, got {list(values)}")
    return values[0]


def _selected(selections: Sequence[int] | None, num_layers: int) -> list[int]:
    if selections is None:
        return list(range(num_layers))
    selected = sorted(selections)
    if not selected or len(set(selected)) != len(selected):
        raise ValueError(f"layer_selections must be distinct layer indices, got {selected}")
    if selected[0] < 0 or selected[-1] >= num_layers:
        raise ValueError(f"layer_selections must lie in [0, {num_layers}), got {selected}")
    return selected
