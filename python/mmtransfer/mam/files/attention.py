"""The plan of attention merging: matrices of queries, keys and values in the files of two architectures."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

from mmtransfer.data.errors import DataError
from mmtransfer.encoders.encoder import Encoder
from mmtransfer.mam.merging import check_lam
from mmtransfer.mam.projections import Projection
from mmtransfer.mam.sources import Pairs, find_pairs

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
        DataError: a model without a description, or tensors that a checkpoint lacks or has in another shape
            or dtype; each named.
        ValueError: widths, layers, a layer map or weights that do not fit the models.
    """
    own, theirs = _open(target), _open(source)
    with warnings.catch_warnings():
        # Said by `_heads` instead.
        warnings.simplefilter("ignore")
        pairs = find_pairs(own.encoder, theirs.encoder, **recipe.options)
    lam = check_lam(list(recipe.lam) if isinstance(recipe.lam, tuple) else recipe.lam, pairs, "lambda")
    patches: dict[str, list[Patch]] = {}
    for pair, group in zip(pairs.pairs, pairs.groups, strict=True):
        stored = _find(own, pair.target)
        other = None if pair.partner is None else _find(theirs, pair.partner)
        # A weight of 0 leaves the target's matrix, bit for bit.
        if lam[group]:
            patch = Patch(
                pair.target, other, pair.partner, lam[group], recipe.options.get("match_rms", False)
            )
            patches.setdefault(stored.name, []).append(patch)
    entries = [
        Entry(
            name,
            result_dtype(stored, recipe.dtype),
            stored.shape,
            (Term(stored, 1.0),),
            tuple(patches.get(name, ())),
        )
        for name, stored in target.tensors.items()
    ]
    return Plan(target, (target, source), tuple(entries), recipe.dtype, _heads(target, source, pairs))


def _open(checkpoint: Checkpoint) -> _Side:
    model = build_model(checkpoint)
    try:
        encoder = Encoder(model)
    except (TypeError, ValueError) as error:
        raise DataError(f"{checkpoint.place} cannot be used: {error}") from error
    rename = find_renaming(model)
    return _Side(checkpoint, encoder, {rename(name): stored for name, stored in checkpoint.tensors.items()})


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


def _heads(target: Checkpoint, source: Checkpoint, pairs: Pairs) -> tuple[str, ...]:
    own, theirs = pairs.heads
    if own is None or theirs is None or own == theirs:
        return ()
    return (
        f"{target.place} has {own} attention heads and {source.place} {theirs}: rows of one head are merged "
        "into those of others",
    )
