"""How alike the layers of two models are on paired samples: which of them to merge."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from mmtransfer.encoders.encoder import Encoder

from .sources import layer_pairs

#: Larger is more alike for the inner product, smaller for the two distances.
METRICS = ("euclid", "swd", "inner")


@dataclass(frozen=True)
class Similarity:
    """A table of the layers of the target; `print` shows it.

    Attributes:
        euclid: mean distance of the two vectors of a sample.
        swd: sliced Wasserstein distance, of order 2, of the two sets of vectors.
        inner: mean inner product of the two vectors of a sample.
        samples: how many.
    """

    euclid: tuple[float, ...]
    swd: tuple[float, ...]
    inner: tuple[float, ...]
    samples: int

    def top(self, k: int, by: str = "swd") -> tuple[int, ...]:
        """The `k` most similar layers by a metric of `METRICS`, ascending, for `layers` of `merge`."""
        if by not in METRICS:
            raise ValueError(f"by must be one of {', '.join(METRICS)}, got {by!r}")
        count = len(self.euclid)
        if type(k) is not int or not 1 <= k <= count:
            raise ValueError(f"k must be an integer in [1, {count}], the layers of the target, got {k!r}")
        values = getattr(self, by)
        order = sorted(range(count), key=lambda layer: (-1 if by == "inner" else 1) * values[layer])
        return tuple(sorted(order[:k]))

    def __str__(self) -> str:
        rows = zip(self.euclid, self.swd, self.inner, strict=True)
        lines = [f"{'layer':>5} " + " ".join(f"{name:>12}" for name in METRICS)]
        lines += [
            f"{layer:>5} " + " ".join(f"{each:>12.4f}" for each in row) for layer, row in enumerate(rows)
        ]
        return "\n".join(lines)


def similarity(
    target: nn.Module | Encoder,
    source: nn.Module | Encoder,
    target_batches: Iterable[Any],
    source_batches: Iterable[Any],
    *,
    layer_map: Sequence[int] | None = None,
    directions: int = 128,
    seed: int = 0,
) -> Similarity:
    """Compare the layers of two models, each on its own form of the same samples, such as recordings and
    their transcripts.

    A layer's outputs are averaged over the valid frames of a sample inside a forward hook, so that one vector
    for each layer and sample is all that is kept. The paper takes a tenth of the training set.

    Args:
        target, source: described models of one width, or `Encoder(model, description)`.
        target_batches, source_batches: the inputs of each encoder, batch by batch: its main input, or a
            dictionary of its arguments; `attention_mask` says which positions are valid. Sample i of one goes
            with sample i of the other; batches may be of different sizes.
        layer_map: as for `merge`.
        directions: random unit vectors of the sliced Wasserstein distance.
        seed: of the directions.

    Raises:
        ValueError: models that cannot be merged, different numbers of samples, or none, something that is no
            batch, or hidden states that are not finite.
    """
    own, other = (each if isinstance(each, Encoder) else Encoder(each) for each in (target, source))
    mapped = layer_pairs(own, other, layer_map)
    if type(directions) is not int or directions < 1:
        raise ValueError(f"directions must be an integer of at least 1, got {directions!r}")
    mine, theirs = pool(own, target_batches), pool(other, source_batches)
    if mine.shape[1] != theirs.shape[1] or not mine.shape[1]:
        raise ValueError(
            f"target_batches and source_batches must have the same samples, at least one; got "
            f"{mine.shape[1]} and {theirs.shape[1]}"
        )
    theirs = theirs[list(mapped)]
    for name, states in (("target", mine), ("source", theirs)):
        if bad := [layer for layer, each in enumerate(states) if not each.isfinite().all()]:
            raise ValueError(
                f"the {name} has hidden states that are not finite, first in layer {bad[0]}; they have no "
                "distance: look for NaN in its inputs and weights"
            )
    unit = torch.randn(mine.shape[2], directions, generator=torch.Generator().manual_seed(seed)).to(mine)
    unit = unit / unit.norm(dim=0)
    sliced = (mine @ unit).sort(dim=1).values - (theirs @ unit).sort(dim=1).values
    return Similarity(
        euclid=tuple((mine - theirs).norm(dim=2).mean(dim=1).tolist()),
        swd=tuple(sliced.square().mean(dim=(1, 2)).sqrt().tolist()),
        inner=tuple((mine * theirs).sum(dim=2).mean(dim=1).tolist()),
        samples=mine.shape[1],
    )


def pool(model: nn.Module | Encoder, batches: Iterable[Any]) -> torch.Tensor:
    """The mean of each layer's output over each sample's valid frames: `(L, N, D)` float32, on the CPU."""
    encoder = model if isinstance(model, Encoder) else Encoder(model)
    if isinstance(batches, (torch.Tensor, Mapping)):
        raise ValueError(f"batches must be an iterable of batches, such as [batch], got {_kind(batches)}")
    found: list[list[torch.Tensor]] = [[] for _ in encoder.all_layers]
    with _evaluating(encoder.model), torch.no_grad():
        for batch in batches:
            options = {"use_cache": False} if encoder.description.keeps_keys else {}
            call, counts = _arguments(encoder, batch)
            with _pooling(encoder, counts, found):
                encoder.model(**call, **options)
    if not found[0]:
        return torch.empty(encoder.num_layers, 0, encoder.hidden_size)
    return torch.stack([torch.cat(each) for each in found])


def _arguments(encoder: Encoder, batch: Any) -> tuple[dict[str, Any], torch.Tensor | None]:
    """The arguments of the encoder, and the valid frames of each sample where there is a mask."""
    row = encoder.description
    given = dict(batch) if isinstance(batch, Mapping) else {row.main_input: batch}
    if not isinstance(given.get(row.main_input), torch.Tensor):
        raise ValueError(
            f"a batch for {row.model_type} must be a tensor, {row.main_input}, or a dictionary that has it; "
            f"got {_kind(batch)}"
        )
    device = next(encoder.model.parameters()).device
    call = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in given.items()
    }
    mask = call.get("attention_mask")
    if mask is not None and not row.takes_mask:
        del call["attention_mask"]
    counts = None
    if mask is not None and row.frames != "fixed":
        counts = encoder.frame_lengths(mask.sum(dim=1))
        if int(counts.min()) < 1:
            raise ValueError("each sample must have at least one valid frame")
    return call, counts


def _kind(batch: Any) -> str:
    """What was given for a batch, for a message."""
    if isinstance(batch, Mapping):
        kinds = ", ".join(f"{name} ({type(value).__name__})" for name, value in batch.items())
        return f"a dictionary with {kinds or 'nothing'}"
    return type(batch).__name__


@contextmanager
def _pooling(
    encoder: Encoder, counts: torch.Tensor | None, found: list[list[torch.Tensor]]
) -> Iterator[None]:
    """Average the output of each layer as soon as it is there."""

    def average(place: list[torch.Tensor], output: Any) -> None:
        state = output[0] if isinstance(output, tuple) else output
        if counts is None:
            place.append(state.mean(dim=1, dtype=torch.float32).cpu())
            return
        valid = torch.arange(state.shape[1], device=state.device) < counts.unsqueeze(1)
        total = torch.einsum("btd,bt->bd", state.float(), valid.float())
        place.append((total / counts.unsqueeze(1)).cpu())

    handles = []
    try:
        for layer, place in zip(encoder.all_layers, found, strict=True):
            hook = partial(lambda place, _module, _args, output: average(place, output), place)
            handles.append(layer.register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode in the body; each module has its own mode back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training
