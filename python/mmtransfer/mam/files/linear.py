"""The plan of a linear merge: for each tensor of the target its counterparts in the other models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mmtransfer.data.errors import DataError, first

from .checkpoint import Checkpoint, Stored
from .names import align
from .plan import FLOATS, Entry, Plan, Term, result_dtype
from .recipe import LinearRecipe
from .streams import Reader
from .weights import find_depths

#: Sums of weights that cannot be divided by.
_ZERO = 1e-9


def plan_linear(recipe: LinearRecipe, checkpoints: Sequence[Checkpoint]) -> Plan:
    """The plan of a recipe.

    Args:
        checkpoints: the models of the recipe, in its order.

    Raises:
        DataError: tensors that a model lacks (unless they are kept), of other shapes, of integers that differ
            or of dtypes that cannot be summed; each named.
        ValueError: a tensor without a weight, or whose weights cannot be normalised.
    """
    target = checkpoints[recipe.target]
    matches = [align(target, each) for each in checkpoints]
    notes = _check_missing(recipe, target, checkpoints, matches)
    depths = find_depths(target.tensors)
    entries = []
    for name, own in target.tensors.items():
        entries.append(_plan_tensor(recipe, name, own, [match.get(name) for match in matches], depths[name]))
    _check_shapes(target, entries)
    with Reader() as reader:
        entries = [_keep_integers(entry, target, reader) for entry in entries]
    _check_dtypes(entries)
    inputs = tuple(checkpoints)
    return Plan(target, inputs, tuple(entries), recipe.dtype, notes)


def _plan_tensor(
    recipe: LinearRecipe, name: str, own: Stored, found: Sequence[Stored | None], depth: float
) -> Entry:
    dtype = result_dtype(own, recipe.dtype)
    if None in found:
        return Entry(name, dtype, own.shape, (Term(own, 1.0),))
    weights = [_weight(recipe, index, name, depth) for index in range(len(recipe.models))]
    total = sum(weights)
    if recipe.normalize:
        if abs(total) < _ZERO:
            raise ValueError(
                f"the weights of {name} add up to {total:g} and cannot be normalised; give others, or "
                "normalize: false in parameters"
            )
        weights = [weight / total for weight in weights]
    used = [(stored, weight) for stored, weight in zip(found, weights, strict=True) if weight]
    # All weights are zero: so is the tensor.
    terms = tuple(Term(stored, weight) for stored, weight in used if stored) or (Term(own, 0.0),)
    return Entry(name, dtype, own.shape, terms)


def _weight(recipe: LinearRecipe, index: int, name: str, depth: float) -> float:
    place, own = recipe.models[index]
    for weights in (own, recipe.weights):
        if weights is not None and (found := weights.find(name, depth)) is not None:
            return found
    raise ValueError(
        f"models[{index}], {place}, has no weight for {name}; give it parameters: {{weight: ...}}, or add a "
        "value without a filter"
    )


def _check_missing(
    recipe: LinearRecipe,
    target: Checkpoint,
    checkpoints: Sequence[Checkpoint],
    matches: Sequence[Mapping[str, Stored]],
) -> tuple[str, ...]:
    """Sentences on tensors that are not in all models; a DataError unless the recipe keeps the target's."""
    notes = []
    for checkpoint, match in zip(checkpoints, matches, strict=True):
        if lost := [name for name in target.tensors if name not in match]:
            notes.append(
                f"{checkpoint.place} lacks {first(lost, 'tensor', 'tensors')} of {target.place}, kept"
            )
        used = {stored.name for stored in match.values()}
        if extra := [name for name in checkpoint.tensors if name not in used]:
            notes.append(
                f"{checkpoint.place} has {first(extra, 'tensor', 'tensors')} more than {target.place}, unused"
            )
    if notes and recipe.missing == "error":
        reasons = "; ".join(note.rpartition(", ")[0] for note in notes)
        raise DataError(f"{reasons}; missing: keep in the recipe merges the others and keeps the target's")
    return tuple(notes)


def _check_shapes(target: Checkpoint, entries: Sequence[Entry]) -> None:
    wrong = [
        f"{entry.name} is {list(entry.shape)} in {target.place} and {list(term.stored.shape)} in "
        f"{term.stored.path.parent}"
        for entry in entries
        for term in entry.terms
        if term.stored.shape != entry.shape
    ]
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise DataError(f"tensors of different shapes cannot be summed: {'; '.join(wrong[:3])}{more}")


def _keep_integers(entry: Entry, target: Checkpoint, reader: Reader) -> Entry:
    """Indices and counters are never averaged: they must agree, and are the target's."""
    own = target.tensors[entry.name]
    if own.dtype in FLOATS or entry.keeps_values:
        return entry
    if not own.dtype.startswith(("I", "U", "BOOL")):
        raise DataError(
            f"{entry.name} is {own.dtype}, which cannot be summed; give models in float32 or bfloat16"
        )
    for term in entry.terms:
        if term.stored != own and (term.stored.dtype != own.dtype or not reader.equal(term.stored, own)):
            raise DataError(
                f"{entry.name}, of {own.dtype}, differs between {own.path.parent} and "
                f"{term.stored.path.parent}; integers are not averaged"
            )
    return Entry(entry.name, entry.dtype, entry.shape, (Term(own, 1.0),))


def _check_dtypes(entries: Sequence[Entry]) -> None:
    for entry in entries:
        for term in entry.terms:
            if not entry.is_copy and term.stored.dtype not in FLOATS:
                raise DataError(
                    f"{entry.name} is {term.stored.dtype} in {term.stored.path.parent}, which cannot be "
                    f"summed; it must be one of {', '.join(FLOATS)}"
                )
