"""segment_attention: causal attention inside contiguous segments of frames, and a few frames before them."""

from __future__ import annotations

import dataclasses
import math
import random
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import mmkernels
import mmkernels.nn
from mmkernels.ops.segment_attention import reference
from op_tests import (
    Call,
    InferenceTensors,
    NarrowParameters,
    NonFinite,
    OpSpec,
    Overwriting,
    Shape,
    WideParameters,
    backends,
    check_against_reference,
    generator_for,
    op_tests,
    poisoned_memory,
    value_and_gradients,
)


def make(shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Call:
    batch, heads, key_heads, frames, size = (shape[key] for key in "BHGTd")
    segments = shape["M"]

    def random_heads(count: int) -> Tensor:
        rows = torch.randn(batch, frames, count, size, generator=generator).to(device, dtype)
        return rows.transpose(1, 2)

    # Some segments are empty, some frames in none; the first row is covered.
    ends = torch.randint(0, frames + 1, (batch, segments), generator=generator).sort(1).values
    if batch > 0 and segments > 0:
        ends[0, -1] = frames
    arguments: dict[str, Any] = {
        "q": random_heads(heads),
        "k": random_heads(key_heads),
        "v": random_heads(key_heads),
        "ends": ends.to(device),
        "lookback": shape.get("lookback", 1),
        "scale": shape.get("scale"),
    }
    return Call(arguments, ("q", "k", "v"))


def dense_mask(ends: Tensor, frames: int, lookback: int) -> Tensor:
    """Which keys each query sees, ``(B, 1, T, T)``, from the definition of a segment."""
    sees = torch.zeros(len(ends), 1, frames, frames, dtype=torch.bool)
    for row, stops in enumerate(ends.tolist()):
        for start, stop in zip([0, *stops], stops, strict=False):
            for query in range(start, stop):
                sees[row, 0, query, max(0, start - lookback) : query + 1] = True
    return sees.to(ends.device)


def eager(
    q: Tensor, k: Tensor, v: Tensor, ends: Tensor, *, lookback: int = 1, scale: float | None = None
) -> Tensor:
    """torch's attention with a mask; it gives NaN for queries that see nothing."""
    if q.numel() == 0:
        return torch.zeros_like(q)
    sees = dense_mask(ends, q.shape[2], lookback)
    covered = sees.any(-1, keepdim=True)
    groups = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
    # torch's fused kernels round half precision as ours do; the formula as written rounds after each step.
    scores = (q @ k.mT) * (q.shape[3] ** -0.5 if scale is None else scale)
    weights = scores.masked_fill(~sees, -torch.inf).masked_fill(~covered, 0).softmax(-1)
    return (weights * sees) @ v


def raw(call: Call) -> list[tuple[Any, tuple[Any, ...]]]:
    a = call.arguments
    forward = (a["q"], a["k"], a["v"], a["ends"], a["lookback"], a["scale"], True)
    ops = torch.ops.mmkernels
    out, lse, extents = ops.segment_attention_fwd(*forward)
    saved = (a["q"], a["k"], a["v"], out, lse, extents)
    backward = (torch.randn_like(out), *saved, a["scale"], True, True, True)
    return [(ops.segment_attention_fwd, forward), (ops.segment_attention_bwd, backward)]


def alone(call: Call, index: int) -> tuple[Call, Any]:
    """A row without its padding."""
    a, row = call.arguments, slice(index, index + 1)
    stop = int(a["ends"][index, -1])
    tensors = {name: a[name][row, :, :stop] for name in "qkv"}
    return call.with_arguments(**tensors, ends=a["ends"][row]), lambda out: out[row, :, :stop]


@st.composite
def shapes(draw: Any) -> Shape:
    key_heads = draw(st.integers(1, 2))
    return {
        "B": draw(st.integers(1, 2)),
        "H": key_heads * draw(st.integers(1, 2)),
        "G": key_heads,
        "T": draw(st.integers(1, 150)),
        "M": draw(st.integers(1, 9)),
        "d": draw(st.sampled_from([8, 16, 24, 40, 64, 72])),
        "lookback": draw(st.sampled_from([0, 1, 5, 40, 1000])),
        "scale": draw(st.sampled_from([None, 0.3, -0.2, 0.0])),
    }


SPEC = OpSpec(
    name="segment_attention",
    function=mmkernels.segment_attention,
    reference=reference.segment_attention,
    eager=eager,
    make=make,
    cases={
        "short": {"B": 3, "H": 2, "G": 2, "T": 12, "M": 4, "d": 16},
        "grouped": {"B": 3, "H": 4, "G": 2, "T": 30, "M": 5, "d": 8, "lookback": 3},
        "long": {"B": 3, "H": 2, "G": 1, "T": 140, "M": 2, "d": 24, "lookback": 0},
    },
    zero_cases={
        "no_frames": {"B": 2, "H": 2, "G": 1, "T": 0, "M": 3, "d": 8},
        "no_batch": {"B": 0, "H": 2, "G": 1, "T": 4, "M": 3, "d": 8},
        "no_segments": {"B": 2, "H": 2, "G": 1, "T": 4, "M": 0, "d": 8},
        "no_heads": {"B": 2, "H": 0, "G": 0, "T": 4, "M": 3, "d": 8},
        "no_queries": {"B": 2, "H": 0, "G": 2, "T": 4, "M": 3, "d": 8},
        "no_size": {"B": 2, "H": 2, "G": 1, "T": 4, "M": 3, "d": 0},
    },
    raw=raw,
    shapes=shapes,
    alone=alone,
    dynamic=({"B": 3, "T": 12, "M": 4}, {"B": 4, "T": 17, "M": 6}),
    activations=("q", "k", "v"),
)
# There are no parameters. A NaN may reach more results than in the reference, see TestValues.
LEFT_OUT = (Overwriting, WideParameters, NarrowParameters, InferenceTensors, NonFinite)
TestOp = op_tests(SPEC, without=LEFT_OUT)
