"""layer_mix: the weighted sum of an encoder's hidden states, with and without LayerNorm."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benches.case import (
    HUBERT_BASE,
    WAV2VEC2_LARGE,
    WHISPER_TINY,
    Candidate,
    Case,
    Direction,
    Encoder,
    OpProblem,
)
from benches.registry import kernel_candidates
from mmkernels.ops.layer_mix import layer_mix
from mmkernels.ops.layer_mix.reference import layer_mix as reference

#: Share of the frames of a padded batch that are valid, where lengths are given.
VALID = 0.6


@dataclass(frozen=True)
class Variant:
    """Options of the op; ``trainable`` asks for the gradients of the layers too."""

    name: str = ""
    norm: bool = False
    affine: bool = False
    lengths: bool = False
    trainable: bool = False


PLAIN = Variant()
NORM = Variant("norm", norm=True)
AFFINE = Variant("norm+affine", norm=True, affine=True)
LENGTHS = Variant("norm+lengths", norm=True, lengths=True)
TRAINABLE = Variant("norm+trainable layers", norm=True, trainable=True)
PLAIN_LENGTHS = Variant("lengths", lengths=True)
PLAIN_TRAINABLE = Variant("trainable layers", trainable=True)


def s3prl(layers: list[Tensor], weights: Tensor, *, lengths: Tensor | None = None, **norm: Any) -> Tensor:
    """Stack, normalise, multiply, sum: the formula of s3prl's Featurizer and of SUPERB."""
    stacked = torch.stack(layers)
    if norm:
        stacked = functional.layer_norm(stacked, stacked.shape[-1:])
    if "norm_weight" in norm:
        stacked = stacked * norm["norm_weight"][:, None, None] + norm["norm_bias"][:, None, None]
    shape = stacked.shape[1:]
    mixed = (weights.unsqueeze(-1) * stacked.view(len(layers), -1)).sum(dim=0).view(shape)
    return _mask(mixed, lengths)


def plain_loop(
    layers: list[Tensor], weights: Tensor, *, lengths: Tensor | None = None, **norm: Any
) -> Tensor:
    """A sum in a loop, the form that the compiler fuses best."""
    mixed = weights[0] * _normalised(layers[0], 0, **norm)
    for index, layer in enumerate(layers[1:], start=1):
        mixed = mixed + weights[index] * _normalised(layer, index, **norm)
    return _mask(mixed, lengths)


def in_place_loop(
    layers: list[Tensor], weights: Tensor, *, lengths: Tensor | None = None, **norm: Any
) -> Tensor:
    """The best eager form: no stack, one accumulator, dot products for the weights' gradient."""
    normalised = (_normalised(layer, index, **norm) for index, layer in enumerate(layers))
    if torch.is_grad_enabled():
        return _mask(_InPlaceSum.apply(weights, *normalised), lengths)
    mixed = next(normalised) * weights[0]
    for index, layer in enumerate(normalised, start=1):
        mixed.addcmul_(layer, weights[index])
    return mixed if lengths is None else mixed.masked_fill_(_padding(mixed, lengths), 0.0)


class _InPlaceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, *layers: Tensor) -> Tensor:
        ctx.save_for_backward(weights, *layers)
        mixed = layers[0] * weights[0]
        for layer, weight in zip(layers[1:], weights[1:], strict=True):
            mixed.addcmul_(layer, weight)
        return mixed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weights, *layers = ctx.saved_tensors
        flat = grad.reshape(-1)
        d_weights = torch.stack([torch.dot(flat, layer.reshape(-1)) for layer in layers])
        needed = ctx.needs_input_grad[1:]
        d_layers = [w * grad if need else None for w, need in zip(weights, needed, strict=True)]
        return d_weights, *d_layers


def _normalised(layer: Tensor, index: int, *, norm: bool = False, **affine: Tensor) -> Tensor:
    if not norm:
        return layer
    gain_and_shift = [affine[name][index] for name in ("norm_weight", "norm_bias")] if affine else []
    return functional.layer_norm(layer, layer.shape[-1:], *gain_and_shift)


def _mask(mixed: Tensor, lengths: Tensor | None) -> Tensor:
    return mixed if lengths is None else mixed.masked_fill(_padding(mixed, lengths), 0.0)


def _padding(mixed: Tensor, lengths: Tensor) -> Tensor:
    frame = torch.arange(mixed.shape[1], device=mixed.device)
    return (frame >= lengths.unsqueeze(1)).unsqueeze(-1)


def _case(
    encoder: Encoder,
    variant: Variant,
    direction: Direction,
    device: str,
    tiny: bool,
    *,
    batch: int = 8,
    frames: int = 400,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Case:
    count, width = (min(encoder.layers, 3), 40) if tiny else (encoder.layers, encoder.width)
    batch, frames = (2, 7) if tiny else (batch, frames)
    lengths = [max(1, round(frames * VALID))] * batch
    rows, valid = batch * frames, sum(lengths) if variant.lengths else batch * frames
    item = dtype.itemsize
    out, read = rows * width * item, count * valid * width * item
    forward, backward = read + out, read + valid * width * item
    flops = (2 + 6 * variant.norm + 2 * variant.affine) * count * valid * width
    back_flops = (2 + 4 * variant.norm + 2 * variant.affine) * count * valid * width
    if variant.trainable:
        backward += count * rows * width * item
        back_flops += (1 + 5 * variant.norm) * count * valid * width
    return Case(
        op="layer_mix",
        shape=encoder.name,
        variant=variant.name,
        direction=direction,
        dtype=dtype,
        device=device,
        sizes={"L": count, "B": batch, "T": frames, "D": width},
        minimum_bytes={"forward": forward, "backward": backward}.get(direction, forward + backward),
        flops={"forward": flops, "backward": back_flops}.get(direction, flops + back_flops),
        output_bytes=out,
        candidates=(
            *kernel_candidates(layer_mix, device),
            Candidate("eager (s3prl)", "papers", s3prl),
            Candidate("eager in place", "hand_written", in_place_loop),
            Candidate("torch.compile", "compile", plain_loop),
        ),
        problem=functools.partial(
            _problem, variant, direction, (count, batch, frames, width), lengths, dtype, device
        ),
        **options,
    )


def _problem(
    variant: Variant,
    direction: Direction,
    sizes: tuple[int, int, int, int],
    lengths: list[int],
    dtype: torch.dtype,
    device: str,
) -> OpProblem:
    count, batch, frames, width = sizes
    make = functools.partial(torch.randn, dtype=dtype, device=device)
    layers = [make(batch, frames, width).requires_grad_(variant.trainable) for _ in range(count)]
    inputs: dict[str, Any] = {"layers": layers, "weights": make(count).softmax(0).requires_grad_()}
    if variant.norm:
        inputs["norm"] = True
    if variant.affine:
        inputs["norm_weight"] = (1 + 0.1 * make(count, width)).requires_grad_()
        inputs["norm_bias"] = (0.1 * make(count, width)).requires_grad_()
    if variant.lengths:
        inputs["lengths"] = torch.tensor(lengths, device=device)
    return OpProblem(inputs, reference, direction, dtype)


def cases(device: str, tiny: bool = False) -> Iterator[Case]:
    case = functools.partial(_case, device=device, tiny=tiny)
    if device == "cuda":
        yield from _cuda_cases(case)
        return
    for variant in (PLAIN, NORM):
        for direction in ("forward", "forward_backward"):
            yield case(HUBERT_BASE, variant, direction, headline=True)
            yield case(HUBERT_BASE, variant, direction, memory="reused", headline=True)
    yield case(HUBERT_BASE, NORM, "backward")
    for variant in (AFFINE, PLAIN_LENGTHS, LENGTHS):
        yield case(HUBERT_BASE, variant, "forward")
        yield case(HUBERT_BASE, variant, "forward_backward")
    for variant in (PLAIN_TRAINABLE, TRAINABLE):
        yield case(HUBERT_BASE, variant, "forward_backward")
    yield case(HUBERT_BASE, NORM, "forward", dtype=torch.bfloat16)
    for encoder, batch, frames in ((WHISPER_TINY, 8, 1500), (WAV2VEC2_LARGE, 4, 400)):
        yield case(encoder, PLAIN, "forward", batch=batch, frames=frames)
        yield case(encoder, NORM, "forward", batch=batch, frames=frames)
        yield case(encoder, NORM, "forward_backward", batch=batch, frames=frames)


def _cuda_cases(case: functools.partial[Case]) -> Iterator[Case]:
    bf16 = functools.partial(case, frames=1500, dtype=torch.bfloat16)
    for variant in (PLAIN, NORM):
        for direction in ("forward", "backward", "forward_backward"):
            yield bf16(WAV2VEC2_LARGE, variant, direction, headline=True)
            yield bf16(HUBERT_BASE, variant, direction)
    for variant in (AFFINE, LENGTHS, TRAINABLE):
        yield bf16(HUBERT_BASE, variant, "forward_backward")
    yield bf16(WHISPER_TINY, NORM, "forward")
    yield case(HUBERT_BASE, NORM, "forward", dtype=torch.float32)
    yield case(HUBERT_BASE, NORM, "forward_backward", dtype=torch.float32)
