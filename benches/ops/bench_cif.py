"""cif: frames to tokens by continuous integrate-and-fire, in training (with target lengths) and without."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benches.case import HUBERT_BASE, WAV2VEC2_LARGE, Candidate, Case, Direction, Encoder, OpProblem
from benches.registry import kernel_candidates
from mmkernels.ops.cif import cif
from mmkernels.ops.cif.reference import cif as reference

#: Seconds of 8 utterances at 50 frames a second, and a token for every 4 frames.
BATCH, FRAMES, TOKENS = 8, 400, 100
TARGETS = "target lengths"
TAIL = "tail"


def scaled(alpha: Tensor, target_lengths: Tensor | None) -> Tensor:
    if target_lengths is None:
        return alpha
    return alpha * (target_lengths / alpha.sum(1))[:, None]


def frame_by_frame(x: Tensor, alpha: Tensor, target_lengths: Tensor | None, max_length: int) -> Tensor:
    """Algorithm 1 of the paper, as its code and FunASR's have it: a loop over frames for the whole batch."""
    batch, frames, width = x.shape
    weights = scaled(alpha, target_lengths)
    held, token = x.new_zeros(batch), x.new_zeros(batch, width)
    fired, tokens = [], []
    for t in range(frames):
        weight = weights[:, t]
        fires = held + weight >= 1
        used = torch.where(fires, 1 - held, weight)
        token = token + used[:, None] * x[:, t]
        fired.append(fires)
        tokens.append(token)
        rest = weight - used
        held = torch.where(fires, rest, held + weight)
        token = torch.where(fires[:, None], rest[:, None] * x[:, t], token)
    every = torch.stack(tokens, 1)
    place = torch.stack(fired, 1)
    rows = []
    for row in range(batch):
        whole = every[row][place[row]]
        # The sum of the weights is a whole number, which rounding may just miss; without targets, the tail.
        last = token[row][None] if target_lengths is not None else token[row][None] / held[row].clamp(min=0.5)
        wants = held[row] >= 0.5
        whole = torch.cat([whole, last]) if wants else whole
        rows.append(torch.nn.functional.pad(whole, (0, 0, 0, max_length - whole.shape[0])))
    return torch.stack(rows)


def dense_weights(x: Tensor, alpha: Tensor, target_lengths: Tensor | None, max_length: int) -> Tensor:
    """The best form of a few statements: all overlaps of frames and tokens, and a matrix product."""
    weights = scaled(alpha, target_lengths)
    end = weights.cumsum(1)[:, None]
    low = torch.arange(max_length, device=x.device, dtype=x.dtype)[:, None]
    overlap = (end.minimum(low + 1) - (end - weights[:, None]).maximum(low)).clamp(min=0)
    if target_lengths is None:
        total = end[:, :, -1:]
        rest = total - total.floor()
        tail = (low == total.floor()) & (rest >= 0.5)
        overlap = torch.where(tail, overlap / torch.where(rest >= 0.5, rest, 1.0), overlap)
        overlap = torch.where((low < total.floor()) | tail, overlap, 0.0)
    return overlap @ x


def library() -> tuple[Candidate, ...]:
    """The torch-cif package, where it is installed."""
    if importlib.util.find_spec("torch_cif") is None:
        return ()
    from torch_cif import cif_function

    def call(x: Tensor, alpha: Tensor, target_lengths: Tensor | None, max_length: int) -> Tensor:
        # It aims at sums greater by eps, which would move the ends of all tokens.
        out: Tensor = cif_function(x, alpha, target_lengths=target_lengths, eps=0.0)["cif_out"][0]
        return out

    return (Candidate(f"torch-cif {importlib.metadata.version('torch-cif')}", "library", call),)


def features_of(function: Callable[..., Any]) -> Callable[..., Tensor]:
    def features(**inputs: Any) -> Tensor:
        out: Tensor = function(**inputs).features
        return out

    return features


def candidates(device: str) -> tuple[Candidate, ...]:
    kernels = (Candidate(c.name, c.role, features_of(c.call)) for c in kernel_candidates(cif, device))
    return (
        *kernels,
        Candidate("eager, frame by frame", "papers", frame_by_frame),
        Candidate("eager, dense weights", "hand_written", dense_weights),
        Candidate("torch.compile", "compile", dense_weights),
        *library(),
    )


def _case(
    encoder: Encoder, direction: Direction, variant: str, device: str, tiny: bool, **options: Any
) -> Case:
    batch, frames, tokens = (2, 12, 4) if tiny else (BATCH, FRAMES, TOKENS)
    width = 16 if tiny else encoder.width
    item = torch.float32.itemsize
    rows, outputs = batch * frames * width * item, batch * tokens * width * item
    # Backward: x and the incoming gradient are read, dx is written.
    moved = {"forward": rows + outputs, "backward": 2 * rows + outputs}
    moved["forward_backward"] = moved["forward"] + moved["backward"]
    products = 2 * batch * frames * width
    operations = {"forward": products, "backward": 2 * products, "forward_backward": 3 * products}
    return Case(
        op="cif",
        shape=encoder.name,
        variant=variant,
        direction=direction,
        dtype=torch.float32,
        device=device,
        sizes={"B": batch, "T": frames, "D": width, "M": tokens},
        minimum_bytes=moved[direction],
        flops=operations[direction],
        output_bytes=outputs if direction == "forward" else outputs + rows,
        candidates=candidates(device),
        problem=functools.partial(_problem, batch, frames, tokens, width, direction, variant, device),
        # Weights near 0 and 1 are differences of sums of hundreds.
        tolerance=1e-4,
        **options,
    )


def _problem(
    batch: int, frames: int, tokens: int, width: int, direction: Direction, variant: str, device: str
) -> OpProblem:
    """Weights around 1 / 4, so that an utterance has about as many tokens as there is room for; their sum is
    not close to where rounding decides about one more."""
    needs = direction != "forward"
    alpha = 0.2 * torch.rand(batch, frames) + 0.1
    alpha *= ((tokens - 0.3) / alpha.sum(1))[:, None]
    inputs: dict[str, Any] = {
        "x": torch.randn(batch, frames, width, device=device).requires_grad_(needs),
        "alpha": alpha.to(device).requires_grad_(needs),
        "target_lengths": torch.full((batch,), tokens, device=device) if variant == TARGETS else None,
        "max_length": tokens,
    }
    return OpProblem(inputs, features_of(reference), direction, torch.float32)


def cases(device: str, tiny: bool = False) -> Iterator[Case]:
    case = functools.partial(_case, device=device, tiny=tiny)
    for encoder in (HUBERT_BASE, WAV2VEC2_LARGE):
        base = encoder is HUBERT_BASE
        yield case(encoder, "forward", TAIL, headline=base)
        yield case(encoder, "forward_backward", TARGETS, headline=base)
        if device == "cuda":
            yield case(encoder, "backward", TARGETS, headline=base)
        elif base:
            yield case(encoder, "forward_backward", TARGETS, memory="reused")
