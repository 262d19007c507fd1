"""segment_pool: contiguous segments of frames, each reduced to one vector."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

import mmkernels
import mmkernels.nn
from mmkernels.ops._common import accumulate_dtype
from mmkernels.ops.segment_pool import reference
from mmkernels.ops.segment_pool.schema import REDUCTIONS
from op_tests import (
    Call,
    InferenceTensors,
    NarrowParameters,
    OpSpec,
    Overwriting,
    Shape,
    WideParameters,
    check_against_reference,
    generator_for,
    op_tests,
    poisoned_memory,
)

each_reduction = pytest.mark.parametrize("reduce", REDUCTIONS)


def make(shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Call:
    batch, frames, segments, width = (shape[key] for key in "BTMD")
    reduce = shape.get("reduce", "mean")

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device, dtype)

    # Some segments are empty, some frames in none; the first row is covered.
    ends = torch.randint(0, frames + 1, (batch, segments), generator=generator).sort(1).values
    if batch > 0 and segments > 0:
        ends[0, -1] = frames
    counts = None
    if shape.get("counts"):
        counts = torch.randint(1, segments + 1, (batch,), generator=generator)
        past = torch.arange(segments) >= counts[:, None]
        ends[past] = -7  # the ends past the count are not read
        counts = counts.to(device)
    arguments: dict[str, Any] = {
        "x": random(batch, frames, width),
        "ends": ends.to(device),
        "reduce": reduce,
        "scores": 2 * random(batch, frames) if reduce == "attention" else None,
        "counts": counts,
    }
    return Call(arguments, ("x", "scores"))


def segments_of(ends: Tensor, counts: Tensor | None, row: int) -> list[tuple[int, int]]:
    stops = ends[row].tolist()[: None if counts is None else int(counts[row])]
    return list(zip([0, *stops], stops, strict=False))


def eager(x: Tensor, ends: Tensor, *, reduce: str, scores: Tensor | None, counts: Tensor | None) -> Tensor:
    """The usual loop over segments, in the dtype of the frames."""
    rows = []
    for row in range(x.shape[0]):
        pooled = [x[row, :0].sum(0)] * ends.shape[1]
        for index, (start, stop) in enumerate(segments_of(ends, counts, row)):
            frames = x[row, start:stop]
            if start == stop:
                continue
            if reduce == "attention":
                assert scores is not None
                weights = scores[row, start:stop].softmax(0).to(x.dtype)
                pooled[index] = (weights[:, None] * frames).sum(0)
            elif reduce == "max":
                pooled[index] = frames.max(0).values
            elif reduce == "last":
                pooled[index] = frames[-1]
            else:
                pooled[index] = getattr(frames, reduce)(0)
        rows.append(torch.stack(pooled) if pooled else x.new_zeros(0, x.shape[2]))
    return torch.stack(rows) if rows else x.new_zeros(0, ends.shape[1], x.shape[2])


def raw(call: Call) -> list[tuple[Any, tuple[Any, ...]]]:
    a = call.arguments
    code = REDUCTIONS.index(a["reduce"])
    wide = accumulate_dtype(a["x"].dtype)
    scores = None if a["scores"] is None else a["scores"].to(wide)
    forward = (a["x"], a["ends"], scores, a["counts"], code, True)
    ops = torch.ops.mmkernels
    out, stats, index = ops.segment_pool_fwd(*forward)
    inputs = (torch.randn_like(out), a["x"], a["ends"], scores, a["counts"], stats, index)
    backward = (*inputs, a["x"].shape[1], code, True, scores is not None)
    return [(ops.segment_pool_fwd, forward), (ops.segment_pool_bwd, backward)]


def alone(call: Call, index: int) -> tuple[Call, Any]:
    """A row without its padding, and without the segments past its count."""
    a = call.arguments
    row = slice(index, index + 1)
    count = a["ends"].shape[1] if a["counts"] is None else int(a["counts"][index])
    stop = int(a["ends"][index, count - 1])
    scores = None if a["scores"] is None else a["scores"][row, :stop]
    single = call.with_arguments(
        x=a["x"][row, :stop], ends=a["ends"][row, :count], scores=scores, counts=None
    )
    return single, lambda out: out[row, :count]


@st.composite
def shapes(draw: Any, reductions: tuple[str, ...]) -> Shape:
    return {
        "B": draw(st.integers(1, 3)),
        "T": draw(st.integers(1, 150)),
        "M": draw(st.integers(1, 9)),
        "D": draw(st.sampled_from([1, 2, 8, 17, 33, 64, 100, 1030])),
        "reduce": draw(st.sampled_from(reductions)),
        "counts": draw(st.booleans()),
    }


ATTENTION = OpSpec(
    name="segment_pool",
    function=mmkernels.segment_pool,
    reference=reference.segment_pool,
    eager=eager,
    make=make,
    cases={
        "attention": {"B": 3, "T": 12, "M": 4, "D": 40, "reduce": "attention"},
        "attention_counts": {"B": 3, "T": 9, "M": 5, "D": 33, "reduce": "attention", "counts": True},
        "attention_long": {"B": 3, "T": 200, "M": 3, "D": 3, "reduce": "attention"},
    },
    zero_cases={
        "no_frames": {"B": 2, "T": 0, "M": 3, "D": 8, "reduce": "attention"},
        "no_batch": {"B": 0, "T": 4, "M": 3, "D": 8, "reduce": "attention"},
        "no_segments": {"B": 2, "T": 4, "M": 0, "D": 8, "reduce": "attention"},
        "no_width": {"B": 2, "T": 4, "M": 3, "D": 0, "reduce": "attention"},
    },
    raw=raw,
    shapes=lambda: shapes(("attention",)),
    alone=alone,
    dynamic=({"B": 3, "T": 12, "M": 4}, {"B": 4, "T": 17, "M": 6}),
    activations=("x",),
    casts_parameters=True,
)
SPEC = dataclasses.replace(
    ATTENTION,
    cases={
        "mean": {"B": 3, "T": 12, "M": 4, "D": 40},
        "sum": {"B": 3, "T": 9, "M": 5, "D": 33, "reduce": "sum", "counts": True},
        "max": {"B": 3, "T": 12, "M": 4, "D": 24, "reduce": "max", "counts": True},
        "mean_long": {"B": 3, "T": 200, "M": 3, "D": 3, "counts": True},
        "max_long": {"B": 3, "T": 200, "M": 3, "D": 3, "reduce": "max"},
        "last": {"B": 3, "T": 20, "M": 4, "D": 17, "reduce": "last"},
    },
    zero_cases={
        f"{name}_{reduce}": {**shape, "reduce": reduce}
        for name, shape in ATTENTION.zero_cases.items()
        for reduce in ("mean", "max", "last")
    },
    shapes=lambda: shapes(REDUCTIONS[:4]),
    casts_parameters=False,
)
# The only parameter is the scores; without them the frames are not kept for the backward pass.
OF_PARAMETERS = (Overwriting, WideParameters, NarrowParameters, InferenceTensors)
TestAttention = op_tests(ATTENTION)
TestReductions = op_tests(SPEC, without=OF_PARAMETERS)


@each_reduction
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_wide_frames(reduce: str, dtype: torch.dtype) -> None:
    """More columns than the CPU's kernels sum at a time."""
    shape = {"B": 2, "T": 150, "M": 3, "D": 2060, "reduce": reduce}
    device = torch.device("cpu")
    check_against_reference(ATTENTION, lambda seed: make(shape, dtype, device, generator_for(seed)), "native")


X = torch.arange(10.0).reshape(1, 5, 2)


def pool(x: Tensor, ends: list[list[int]], reduce: str = "mean", **options: Any) -> Tensor:
    scores = torch.zeros(x.shape[:2], dtype=x.dtype) if reduce == "attention" else None
    return mmkernels.segment_pool(x, torch.tensor(ends), reduce=reduce, **{"scores": scores, **options})


class TestValues:
    @pytest.mark.parametrize(
        ("reduce", "expected"),
        [
            ("mean", [[1, 2], [6, 7]]),
            ("sum", [[2, 4], [12, 14]]),
            ("max", [[2, 3], [6, 7]]),
            ("last", [[2, 3], [6, 7]]),
            ("attention", [[1, 2], [6, 7]]),
        ],
    )
    def test_by_hand(self, reduce: str, expected: list[list[float]]) -> None:
        x = X.clone()
        x[0, 2] = x[0, 3]  # the second segment holds frame 3 twice
        assert pool(x, [[2, 4]], reduce).tolist() == [expected]

    @pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
    def test_dtypes_of_ends(self, dtype: torch.dtype) -> None:
        ends = torch.tensor([[2, 4]], dtype=dtype)
        assert mmkernels.segment_pool(X, ends).tolist() == [[[1, 2], [5, 6]]]

    @each_reduction
    def test_empty_segments_are_zero(self, reduce: str) -> None:
        """torch.segment_reduce gives NaN for mean, and -inf for max."""
        x = (X + 1).requires_grad_()
        out = pool(x, [[0, 0, 3, 3, 5, 5]], reduce)
        assert out[0, [0, 1, 3, 5]].eq(0).all()
        grad = torch.zeros_like(out)
        grad[0, [0, 1, 3, 5]] = torch.nan
        (found,) = torch.autograd.grad(out, x, grad)
        assert found.eq(0).all()

    @each_reduction
    def test_frames_in_no_segment_touch_nothing(self, reduce: str) -> None:
        """torch_scatter leaves their gradients as they were in memory, and its mean fails."""
        x = torch.randn(3, 200, 5)
        ends, counts = torch.tensor([[70, 150, 9], [3, 3, 5], [8, 9, 10]]), torch.tensor([2, 3, 0])
        scores = torch.randn(3, 200)
        for row, stop in enumerate((150, 5, 0)):
            x[row, stop:], scores[row, stop:] = torch.nan, torch.inf
        x.requires_grad_(), scores.requires_grad_()
        leaves = (x, scores) if reduce == "attention" else (x,)
        with poisoned_memory():
            out = mmkernels.segment_pool(
                x, ends, reduce=reduce, scores=scores if reduce == "attention" else None, counts=counts
            )
            gradients = torch.autograd.grad(out, leaves, torch.randn_like(out))
        assert out.isfinite().all()
        assert out[0, 2].eq(0).all()
        assert out[2].eq(0).all()
        for gradient in gradients:
            assert gradient.isfinite().all()
            for row, stop in enumerate((150, 5, 0)):
                assert gradient[row, stop:].eq(0).all()
                assert stop == 0 or gradient[row, :stop].ne(0).any()

    def test_sums_are_wide(self) -> None:
        """torch.segment_reduce stops at 256, and its mean in float16 is infinite."""
        ends = torch.tensor([[4096]])
        ones = torch.ones(1, 4096, 3, dtype=torch.bfloat16)
        assert mmkernels.segment_pool(ones, ends, reduce="sum").eq(4096).all()
        twenties = torch.full((1, 4096, 3), 20, dtype=torch.float16)
        assert mmkernels.segment_pool(twenties, ends).eq(20).all()
        assert mmkernels.segment_pool(twenties, ends, reduce="sum").isposinf().all()

    @pytest.mark.parametrize("frames", [3, 49, 70, 1000])
    def test_the_mean_of_a_constant(self, frames: int) -> None:
        assert pool(torch.ones(1, frames, 2), [[frames]]).eq(1).all()

    @pytest.mark.parametrize("frames", [5, 150])
    @pytest.mark.parametrize("sign", [1, -1])
    def test_the_first_of_equal_maxima(self, frames: int, sign: int) -> None:
        """torch.segment_reduce shares a positive gradient among them, and gives each a negative one whole."""
        x = torch.zeros(1, frames, 1)
        x[0, [2, 4, frames - 1]] = 3
        x.requires_grad_()
        out = pool(x, [[frames]], "max")
        (found,) = torch.autograd.grad(out, x, torch.full_like(out, sign))
        assert found.flatten().nonzero().tolist() == [[2]]
        assert found[0, 2] == sign

    @pytest.mark.parametrize("frames", [5, 150])
    def test_a_maximum_is_nan_where_torch_has_one(self, frames: int) -> None:
        x = torch.randn(1, frames, 2)
        x[0, 3:5, 0] = torch.nan
        x.requires_grad_()
        out = pool(x, [[frames]], "max")
        expected = x[0].max(0)
        torch.testing.assert_close(out[0, 0], expected.values, equal_nan=True)
        (found,) = torch.autograd.grad(out.sum(), x)
        assert found[0, :, 0].nonzero().tolist() == [[3]]
        lowest = torch.full((1, frames, 2), -torch.inf)
        assert pool(lowest, [[frames]], "max").isneginf().all()

    def test_a_score_of_minus_infinity_leaves_a_frame_out(self) -> None:
        x, scores = torch.randn(1, 150, 4), torch.randn(1, 150)
        scores[0, 10:90] = -torch.inf
        out = mmkernels.segment_pool(x, torch.tensor([[150]]), reduce="attention", scores=scores)
        kept = torch.cat([x[:, :10], x[:, 90:]], 1), torch.cat([scores[:, :10], scores[:, 90:]], 1)
        expected = mmkernels.segment_pool(kept[0], torch.tensor([[70]]), reduce="attention", scores=kept[1])
        torch.testing.assert_close(out, expected)
        all_out = torch.full((1, 150), -torch.inf, requires_grad=True)
        for ends in ([[5]], [[150]]):
            out = mmkernels.segment_pool(x, torch.tensor(ends), reduce="attention", scores=all_out)
            assert out.eq(0).all()
            (found,) = torch.autograd.grad(out.sum(), all_out)
            assert found.eq(0).all()

    def test_large_scores(self) -> None:
        x, scores = torch.randn(1, 150, 4), torch.full((1, 150), 3e4)
        out = mmkernels.segment_pool(x, torch.tensor([[150]]), reduce="attention", scores=scores)
        torch.testing.assert_close(out[0, 0], x[0].mean(0))

    @each_reduction
    def test_the_length_of_a_segment_changes_no_other(self, reduce: str) -> None:
        """The same frames, in one segment of the row or behind a long one, give the same bits."""
        x, scores = torch.randn(1, 300, 7), torch.randn(1, 300)

        def pooled(start: int, ends: list[int]) -> Tensor:
            some = scores[:, start:] if reduce == "attention" else None
            return mmkernels.segment_pool(x[:, start:], torch.tensor([ends]), reduce=reduce, scores=some)

        assert torch.equal(pooled(0, [130, 300])[:, 1], pooled(130, [170])[:, 0])


class TestMemory:
    @pytest.mark.parametrize("reduce", ["mean", "sum", "max", "last"])
    def test_frames_are_not_kept(self, reduce: str) -> None:
        """Their memory may be used again before the backward pass."""
        x = torch.randn(2, 6, 3, requires_grad=True)
        frames = x * 1
        out = pool(frames, [[2, 4], [3, 6]], reduce)
        expected = torch.autograd.grad(out.sum(), x, retain_graph=True)
        with torch.no_grad():
            frames.fill_(torch.nan)
        assert torch.equal(torch.autograd.grad(out.sum(), x)[0], expected[0])

    @each_reduction
    def test_ends_overwritten_before_the_backward_pass(self, reduce: str) -> None:
        """torch.segment_reduce reads them again, and writes out of bounds. Those of int32 are a copy."""
        x, scores = torch.randn(1, 6, 3, requires_grad=True), torch.zeros(1, 6)
        for dtype in (torch.int64, torch.int32):
            ends = torch.tensor([[2, 4]], dtype=dtype)
            given = scores if reduce == "attention" else None
            out = mmkernels.segment_pool(x, ends, reduce=reduce, scores=given)
            ends.fill_(1000)
            if dtype == torch.int64:
                with pytest.raises(RuntimeError, match="segment_pool: an input was overwritten"):
                    out.sum().backward()
            else:
                out.sum().backward()

    def test_memory_is_the_output(self) -> None:
        x, ends = torch.randn(4, 100, 64), torch.arange(10, 101, 10).expand(4, -1)
        with torch.profiler.profile(profile_memory=True) as profile:
            out = mmkernels.segment_pool(x, ends)
        allocated = sum(
            event.self_cpu_memory_usage for event in profile.events() if event.self_cpu_memory_usage > 0
        )
        assert allocated <= 1.1 * out.numel() * 4 + 4096


class TestModule:
    @each_reduction
    def test_module(self, reduce: str) -> None:
        module = mmkernels.nn.SegmentPool(reduce, dim=8)
        x, ends, counts = torch.randn(2, 9, 8), torch.tensor([[3, 9], [4, 5]]), torch.tensor([2, 1])
        out = module(x, ends, counts)
        same = "mean" if reduce == "attention" else reduce  # a query of zero weights all frames alike
        torch.testing.assert_close(out, mmkernels.segment_pool(x, ends, reduce=same, counts=counts))
        assert [name for name, _ in module.named_parameters()] == (["query"] if reduce == "attention" else [])

    def test_a_query_learns(self) -> None:
        module = mmkernels.nn.SegmentPool("attention", dim=8)
        nn.init.normal_(module.query)
        x, ends = torch.randn(2, 9, 8), torch.tensor([[3, 9], [4, 5]])
        scores = (x @ module.query).requires_grad_()
        expected = mmkernels.segment_pool(x, ends, reduce="attention", scores=scores, backend="reference")
        want = torch.autograd.grad(expected.square().sum(), module.query)
        got = torch.autograd.grad(module(x, ends).square().sum(), module.query)
        torch.testing.assert_close(got, want)

    def test_arguments(self) -> None:
        with pytest.raises(ValueError, match="reduce must be one of mean, sum, max, last, attention"):
            mmkernels.nn.SegmentPool("median")
        with pytest.raises(ValueError, match="needs dim"):
            mmkernels.nn.SegmentPool("attention")
        assert "'attention', dim=8" in repr(mmkernels.nn.SegmentPool("attention", dim=8))


BACKENDS = ["auto", "reference"]


class TestBadInput:
    @pytest.mark.parametrize("backend", BACKENDS)
    def test_values_of_ends(self, backend: str) -> None:
        x = torch.randn(2, 5, 3)
        bad = {
            r"ends must not decrease; row 1 has 2 at segment 2, after 3": [[1, 2, 3], [1, 3, 2]],
            r"ends must lie in \[0, 5\], the frames of x; row 0 has -1 at segment 0": [[-1, 2, 3], [1, 2, 3]],
            r"ends must lie in \[0, 5\], the frames of x; row 1 has 6 at segment 2": [[1, 2, 3], [1, 3, 6]],
        }
        for message, ends in bad.items():
            for dtype in (torch.int32, torch.int64):
                with pytest.raises(ValueError, match=message):
                    mmkernels.segment_pool(x, torch.tensor(ends, dtype=dtype), backend=backend)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_counts(self, backend: str) -> None:
        x, ends = torch.randn(2, 5, 3), torch.tensor([[1, 2], [1, 9]])
        for count in (-1, 3):
            with pytest.raises(
                ValueError, match=rf"counts must lie in \[0, 2\], got {count} in row 1 of the batch"
            ):
                mmkernels.segment_pool(x, ends, counts=torch.tensor([2, count]), backend=backend)
        mmkernels.segment_pool(x, ends, counts=torch.tensor([2, 1]), backend=backend)  # the 9 is not read
        with pytest.raises(ValueError, match=r"counts must have shape \(2,\), .*, got \(3,\)"):
            mmkernels.segment_pool(x, ends, counts=torch.tensor([1, 1, 1]))
        with pytest.raises(TypeError, match=r"counts must be an integer tensor, got torch.float32"):
            mmkernels.segment_pool(x, ends, counts=torch.tensor([1.0, 1.0]))
        with pytest.raises(ValueError, match="counts is on meta, x is on cpu"):
            mmkernels.segment_pool(x, ends, counts=torch.tensor([1, 1], device="meta"))

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("value", [torch.nan, torch.inf])
    def test_values_of_scores(self, backend: str, value: float) -> None:
        x, ends, scores = torch.randn(2, 5, 3), torch.tensor([[2, 4], [1, 3]]), torch.zeros(2, 5)
        scores[0, 4], scores[1, 3] = value, value  # in no segment
        mmkernels.segment_pool(x, ends, reduce="attention", scores=scores, backend=backend)
        scores[1, 2] = value
        with pytest.raises(
            ValueError, match=rf"scores must be numbers or -inf; row 1 has {value} at frame 2"
        ):
            mmkernels.segment_pool(x, ends, reduce="attention", scores=scores, backend=backend)

    def test_shapes_and_types(self) -> None:
        x, ends = torch.randn(2, 5, 3), torch.tensor([[1, 2], [1, 2]])
        scores = torch.zeros(2, 5)
        cases: list[tuple[type[Exception], str, tuple[Any, ...], dict[str, Any]]] = [
            (TypeError, "x must be a tensor, got list", ([1], ends), {}),
            (TypeError, "x must be float32, float16, bfloat16 or float64", (x.long(), ends), {}),
            (ValueError, r"x must have shape \(B, T, D\), got \(5, 3\)", (x[0], ends), {}),
            (TypeError, "ends must be a tensor, got list", (x, [[1, 2]]), {}),
            (TypeError, "ends must be int32 or int64, got torch.float32", (x, ends.float()), {}),
            (ValueError, r"ends must have shape \(2, M\), got \(1, 2\)", (x, ends[:1]), {}),
            (ValueError, r"ends must have shape \(2, M\), got \(2,\)", (x, ends[0]), {}),
            (ValueError, "ends is on meta, x is on cpu", (x, ends.to("meta")), {}),
            (ValueError, "reduce must be one of mean, sum, max, last", (x, ends), {"reduce": "min"}),
            (ValueError, "scores are needed for reduce='attention'", (x, ends), {"reduce": "attention"}),
            (ValueError, "for it alone, got scores with reduce='mean'", (x, ends), {"scores": scores}),
        ]
        for error, message, arguments, options in cases:
            with pytest.raises(error, match=message):
                mmkernels.segment_pool(*arguments, **options)
        for bad, message in (
            (scores[:, :4], r"scores must have shape \(2, 5\), got \(2, 4\)"),
            (scores.to("meta"), "scores is on meta"),
        ):
            with pytest.raises(ValueError, match=message):
                mmkernels.segment_pool(x, ends, reduce="attention", scores=bad)
        with pytest.raises(TypeError, match="scores must be float32"):
            mmkernels.segment_pool(x, ends, reduce="attention", scores=scores.long())

    def test_raw_ops_survive_bad_input(self) -> None:
        """The glue checks again: a wrong call is an error, not a crash."""
        forward, backward = torch.ops.mmkernels.segment_pool_fwd, torch.ops.mmkernels.segment_pool_bwd
        x, ends, scores = torch.randn(2, 5, 3), torch.tensor([[1, 2], [1, 2]]), torch.zeros(2, 5)
        bad = [
            (x[0], ends, None, None, 0, True),
            (x, ends.int(), None, None, 0, True),
            (x, ends[:1], None, None, 0, True),
            (x, ends, scores, None, 0, True),
            (x, ends, None, None, 4, True),
            (x, ends, scores.double(), None, 4, True),
            (x, ends, scores[:, :3], None, 4, True),
            (x, ends, None, torch.tensor([1]), 0, True),
            (x, ends, None, None, 5, True),
            (x, ends, None, None, -1, True),
            (x, ends + 4, None, None, 0, True),
        ]
        for arguments in bad:
            with pytest.raises(RuntimeError):
                forward(*arguments)
        grad, stats = torch.randn(2, 2, 3), torch.zeros(2, 2, 2)
        index = torch.zeros(2, 2, 3, dtype=torch.int32)
        for arguments in (
            (grad[:1], None, ends, None, None, stats, index, 5, 0, True, False),
            (grad, None, ends, None, None, stats, index, -1, 0, True, False),
            (grad, None, ends, None, None, stats, index[:1], 5, 2, True, False),
            (grad, None, ends, scores, None, stats[:1], index, 5, 4, True, False),
            (grad, None, ends, scores, None, stats, index, 5, 4, True, True),
            (grad, x[:, :4], ends, scores, None, stats, index, 5, 4, True, True),
            (grad, x, ends, None, None, stats, index, 5, 0, True, True),
        ):
            with pytest.raises(RuntimeError):
                backward(*arguments)

    def test_the_backward_op_is_safe_for_any_ends(self) -> None:
        for value in (-(2**63), 2**63 - 1, 1000):
            ends = torch.tensor([[3, value], [value, 1]])
            grad = torch.ones(2, 2, 3)
            stats, index = torch.zeros(0, 2, 2), torch.zeros(0, 2, 3, dtype=torch.int32)
            dx, _ = torch.ops.mmkernels.segment_pool_bwd(
                grad, None, ends, None, None, stats, index, 5, 1, True, False
            )
            x = torch.zeros(2, 5, 3, requires_grad=True)
            expected = torch.autograd.grad(reference.segment_pool(x, ends, reduce="sum").sum(), x)
            assert torch.equal(dx, expected[0])
