"""HFF-b: one whole training step on frozen taps, of the fusion built on the ops and of its eager twin."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benches.case import WAV2VEC2_LARGE, WHISPER_TINY, Candidate, Case, Runner
from benches.measure.record import Row
from benches.registry import kernel_candidates
from mmtransfer.hff.fusion import HFFb
from mmtransfer.hff.reference import EagerHFFb

CLASSES = 32


class FusionWithHead(nn.Module):
    """A fusion and a linear layer to per-frame logits, in the place of a CTC head."""

    def __init__(self, fusion: nn.Module, out_dim: int) -> None:
        super().__init__()
        self.fusion = fusion
        self.head = nn.Linear(out_dim, CLASSES)

    def forward(self, x: Any) -> Tensor:
        return self.head(self.fusion(x))


class StepProblem:
    """Forward, loss, backward and the optimiser's step. All candidates start from the same parameters.

    The optimiser is the fused AdamW for all: the lists' many parameters do not count against them.
    """

    def __init__(
        self, rows: int, taps: int, width: int, out_dim: int, dtype: torch.dtype, device: str
    ) -> None:
        self.sizes, self.dtype, self.device = (taps, width, out_dim), dtype, device
        self.x = torch.randn(rows, taps, width, dtype=dtype, device=device)
        self.labels = torch.randint(CLASSES, (rows,), device=device)
        self.state = FusionWithHead(EagerHFFb(*self.sizes), out_dim).to(dtype).state_dict()

    def runner(self, candidate: Candidate) -> Runner:
        model = self._model(candidate.call).to(self.device, self.dtype)
        # The lists get their taps as tensors of their own, as an encoder returns them.
        packed = candidate.role == "kernel"
        x = self.x if packed else [tap.contiguous() for tap in self.x.unbind(1)]
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        forward = torch.compile(model, dynamic=False) if candidate.role == "compile" else model

        def step(_: None) -> list[Tensor]:
            optimizer.zero_grad()
            logits = forward(x)
            functional.cross_entropy(logits.float(), self.labels).backward()
            optimizer.step()
            return [logits]

        return Runner(step, collect=lambda results: [*results, *_gradients(model)])

    def expected(self) -> list[Tensor]:
        model = self._model(EagerHFFb).to(self.device, torch.float64)
        logits = model(self.x.double())
        functional.cross_entropy(logits, self.labels).backward()
        return [logits.detach(), *_gradients(model)]

    def _model(self, fusion: Any) -> FusionWithHead:
        model = FusionWithHead(fusion(*self.sizes), self.sizes[-1])
        model.load_state_dict(self.state)
        return model


def _gradients(model: nn.Module) -> list[Tensor]:
    """All gradients in the order and form of the state dict, which the twins share."""
    shadow = copy.deepcopy(model)
    for parameter, twin in zip(model.parameters(), shadow.parameters(), strict=True):
        assert parameter.grad is not None
        twin.data = parameter.grad.clone()
    return [tensor for _, tensor in sorted(shadow.state_dict().items())]


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
    with torch.device("meta"):
        fusion = EagerHFFb(taps, width, out_dim)
        parameters = sum(p.numel() for p in FusionWithHead(fusion, out_dim).parameters())
    leaves = sum(p.numel() for p in fusion.levels[0].parameters())
    item = dtype.itemsize
    return Case(
        op="hff",
        shape=shape,
        variant="hff_b",
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
            *kernel_candidates(HFFb, device),
            Candidate("eager twin", "papers", EagerHFFb),
            Candidate("torch.compile", "compile", EagerHFFb),
        ),
        problem=functools.partial(StepProblem, rows, taps, width, out_dim, dtype, device),
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


def bench_hff(row: Row) -> None:
    row.record()
