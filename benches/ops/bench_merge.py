"""merge: the attention matrices of two models, interpolated by a learnable weight for each layer (L-MAM)."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

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
from mmkernels.ops.merge import merge
from mmkernels.ops.merge.reference import merge as reference

#: Query, key and value of each layer.
MATRICES = 3
#: Results are written to memory that the caller gives.
GIVEN = "given memory"


def naive(target: list[Tensor], source: list[Tensor], lam: Tensor, groups: list[int]) -> list[Tensor]:
    """The equation as the paper has it."""
    return [(1 - lam[g]) * t + lam[g] * s for t, s, g in zip(target, source, groups, strict=True)]


def lerp_loop(target: list[Tensor], source: list[Tensor], lam: Tensor, groups: list[int]) -> list[Tensor]:
    """The best eager form that has a gradient of the weights."""
    return [torch.lerp(t, s, lam[g]) for t, s, g in zip(target, source, groups, strict=True)]


def foreach(target: list[Tensor], source: list[Tensor], weights: list[float]) -> list[Tensor]:
    """All tensors in one call of torch, by weights that the host knows; no gradient for them."""
    return list(torch._foreach_lerp(target, source, weights))


def naive_copied(out: list[Tensor], **inputs: Any) -> list[Tensor]:
    """As scripts that merge checkpoints do it: compute, then copy into the model."""
    return [tensor.copy_(result) for tensor, result in zip(out, naive(**inputs), strict=True)]


def lerp_into(
    target: list[Tensor], source: list[Tensor], lam: Tensor, groups: list[int], out: list[Tensor]
) -> list[Tensor]:
    several = zip(target, source, groups, out, strict=True)
    return [torch.lerp(t, s, lam[g], out=tensor) for t, s, g, tensor in several]


def foreach_copied(out: list[Tensor], **inputs: Any) -> list[Tensor]:
    torch._foreach_copy_(out, foreach(**inputs))
    return out


def with_numbers(inputs: dict[str, Any]) -> dict[str, Any]:
    """The weight of each pair as a number of Python, read from the device off the clock."""
    values = inputs["lam"].tolist()
    rest = {name: value for name, value in inputs.items() if name not in ("lam", "groups")}
    return {**rest, "weights": [values[group] for group in inputs["groups"]]}


def candidates(direction: Direction, variant: str, device: str) -> tuple[Candidate, ...]:
    given = variant == GIVEN
    rows = (
        *kernel_candidates(merge, device),
        Candidate("eager", "papers", naive_copied if given else naive),
        Candidate("eager lerp", "hand_written", lerp_into if given else lerp_loop),
        Candidate("torch.compile", "compile", lerp_into if given else naive),
    )
    if direction != "forward":
        return rows
    function = foreach_copied if given else foreach
    return (*rows, Candidate("foreach_lerp, numbers", "library", function, with_numbers))


def _case(
    encoder: Encoder, direction: Direction, device: str, tiny: bool, variant: str = "", **options: Any
) -> Case:
    layers, width = (2, 40) if tiny else (encoder.layers - 1, encoder.width)
    pairs = MATRICES * layers
    count, item = pairs * width * width, torch.float32.itemsize
    # Forward: target, source, result. Backward: the gradient and both again, and the target's gradient.
    moved = {"forward": 3, "backward": 4, "forward_backward": 7}
    operations = {"forward": 3, "backward": 4, "forward_backward": 7}
    return Case(
        op="merge",
        shape=encoder.name,
        variant=variant,
        direction=direction,
        dtype=torch.float32,
        device=device,
        sizes={"pairs": pairs, "D": width, "groups": layers},
        minimum_bytes=moved[direction] * count * item,
        flops=operations[direction] * count,
        output_bytes=count * item,
        candidates=candidates(direction, variant, device),
        problem=functools.partial(_problem, layers, width, direction, variant, device),
        **options,
    )


def _problem(layers: int, width: int, direction: Direction, variant: str, device: str) -> OpProblem:
    def matrices() -> list[Tensor]:
        return [torch.randn(width, width, device=device) / width**0.5 for _ in range(MATRICES * layers)]

    inputs: dict[str, Any] = {
        "target": [matrix.requires_grad_(direction != "forward") for matrix in matrices()],
        "source": matrices(),
        "lam": torch.rand(layers, device=device).requires_grad_(direction != "forward"),
        "groups": [index // MATRICES for index in range(MATRICES * layers)],
    }
    if variant == GIVEN:
        inputs["out"] = [torch.empty_like(matrix) for matrix in inputs["target"]]
    return OpProblem(inputs, _reference, direction, torch.float32)


def _reference(out: list[Tensor] | None = None, **inputs: Any) -> list[Tensor]:
    return reference(**inputs)


def cases(device: str, tiny: bool = False) -> Iterator[Case]:
    case = functools.partial(_case, device=device, tiny=tiny)
    for encoder in (WAV2VEC2_LARGE, HUBERT_BASE, WHISPER_TINY):
        large = encoder is WAV2VEC2_LARGE
        yield case(encoder, "forward", headline=large)
        yield case(encoder, "forward_backward", headline=large)
        if large:
            yield case(encoder, "forward", variant=GIVEN, headline=True)
        if device == "cuda":
            yield case(encoder, "backward", headline=large)
        elif large:
            yield case(encoder, "forward_backward", memory="reused")
