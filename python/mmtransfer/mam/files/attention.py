"""The plan of attention merging: matrices of queries, keys and values in the files of two architectures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mmtransfer.data.errors import DataError
from mmtransfer.encoders.encoder import Encoder, resolve_layers
from mmtransfer.mam.projections import Projection, find_projections, num_heads

from .checkpoint import Checkpoint, Stored
from .names import build_model, find_renaming
from .plan import FLOATS, Entry, Patch, Plan, Term, result_dtype
from .recipe import AttentionRecipe


@dataclass(frozen=True)
class _Side:
    """A checkpoint, its encoder without weights, and its tensors by their names in that model."""

    checkpoint: Checkpoint
    encoder: Encoder
    stored: Mapping[str, Stored]


def plan_attention(recipe: AttentionRecipe, target: Checkpoint, source: Checkpoint) -> Plan:
    """The plan of a recipe; tensors without a merged matrix are copied.

    Raises:
        DataError: a model without a description, projections of different shapes, or tensors that a
            checkpoint lacks or has in another shape or dtype; each named.
        ValueError: layers, a layer map or weights that do not fit the models.
    """
    own, theirs = _open(target), _open(source)
    patches: dict[str, list[Patch]] = {}
    pairs = _pair(recipe, own, theirs)
    for ours, other, lam in pairs:
        stored = _find(own, ours)
        patch = Patch(ours, _find(theirs, other), other, lam, bool(recipe.options.get("match_rms", False)))
        patches.setdefault(stored.name, []).append(patch)
    entries = []
    for name, stored in target.tensors.items():
        dtype = result_dtype(stored, recipe.dtype)
        # A weight of 0 leaves the target's matrix, bit for bit.
        merged = tuple(patch for patch in patches.get(name, ()) if patch.lam != 0)
        entries.append(Entry(name, dtype, stored.shape, (Term(stored, 1.0),), merged))
    return Plan(target, (target, source), tuple(entries), recipe.dtype, _heads(own, theirs))


def _open(checkpoint: Checkpoint) -> _Side:
    model = build_model(checkpoint)
    try:
        encoder = Encoder(model)
    except (TypeError, ValueError) as error:
        raise DataError(f"{checkpoint.place} cannot be used: {error}") from error
    rename = find_renaming(model)
    return _Side(checkpoint, encoder, {rename(name): stored for name, stored in checkpoint.tensors.items()})


def _pair(recipe: AttentionRecipe, own: _Side, theirs: _Side) -> list[tuple[Projection, Projection, float]]:
    """Each projection that is merged, with the source's and its weight."""
    layers, layer_map = _resolve(recipe, own.encoder, theirs.encoder)
    lams = dict(zip(layers, _spread(recipe.lam, layers), strict=True))
    parts = recipe.options.get("parts", ("q", "k", "v"))
    bias = bool(recipe.options.get("bias", False))
    used = sorted({layer_map[layer] for layer in layers})
    sources = {
        (each.layer, each.part, each.kind): each
        for each in find_projections(theirs.encoder, used, parts, bias=bias)
    }
    pairs = []
    for ours in find_projections(own.encoder, layers, parts, bias=bias):
        other = sources.get((layer_map[ours.layer], ours.part, ours.kind))
        if other is None:
            # One side has no bias there.
            continue
        if ours.view.shape != other.view.shape:
            raise DataError(
                f"{ours.name} of {own.checkpoint.place} is {list(ours.view.shape)} and {other.name} of "
                f"{theirs.checkpoint.place} is {list(other.view.shape)}; attention merging needs "
                "models of one width"
            )
        pairs.append((ours, other, lams[ours.layer]))
    return pairs


def _resolve(recipe: AttentionRecipe, own: Encoder, theirs: Encoder) -> tuple[list[int], list[int]]:
    """The target's layers that are merged, and for every layer of the target the source's."""
    layers = resolve_layers("layers", recipe.options.get("layers", range(own.num_layers)), own.num_layers)
    layer_map = recipe.options.get("layer_map")
    if layer_map is None:
        if own.num_layers != theirs.num_layers:
            even = [layer * theirs.num_layers // own.num_layers for layer in range(own.num_layers)]
            raise ValueError(
                f"target has {own.num_layers} layers and source {theirs.num_layers}; give layer_map, the "
                f"source's layer for each of the target's, such as {even}"
            )
        return list(layers), list(range(own.num_layers))
    inside = all(-theirs.num_layers <= layer < theirs.num_layers for layer in layer_map)
    if len(layer_map) != own.num_layers or not inside:
        raise ValueError(
            f"layer_map must have {own.num_layers} layers of the source, in [{-theirs.num_layers}, "
            f"{theirs.num_layers - 1}], got {layer_map}"
        )
    return list(layers), [layer % theirs.num_layers for layer in layer_map]


def _spread(lam: float | tuple[float, ...], layers: Sequence[int]) -> Sequence[float]:
    if not isinstance(lam, tuple):
        return [lam] * len(layers)
    if len(lam) != len(layers):
        raise ValueError(
            f"lambda must have one entry for each of the {len(layers)} merged layers, got {len(lam)}"
        )
    return lam


def _find(side: _Side, projection: Projection) -> Stored:
    """The stored tensor with a projection; DataError if it is not there as the configuration says."""
    stored = side.stored.get(projection.name)
    if stored is None:
        raise DataError(f"{side.checkpoint.place} lacks the tensor {projection.name}")
    if stored.shape != tuple(projection.parameter.shape):
        raise DataError(
            f"{stored.name} of {side.checkpoint.place} is {list(stored.shape)}, and its config.json says "
            f"{list(projection.parameter.shape)}"
        )
    if stored.dtype not in FLOATS:
        raise DataError(
            f"{stored.name} of {side.checkpoint.place} is {stored.dtype}, which cannot be merged; it must be "
            f"one of {', '.join(FLOATS)}"
        )
    return stored


def _heads(own: _Side, theirs: _Side) -> tuple[str, ...]:
    ours, others = num_heads(own.encoder), num_heads(theirs.encoder)
    if ours is None or others is None or ours == others:
        return ()
    return (
        f"{own.checkpoint.place} has {ours} heads and {theirs.checkpoint.place} {others}: heads of different "
        "sizes are merged row by row",
    )
