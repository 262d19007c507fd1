"""HFF-b: one training step on frozen taps, of the fusion built on the ops and of its eager twin."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benches.case import WAV2VEC2_LARGE, WHISPER_TINY, Candidate, Case
from benches.methods.step import StepProblem
from benches.registry import kernel_candidates
from mmtransfer.hff import HFFb
from mmtransfer.hff.eager import EagerHFFb

CLASSES = 32


class FusionWithHead(nn.Module):
    """A fusion and a linear layer to per-frame logits, in the place of a CTC head."""

    def __init__(self, fusion: nn.Module, out_dim: int) -> None:
        super().__init__()
        self.fusion = fusion
        self.head = nn.Linear(out_dim, CLASSES)

    def forward(self, x: Any) -> Tensor:
        return self.head(self.fusion(x))


def build(fusion: Any, sizes: tuple[int, int, int]) -> FusionWithHead:
    """``fusion`` of (taps, width, out_dim) with its head."""
    return FusionWithHead(fusion(*sizes), sizes[-1])


def as_taps(inputs: dict[str, Tensor]) -> dict[str, Any]:
    """Each tap in its own tensor, as an encoder returns them."""
    return {"x": [tap.contiguous() for tap in inputs["x"].unbind(1)]}


def _problem(rows: int, sizes: tuple[int, int, int], dtype: torch.dtype, device: str) -> StepProblem:
    taps, width, _ = sizes
    return StepProblem(
        functools.partial(build, EagerHFFb, sizes),
        {"x": torch.randn(rows, taps, width, dtype=dtype, device=device)},
        torch.randint(CLASSES, (rows,), device=device),
        parameters=dtype,
        activations=dtype,
    )


def _case(
    shape: str,
    sizes: tuple[int, int, int],
    device: str,
    tiny: bool,
    *,
    dtype: torch.dtype = torch.float32,
    headline: bool = False,
) -> Case:
    rows, taps, width = (9, 4, 40) if tiny else sizes
    out_dim = 24 if tiny else 640
    model_sizes = taps, width, out_dim
    with torch.device("meta"):
        model = build(EagerHFFb, model_sizes)
    parameters = sum(p.numel() for p in model.parameters())
    leaves = sum(p.numel() for p in model.fusion.levels[0].parameters())
    eager = functools.partial(build, EagerHFFb, model_sizes)
    item = dtype.itemsize
    return Case(
        op="hff",
        shape=shape,
        variant="hff-b",
        direction="training step",
        dtype=dtype,
        device=device,
        sizes={"N": rows, "L": taps, "C": width, "out_dim": out_dim},
        # Taps forwards and backwards; parameters, gradients and the optimiser's two moments, each twice.
        minimum_bytes=item * (2 * rows * taps * width + 8 * parameters),
        # A product forwards and two backwards, but none for the gradient of frozen taps.
        flops=2 * rows * (3 * parameters - leaves),
        output_bytes=item * rows * CLASSES,
        candidates=(
            *(
                Candidate(c.name, c.role, functools.partial(build, c.call, model_sizes))
                for c in kernel_candidates(HFFb, device)
            ),
            Candidate("eager twin", "papers", eager, as_taps),
            Candidate("torch.compile", "compile", eager, as_taps),
        ),
        problem=functools.partial(_problem, rows, model_sizes, dtype, device),
        bound="compute",
        headline=headline,
        # Rounding changes the sign of some inputs of the ReLUs, a share of about eps, and with each a whole
        # term of a gradient.
        tolerance=min(10 * torch.finfo(dtype).eps ** 0.5, 0.3),
        max_rounds=15,
    )


def cases(device: str, tiny: bool = False) -> Iterator[Case]:
    case = functools.partial(_case, device=device, tiny=tiny)
    large, small = WAV2VEC2_LARGE, WHISPER_TINY
    if device == "cuda":
        yield case(f"{large.name}, 12 taps", (12000, 12, large.width), dtype=torch.bfloat16, headline=True)
        return
    yield case(f"{large.name}, 12 taps", (2048, 12, large.width), headline=True)
    yield case(f"{small.name}, 4 taps", (2048, 4, small.width))
