"""The parts of one encoder: its layers, width and final norm, and the number of frames that it makes."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import nn

from mmkernels.wrappers import chain, is_wrapper, unwrap

from .descriptions import DESCRIPTIONS, ModelDescription

Tap = int | Literal["embeddings"]


class Encoder:
    """The encoder inside a model, as its description finds it; holds references and changes nothing.

    Args:
        model: a transformers model of a type in `DESCRIPTIONS`, with or without a head or a decoder; or any
            model that `description` fits. Wrappers are looked through (`mmkernels.wrappers`).
        description: where things are in a model that is not in the table.

    Attributes:
        root: the model that was given, without its wrappers.
        model: the encoder in it, which may be the same.
        description: of its type.
        all_layers: every encoder layer.
        layers: those that run; fewer than all where `up_to` says that the last tap comes earlier.
        is_tapped: whether taps of the layers are all that is read, as `up_to` says.

    Raises:
        TypeError: `model` is no module, or not one of transformers and without a description.
        ValueError: its type is not in the table, or no path of the description leads to an encoder.
    """

    def __init__(self, model: nn.Module, description: ModelDescription | None = None) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        # The paths of a description that is given may lead through a wrapper that the user wrote.
        self.root = unwrap(model) if description is None else _without_known_wrappers(model)
        self.description = describe(self.root) if description is None else description
        self.model = unwrap(_find(self.root, self.description))
        self.all_layers: list[nn.Module] = [
            unwrap(layer) for layer in _lookup(self.model, self.description.layers)
        ]
        self.layers = self.all_layers
        self.is_tapped = False
        if not self.layers:
            raise ValueError("model has no layers")

    @property
    def num_layers(self) -> int:
        return len(self.all_layers)

    @property
    def hidden_size(self) -> int:
        """The width of the layers."""
        name = self.description.hidden_size
        config: Any = getattr(self.model, "config", None)
        if hasattr(config, name):
            return int(getattr(config, name))
        projection = self.all_layers[0].get_submodule(self.description.layer_attention_output)
        return int(getattr(projection, "out_features", 0))

    @property
    def activation(self) -> str | None:
        """The name that the configuration gives the MLPs' activation, if it gives one."""
        name = getattr(getattr(self.model, "config", None), self.description.activation, None)
        return name if isinstance(name, str) else None

    @property
    def attention_path(self) -> str:
        """Path, in a layer, of the module whose (first) output is the attention's, projected."""
        calls = self.description.calls_projections
        return self.description.layer_attention_output if calls else self.description.layer_attention

    @property
    def final_norm(self) -> nn.Module | None:
        """The norm after the last layer, or None where this variant of the model has none."""
        condition = self.description.final_norm_if
        if self.description.final_norm is None:
            return None
        if condition is not None and not getattr(self._config, condition):
            return None
        return self.model.get_submodule(self.description.final_norm)

    @property
    def minimum_length(self) -> int:
        """The shortest input from which the encoder makes one frame, along the main input's time axis."""
        length = 1
        if self.description.frames == "conv":
            kernels, strides = self._config.conv_kernel, self._config.conv_stride
            for kernel, stride in zip(reversed(kernels), reversed(strides), strict=True):
                length = (length - 1) * stride + kernel
        return length

    def frame_lengths(self, lengths: torch.Tensor) -> torch.Tensor:
        """Frames that the layers make of inputs of these lengths (int64, any shape), at least 0.

        Lengths count along the main input's time axis: samples of a waveform, mel frames, tokens. Where the
        description's `frames` is "fixed" the number does not depend on the lengths: ValueError.
        """
        frames = self.description.frames
        if frames == "fixed":
            raise ValueError(f"{self.description.model_type} makes the same number of frames of every input")
        if frames == "halved":
            lengths = (lengths + 1) // 2
        elif frames == "conv":
            for kernel, stride in zip(self._config.conv_kernel, self._config.conv_stride, strict=True):
                lengths = (lengths - kernel) // stride + 1
        return lengths.clamp(min=0)

    def up_to(self, taps: Sequence[Tap]) -> Encoder:
        """The same encoder, with the layers alone that run when these (resolved) taps are read."""
        found = Encoder(self.root, self.description)
        found.is_tapped = True
        deepest = max((tap for tap in taps if tap != "embeddings"), default=-1)
        found.layers = self.all_layers[: deepest + 1]
        return found

    def select(self, layers: Sequence[int] | None, name: str = "layers") -> list[nn.Module]:
        """The layers of these indices, ascending; None for all that run. Negative indices count from the end.

        ValueError names the argument: no such layer, one twice, none at all, or one past the last tap, which
        would be trained without effect.
        """
        if layers is None:
            indices = tuple(range(len(self.layers)))
        else:
            indices = resolve_layers(name, layers, self.num_layers)
        if not self.layers:
            raise ValueError(
                "the readout taps the embeddings only: there is no layer that an edit could change"
            )
        if max(indices) >= len(self.layers):
            raise ValueError(
                f"{name} must not lie past the last tap, layer {len(self.layers) - 1}, where an edit has no "
                f"effect, got {max(indices)}"
            )
        return [self.layers[index] for index in sorted(indices)]

    def without_idle(self, parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """These, but for those that no tap depends on, which would be trained without effect: in layers past
        the last tap, in parts behind the layers, and in masks of pre-training.

        An encoder that is not read by taps has none.
        """
        idle = {id(p) for layer in self.all_layers[len(self.layers) :] for p in layer.parameters()}
        if self.is_tapped:
            idle |= {id(parameter) for name, parameter in self._named_behind_taps()}
        return [parameter for parameter in parameters if id(parameter) not in idle]

    def _named_behind_taps(self) -> Iterator[tuple[str, nn.Parameter]]:
        parts = self.description.behind_layers
        norm = self.final_norm
        normed = self.description.last_state_normed and len(self.layers) == self.num_layers
        for name, parameter in self.model.named_parameters():
            if any(name == part or name.startswith(f"{part}.") for part in parts):
                yield name, parameter
        if norm is not None and not normed:
            yield from norm.named_parameters()

    @property
    def _config(self) -> Any:
        return self.model.config


def describe(model: nn.Module) -> ModelDescription:
    """The description of a transformers model.

    Raises:
        TypeError: `model` is not a module with a transformers configuration.
        ValueError: its `config.model_type` is not in the table.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if not isinstance(model, nn.Module) or model_type is None:
        raise TypeError(
            "model must be a transformers model (a module with config.model_type), "
            f"got {type(model).__name__}; or pass its description"
        )
    if model_type not in DESCRIPTIONS:
        raise ValueError(
            f"model type {model_type!r} is not in mmtransfer.encoders.DESCRIPTIONS, which has "
            f"{', '.join(sorted(DESCRIPTIONS))}; pass a ModelDescription for it as description (paths of the "
            "encoder, its layers and their projections)"
        )
    return DESCRIPTIONS[model_type]


def resolve_layers(
    name: str, layers: Sequence[Tap], num_layers: int, *, embeddings: bool = False
) -> tuple[Any, ...]:
    """Distinct layer indices within `[0, num_layers)`, in the order given; ValueError names the argument."""
    allowed = f"{name} must be layer indices in [{-num_layers}, {num_layers - 1}]"
    if embeddings:
        allowed += " or 'embeddings'"
    if isinstance(layers, (str, int)) or not len(layers):
        raise ValueError(f"{allowed}, at least one, got {layers!r}")
    resolved: list[Tap] = []
    for layer in layers:
        if not (embeddings and layer == "embeddings"):
            if type(layer) is not int or not -num_layers <= layer < num_layers:
                raise ValueError(f"{allowed}, got {layer!r}")
            layer %= num_layers
        if layer in resolved:
            raise ValueError(f"{name} must be distinct, got layer {layer!r} twice in {list(layers)}")
        resolved.append(layer)
    return tuple(resolved)


def default_taps(encoder: Encoder) -> tuple[Tap, ...]:
    """The embeddings and all layers up to 12 layers, every second layer (1, 3, 5, ...) of deeper encoders."""
    layers = encoder.num_layers
    return ("embeddings", *range(layers)) if layers <= 12 else tuple(range(1, layers, 2))


def _without_known_wrappers(model: nn.Module) -> nn.Module:
    return next(module for module in chain(model) if not is_wrapper(module))


def _find(model: nn.Module, description: ModelDescription) -> nn.Module:
    for path in description.encoder:
        encoder = _lookup(model, path)
        if encoder is not None and _lookup(encoder, description.layers) is not None:
            return encoder
    raise ValueError(
        f"{type(model).__name__} has no {description.model_type} encoder: none of the paths "
        f"{', '.join(map(repr, description.encoder))} leads to a module with {description.layers!r}"
    )


def _lookup(root: nn.Module, path: str) -> Any:
    if not path:
        return root
    try:
        return operator.attrgetter(path)(root)
    except AttributeError:
        return None
