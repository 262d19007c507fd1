"""segment_pool: the frames of a speech encoder, pooled into one vector for each token."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benches.case import WAV2VEC2_LARGE, Candidate, Case, Direction, OpProblem
from benches.registry import kernel_candidates
from mmkernels.ops.segment_pool import segment_pool
from mmkernels.ops.segment_pool.reference import segment_pool as reference

#: Frames of a token, at 50 frames a second.
TOKEN = 10


def loop(x: Tensor, ends: Tensor, reduce: str, scores: Tensor | None = None) -> Tensor:
    """A loop over the segments, as most code has it."""
    rows = []
    for row, stops in enumerate(ends.tolist()):
        pooled = []
        for start, stop in zip([0, *stops], stops, strict=False):
            frames = x[row, start:stop]
            if scores is not None:
                pooled.append((scores[row, start:stop].softmax(0).unsqueeze(1) * frames).sum(0))
            elif reduce == "max":
                pooled.append(frames.max(0).values)
            elif reduce == "last":
                pooled.append(frames[-1])
            else:
                pooled.append(frames.mean(0))
        rows.append(torch.stack(pooled))
    return torch.stack(rows)


def mask_product(x: Tensor, inside: Tensor, lengths: Tensor) -> Tensor:
    """The mean as a product with a mask."""
    return torch.bmm(inside, x) / lengths


def index_add(x: Tensor, segment: Tensor, lengths: Tensor) -> Tensor:
    """The mean by sums at indices, and a division."""
    batch, segments, _ = lengths.shape
    sums = x.new_zeros(batch * segments, x.shape[2])
    return sums.index_add_(0, segment, x.flatten(0, 1)).view(batch, segments, -1) / lengths


def index_softmax(x: Tensor, segment: Tensor, lengths: Tensor, scores: Tensor) -> Tensor:
    """Attention by indices: largest score, sum of exponentials and weighted sum of each segment."""
    batch, segments, _ = lengths.shape
    flat = scores.flatten()
    largest = flat.new_full((batch * segments,), -torch.inf)
    largest = largest.scatter_reduce(0, segment, flat.detach(), "amax")
    exponentials = torch.exp(flat - largest[segment])
    totals = flat.new_zeros(batch * segments).index_add_(0, segment, exponentials)
    weights = (exponentials / totals[segment]).unsqueeze(1)
    sums = x.new_zeros(batch * segments, x.shape[2])
    return sums.index_add_(0, segment, weights * x.flatten(0, 1)).view(batch, segments, -1)


def scatter_max(x: Tensor, segment: Tensor, lengths: Tensor) -> Tensor:
    batch, segments, _ = lengths.shape
    lowest = x.new_full((batch * segments, x.shape[2]), -torch.inf)
    frames = x.flatten(0, 1)
    where = segment.unsqueeze(1).expand_as(frames)
    return lowest.scatter_reduce(0, where, frames, "amax").view(batch, segments, -1)


def take_last(x: Tensor, ends: Tensor) -> Tensor:
    return x.gather(1, (ends - 1).unsqueeze(2).expand(-1, -1, x.shape[2]))


def segment_reduce(x: Tensor, lengths: Tensor, reduce: str) -> Tensor:
    return torch.segment_reduce(x, reduce, lengths=lengths, axis=1)


def _lengths(inputs: dict[str, Any]) -> Tensor:
    return inputs["ends"].diff(dim=1, prepend=torch.zeros_like(inputs["ends"][:, :1]))


def with_segments(inputs: dict[str, Any]) -> dict[str, Any]:
    """The number of each frame's segment in the batch, and the lengths, made off the clock."""
    lengths = _lengths(inputs)
    segment = torch.arange(lengths.numel(), device=lengths.device).repeat_interleave(lengths.flatten())
    scores = {} if "scores" not in inputs else {"scores": inputs["scores"]}
    return {"x": inputs["x"], "segment": segment, "lengths": lengths.unsqueeze(2), **scores}


def with_mask(inputs: dict[str, Any]) -> dict[str, Any]:
    x, lengths = inputs["x"], _lengths(inputs)
    frame = torch.arange(x.shape[1], device=x.device)
    ends = inputs["ends"].unsqueeze(2)
    inside = (frame < ends) & (frame >= ends - lengths.unsqueeze(2))
    return {"x": x, "inside": inside.to(x.dtype), "lengths": lengths.unsqueeze(2)}


def with_lengths(inputs: dict[str, Any]) -> dict[str, Any]:
    return {"x": inputs["x"], "lengths": _lengths(inputs), "reduce": inputs["reduce"]}


def with_ends(inputs: dict[str, Any]) -> dict[str, Any]:
    return {"x": inputs["x"], "ends": inputs["ends"]}


def candidates(reduce: str, device: str) -> tuple[Candidate, ...]:
    rows = (*kernel_candidates(segment_pool, device), Candidate("eager loop", "papers", loop))
    library = Candidate("segment_reduce", "library", segment_reduce, with_lengths)
    if reduce == "mean":
        return (
            *rows,
            Candidate("index_add_", "hand_written", index_add, with_segments),
            Candidate("mask and bmm", "hand_written", mask_product, with_mask),
            Candidate("torch.compile", "compile", index_add, with_segments),
            library,
        )
    by_hand, lay_out = {
        "max": (scatter_max, with_segments),
        "last": (take_last, with_ends),
        "attention": (index_softmax, with_segments),
    }[reduce]
    rows += (
        Candidate(by_hand.__name__, "hand_written", by_hand, lay_out),
        Candidate("torch.compile", "compile", by_hand, lay_out),
    )
    return (*rows, library) if reduce == "max" else rows


def _case(
    reduce: str,
    direction: Direction,
    device: str,
    tiny: bool,
    *,
    batch: int = 8,
    frames: int = 1500,
    token: int = TOKEN,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Case:
    variant = reduce if token == TOKEN else f"{reduce}, one segment"
    batch, frames, width = (2, 24, 40) if tiny else (batch, frames, WAV2VEC2_LARGE.width)
    token = min(token, frames // 2 if tiny else frames)
    segments = frames // token
    item, rows, results = dtype.itemsize, batch * segments * token, batch * segments
    attends = reduce == "attention"
    scores = rows * 4 if attends else 0
    out, all_frames = results * width * item, rows * width * item
    forward = out + (out if reduce == "last" else all_frames) + scores
    # The gradient of the scores reads the frames again. That of a maximum needs the frame of each.
    backward = out + all_frames * (1 + attends) + 2 * scores
    backward += results * width * 4 if reduce == "max" else 0
    forward_flops = results * width if reduce == "last" else (1 + attends) * rows * width
    backward_flops = 3 * attends * rows * width + results * width
    return Case(
        op="segment_pool",
        shape=WAV2VEC2_LARGE.name,
        variant=variant,
        direction=direction,
        dtype=dtype,
        device=device,
        sizes={"B": batch, "T": segments * token, "M": segments, "D": width},
        minimum_bytes={"forward": forward, "backward": backward}.get(direction, forward + backward),
        flops={"forward": forward_flops, "backward": backward_flops}.get(
            direction, forward_flops + backward_flops
        ),
        output_bytes=out,
        candidates=candidates(reduce, device),
        problem=functools.partial(
            _problem, reduce, direction, (batch, segments, token, width), dtype, device
        ),
        **options,
    )


def _problem(
    reduce: str, direction: Direction, sizes: tuple[int, int, int, int], dtype: torch.dtype, device: str
) -> OpProblem:
    batch, segments, token, width = sizes
    wanted = direction != "forward"
    x = torch.randn(batch, segments * token, width, dtype=dtype, device=device)
    ends = torch.arange(1, segments + 1, device=device) * token
    inputs: dict[str, Any] = {
        "x": x.requires_grad_(wanted),
        "ends": ends.expand(batch, -1).contiguous(),
        "reduce": reduce,
    }
    if reduce == "attention":
        inputs["scores"] = torch.randn(x.shape[:2], device=device).requires_grad_(wanted)
    return OpProblem(inputs, reference, direction, dtype)


def cases(device: str, tiny: bool = False) -> Iterator[Case]:
    case = functools.partial(_case, device=device, tiny=tiny)
    if device == "cuda":
        for dtype in (torch.bfloat16, torch.float32):
            many = functools.partial(case, batch=16, dtype=dtype)
            for direction in ("forward", "backward"):
                yield many("mean", direction, headline=dtype == torch.bfloat16)
                yield many("attention", direction, headline=dtype == torch.bfloat16)
                yield many("max", direction)
            yield many("last", "forward")
            yield case("mean", "forward", batch=1, frames=30_000, token=30_000, dtype=dtype)
        return
    for direction in ("forward", "forward_backward"):
        yield case("mean", direction, headline=True)
        yield case("mean", direction, memory="reused")
        yield case("attention", direction)
        yield case("max", direction)
    yield case("last", "forward")
    yield case("mean", "forward", dtype=torch.bfloat16)
    yield case("mean", "forward", batch=1, frames=12_000, token=12_000)
