"""SSR's connector: one training step on speech frames, by how its attention and last layer are computed.

A linear loss of the vectors' classes stands for that of the language model's embeddings, the same for all.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benches.case import WHISPER_TINY, Candidate, Case
from benches.methods.step import StepProblem
from benches.registry import kernel_candidates
from mmtransfer.ssr.connector import Connector
from mmtransfer.ssr.eager import EagerConnector

#: Frames of a token, on average: half a word at 50 frames a second.
FRAMES_PER_TOKEN = 10


@dataclass(frozen=True)
class Shape:
    """A batch, and the sizes of the connector."""

    batch: int
    frames: int
    dim: int
    width: int
    heads: int
    key_heads: int
    hidden: int
    layers: int = 4

    def build(self, backend: str = "auto") -> Connector:
        return Connector(
            self.dim,
            self.width,
            layers=self.layers,
            heads=self.heads,
            key_heads=self.key_heads,
            hidden=self.hidden,
            backend=backend,
        )


class Vectors(nn.Module):
    """A connector whose vectors are one batch of rows."""

    def __init__(self, connector: nn.Module) -> None:
        super().__init__()
        self.connector = connector

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        return self.connector(x, ends).flatten(0, 1)


def _ours(shape: Shape, *, backend: str) -> Vectors:
    return Vectors(shape.build(backend))


def _eager(shape: Shape) -> Vectors:
    return Vectors(EagerConnector(shape.build()))


def _problem(shape: Shape, dtype: torch.dtype, device: str) -> StepProblem:
    tokens = shape.frames // FRAMES_PER_TOKEN
    # Distinct ends of segments, the last at the end of the frames.
    ends = torch.stack(
        [torch.randperm(shape.frames - 1)[: tokens - 1].sort().values + 1 for _ in range(shape.batch)]
    )
    ends = torch.cat([ends, torch.full((shape.batch, 1), shape.frames)], 1)
    return StepProblem(
        functools.partial(_eager, shape),
        {
            "x": torch.randn(shape.batch, shape.frames, shape.dim, dtype=dtype, device=device),
            "ends": ends.to(device),
        },
        torch.randint(shape.width, (shape.batch * tokens,), device=device),
        parameters=dtype,
        activations=dtype,
    )


def _case(
    name: str, shape: Shape, device: str, *, dtype: torch.dtype = torch.float32, headline: bool = False
) -> Case:
    with torch.device("meta"):
        parameters = sum(p.numel() for p in shape.build().parameters())
        last = sum(p.numel() for p in shape.build().layers[-1].parameters())
    rows = shape.batch * shape.frames
    keys = 2 * shape.width * shape.width // shape.heads * shape.key_heads
    item = dtype.itemsize
    tokens = shape.frames // FRAMES_PER_TOKEN
    # Of the last layer, keys and values are of all frames, the rest of the last frames of segments.
    products = rows * (parameters - last + keys) + shape.batch * tokens * (last - keys)
    return Case(
        op="ssr",
        shape=name,
        variant="connector",
        direction="training step",
        dtype=dtype,
        device=device,
        sizes={
            "B": shape.batch,
            "T": shape.frames,
            "C": shape.dim,
            "H": shape.width,
            "layers": shape.layers,
            "tokens": tokens,
        },
        minimum_bytes=item * (rows * shape.dim + 8 * parameters),
        flops=6 * products,
        output_bytes=item * shape.batch * tokens * shape.width,
        candidates=(
            *kernel_candidates(functools.partial(_ours, shape), device),
            Candidate("dense mask, all rows", "papers", functools.partial(_eager, shape)),
            Candidate("torch.compile", "compile", functools.partial(_eager, shape)),
        ),
        problem=functools.partial(_problem, shape, dtype, device),
        bound="compute",
        headline=headline,
        tolerance=min(10 * torch.finfo(dtype).eps ** 0.5, 0.3),
        max_rounds=9,
    )


#: The sizes of every case in a quick check.
_TINY = Shape(2, 40, 16, 32, 2, 1, 48, 2)


def cases(device: str, tiny: bool = False) -> Iterator[Case]:
    def case(name: str, shape: Shape, **options: Any) -> Case:
        return _case(name, _TINY if tiny else shape, device, **options)

    if device == "cuda":
        llama = Shape(12, 385, 768, 4096, 32, 8, 14336)
        yield case("DinoSR to Llama-3-8B", llama, dtype=torch.bfloat16, headline=True)
        return
    width = WHISPER_TINY.width
    yield case(f"{WHISPER_TINY.name} to a small model", Shape(8, 500, width, 256, 4, 2, 704), headline=True)
    yield case(f"{WHISPER_TINY.name}, 30 s", Shape(2, 1500, width, 512, 8, 2, 1408))
