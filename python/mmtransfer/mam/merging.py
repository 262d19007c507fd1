"""MAM: attention interpolated between a source and a target, in place and without training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

import mmkernels
from mmtransfer.encoders.encoder import Encoder

from .projections import PARTS
from .sources import Pairs, Source, find_pairs

T = TypeVar("T")


@dataclass(frozen=True)
class Merged:
    """The report of `merge`; `print` shows it.

    Attributes:
        layers: of the target that were merged.
        lam: for each of them the share of the source.
        matrices: how many weights (and biases).
        parameters: how many numbers those have.
        heads: attention heads of target and source, None where a configuration does not say.
    """

    layers: tuple[int, ...]
    lam: tuple[float, ...]
    matrices: int
    parameters: int
    heads: tuple[int | None, int | None]

    def __str__(self) -> str:
        share = f"{self.lam[0]:g}" if len(set(self.lam)) == 1 else f"{min(self.lam):g} to {max(self.lam):g}"
        return (
            f"merged {self.matrices} matrices, {self.parameters:,} parameters, of {len(self.layers)} layers; "
            f"share of the source: {share}"
        )


def merge(
    target: nn.Module | Encoder,
    source: Source,
    lam: float | Sequence[float] | torch.Tensor,
    *,
    layers: Any = "all",
    layer_map: Sequence[int] | None = None,
    parts: Sequence[str] = PARTS,
    bias: bool = False,
    match_rms: bool = False,
) -> Merged:
    """Interpolate the attention of `target` in place: `(1 - lam) * W_target + lam * W_source` for the weights
    of queries, keys and values. All matrices are one call of `mmkernels.merge`; nothing is trained.

    Args:
        target: a described model, with or without a head or a decoder, or `Encoder(model, description)`.
        source: a model as wide as the target, its folder or hub name, or `Noise`. It is not changed.
        lam: share of the source in [0, 1], or one for each of `layers`.
        layers: "all", or the target's indices, negative ones from the end: `range(12, 20)`, `[0, 3]`, or the
            most similar ones, `similarity(...).top(8)`. Others are not touched.
        layer_map: for each layer of the target (all of them) that of the source; needed where the two have
            different numbers of layers.
        parts: some of "q", "k", "v".
        bias: merge the target's biases too, those that the source lacks with zeros; the paper's equations
            have weights alone.
        match_rms: first scale each source matrix to the root mean square of the target's.

    Raises:
        TypeError, ValueError: models of different widths, or without a description; a share, layer, part or
            map out of range. The target is untouched.

    Warns where the two have different numbers of attention heads. Source: equations 1 and 2 of arXiv
    2312.14378.
    """
    pairs = find_pairs(
        target, source, layers=layers, layer_map=layer_map, parts=parts, bias=bias, match_rms=match_rms
    )
    shares = check_lam(lam, pairs)
    own = [pair.target.view.detach() for pair in pairs.pairs]
    _write(pairs, own, _fitted(pairs), shares)
    return _report(pairs, shares)


def sweep(
    target: nn.Module | Encoder,
    source: Source,
    lams: Iterable[float | Sequence[float]],
    evaluate: Callable[[nn.Module], T],
    **options: Any,
) -> list[tuple[Any, T]]:
    """`evaluate(model)` with the target merged at each of `lams`; the target is given back as it was.

    Each point is merged from the target's own weights, of which a copy is kept meanwhile, so that it equals a
    fresh `merge` bit for bit. Between points nothing but the merged matrices is written. The target has its
    weights back also if `evaluate` raises.

    Args:
        target, source: as `merge`.
        lams: the shares, all checked before the first is tried.
        evaluate: called with the target's root model.
        options: of `merge`.

    Returns:
        For each share `(lam, evaluate's result)`.
    """
    pairs = find_pairs(target, source, **options)
    points = [(lam, check_lam(lam, pairs)) for lam in lams]
    root = target.root if isinstance(target, Encoder) else target
    own = [pair.target.view.detach().clone() for pair in pairs.pairs]
    sources = _fitted(pairs)
    results = []
    try:
        for lam, shares in points:
            _write(pairs, own, sources, shares)
            results.append((lam, evaluate(root)))
    finally:
        _copy(pairs, own)
    return results


@torch.no_grad()
def _write(
    pairs: Pairs, own: Sequence[torch.Tensor], sources: Sequence[torch.Tensor], lam: Sequence[float]
) -> None:
    """Write the merge of `own` and the sources into the target's parameters."""
    first = own[0]
    # Slices of a transposed weight are not contiguous: their merge is copied.
    views = [pair.target.view.detach() for pair in pairs.pairs]
    out = [view if view.is_contiguous() else torch.empty_like(view, memory_format=_DENSE) for view in views]
    weights = torch.tensor(list(lam), dtype=torch.promote_types(first.dtype, torch.float32))
    mmkernels.merge(list(own), list(sources), weights.to(first.device), groups=pairs.groups, out=out)
    for view, result in zip(views, out, strict=True):
        if view is not result:
            view.copy_(result)


_DENSE = torch.contiguous_format


@torch.no_grad()
def _copy(pairs: Pairs, values: Iterable[torch.Tensor]) -> None:
    for pair, value in zip(pairs.pairs, values, strict=True):
        pair.target.view.copy_(value)


def _fitted(pairs: Pairs) -> list[torch.Tensor]:
    return [fit(pair.source, pair.target.view) for pair in pairs.pairs]


def fit(source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """A source on the target's device, and in its dtype where float64 meets another, which the op refuses.

    ValueError for one without values.
    """
    if source.is_meta and not target.is_meta:
        raise ValueError("the source is on the meta device and has no values to merge; load its weights")
    dtype = target.dtype if torch.float64 in (source.dtype, target.dtype) else source.dtype
    return source.detach().to(target.device, dtype)


def check_lam(lam: Any, pairs: Pairs, name: str = "lam") -> tuple[float, ...]:
    """One share for each layer. ValueError for another number of them, or one outside [0, 1]."""
    count = len(pairs.layers)
    values = lam.tolist() if isinstance(lam, torch.Tensor) else lam
    values = list(values) if isinstance(values, (list, tuple)) else [values] * count
    numbers = all(isinstance(each, (int, float)) and not isinstance(each, bool) for each in values)
    if len(values) != count or not numbers or not all(0 <= each <= 1 for each in values):
        raise ValueError(
            f"{name} must be a number in [0, 1], or one for each of the {count} layers, got {lam!r}; it is "
            "the share of the source"
        )
    return tuple(float(each) for each in values)


def _report(pairs: Pairs, lam: tuple[float, ...]) -> Merged:
    sizes = [pair.source.numel() for pair in pairs.pairs]
    return Merged(pairs.layers, lam, len(sizes), sum(sizes), pairs.heads)
