from __future__ import annotations

import functools
import gc
import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import mmkernels
from mmkernels.ops.merge import reference
from op_tests import Call, OpSpec, Shape, op_tests


def joined(function: Callable[..., list[Tensor]]) -> Callable[..., Tensor]:
    """All results in one vector, which is what the tests of an op compare."""

    @functools.wraps(function)
    def run(**arguments: Any) -> Tensor:
        return torch.cat([result.reshape(-1) for result in function(**arguments)])

    return run


def make(shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Call:
    sizes: Sequence[tuple[int, ...]] = shape["sizes"]
    groups = shape.get("groups")

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device, dtype)

    entries = shape.get("entries", len(sizes) if groups is None else max(groups) + 1)
    arguments: dict[str, Any] = {
        "target": [random(*size) for size in sizes],
        # Of another scale and offset, as the weights of another model.
        "source": [2 * random(*size) + 0.5 for size in sizes],
        "lam": torch.rand(entries, generator=generator).to(device, dtype) * 1.5 - 0.25,
    }
    if groups is not None:
        arguments["groups"] = groups
    return Call(arguments, ("target", "source", "lam"))


def eager(
    target: list[Tensor], source: list[Tensor], lam: Tensor, groups: list[int] | None = None
) -> list[Tensor]:
    """The usual way: a product and a sum for each pair, in the pairs' dtype."""
    groups = groups or ([0] * len(target) if lam.numel() == 1 else list(range(len(target))))
    weights = lam.to(target[0].dtype)
    return [(1 - weights[g]) * a + weights[g] * b for a, b, g in zip(target, source, groups, strict=True)]


def raw(call: Call) -> list[tuple[Any, tuple[Any, ...]]]:
    a = call.arguments
    pairs, dtype = (a["target"], a["source"]), a["target"][0].dtype
    lam = a["lam"].to(mmkernels.ops._common.accumulate_dtype(dtype))
    groups = a.get("groups") or [index % lam.numel() for index in range(len(pairs[0]))]
    ops = torch.ops.mmkernels
    out = ops.merge_fwd(*pairs, lam, groups, dtype)
    grad = [torch.randn_like(tensor) for tensor in out]
    some = list(range(0, len(out), 2))
    return [
        (ops.merge_fwd, (*pairs, lam, groups, dtype)),
        (ops.merge_out, (*pairs, lam, groups, out)),
        (ops.merge_bwd, (grad, *pairs, lam, groups, True, some, [len(out) - 1])),
        (ops.merge_bwd, (grad, *pairs, lam, groups, False, [], some)),
    ]


def alone(call: Call, index: int) -> tuple[Call, Any]:
    """A pair has the same bits as in a call without the others."""
    a = call.arguments
    lam, groups = a["lam"], a.get("groups")
    entry = groups[index] if groups else index % lam.numel()
    pair = {"target": [a["target"][index]], "source": [a["source"][index]], "lam": lam[entry : entry + 1]}
    start = sum(tensor.numel() for tensor in a["target"][:index])
    return Call(pair, call.differentiable), lambda out: out[start : start + pair["target"][0].numel()]


@st.composite
def shapes(draw: Any) -> Shape:
    count = draw(st.integers(1, 6))
    size = st.sampled_from([(1,), (7,), (16, 3), (0, 4), (33, 5), (4, 4, 4), (129,), (2, 1), ()])
    sizes = draw(st.lists(size, min_size=count, max_size=count))
    kind = draw(st.sampled_from(["each", "one", "groups"]))
    if kind == "one":
        return {"sizes": sizes, "entries": 1}
    if kind == "groups":
        return {"sizes": sizes, "groups": draw(st.lists(st.integers(0, 2), min_size=count, max_size=count))}
    return {"sizes": sizes}


CHUNK = 16384
SPEC = OpSpec(
    name="merge",
    casts_parameters=True,
    function=joined(mmkernels.merge),
    reference=joined(reference.merge),
    eager=joined(eager),
    make=make,
    cases={
        "each": {"sizes": [(5, 4), (3,), (2, 3, 2)]},
        "groups": {"sizes": [(4, 3), (2, 2), (7,), (3, 3)], "groups": [1, 0, 1, 3]},
        "one_entry": {"sizes": [(9,), (4, 2), (1, 1)], "entries": 1},
        "one_pair_many_groups": {"sizes": [(6, 5), (4,), (2,)], "groups": [2, 2, 2], "entries": 4},
        "scalars": {"sizes": [(), (1,), (), (2,)], "groups": [0, 1, 0, 0]},
    },
    zero_cases={
        "no_elements": {"sizes": [(0,), (3, 0)]},
        "one_group_of_nothing": {"sizes": [(0, 2), (3, 2), (), (2, 0)]},
    },
    raw=raw,
    shapes=shapes,
    alone=alone,
    dynamic=({"sizes": [(5, 4), (3, 6)], "groups": [1, 0]}, {"sizes": [(6, 7), (4, 5)], "groups": [1, 0]}),
    activations=("target", "source"),
)
TestMerge = op_tests(SPEC)


def pairs(
    *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32, of_source: torch.dtype | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    return [torch.randn(s).to(dtype) for s in shapes], [torch.randn(s).to(of_source or dtype) for s in shapes]


FLOATS = (torch.float32, torch.float16, torch.bfloat16)
each_float = pytest.mark.parametrize("dtype", FLOATS, ids=["float32", "float16", "bfloat16"])


class TestChunks:
    """Tensors longer than the chunks that the kernels' sums are over."""

    SHAPES = ((3 * CHUNK,), (2, CHUNK + 7), (5,), (CHUNK - 1,))

    @each_float
    @pytest.mark.parametrize("groups", [None, [1, 0, 0, 1]])
    def test_values_and_gradients(self, dtype: torch.dtype, groups: list[int] | None) -> None:
        target, source = pairs(*self.SHAPES, dtype=dtype)
        leaves = [t.requires_grad_() for t in (*target, *source)]
        lam = torch.rand(2 if groups else 4, requires_grad=True)
        found = mmkernels.merge(target, source, lam, groups=groups)
        exact = reference.merge(
            [t.double() for t in target], [s.double() for s in source], lam.double(), groups=groups
        )
        grads = [torch.randn_like(t) for t in found]
        gradients = torch.autograd.grad(found, [lam, *leaves], grads)
        expected = torch.autograd.grad(exact, [lam, *leaves], [g.double() for g in grads])
        eps = torch.finfo(dtype).eps
        for value, other in zip((*found, *gradients[1:]), (*exact, *expected[1:]), strict=True):
            torch.testing.assert_close(value.double(), other.double(), rtol=eps, atol=eps)
        torch.testing.assert_close(gradients[0], expected[0], rtol=1e-5, atol=1e-3)

    def test_hundreds_of_pairs(self) -> None:
        """More than a launch on a GPU takes."""
        target, source = pairs(*[(index % 7, 3) for index in range(300)])
        lam, groups = torch.rand(9, requires_grad=True), [index % 9 for index in range(300)]
        out = mmkernels.merge(target, source, lam, groups=groups)
        expected = reference.merge(target, source, lam, groups=groups)
        torch.testing.assert_close(out, expected)
        found, exact = (torch.autograd.grad(sum(o.sum() for o in some), lam) for some in (out, expected))
        torch.testing.assert_close(found, exact)

    def test_the_sums_are_of_float32_or_better(self) -> None:
        """A running sum of ones in float32 stops at 2^24; in half precision it is lost at once."""
        size = 40 * CHUNK
        target, source = [torch.zeros(size, dtype=torch.float16)], [torch.ones(size, dtype=torch.float16)]
        lam = torch.tensor([0.5], requires_grad=True)
        (out,) = mmkernels.merge(target, source, lam, dtype=torch.float32)
        out.sum().backward()
        assert lam.grad == size


class TestEnds:
    """Where lam is 0 or 1 the result is a copy."""

    @each_float
    @pytest.mark.parametrize("backend", ["auto", "reference"])
    @pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
    def test_what_the_other_side_holds_does_not_come_through(
        self, value: float, backend: str, dtype: torch.dtype
    ) -> None:
        target, source = pairs((5, 7), (5, 7), dtype=dtype)
        expected = [target[0].clone(), source[1].clone()]
        source[0][2], target[1][3] = value, value
        source[0][4, 1:], target[1][1, 5] = value, value
        out = mmkernels.merge(target, source, [0, 1], backend=backend)
        assert all(map(torch.equal, out, expected))

    @each_float
    @pytest.mark.parametrize("backend", ["auto", "reference"])
    def test_infinities_are_copied(self, backend: str, dtype: torch.dtype) -> None:
        target, source = pairs((5, 7), (5, 7), dtype=dtype)
        target[0][1], source[1][2] = math.inf, -math.inf
        out = mmkernels.merge(target, source, [0, 1], backend=backend)
        assert torch.equal(out[0], target[0])
        assert torch.equal(out[1], source[1])

    def test_close_to_an_end_the_error_is_that_of_the_nearer_side(self) -> None:
        target, source = [torch.full((8,), 1e8)], [torch.ones(8)]
        (out,) = mmkernels.merge(target, source, 1 - 2.0**-24)
        torch.testing.assert_close(out, torch.full((8,), 1 + (1e8 - 1) * 2.0**-24))
        (same,) = mmkernels.merge(source, source, 0.3)
        assert torch.equal(same, source[0])

    def test_gradients_at_the_ends(self) -> None:
        target, source = pairs((4, 3), (4, 3))
        for tensor in (*target, *source):
            tensor.requires_grad_()
        lam = torch.tensor([0.0, 1.0], requires_grad=True)
        out = mmkernels.merge(target, source, lam)
        (d_lam, *d_pairs) = torch.autograd.grad(out, [lam, *target, *source], [torch.ones(4, 3)] * 2)
        torch.testing.assert_close(
            d_lam, torch.stack([(s - t).sum() for t, s in zip(target, source, strict=True)])
        )
        assert [float(d.mean()) for d in d_pairs] == [1, 0, 0, 1]


class TestDtypes:
    @pytest.mark.parametrize("of_target", FLOATS)
    @pytest.mark.parametrize("of_source", FLOATS)
    @pytest.mark.parametrize("dtype", [None, *FLOATS])
    def test_every_combination(
        self, of_target: torch.dtype, of_source: torch.dtype, dtype: torch.dtype | None
    ) -> None:
        """A result is rounded once, and each gradient has the dtype of its tensor."""
        target, source = pairs((9, 5), (40,), dtype=of_target, of_source=of_source)
        leaves = [t.requires_grad_() for t in (*target, *source)]
        lam = torch.tensor([0.3, 0.8], requires_grad=True)
        out = mmkernels.merge(target, source, lam, dtype=dtype)
        result = dtype or of_target
        exact = reference.merge(target, source, lam, dtype=torch.float32)
        eps = torch.finfo(result).eps
        for value, other in zip(out, exact, strict=True):
            assert value.dtype == result
            torch.testing.assert_close(value.float(), other, rtol=eps, atol=4e-7)
        gradients = torch.autograd.grad(out, [lam, *leaves], [torch.ones_like(o) for o in out])
        expected = torch.autograd.grad(exact, [lam, *leaves], [torch.ones_like(o) for o in exact])
        for gradient, other in zip(gradients, expected, strict=True):
            assert gradient.dtype == other.dtype
            torch.testing.assert_close(gradient, other, rtol=1e-5, atol=2e-5)

    def test_pairs_of_many_dtypes_in_one_call(self) -> None:
        dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.bfloat16, torch.float32]
        target = [torch.randn(6, 3).to(dtype).requires_grad_() for dtype in dtypes]
        source = [torch.randn(6, 3).to(dtype).requires_grad_() for dtype in reversed(dtypes)]
        lam = torch.rand(2, requires_grad=True)
        groups = [0, 1, 1, 0, 1]
        out = mmkernels.merge(target, source, lam, groups=groups)
        expected = reference.merge(target, source, lam, groups=groups)
        assert [o.dtype for o in out] == dtypes
        torch.testing.assert_close(out, expected)
        grads = [torch.ones_like(o) for o in out]
        leaves = [lam, *target, *source]
        found, exact = (torch.autograd.grad(some, leaves, grads) for some in (out, expected))
        torch.testing.assert_close(found, exact)
        into = [torch.empty_like(t) for t in target]
        with torch.no_grad():
            mmkernels.merge(target, source, lam, groups=groups, out=into)
        assert all(map(torch.equal, into, out))

    def test_autocast_changes_nothing(self) -> None:
        target, source = pairs((9, 5), (40,))
        lam = torch.rand(2, requires_grad=True)
        plain = mmkernels.merge(target, source, lam)
        with torch.autocast("cpu", torch.bfloat16):
            out = mmkernels.merge(target, source, lam)
        assert all(map(torch.equal, out, plain))

    @pytest.mark.parametrize("of_lam", [*FLOATS, torch.float64])
    def test_lam_is_read_in_float32(self, of_lam: torch.dtype) -> None:
        target, source = pairs((4, 4), dtype=torch.bfloat16)
        lam = torch.tensor([0.3]).to(of_lam).requires_grad_()
        (out,) = mmkernels.merge(target, source, lam)
        (expected,) = mmkernels.merge(target, source, lam.detach().float())
        assert torch.equal(out, expected)
        out.sum().backward()
        assert lam.grad is not None
        assert lam.grad.dtype == of_lam


class TestLam:
    @pytest.mark.parametrize("lam", [0.25, 1, torch.tensor(0.25), torch.tensor([0.25]), [0.25], (0.25,)])
    def test_one_for_all(self, lam: Any) -> None:
        target, source = pairs((3, 4), (5,))
        value = float(torch.as_tensor(lam))
        expected = [torch.lerp(t, s, value) for t, s in zip(target, source, strict=True)]
        torch.testing.assert_close(mmkernels.merge(target, source, lam), expected)

    def test_one_for_each(self) -> None:
        target, source = pairs((3, 4), (5,))
        expected = [torch.lerp(t, s, w) for t, s, w in zip(target, source, (0.25, 2.0), strict=True)]
        torch.testing.assert_close(mmkernels.merge(target, source, (0.25, 2)), expected)
        torch.testing.assert_close(mmkernels.merge(target, source, torch.tensor([0.25, 2.0])), expected)

    def test_a_scalar_gets_its_gradient(self) -> None:
        target, source = pairs((3, 4), (5,))
        lam = torch.tensor(0.25, requires_grad=True)
        sum(o.sum() for o in mmkernels.merge(target, source, lam)).backward()
        assert lam.grad is not None
        assert lam.grad.shape == ()
        total = sum((s - t).sum() for t, s in zip(target, source, strict=True))
        torch.testing.assert_close(lam.grad, total)

    def test_groups_without_a_pair_have_no_gradient(self) -> None:
        target, source = pairs((3, 4), (5,))
        lam = torch.rand(4, requires_grad=True)
        sum(o.sum() for o in mmkernels.merge(target, source, lam, groups=[3, 1])).backward()
        assert lam.grad is not None
        assert lam.grad[[0, 2]].tolist() == [0, 0]
        assert (lam.grad[[1, 3]] != 0).all()

    def test_slices_of_a_longer_tensor(self) -> None:
        target, source = pairs((3, 4), (5,))
        lam = torch.rand(5, 2)[1:3, 1]
        expected = mmkernels.merge(target, source, lam.clone())
        assert all(map(torch.equal, mmkernels.merge(target, source, lam), expected))


class TestGradients:
    def count(self, launched: list[tuple[int, bool, int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
        """Records pairs, need_lam, and how many gradients of targets and of sources, of each backward op."""
        from mmkernels.ops.merge import api

        forward, into, backward = api.OPS["native"]

        def recorded(*arguments: Any) -> Any:
            grad, *_, need_lam, need_target, need_source = arguments
            launched.append((len(grad), need_lam, len(need_target), len(need_source)))
            return backward(*arguments)

        monkeypatch.setitem(api.OPS, "native", (forward, into, recorded))

    def test_what_nobody_asks_for_costs_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        launched: list[tuple[int, bool, int, int]] = []
        self.count(launched, monkeypatch)
        target, source = pairs((3,), (4,), (5,), (6,))
        target[0].requires_grad_(), target[2].requires_grad_(), source[2].requires_grad_()
        lam = torch.rand(4)
        out = mmkernels.merge(target, source, lam)
        assert [o.requires_grad for o in out] == [True, False, True, False]
        torch.autograd.grad(out[2].sum(), [target[2], source[2]], retain_graph=True)
        (out[0].sum() + out[2].sum()).backward()
        lam.requires_grad_()
        out = mmkernels.merge(target, source, lam)
        assert all(o.requires_grad for o in out)
        torch.autograd.grad(out[1].sum(), lam)
        assert launched == [(1, False, 1, 1), (2, False, 2, 1), (1, True, 0, 0)]

    def test_a_result_that_is_not_used_leaves_its_inputs_without_a_gradient(self) -> None:
        target, source = pairs((3,), (4,))
        for tensor in (*target, *source):
            tensor.requires_grad_()
        mmkernels.merge(target, source, 0.5)[1].sum().backward()
        assert [t.grad is None for t in (*target, *source)] == [True, False, True, False]

    def test_one_tensor_as_several_inputs(self) -> None:
        """A shared matrix, and a pair of a tensor with itself."""
        x, y = (torch.randn(3, 4, requires_grad=True) for _ in range(2))
        lam = torch.rand(3, requires_grad=True)
        results = []
        for merge in (mmkernels.merge, reference.merge):
            out = merge([x, x, y], [y, x, y], lam)
            results.append(torch.autograd.grad(sum(o.square().sum() for o in out), [x, y, lam]))
        torch.testing.assert_close(*results)

    def test_retained_graph(self) -> None:
        """One merge may serve several micro-batches, each with a backward pass."""
        target, source = pairs((3, 4), (5,))
        lam = torch.rand(2, requires_grad=True)
        out = mmkernels.merge(target, source, lam)
        both = torch.autograd.grad(sum(o.square().sum() for o in out), lam, retain_graph=True)[0]
        parts = [torch.autograd.grad(o.square().sum(), lam, retain_graph=True)[0] for o in out]
        torch.testing.assert_close(sum(parts), both)

    def test_the_gradient_of_lam_does_not_depend_on_threads(self) -> None:
        target, source = pairs(*[(3, CHUNK + 5)] * 5)
        found = []
        threads = torch.get_num_threads()
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                lam = torch.full((2,), 0.3, requires_grad=True)
                out = mmkernels.merge(target, source, lam, groups=[0, 1, 0, 1, 1])
                found += torch.autograd.grad(sum(o.square().sum() for o in out), lam)
        finally:
            torch.set_num_threads(threads)
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])


class TestInto:
    """Results written to memory that is given."""

    @pytest.mark.parametrize("backend", ["auto", "reference"])
    @pytest.mark.parametrize("dtype", [None, torch.bfloat16])
    def test_returns_what_it_is_given(self, backend: str, dtype: torch.dtype | None) -> None:
        target, source = pairs((3, 4), (0, 2), (5,))
        out = [torch.full_like(t, math.nan, dtype=dtype) for t in target]
        found = mmkernels.merge(target, source, 0.3, dtype=dtype, out=out, backend=backend)
        assert [f is o for f, o in zip(found, out, strict=True)] == [True] * 3
        expected = mmkernels.merge(target, source, 0.3, dtype=dtype, backend=backend)
        assert all(map(torch.equal, out, expected))

    @pytest.mark.parametrize("backend", ["auto", "reference"])
    def test_in_place(self, backend: str) -> None:
        shapes = [(3, 4), (2, CHUNK + 3)]
        for dtype in FLOATS:
            target, source = pairs(*shapes, dtype=dtype)
            expected = mmkernels.merge(target, source, [0.3, 0.9], backend=backend)
            mmkernels.merge(target, source, [0.3, 0.9], out=target, backend=backend)
            assert all(map(torch.equal, target, expected))
            target, source = pairs(*shapes, dtype=dtype)
            expected = mmkernels.merge(target, source, [0.3, 0.9], backend=backend)
            mmkernels.merge(target, source, [0.3, 0.9], out=source, backend=backend)
            assert all(map(torch.equal, source, expected))

    @pytest.mark.parametrize("dtype", FLOATS)
    def test_parts_of_one_buffer(self, dtype: torch.dtype) -> None:
        """At any address, in a call of so many elements that results are written around the caches."""
        shapes = [(5,), (2, CHUNK + 1), (62, CHUNK), (7,)]
        target, source = pairs(*shapes, dtype=dtype)
        sizes = [t.numel() for t in target]
        flat = torch.full((sum(sizes) + 2,), 7.0, dtype=dtype)
        out = [part.view(s) for part, s in zip(flat[1:-1].split(sizes), shapes, strict=True)]
        mmkernels.merge(target, source, 0.3, out=out)
        assert all(map(torch.equal, out, mmkernels.merge(target, source, 0.3)))
        assert flat[0] == flat[-1] == 7

    def test_parameters_in_place(self) -> None:
        target, source = pairs((3, 4), (5,))
        expected = mmkernels.merge(target, source, 0.3)
        parameters = [torch.nn.Parameter(t) for t in target]
        with pytest.raises(ValueError, match=r"written without a gradient.*torch.no_grad\(\)"):
            mmkernels.merge(parameters, source, 0.3, out=parameters)
        with torch.no_grad():
            mmkernels.merge(parameters, source, 0.3, out=parameters)
        assert all(map(torch.equal, parameters, expected))
        assert all(p.requires_grad and p.grad_fn is None for p in parameters)

    @pytest.mark.parametrize("which", ["lam", "target", "source", "out"])
    def test_no_gradient_is_lost_in_silence(self, which: str) -> None:
        target, source = pairs((3, 4), (5,))
        lam, out = torch.rand(2), [torch.empty_like(t) for t in target]
        chosen = {"lam": lam, "target": target[1], "source": source[0], "out": out[1]}[which]
        chosen.requires_grad_()
        for backend in ("auto", "reference"):
            with pytest.raises(ValueError, match="out is written without a gradient"):
                mmkernels.merge(target, source, lam, out=out, backend=backend)

    def test_autograd_sees_the_overwriting(self) -> None:
        target, source = pairs((3, 4))
        weight = torch.randn(3, 4, requires_grad=True)
        loss = (weight * target[0]).sum()
        mmkernels.merge(target, source, 0.3, out=target)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    @pytest.mark.parametrize(
        "transform",
        [
            torch.vmap,
            torch.func.functionalize,
            lambda call: lambda *pair: torch.func.jvp(call, pair, pair)[0],
        ],
        ids=["vmap", "functionalize", "jvp"],
    )
    def test_transforms(self, transform: Any) -> None:
        """Their tensors have no address."""
        (target,), (source,) = pairs((3, 4))
        expected = mmkernels.merge([target], [source], 0.3)[0]

        def merge(target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
            return mmkernels.merge([target], [source], 0.3, out=[torch.empty_like(target)])[0]

        torch.testing.assert_close(transform(merge)(target, source), expected)

    def test_compiled(self) -> None:
        torch._dynamo.reset()
        target, source = pairs((3, 4), (5,))
        lam = torch.rand(2)
        expected = mmkernels.merge(target, source, lam)
        merge = torch.compile(mmkernels.merge, backend="aot_eager", fullgraph=True)
        merge(target, source, lam, out=target)
        assert all(map(torch.equal, target, expected))


class TestMemory:
    def allocated(self, step: Callable[[], Any]) -> int:
        with torch.profiler.profile(profile_memory=True) as profile:
            step()
        sizes = (event.self_cpu_memory_usage for event in profile.events())
        return sum(size for size in sizes if size > 0)

    def test_only_what_is_returned(self) -> None:
        target, source = pairs(*[(64, 256)] * 6)
        size = 6 * 64 * 256 * 4
        lam = torch.rand(6, requires_grad=True)
        with torch.no_grad():
            assert self.allocated(lambda: mmkernels.merge(target, source, lam)) <= 1.1 * size
            assert self.allocated(lambda: mmkernels.merge(target, source, lam, out=target)) <= 0.1 * size
        out = mmkernels.merge(target, source, lam)
        grads = [torch.ones_like(o) for o in out]
        assert self.allocated(lambda: torch.autograd.grad(out, lam, grads)) <= 0.1 * size

    def test_nothing_is_kept(self) -> None:
        """After a step, its tensors are freed without the garbage collector."""
        target, source = pairs((3, 4), (5,))
        lam = torch.rand(2, requires_grad=True)
        gc.disable()
        try:
            out = mmkernels.merge(target, source, lam)
            sum(o.sum() for o in out).backward()
            alive = [weakref.ref(t) for t in (*out, *target)]
            del out, target
            assert [ref() for ref in alive] == [None] * 4
        finally:
            gc.enable()


class TestBadInput:
    def test_lists(self) -> None:
        target, source = pairs((3, 4), (5,))
        with pytest.raises(TypeError, match="target must be a list or tuple of tensors, got Tensor"):
            mmkernels.merge(target[0], source, 0.5)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="source must be a list or tuple of tensors, got dict"):
            mmkernels.merge(target, {}, 0.5)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="source must have as many tensors as target, 2, got 1"):
            mmkernels.merge(target, source[:1], 0.5)
        with pytest.raises(ValueError, match="out must have as many tensors as target, 2, got 0"):
            mmkernels.merge(target, source, 0.5, out=[])
        with pytest.raises(ValueError, match="source must have as many tensors as target, 0, got 2"):
            mmkernels.merge([], source, 0.5)

    def test_nothing_to_merge(self) -> None:
        assert mmkernels.merge([], [], 0.5) == []
        assert mmkernels.merge([], [], torch.rand(3), groups=[], out=[]) == []

    @pytest.mark.parametrize("backend", ["auto", "reference"])
    @pytest.mark.parametrize("name", ["target", "source", "out"])
    @pytest.mark.parametrize("index", [0, 3])
    def test_a_tensor_is_named(self, name: str, index: int, backend: str) -> None:
        def merge(tensor: Any) -> None:
            target, source = pairs(*[(2, 3)] * 5)
            lists = {"target": target, "source": source, "out": [torch.empty_like(t) for t in target]}
            lists[name][index] = tensor
            mmkernels.merge(**lists, lam=0.5, backend=backend)  # type: ignore[arg-type]

        where = rf"merge: {name}\[{index}\]"
        with pytest.raises(TypeError, match=f"{where} must be a tensor, got str"):
            merge("weight")
        with pytest.raises(TypeError, match=f"{where} must be a tensor, got ndarray"):
            merge(torch.ones(2, 3).numpy())
        with pytest.raises(TypeError, match=f"{where} must be float32, .*, got torch.int64"):
            merge(torch.ones(2, 3, dtype=torch.int64))
        if (name, index) == ("target", 0):
            return  # the others are compared with it
        with pytest.raises(ValueError, match=f"{where} is on meta, target.0. is on cpu"):
            merge(torch.empty(2, 3, device="meta"))
        with pytest.raises(ValueError, match=f"{where} is torch.float64, and target.0. torch.float32"):
            merge(torch.ones(2, 3, dtype=torch.float64))
        if name != "target":
            with pytest.raises(ValueError, match=rf"{where} must have the shape of .*\(2, 3\), got \(3, 2\)"):
                merge(torch.ones(3, 2))

    @pytest.mark.parametrize("backend", ["auto", "reference"])
    def test_out(self, backend: str) -> None:
        target, source = pairs((2, 3), (4, 5))
        good = [torch.full_like(t, 7.0) for t in target]
        merge = functools.partial(mmkernels.merge, target, source, 0.5, backend=backend)
        with pytest.raises(
            ValueError, match=r"out\[1\] must be contiguous and torch.float32.*is not contiguous"
        ):
            merge(out=[good[0], torch.empty(5, 4).mT])
        with pytest.raises(
            ValueError, match=r"out\[1\] must be contiguous and torch.float32.*torch.bfloat16"
        ):
            merge(out=[good[0], good[1].bfloat16()])
        with pytest.raises(
            ValueError, match=r"out\[0\] must be contiguous and torch.bfloat16.*torch.float32"
        ):
            merge(out=good, dtype=torch.bfloat16)
        assert good[0].eq(7).all(), "written before all was checked"

    @pytest.mark.parametrize("backend", ["auto", "reference"])
    def test_out_over_memory_of_other_pairs(self, backend: str) -> None:
        """Pairs are computed in no order: a swap or a tied weight would depend on it."""
        memory = torch.arange(40.0)
        a, b = memory[:16].view(4, 4), memory[16:32].view(4, 4)
        ones, other = torch.ones(4, 4), torch.empty(4, 4)
        shifted = memory[1:17].view(4, 4)
        merge = functools.partial(mmkernels.merge, lam=0.5, backend=backend)
        for call, message in (
            (lambda: merge([a, a], [ones, ones], out=[a, a]), r"out\[1\] shares memory with out\[0\]"),
            (lambda: merge([a, b], [ones, ones], out=[b, a]), r"out\[1\] shares memory with target\[0\]"),
            (lambda: merge([ones], [a], out=[shifted]), r"out\[0\] shares memory with source\[0\]"),
            (lambda: merge([a, a], [ones, ones], out=[a, other]), r"out\[0\] shares memory with target\[1\]"),
        ):
            before = memory.clone()
            with pytest.raises(ValueError, match=message):
                call()
            assert torch.equal(memory, before)
        share = torch.full((1,), 0.5)
        with pytest.raises(ValueError, match=r"out\[0\] shares memory with lam"):
            mmkernels.merge([torch.ones(1)], [torch.ones(1)], share, out=[share], backend=backend)
        # A tensor that is read by several pairs, neighbours in one memory, and a transpose, which is copied.
        mmkernels.merge([a, b], [ones, ones], 0.5, out=[a, b], backend=backend)
        mmkernels.merge([a.mT, b], [b, ones], 0.5, out=[a, other], backend=backend)

    def test_float64_goes_with_float64(self) -> None:
        target, source = pairs((2, 3), (4,))
        wide = [t.double() for t in target]
        for backend in ("auto", "reference"):
            merge = functools.partial(mmkernels.merge, backend=backend)
            with pytest.raises(ValueError, match="float64 goes with float64 only"):
                merge(wide, source, 0.5)
            with pytest.raises(ValueError, match="float64 gives, and needs, float64"):
                merge(target, source, 0.5, dtype=torch.float64)
            with pytest.raises(ValueError, match="float64 gives, and needs, float64"):
                merge(wide, wide, 0.5, dtype=torch.float32)
            assert merge(wide, wide, torch.tensor(0.5))[0].dtype == torch.float64
        with pytest.raises(TypeError, match=r"dtype must be float32, .*, got torch.int32"):
            mmkernels.merge(target, source, 0.5, dtype=torch.int32)

    def test_lam(self) -> None:
        target, source = pairs((2, 3), (4,), (5,))
        merge = functools.partial(mmkernels.merge, target, source)
        with pytest.raises(
            ValueError, match="lam must have one entry, or one for each of the 3 pairs, got 2"
        ):
            merge(torch.rand(2))
        with pytest.raises(
            ValueError, match="lam must have one entry, or one for each of the 3 pairs, got 0"
        ):
            merge([])
        with pytest.raises(
            ValueError, match=r"lam must be a number or have one dimension, got shape \(3, 1\)"
        ):
            merge(torch.rand(3, 1))
        with pytest.raises(ValueError, match=r"lam is on meta, target\[0\] is on cpu"):
            merge(torch.empty(3, device="meta"))
        with pytest.raises(TypeError, match=r"lam must be float32, .*, got torch.int64"):
            merge(torch.ones(3, dtype=torch.int64))
        with pytest.raises(TypeError, match="lam must be a tensor, a number or a list"):
            merge("0.5")
        with pytest.raises(TypeError, match=r"lam\[1\] must be a number, got Tensor; torch\.stack"):
            merge([0.5, torch.tensor(0.5), 0.5])

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_lam_that_is_not_finite(self, value: float) -> None:
        target, source = pairs((2, 3), (4,))
        for lam in ([0.5, value], torch.tensor([0.5, value]), torch.tensor([0.5, value], requires_grad=True)):
            with pytest.raises(ValueError, match=f"lam must be finite, got {value} at index 1"):
                mmkernels.merge(target, source, lam)
        with pytest.raises(ValueError, match=f"lam must be finite, got {value} at index 0"):
            mmkernels.merge(target, source, value)

    def test_lam_that_is_not_finite_in_float32(self) -> None:
        target, source = pairs((2, 3))
        for lam in (1e300, [1e300], torch.tensor([1e300], dtype=torch.float64)):
            with pytest.raises(ValueError, match=r"lam must be finite, got 1e\+300 at index 0"):
                mmkernels.merge(target, source, lam)

    def test_groups(self) -> None:
        target, source = pairs((2, 3), (4,))
        merge = functools.partial(mmkernels.merge, target, source, torch.rand(3))
        with pytest.raises(ValueError, match=r"groups\[1\] must lie in \[0, 3\), the entries of lam, got 3"):
            merge(groups=[0, 3])
        with pytest.raises(ValueError, match=r"groups\[0\] must lie in \[0, 3\), the entries of lam, got -1"):
            merge(groups=[-1, 0])
        with pytest.raises(ValueError, match="groups must have an entry for each of the 2 pairs, got 3"):
            merge(groups=[0, 1, 2])
        with pytest.raises(TypeError, match=r"groups\[1\] must be an integer, got float"):
            merge(groups=[0, 1.0])
        with pytest.raises(TypeError, match="groups must be a list of integers, got Tensor"):
            merge(groups=torch.tensor([0, 1]))

    def test_raw_op_survives_bad_input(self) -> None:
        """The glue checks again: a wrong call of a raw op is an error, not a crash."""
        target, source = pairs((2, 3), (4,))
        lam, groups, single = torch.rand(2), [0, 1], torch.float32
        ops = torch.ops.mmkernels
        bad: list[tuple[Any, ...]] = [
            (target, source[:1], lam, groups, single),
            (target, source, lam, [0], single),
            (target, source, lam, [0, 2], single),
            (target, source, lam, [-1, 0], single),
            (target, source, lam.double(), groups, single),
            (target, source, lam[None], groups, single),
            (target, [source[0], source[1][:3]], lam, groups, single),
            (target, [source[0], source[1].half()], lam, groups, single),
            ([target[0].double(), target[1]], source, lam, groups, single),
            (target, source, lam, groups, torch.int32),
            (target, source, lam, groups, torch.float64),
        ]
        for arguments in bad:
            with pytest.raises(RuntimeError):
                ops.merge_fwd(*arguments)
        good = [torch.empty_like(t) for t in target]
        for out in (good[:1], [good[0], good[1][:3]], [good[0], good[1].half()], [good[0].T, good[1]]):
            with pytest.raises(RuntimeError):
                ops.merge_out(target, source, lam, groups, out)
        for grad, need_target, need_source in (
            (good[:1], [0], [0]),
            ([good[0], good[1][:3]], [0], [0]),
            ([good[0], good[1].half()], [0], [0]),
            (good, [2], []),
            (good, [], [-1]),
            (good, [1, 1], []),
        ):
            with pytest.raises(RuntimeError):
                ops.merge_bwd(grad, target, source, lam, groups, True, need_target, need_source)
