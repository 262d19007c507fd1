"""Sources of a merge: the projections of another model, or noise in place of them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mmtransfer.encoders.encoder import Encoder, resolve_layers

from .learnable import find_merging
from .projections import PARTS, Projection, find_projections, num_heads

_STANDARD, _TARGET = "0,1", "target"


@dataclass(frozen=True)
class Noise:
    """Normal matrices in place of a source's, the controls of the paper: they tell a source's weights from
    their scale.

    Attributes:
        like: `"0,1"` for the standard normal distribution, `"target"` for the mean and the standard deviation
            of each target matrix, or a source (a model, a folder or a name on the hub) for those of its
            matrices: N(0,1), N(Target), N(Source).
        seed: of the matrices; each has its own stream, so a choice of layers does not change the others.

    As text, `"N(0,1)"`, `"N(target)"` or `"N(folder)"`, it is a value of L-MAM's option `source` too.
    """

    like: Any = _STANDARD
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.like, (Noise, type(None))) or self.like == "":
            raise ValueError(f'like must be "0,1", "target" or a source, got {self.like!r}')
        text = self.like.replace(" ", "").lower() if isinstance(self.like, str) else None
        if text in (_STANDARD, _TARGET):
            # The paper writes N(Target).
            object.__setattr__(self, "like", text)
        elif text == "source" and not Path(self.like).exists():
            raise ValueError(
                "like must be the source itself for the paper's N(Source), a model, a folder or a hub "
                f"name, got {self.like!r}"
            )
        if not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"seed must be an integer of at least 0, got {self.seed!r}")

    def __str__(self) -> str:
        return f"N({describe_source(self.like)})"


#: A model (or `Encoder(model, description)`), its folder or hub name, noise, or noise as text.
Source = nn.Module | Encoder | str | Path | Noise


@dataclass(frozen=True)
class Pair:
    """A projection of the target, and the matrix (or bias) that is merged into it, `(D_out, D_in)`.

    `partner` is the source's projection that has it; None for noise, and for zeros in place of a bias.
    """

    target: Projection
    source: torch.Tensor
    partner: Projection | None = None


@dataclass(frozen=True)
class Pairs:
    """All that one merge joins.

    Attributes:
        pairs: layer by layer, in each q, k, v.
        layers: the target's, in the order given.
        heads: the attention heads of target and source, None where a configuration does not say.
    """

    pairs: tuple[Pair, ...]
    layers: tuple[int, ...]
    heads: tuple[int | None, int | None]

    @property
    def groups(self) -> list[int]:
        """For each pair the place of its layer in `layers`."""
        place = {layer: index for index, layer in enumerate(self.layers)}
        return [place[pair.target.layer] for pair in self.pairs]


def find_pairs(
    target: nn.Module | Encoder,
    source: Source,
    *,
    layers: Any = "all",
    layer_map: Sequence[int] | None = None,
    parts: Sequence[str] = PARTS,
    bias: bool = False,
    match_rms: bool = False,
) -> Pairs:
    """Pair the projections of chosen layers with those of the source; nothing is changed or copied.

    The arguments are those of `merge`. Sources on another device stay there, and those of noise or with
    `match_rms` are new tensors.

    Raises:
        TypeError, ValueError: as `merge`.
    """
    encoder = target if isinstance(target, Encoder) else Encoder(target)
    source = open_source(source)
    like = source.like if isinstance(source, Noise) else source
    _check_plain("target", encoder)
    _check_plain("source", like)
    indices = choose_layers(encoder, layers)
    own = find_projections(encoder, indices, parts, bias=bias)
    heads: tuple[int | None, int | None] = (num_heads(encoder), None)
    partners: list[Projection | None] = [None] * len(own)
    if isinstance(like, Encoder):
        partners = _partners(encoder, like, own, layer_map, bias=bias)
        heads = _check_heads(encoder, like)
    by_projection = dict(zip(own, partners, strict=True))
    found = check_shared(by_projection, alike=isinstance(like, Encoder))
    # A target that is merged with itself, shifted by some layers, would be read after it is written.
    written = {id(each.parameter) for each in found}
    pairs = []
    for each in found:
        partner = by_projection[each] if isinstance(like, Encoder) else each
        # A projection without a bias is one with a bias of zero.
        matrix = torch.zeros_like(each.view) if partner is None else partner.view.detach()
        if isinstance(source, Noise):
            matrix = _draw(source, each, matrix)
        elif partner is not None and id(partner.parameter) in written:
            matrix = matrix.clone()
        matrix = match_scale(matrix, each.view) if match_rms else matrix
        pairs.append(Pair(each, matrix, None if isinstance(source, Noise) else partner))
    return Pairs(tuple(pairs), indices, heads)


def open_source(source: Source) -> Encoder | Noise:
    """The encoder of a source, loaded where a name is given; noise keeps the text "0,1" or "target".

    Raises:
        TypeError, ValueError: no source, or a model without a description.
        DataError: a folder or a name that cannot be loaded.
    """
    if isinstance(source, str) and (text := re.fullmatch(r"N\((.+)\)", source)) is not None:
        source = Noise(text[1])
    if isinstance(source, Noise):
        if isinstance(source.like, str) and source.like in (_STANDARD, _TARGET):
            return source
        return Noise(open_source(source.like), source.seed)
    if isinstance(source, (nn.Module, Encoder)):
        return source if isinstance(source, Encoder) else Encoder(source)
    if not isinstance(source, (str, Path)):
        raise TypeError(
            "source must be a model, an Encoder, the folder or hub name of a model, or Noise, "
            f"got {type(source).__name__}"
        )
    from mmtransfer.encoders.loading import load_model

    return Encoder(load_model(source, speech=False))


def _check_plain(name: str, model: Any) -> None:
    """ValueError for a model that learns to merge: its parameters are not those that it computes with."""
    if isinstance(model, Encoder) and find_merging(model.root) is not None:
        raise ValueError(
            f"the {name} has learnt merging (l-mam) in force, and computes with other weights than its "
            "parameters; fold it first (mmtransfer.mam.fold)"
        )


def describe_source(source: Any) -> str:
    """A source in a checkpoint's configuration and in reports."""
    if isinstance(source, (str, Path, Noise)):
        return str(source)
    model = source.root if isinstance(source, Encoder) else source
    return getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__


def choose_layers(encoder: Encoder, layers: Any) -> tuple[int, ...]:
    """The indices that `layers` stands for; ValueError names the range of the model's."""
    if isinstance(layers, str):
        if layers != "all":
            raise ValueError(f'layers must be "all" or indices, got {layers!r}')
        return tuple(range(encoder.num_layers))
    if not isinstance(layers, Iterable):
        raise ValueError(f'layers must be "all" or indices, got {layers!r}')
    return resolve_layers("layers", tuple(layers), encoder.num_layers)


def _partners(
    target: Encoder, source: Encoder, own: list[Projection], layer_map: Sequence[int] | None, *, bias: bool
) -> list[Projection | None]:
    """The source's projection for each of the target's; None for a bias that it lacks."""
    mapped = layer_pairs(target, source, layer_map)
    theirs = {(each.layer, each.part, each.kind): each for each in find_projections(source, bias=bias)}
    found = []
    for each in own:
        partner = theirs.get((mapped[each.layer], each.part, each.kind))
        if partner is not None and partner.view.shape != each.view.shape:
            raise ValueError(
                f"{each.name} has shape {tuple(each.view.shape)}, {partner.name} of the source "
                f"{tuple(partner.view.shape)}"
            )
        found.append(partner)
    return found


def layer_pairs(target: Encoder, source: Encoder, layer_map: Sequence[int] | None) -> tuple[int, ...]:
    """The source's layer of each of the target's. ValueError for models of two widths, or a wrong map."""
    if target.hidden_size != source.hidden_size:
        raise ValueError(
            "target and source must be equally wide: the target, "
            f"{target.description.model_type}, has {target.hidden_size}, the source, "
            f"{source.description.model_type}, {source.hidden_size}"
        )
    own, theirs = target.num_layers, source.num_layers
    even = [round(index * (theirs - 1) / max(own - 1, 1)) for index in range(own)]
    if layer_map is None:
        if own != theirs:
            raise ValueError(
                f"the target has {own} layers and the source {theirs}: layer_map must say which source layer "
                f"goes with each of the target's; evenly spaced: layer_map={even}"
            )
        return tuple(even)
    right = isinstance(layer_map, (list, tuple, range)) and len(layer_map) == own
    if not right or not all(type(each) is int and -theirs <= each < theirs for each in layer_map):
        raise ValueError(
            f"layer_map must have {own} entries, one for each layer of the target, each a layer of the "
            f"source in [{-theirs}, {theirs - 1}], such as {even}; got {layer_map!r}"
        )
    return tuple(each % theirs for each in layer_map)


def _check_heads(target: Encoder, source: Encoder) -> tuple[int | None, int | None]:
    heads = num_heads(target), num_heads(source)
    if None not in heads and heads[0] != heads[1]:
        warnings.warn(
            f"the target has {heads[0]} attention heads and the source {heads[1]}: rows of one head are "
            "merged into those of others",
            stacklevel=4,
        )
    return heads


def _place(projection: Projection | None) -> tuple[Any, ...] | None:
    if projection is None:
        return None
    return id(projection.parameter), None if projection.fused is None else projection.part


def check_shared(partners: Mapping[Projection, Projection | None], *, alike: bool) -> list[Projection]:
    """Each parameter once. ValueError where two layers share one that would be merged with different ones."""
    seen: dict[Any, Projection] = {}
    for each, partner in partners.items():
        first = seen.setdefault(_place(each), each)
        if first is not each and not (alike and _place(partners[first]) == _place(partner)):
            raise ValueError(
                f"layers {first.layer} and {each.layer} of the target share {first.name}, which can be "
                "merged with one matrix only; choose layers or a layer_map so that it is"
            )
    return [*seen.values()]


def _draw(noise: Noise, projection: Projection, like: torch.Tensor) -> torch.Tensor:
    """A matrix of the target's shape and dtype; drawn on the CPU, so that every device gets the same."""
    view = projection.view
    place = (noise.seed, projection.layer, PARTS.index(projection.part), projection.kind == "bias")
    generator = torch.Generator().manual_seed(_mix(place))
    drawn = torch.randn(view.shape, generator=generator).to(view)
    if noise.like == _STANDARD:
        return drawn
    wide = torch.promote_types(view.dtype, torch.float32)
    std, mean = torch.std_mean(like.detach().to(view.device, wide), correction=0)
    return (drawn.to(wide) * std + mean).to(view.dtype)


def _mix(numbers: Iterable[int]) -> int:
    """One seed of several small numbers, different for each combination."""
    mixed = 0
    for number in numbers:
        mixed = (mixed * 1_000_003 + int(number) + 1) % (2**63 - 1)
    return mixed


def match_scale(matrix: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The matrix scaled to the root mean square of the target's; one of zeros stays."""
    matrix = matrix.detach().to(torch.promote_types(matrix.dtype, torch.float32))
    own, theirs = (each.detach().to(matrix.dtype).square().mean().sqrt() for each in (target, matrix))
    return matrix * torch.where(theirs > 0, own.to(theirs.device) / theirs, 1.0)
