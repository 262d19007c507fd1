"""Where the queries', keys' and values' projections of a described model are, those of fused layouts too."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from mmkernels.wrappers import plain_name
from mmtransfer.encoders.encoder import Encoder, resolve_layers

PARTS = ("q", "k", "v")
_PATHS = {"q": "layer_query", "k": "layer_key", "v": "layer_value"}


@dataclass(frozen=True)
class Projection:
    """The weight, or the bias, of one projection of one layer; holds references and changes nothing.

    Works on models on the meta device too: `select` takes the same part of any tensor of the parameter's
    shape, such as one read from a file.

    Attributes:
        layer: its index.
        part: "q", "k" or "v".
        kind: "weight" or "bias".
        owner, attribute: the module that has the parameter, and the parameter's name in it.
        name: the parameter's name in the root model, without wrappers.
        fused: as in the description: how one parameter holds all three; None if it holds this one alone.
    """

    layer: int
    part: str
    kind: Literal["weight", "bias"]
    owner: nn.Module
    attribute: str
    name: str
    fused: Literal["rows", "columns"] | None = None

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter, as the module has it now."""
        found = self.owner._parameters[self.attribute]
        assert found is not None
        return found

    @property
    def view(self) -> torch.Tensor:
        """This part of the parameter: a weight `(D_out, D_in)` or a bias `(D_out,)`, in every layout."""
        return self.select(self.parameter)

    def select(self, tensor: torch.Tensor) -> torch.Tensor:
        """The view that `view` is of the parameter, of another tensor of the parameter's shape."""
        if self.fused is None:
            return tensor
        place = PARTS.index(self.part)
        if self.fused == "columns" and self.kind == "weight":
            return tensor.chunk(3, dim=1)[place].t()
        return tensor.chunk(3, dim=0)[place]


def find_projections(
    model: nn.Module | Encoder,
    layers: Sequence[int] | None = None,
    parts: Sequence[str] = PARTS,
    *,
    bias: bool = False,
) -> list[Projection]:
    """The projections of chosen layers, layer by layer in the order given, in each q, k, v.

    Args:
        model: of a type in `mmtransfer.encoders.DESCRIPTIONS`, or `Encoder(model, description)` of another.
        layers: indices, negative ones from the end; None for all.
        parts: some of "q", "k", "v".
        bias: list the biases that there are too, after a layer's weights.

    Raises:
        TypeError, ValueError: no such model, layer or part; a layer without the projections that the
            description names, or with parametrised, quantised or sharded ones.
    """
    encoder = model if isinstance(model, Encoder) else Encoder(model)
    chosen = range(encoder.num_layers) if layers is None else layers
    indices = resolve_layers("layers", tuple(chosen), encoder.num_layers)
    check_parts(parts)
    names = {id(each): plain_name(name) for name, each in encoder.root.named_parameters()}
    return [each for index in indices for each in _of_layer(encoder, index, parts, bias, names)]


def check_parts(parts: Sequence[str]) -> tuple[str, ...]:
    """The parts in the order q, k, v. ValueError unless they are distinct, of these three, at least one."""
    known = isinstance(parts, (list, tuple)) and all(part in PARTS for part in parts)
    if not known or not parts or len(set(parts)) < len(parts):
        raise ValueError(f"parts must be some of {', '.join(map(repr, PARTS))}, each once, got {parts!r}")
    return tuple(part for part in PARTS if part in parts)


def num_heads(model: nn.Module | Encoder) -> int | None:
    """The attention heads of a layer, as the configuration has them."""
    encoder = model if isinstance(model, Encoder) else Encoder(model)
    found = getattr(getattr(encoder.model, "config", None), "num_attention_heads", None)
    return found if isinstance(found, int) else None


def _of_layer(
    encoder: Encoder, index: int, parts: Sequence[str], bias: bool, names: dict[int, str]
) -> Iterator[Projection]:
    kinds: tuple[Literal["weight", "bias"], ...] = ("weight", "bias") if bias else ("weight",)
    for kind in kinds:
        for part in check_parts(parts):
            owner, attribute = _find(encoder, index, part, kind)
            parameter = owner._parameters.get(attribute)
            if parameter is None and kind == "bias":
                continue
            name = names.get(id(parameter), f"{kind} of {part} in layer {index}")
            found = Projection(index, part, kind, owner, attribute, name, encoder.description.fused)
            _check(found, parameter)
            yield found


def _find(encoder: Encoder, index: int, part: str, kind: str) -> tuple[nn.Module, str]:
    path = getattr(encoder.description, _PATHS[part])
    try:
        owner = encoder.all_layers[index].get_submodule(path)
    except AttributeError as error:
        raise ValueError(f"layer {index} does not fit the description: {error}") from None
    attribute = f"in_proj_{kind}" if "in_proj_weight" in owner._parameters else kind
    return owner, attribute


def _check(projection: Projection, parameter: Any) -> None:
    """ValueError for a parameter that is not there as a plain one, or whose shape the layout rules out."""
    if type(parameter) is not nn.Parameter or not parameter.is_floating_point():
        found = "none" if parameter is None else f"a {type(parameter).__name__} of {parameter.dtype}"
        raise ValueError(
            f"layer {projection.layer}: the projection {projection.part!r} must have a plain floating "
            f"{projection.attribute}, got {found}; remove parametrisations and LoRA, which may be added "
            "afterwards (l-mam+lora), and load floating weights on one device"
        )
    dims = 2 if projection.kind == "weight" else 1
    long = 1 if projection.fused == "columns" and dims == 2 else 0
    if parameter.dim() != dims or (projection.fused is not None and parameter.shape[long] % 3):
        layout = f"{projection.fused} of all three" if projection.fused else "one projection"
        raise ValueError(
            f"{projection.name} must hold {layout} in {dims} dimensions, got shape {tuple(parameter.shape)}"
        )
