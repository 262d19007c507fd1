"""segment_attention: causal attention inside contiguous segments of frames, and a few frames before them."""

from __future__ import annotations

import itertools
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
    check_against_reference,
    generator_for,
    op_tests,
    poisoned_memory,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


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
        # The error of two frames is that of a few numbers, in which eager may be exact by chance.
        "T": draw(st.integers(16, 150)),
        "M": draw(st.integers(1, 9)),
        "d": draw(st.sampled_from([8, 16, 24, 40, 64, 72])),
        "lookback": draw(st.sampled_from([0, 1, 5, 40, 1000])),
        "scale": draw(st.sampled_from([None, 0.2, -0.1, 0.0])),
    }


SPEC = OpSpec(
    name="segment_attention",
    function=mmkernels.segment_attention,
    reference=reference.segment_attention,
    eager=eager,
    make=make,
    cases={
        "short": {"B": 3, "H": 2, "G": 2, "T": 5, "M": 3, "d": 8},
        "grouped": {"B": 3, "H": 2, "G": 1, "T": 9, "M": 4, "d": 8, "lookback": 2},
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


def random_ends(generator: random.Random, frames: int, segments: int) -> list[int]:
    return sorted(generator.randint(0, frames) for _ in range(segments))


def heads(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> tuple[Tensor, ...]:
    """q, k and v of the same shape ``(B, H, T, d)``, each a view of ``(B, T, H, d)``."""
    batch, count, frames, size = shape
    rows = (torch.randn(batch, frames, count, size, dtype=dtype).transpose(1, 2) for _ in range(3))
    return tuple(row.requires_grad_(grad) for row in rows)


class TestMask:
    def test_the_mask_of_the_paper(self) -> None:
        """The authors' loop: a query sees the keys from the last boundary strictly before it on, where a
        boundary is the last frame of a segment."""
        generator = random.Random(0)
        for _ in range(200):
            frames = generator.randint(1, 40)
            ends = [*random_ends(generator, frames, generator.randint(0, 8)), frames]
            boundaries = [end - 1 for end in ends if end > 0]
            expected = [max([0, *(b for b in boundaries if b < query)]) for query in range(frames)]
            starts = reference.key_starts(torch.tensor([ends]), frames, 1)
            assert starts[0].tolist() == expected

    @pytest.mark.parametrize("lookback", [0, 1, 5, 1000])
    def test_extents_of_random_segments(self, lookback: int) -> None:
        """Segments of any lengths, some empty, and frames in none."""
        generator = random.Random(lookback)
        for _ in range(150):
            frames = generator.randint(1, 60)
            ends = torch.tensor([random_ends(generator, frames, generator.randint(1, 9))])
            sees = dense_mask(ends, frames, lookback)[0, 0]
            starts = [row.int().argmax().item() if row.any() else frames for row in sees]
            stops = [
                frames - column.flip(0).int().argmax().item() if column.any() else 0 for column in sees.T
            ]
            assert reference.key_starts(ends, frames, lookback)[0].tolist() == starts
            q, k, v = heads(1, 1, frames, 8)
            _, _, extents = torch.ops.mmkernels.segment_attention_fwd(q, k, v, ends, lookback, None, False)
            assert extents[0].tolist() == [starts, stops]

    @pytest.mark.parametrize("lookback", [0, 1, 5])
    def test_attention_of_torch_with_a_mask(self, lookback: int) -> None:
        generator = random.Random(lookback)
        for _ in range(40):
            frames = generator.randint(1, 90)
            ends = torch.tensor([[*random_ends(generator, frames, 5), frames] for _ in range(2)])
            q, k, v = heads(2, 2, frames, 16)
            mask = dense_mask(ends, frames, lookback)
            expected = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            out = mmkernels.segment_attention(q, k, v, ends, lookback=lookback)
            torch.testing.assert_close(out, expected)


class TestValues:
    @pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
    def test_by_hand(self, dtype: torch.dtype) -> None:
        """Equal scores: each query gets the mean of the values that it sees."""
        q, k, v = torch.zeros(1, 1, 5, 8), torch.randn(1, 1, 5, 8), torch.randn(1, 1, 5, 8)
        ends = torch.tensor([[2, 2, 4]], dtype=dtype)
        (first, second, third, fourth), out = v[0, 0, :4], mmkernels.segment_attention(q, k, v, ends)[0, 0]
        expected = [
            *(first, (first + second) / 2, (second + third) / 2),
            *((second + third + fourth) / 3, torch.zeros(8)),
        ]
        torch.testing.assert_close(out, torch.stack(expected))

    @pytest.mark.parametrize("lookback", [0, 100])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_segments_of_many_blocks(self, dtype: torch.dtype, lookback: int) -> None:
        """Also heads of a size that is no multiple of two vectors."""
        shape = {"B": 1, "H": 2, "G": 1, "T": 500, "M": 2, "d": 72, "lookback": lookback}
        device = torch.device("cpu")
        check_against_reference(SPEC, lambda seed: make(shape, dtype, device, generator_for(seed)), "native")

    def test_one_frame_alone(self) -> None:
        """Its weight is 1, whatever the score: no gradient reaches query and key."""
        q, k, v = heads(2, 2, 70, 24, grad=True)
        ends = torch.arange(1, 71).expand(2, -1)
        out = mmkernels.segment_attention(q, k, v, ends, lookback=0)
        assert torch.equal(out, v)
        grad = torch.randn_like(out)
        dq, dk, dv = torch.autograd.grad(out, (q, k, v), grad)
        assert dq.eq(0).all()
        assert dk.eq(0).all()
        torch.testing.assert_close(dv, grad)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
    def test_frames_in_no_segment_touch_nothing(self, dtype: torch.dtype) -> None:
        q, k, v = heads(3, 2, 150, 16, dtype=dtype)
        ends = torch.tensor([[70, 130], [3, 3], [0, 0]])
        grad = torch.randn_like(q)
        for row, stop in enumerate((130, 3, 0)):
            for tensor in (q, k, v, grad):
                tensor[row, :, stop:] = torch.nan
        leaves = tuple(tensor.requires_grad_() for tensor in (q, k, v))
        for backend in ("native", "reference"):
            with poisoned_memory():
                out = mmkernels.segment_attention(*leaves, ends, backend=backend)
                gradients = torch.autograd.grad(out, leaves, grad)
            for tensor in (out, *gradients):
                assert tensor.isfinite().all()
                for row, stop in enumerate((130, 3, 0)):
                    assert tensor[row, :, stop:].eq(0).all()

    @pytest.mark.parametrize("name", ["q", "k", "v"])
    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
    def test_values_that_are_not_finite(self, name: str, value: float) -> None:
        """They come out where a query sees them as in the reference, and at most 63 frames before."""
        tensors = dict(zip("qkv", heads(2, 2, 300, 8), strict=True))
        ends = torch.tensor([[100, 300], [150, 300]])
        plain = mmkernels.segment_attention(**tensors, ends=ends)
        tensors[name][1, 1, 180, 3] = value
        out = mmkernels.segment_attention(**tensors, ends=ends)
        expected = eager(**tensors, ends=ends)
        assert torch.equal(out[0], plain[0])
        assert torch.equal(out[1, 0], plain[1, 0])
        assert torch.equal(out[1, 1, :117], plain[1, 1, :117])
        assert torch.equal(out[1, 1, 180:].isfinite(), expected[1, 1, 180:].isfinite())

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_a_nan_of_a_value_stays_near_the_queries_that_see_it(self, dtype: torch.dtype) -> None:
        """It may reach queries of the next segment, but none 64 frames from those that see it."""
        tensors = dict(zip("qkv", heads(1, 2, 300, 8, dtype=dtype), strict=True))
        ends = torch.tensor([[130, 300]])
        plain = mmkernels.segment_attention(**tensors, ends=ends, lookback=0)
        tensors["v"][0, 1, 90] = torch.nan
        out = mmkernels.segment_attention(**tensors, ends=ends, lookback=0)
        assert out[0, 1, 90:130].isnan().all()
        assert torch.equal(out[0, 0], plain[0, 0])
        for untouched in (slice(0, 27), slice(193, 300)):
            assert torch.equal(out[0, 1, untouched], plain[0, 1, untouched])

    def test_scores_of_minus_infinity(self) -> None:
        """Keys with that score get no weight, in the first block of keys or in a later one."""
        q, k, v = heads(1, 1, 200, 8)
        q[..., 0] = 1
        k[0, 0, 3:130, 0] = -torch.inf
        out = mmkernels.segment_attention(q, k, v, torch.tensor([[200]]))
        sees = torch.ones(200, 200, dtype=torch.bool).tril()
        sees[:, 3:130] = False
        expected = nn.functional.scaled_dot_product_attention(q, k.nan_to_num(neginf=0), v, attn_mask=sees)
        torch.testing.assert_close(out, expected)

    def test_large_scores(self) -> None:
        q, k, v = heads(1, 1, 90, 8)
        out = mmkernels.segment_attention(1e4 * q, k, v, torch.tensor([[90]]))
        expected = mmkernels.segment_attention(1e4 * q.double(), k.double(), v.double(), torch.tensor([[90]]))
        torch.testing.assert_close(out, expected.float(), rtol=1e-2, atol=1e-2)

    @pytest.mark.parametrize("start", [1, 63, 64, 100])
    def test_frames_before_a_segment_and_its_lookback_change_nothing(self, start: int) -> None:
        q, k, v = heads(1, 2, 200, 16)
        ends = torch.tensor([[start, 200]])
        out = mmkernels.segment_attention(q, k, v, ends, lookback=0)[:, :, start:]
        alone = (tensor[:, :, start:] for tensor in (q, k, v))
        found = mmkernels.segment_attention(*alone, torch.tensor([[200 - start]]))
        torch.testing.assert_close(out, found)

    def test_heads_share_keys_in_turn(self) -> None:
        q = torch.randn(2, 6, 40, 8)
        k, v = torch.randn(2, 2, 40, 8), torch.randn(2, 2, 40, 8)
        ends = torch.tensor([[10, 40], [7, 30]])
        repeated = (tensor.repeat_interleave(3, dim=1) for tensor in (k, v))
        out = mmkernels.segment_attention(q, k, v, ends)
        assert torch.equal(out, mmkernels.segment_attention(q, *repeated, ends))


class TestMemory:
    def test_the_order_of_memory_is_that_of_the_projection(self) -> None:
        q, k, v = heads(2, 3, 10, 8, grad=True)
        out = mmkernels.segment_attention(q, k, v, torch.tensor([[4, 10], [1, 9]]))
        assert out.transpose(1, 2).is_contiguous()
        gradients = torch.autograd.grad(out.sum(), (q, k, v))
        assert all(gradient.transpose(1, 2).is_contiguous() for gradient in gradients)

    def test_memory_is_linear_in_the_frames(self) -> None:
        frames, size = 4096, 16
        q, k, v = heads(1, 1, frames, size, grad=True)
        with torch.profiler.profile(profile_memory=True) as profile:
            out = mmkernels.segment_attention(q, k, v, torch.tensor([[frames]]))
            torch.autograd.grad(out.sum(), (q, k, v))
        allocated = sum(
            event.self_cpu_memory_usage for event in profile.events() if event.self_cpu_memory_usage > 0
        )
        # The result, its gradient twice, three gradients, logarithms, dots, extents.
        assert allocated <= 1.1 * frames * 4 * (6 * size + 4) + 4096

    @pytest.mark.parametrize("name", ["q", "k", "v", "ends"])
    def test_an_input_overwritten_before_the_backward_pass(self, name: str) -> None:
        q, k, v = heads(1, 1, 6, 8)
        given = {"q": q, "k": k, "v": v, "ends": torch.tensor([[2, 4]])}
        leaf = torch.randn(1, 1, 6, 8, requires_grad=True)
        other = "k" if name == "v" else "v"
        out = mmkernels.segment_attention(**{**given, other: leaf})
        given[name].mul_(2)
        with pytest.raises(RuntimeError, match="segment_attention: an input was overwritten"):
            out.sum().backward()

    def test_frozen_gradients_are_not_computed(self) -> None:
        q, k, v = heads(2, 2, 20, 8)
        ends = torch.tensor([[9, 20], [5, 5]])
        forward = torch.ops.mmkernels.segment_attention_fwd
        out, lse, extents = forward(q, k, v, ends, 1, None, True)
        saved = (torch.ones_like(out), q, k, v, out, lse, extents, None)
        together = torch.ops.mmkernels.segment_attention_bwd(*saved, True, True, True)
        for needed in itertools.product((False, True), repeat=3):
            found = torch.ops.mmkernels.segment_attention_bwd(*saved, *needed)
            for gradient, expected, need in zip(found, together, needed, strict=True):
                assert gradient.shape[0] == (2 if need else 0)
                assert not need or torch.equal(gradient, expected)
        assert forward(q, k, v, ends, 1, None, False)[1].shape == (0, 2, 20)


class TestModule:
    @pytest.mark.parametrize("key_heads", [None, 2])
    def test_module(self, key_heads: int | None) -> None:
        module = mmkernels.nn.SegmentAttention(32, 4, key_heads, lookback=2)
        x, ends = torch.randn(2, 9, 32), torch.tensor([[3, 9], [4, 5]])
        shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
        kept = 8 * (key_heads or 4)
        assert shapes == {
            **{"q_proj.weight": (32, 32), "k_proj.weight": (kept, 32)},
            **{"v_proj.weight": (kept, 32), "o_proj.weight": (32, 32)},
        }
        projections = module.q_proj, module.k_proj, module.v_proj
        q, k, v = (p(x).unflatten(2, (-1, 8)).transpose(1, 2) for p in projections)
        attended = eager(q, k, v, ends, lookback=2).transpose(1, 2).flatten(2)
        torch.testing.assert_close(module(x, ends), module.o_proj(attended))

    def test_arguments(self) -> None:
        for arguments, message in (
            ((32, 5), "heads must divide dim"),
            ((32, 8), "heads must divide dim into multiples of 8, got 8 of 32"),
            ((32, 4, 3), "key_heads must divide heads, got 3 of 4"),
            ((32, 0), "heads must divide dim"),
        ):
            with pytest.raises(ValueError, match=message):
                mmkernels.nn.SegmentAttention(*arguments)
        with pytest.raises(ValueError, match="lookback must not be negative, got -1"):
            mmkernels.nn.SegmentAttention(32, 4, lookback=-1)
        assert "heads=4, key_heads=2, lookback=1" in repr(mmkernels.nn.SegmentAttention(32, 4, 2))


class TestBadInput:
    @pytest.mark.parametrize("backend", ["auto", "reference"])
    def test_values_of_ends(self, backend: str) -> None:
        q, k, v = heads(2, 1, 5, 8)
        bad = {
            r"ends must not decrease; row 1 has 2 at segment 2, after 3": [[1, 2, 3], [1, 3, 2]],
            r"ends must lie in \[0, 5\], the frames of q; row 0 has -1 at segment 0": [[-1, 2, 3], [1, 2, 3]],
            r"ends must lie in \[0, 5\], the frames of q; row 1 has 6 at segment 2": [[1, 2, 3], [1, 3, 6]],
        }
        for message, ends in bad.items():
            for dtype in (torch.int32, torch.int64):
                with pytest.raises(ValueError, match=message):
                    mmkernels.segment_attention(q, k, v, torch.tensor(ends, dtype=dtype), backend=backend)

    def test_shapes_and_types(self) -> None:
        q, k, v = heads(2, 2, 5, 8)
        ends = torch.tensor([[1, 2], [1, 2]])
        cases: list[tuple[type[Exception], str, dict[str, Any]]] = [
            (TypeError, "q must be a tensor, got list", {"q": [1]}),
            (TypeError, "v must be float32, float16, bfloat16 or float64", {"v": v.long()}),
            (ValueError, r"q must have shape \(B, H, T, d\), got \(2, 5, 8\)", {"q": q[:, 0]}),
            (ValueError, "d, the last size of q, must be a multiple of 8, got 7", {"q": q[..., :7]}),
            (ValueError, r"k must have shape \(2, G, 5, 8\), got \(2, 2, 4, 8\)", {"k": k[:, :, :4]}),
            (ValueError, r"k must have shape \(2, G, 5, 8\), got \(1, 2, 5, 8\)", {"k": k[:1]}),
            (ValueError, "heads of q must be a multiple of those of k, got 1 and 2", {"q": q[:, :1]}),
            (ValueError, "heads of q must be a multiple of those of k, got 2 and 0", {"k": k[:, :0]}),
            (ValueError, r"v must have the shape of k, \(2, 2, 5, 8\), got \(2, 1, 5, 8\)", {"v": v[:, :1]}),
            (TypeError, "k must have the dtype of q, torch.float32, got torch.float16", {"k": k.half()}),
            (ValueError, "v is on meta, q is on cpu", {"v": v.to("meta")}),
            (TypeError, "ends must be a tensor, got list", {"ends": [[1, 2]]}),
            (TypeError, "ends must be int32 or int64, got torch.float32", {"ends": ends.float()}),
            (ValueError, r"ends must have shape \(2, M\), got \(1, 2\)", {"ends": ends[:1]}),
            (ValueError, "ends is on meta, q is on cpu", {"ends": ends.to("meta")}),
            (TypeError, "lookback must be an integer, got float", {"lookback": 1.0}),
            (TypeError, "lookback must be an integer, got bool", {"lookback": True}),
            (ValueError, "lookback must not be negative .*, got -1", {"lookback": -1}),
            (ValueError, "lookback must not be negative and less than", {"lookback": 2**63}),
            (TypeError, "scale must be a number or None, got str", {"scale": "1"}),
            (ValueError, "scale must be within the range of a float", {"scale": 10**400}),
        ]
        good = {"q": q, "k": k, "v": v, "ends": ends}
        for error, message, changes in cases:
            with pytest.raises(error, match=message):
                mmkernels.segment_attention(**{**good, **changes})

    def test_raw_ops_survive_bad_input(self) -> None:
        """The glue checks again: a wrong call is an error, not a crash."""
        ops = torch.ops.mmkernels
        forward, backward = ops.segment_attention_fwd, ops.segment_attention_bwd
        q, k, v = heads(2, 2, 5, 8)
        ends = torch.tensor([[1, 2], [1, 2]])
        good = [q, k, v, ends, 1, None, True]
        changes = [
            *((0, q[0]), (0, q[..., :7]), (0, q.double()), (1, k[:, :, :4]), (1, k[:, :0]), (2, v[:, :1])),
            *((2, v.half()), (3, ends.int()), (3, ends[:1]), (3, ends[0]), (3, ends + 4), (4, -1)),
        ]
        for index, value in changes:
            with pytest.raises(RuntimeError):
                forward(*good[:index], value, *good[index + 1 :])
        out, lse, extents = forward(*good)
        saved = [torch.ones_like(out), q, k, v, out, lse, extents, None, True, True, True]
        changes = [
            *((0, out[:, :4]), (0, out.double()), (1, q[:, :1]), (2, k[:1]), (4, out[:1]), (4, out.double())),
            *((5, lse[:1]), (5, lse.double()), (6, extents[:, :1]), (6, extents.long())),
        ]
        for index, value in changes:
            with pytest.raises(RuntimeError):
                backward(*saved[:index], value, *saved[index + 1 :])

    def test_the_backward_op_is_safe_for_any_extents(self) -> None:
        q, k, v = heads(1, 2, 150, 8)
        out, lse = torch.zeros(1, 150, 2, 8), torch.zeros(1, 2, 150)
        for low, high in ((-(2**31), 2**31), (-10, 300), (0, 150)):
            extents = torch.randint(low, high, (1, 2, 150)).int()
            gradients = torch.ops.mmkernels.segment_attention_bwd(
                *(torch.ones_like(out), q, k, v, out, lse, extents, None, True, True, True)
            )
            assert [g.shape for g in gradients] == [(1, 150, 2, 8)] * 3
