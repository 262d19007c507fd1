from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

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
    """A pair has the bits that it has in a call of its own."""
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
        "scalars_and_nothing": {"sizes": [(), (0, 3), (4,), (2, 0)], "entries": 1},
    },
    zero_cases={
        "no_elements": {"sizes": [(0,), (3, 0)]},
        "one_group_of_nothing": {"sizes": [(0, 2), (3, 2)]},
    },
    raw=raw,
    shapes=shapes,
    alone=alone,
    dynamic=({"sizes": [(5, 4), (3, 2)], "groups": [1, 0]}, {"sizes": [(6, 7), (4, 5)], "groups": [1, 0]}),
    activations=("target", "source"),
)
TestMerge = op_tests(SPEC)
