"""segment_attention: the decoder of SSR's connector, whose frames see their token and one frame before it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from benches.case import Candidate, Case, Direction, OpProblem
from benches.registry import kernel_candidates
from mmkernels.ops.segment_attention import segment_attention
from mmkernels.ops.segment_attention.reference import key_starts
from mmkernels.ops.segment_attention.reference import segment_attention as reference

#: Frames of a token.
TOKEN = 10


def masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """torch's attention with a mask of size T x T."""
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def loop(q: Tensor, k: Tensor, v: Tensor, ends: Tensor) -> Tensor:
    """One call for each segment; segments are the same in every row."""
    parts, start = [], 0
    for stop in ends[0].tolist():
        first = max(0, start - 1)
        frame = torch.arange(first, stop, device=q.device)
        causal = frame <= torch.arange(start, stop, device=q.device)[:, None]
        keys, values = k[:, :, first:stop], v[:, :, first:stop]
        parts.append(functional.scaled_dot_product_attention(q[:, :, start:stop], keys, values, causal))
        start = stop
    return torch.cat(parts, 2)


def windows(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, token: int) -> Tensor:
    """Segments of one length as a batch: each has its frames and the one before as keys."""

    def with_one_before(x: Tensor) -> Tensor:
        return functional.pad(x, (0, 0, 1, 0)).unfold(2, token + 1, token).transpose(3, 4)

    queries = q.unflatten(2, (-1, token))
    keys, values = with_one_before(k), with_one_before(v)
    return functional.scaled_dot_product_attention(queries, keys, values, mask).flatten(2, 3)


def flexible(q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask) -> Tensor:
    out = flex_attention(q, k, v, block_mask=block_mask)
    assert isinstance(out, Tensor)
    return out


def with_block_mask(inputs: dict[str, Any]) -> dict[str, Any]:
    """Segments are the same in every row."""
    frames, device = inputs["q"].shape[2], inputs["q"].device
    start = key_starts(inputs["ends"][:1], frames, 1)[0]

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key >= start[query]) & (key <= query)

    block_mask = create_block_mask(sees, None, None, frames, frames, device=device)
    return {**{name: inputs[name] for name in "qkv"}, "block_mask": block_mask}


def with_mask(inputs: dict[str, Any]) -> dict[str, Any]:
    frames = inputs["q"].shape[2]
    frame = torch.arange(frames, device=inputs["q"].device)
    start = key_starts(inputs["ends"], frames, 1)
    mask = (frame >= start[:, None, :, None]) & (frame <= frame[:, None])
    return {**{name: inputs[name] for name in "qkv"}, "mask": mask}


def with_windows(inputs: dict[str, Any], token: int) -> dict[str, Any]:
    """The mask of a segment, and of the first, before which there is no frame."""
    segments = inputs["q"].shape[2] // token
    mask = torch.ones(segments, token, token + 1, dtype=torch.bool, device=inputs["q"].device).tril(1)
    mask[0, :, 0] = False
    return {**{name: inputs[name] for name in "qkv"}, "mask": mask, "token": token}


def candidates(device: str, token: int, frames: int, direction: Direction) -> tuple[Candidate, ...]:
    rows = (
        *kernel_candidates(segment_attention, device),
        Candidate("SDPA, dense mask", "papers", masked, with_mask),
        Candidate("torch.compile", "compile", masked, with_mask),
    )
    if device == "cuda" or direction == "forward":  # torch has no backward pass of it on the CPU
        rows += (Candidate("flex_attention, compiled", "compile", flexible, with_block_mask),)
    if token == frames:
        return rows
    by_windows = Candidate("windows", "hand_written", windows, functools.partial(with_windows, token=token))
    return (*rows, by_windows, Candidate("SDPA per segment", "hand_written", loop))


def _case(
    variant: str,
    direction: Direction,
    device: str,
    tiny: bool,
    *,
    batch: int = 4,
    heads: int = 8,
    frames: int = 1500,
    size: int = 64,
    token: int = TOKEN,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Case:
    whole = token == frames
    batch, heads, frames = (2, 2, 40) if tiny else (batch, heads, frames)
    token = frames if whole else min(token, frames)
    frames = frames // token * token
    rows = batch * heads * frames
    # The pairs that see each other: those of a segment, and each frame with the one before it.
    pairs = batch * heads * (frames // token * token * (token + 1) // 2 + frames - token)
    tensor = rows * size * dtype.itemsize
    forward, backward = 4 * tensor, 8 * tensor
    return Case(
        op="segment_attention",
        shape="ssr-connector",
        variant=variant,
        direction=direction,
        dtype=dtype,
        device=device,
        sizes={"B": batch, "H": heads, "T": frames, "d": size, "M": frames // token},
        minimum_bytes={"forward": forward, "backward": backward}.get(direction, forward + backward),
        flops={"forward": 4 * pairs * size, "backward": 10 * pairs * size}.get(direction, 14 * pairs * size),
        output_bytes=tensor,
        candidates=candidates(device, token, frames, direction),
        problem=functools.partial(_problem, direction, (batch, heads, frames, size), token, dtype, device),
        bound="compute" if whole else "memory",
        **options,
    )


def _problem(
    direction: Direction, sizes: tuple[int, int, int, int], token: int, dtype: torch.dtype, device: str
) -> OpProblem:
    batch, heads, frames, size = sizes

    def rows() -> Tensor:
        x = torch.randn(batch, frames, heads, size, dtype=dtype, device=device)
        return x.transpose(1, 2).requires_grad_(direction != "forward")

    ends = torch.arange(1, frames // token + 1, device=device) * token
    inputs = {"q": rows(), "k": rows(), "v": rows(), "ends": ends.expand(batch, -1).contiguous()}
    return OpProblem(inputs, reference, direction, dtype)


def cases(device: str, tiny: bool = False) -> Iterator[Case]:
    case = functools.partial(_case, device=device, tiny=tiny)
    if device == "cuda":
        for dtype in (torch.bfloat16, torch.float32):
            for direction in ("forward", "backward"):
                connector = functools.partial(case, direction=direction, dtype=dtype, batch=12, heads=32)
                yield connector("tokens", frames=1500, size=128, headline=dtype == torch.bfloat16)
                yield connector("one segment", batch=1, frames=8000, token=8000, size=128)
        return
    directions: tuple[Direction, ...] = ("forward", "forward_backward")
    for direction in directions:
        yield case("tokens", direction, headline=True)
        yield case("one segment", direction, batch=1, frames=3000, token=3000)
    yield case("tokens", "forward", dtype=torch.bfloat16)
