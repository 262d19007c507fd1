"""The CUDA kernels of adapter, run on the CPU by the host SIMT runtime, against the float64 reference.

They run in the order in which csrc/torch/adapter_cuda.cpp starts them; the library's products are torch's.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import simt_build
import torch
from devices import A10, A100, DEVICES, H100, L4, SMALL, Device
from hypothesis import given, settings
from hypothesis import strategies as st
from simt_tensors import DTYPE_CODES, HALF_DTYPES, GuardedTensors, integers, pointer
from torch import Tensor

from mmkernels.activations import ACTIVATIONS
from mmkernels.ops._common import ACTIVATION_CODES
from mmkernels.ops.adapter import reference
from op_tests import assert_close_to_reference

pytestmark = pytest.mark.skipif(
    simt_build.missing_tools() is not None, reason=str(simt_build.missing_tools())
)

SOURCES = [
    "csrc/cuda/adapter.cu",
    "csrc/cuda/adapter_backward.cu",
    "csrc/cuda/norm_product.cu",
    "csrc/cuda/norm_product_backward.cu",
    "tests/csrc/adapter_shim.cpp",
    "tests/csrc/norm_product_shim.cpp",
]
DTYPES = tuple(DTYPE_CODES)
EPS = 1e-5
# Rows of a partial sum around library products, of dz and of g.
CHUNK = 64
SUM_ROWS = 256


@dataclass
class Problem:
    """Inputs of one call: rows of x and of the gradient `gap` elements apart, `offset` elements past an
    aligned address. residual: "none", "x", "same" (of x's dtype), or "float". parameter_dtype: float32, or
    that of x."""

    dtype: torch.dtype
    shape: tuple[int, int, int]  # rows, width, bottleneck
    activation: str = "gelu"
    norm: bool = True
    bias: bool = True
    residual: str = "x"
    scale: float = 0.5
    gap: int = 0
    offset: int = 0
    mean: float = 0.0
    parameter_dtype: torch.dtype = torch.float32
    device: Device = SMALL
    memory: GuardedTensors = field(default_factory=GuardedTensors)

    def __post_init__(self) -> None:
        rows, width, bottleneck = self.shape
        generator = torch.Generator().manual_seed(rows * 1000 + width)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        def of(values: Tensor) -> Tensor:
            return self.memory.of(values.to(self.dtype), self.offset)[:, :width]

        self.x = of(self.mean + random(rows, width + self.gap))
        self.grad = of(random(rows, width + self.gap))

        def parameter(values: Tensor, offset: int = 0) -> Tensor:
            return self.memory.of(values.to(self.parameter_dtype), offset)

        self.down = parameter(random(bottleneck, width) / max(width, 1) ** 0.5)
        self.up = parameter(random(width, bottleneck) / max(bottleneck, 1) ** 0.5)
        self.down_bias = parameter(random(bottleneck)) if self.bias else None
        # Aligned to an element only.
        self.up_bias = parameter(random(width), 1) if self.bias else None
        self.gain = parameter(1 + 0.1 * random(width)) if self.norm else None
        self.shift = parameter(random(width)) if self.norm and self.bias else None
        other = random(rows, width)
        residuals = {"same": of(other), "float": self.memory.of(other), "x": self.x, "none": None}
        self.added = residuals[self.residual]

    @property
    def sizes(self) -> np.ndarray:
        codes = DTYPE_CODES[self.dtype], ACTIVATION_CODES[self.activation], DTYPE_CODES[self.parameter_dtype]
        return integers(codes[0], *self.shape, *codes[1:])

    @property
    def out_dtype(self) -> torch.dtype:
        return torch.float32 if self.residual == "float" else self.dtype

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.memory.empty(shape, dtype)

    def of(self, values: Tensor) -> Tensor:
        return self.memory.of(values)

    def of_parameters(self, *shape: int) -> Tensor:
        """Memory for one of their gradients."""
        return self.memory.empty(shape, self.parameter_dtype)

    def product(self, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
        """a @ b as the library computes it."""
        return self.of((a.double() @ b.double()).to(dtype))

    @property
    def parameters(self) -> dict[str, Tensor | None]:
        return {
            "down_weight": self.down,
            "down_bias": self.down_bias,
            "up_weight": self.up,
            "up_bias": self.up_bias,
            "norm_weight": self.gain,
            "norm_bias": self.shift,
        }

    def reference(self, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
        """The reference's output in `dtype`, and its gradients by name."""
        accumulate = torch.float64 if dtype == torch.float64 else torch.float32
        leaves = {"x": self.x.detach().to(dtype)}
        leaves |= {name: p.detach().to(accumulate) for name, p in self.parameters.items() if p is not None}
        for leaf in leaves.values():
            leaf.requires_grad_()
        wide = dtype == torch.float64 or self.residual == "float"
        residual = None if self.added is None else self.added.to(accumulate if wide else dtype)
        arguments: dict[str, Any] = {**dict.fromkeys(self.parameters), **leaves}
        out = reference.adapter(
            **arguments,
            residual=leaves["x"] if self.residual == "x" else residual,
            scale=self.scale,
            activation=self.activation,
            eps=EPS,
        )
        gradients = torch.autograd.grad(out, list(leaves.values()), self.grad.to(out.dtype))
        return out.detach(), dict(zip(leaves, gradients, strict=True))


@pytest.fixture(scope="module")
def kernels() -> simt_build.Library:
    return simt_build.load(simt_build.build("adapter", SOURCES, races=True))


@dataclass(frozen=True)
class Folded:
    down: Tensor
    bias: Tensor
    total: Tensor
    up: Tensor
    up_bias: Tensor | None


def fold(kernels: simt_build.Library, problem: Problem, *, order: int = 2) -> Folded:
    """Writes what the other kernels cannot read as it is given."""
    _, width, bottleneck = problem.shape
    new = problem.dtype != problem.parameter_dtype
    new_bias = problem.bias and problem.parameter_dtype != torch.float32
    folded = Folded(
        problem.empty(bottleneck, width, dtype=problem.dtype) if new or problem.norm else problem.down,
        problem.empty(bottleneck),
        problem.empty(bottleneck if problem.norm else 0),
        problem.empty(width, bottleneck, dtype=problem.dtype) if new else problem.up,
        problem.empty(width) if new_bias else problem.up_bias,
    )
    given = [problem.down, problem.down_bias, problem.up, problem.up_bias, problem.gain, problem.shift]
    targets = [folded.down, folded.bias, folded.total, folded.up, folded.up_bias]
    written = [target if all(target is not g for g in given) else None for target in targets]
    kernels.call("adapter_fold", problem.sizes, *map(pointer, [*given, *written]), order=order)
    return folded


def fuses(kernels: simt_build.Library, problem: Problem, *rows: Tensor | None) -> bool:
    result = integers(1)
    for tensor in rows:
        if result[0] and tensor is not None:
            kernels.call("adapter_fuses", problem.sizes, pointer(tensor), tensor.stride(0), result)
    return bool(result[0]) and problem.shape[0] > 0


def rows_of(tensor: Tensor | None) -> tuple[ctypes.c_void_p, int]:
    return pointer(tensor), 0 if tensor is None else tensor.stride(0)


def library_sizes(problem: Problem) -> np.ndarray:
    """Sizes for the steps of norm_product: one tap."""
    dtype, rows, *rest = problem.sizes
    return integers(dtype, rows, 1, *rest)


@dataclass(frozen=True)
class Forward:
    out: Tensor
    hidden: Tensor
    stats: Tensor
    fused: bool


def forward(kernels: simt_build.Library, problem: Problem, *, order: int = 2, save: bool = True) -> Forward:
    rows, width, bottleneck = problem.shape
    residual = problem.added if problem.residual in ("same", "float") else None
    result = Forward(
        problem.empty(rows, width, dtype=problem.out_dtype),
        problem.empty(rows if save else 0, bottleneck, dtype=problem.dtype),
        problem.empty(rows if save and problem.norm else 0, 2),
        fuses(kernels, problem, problem.x, residual),
    )
    folded = fold(kernels, problem, order=order)
    if not result.fused:
        forward_by_products(kernels, problem, folded, result, order)
    else:
        with kernels.on(problem.device):
            kernels.call(
                "adapter_forward",
                problem.sizes,
                problem.scale,
                EPS,
                *rows_of(problem.x),
                *rows_of(residual),
                problem.residual == "x",
                DTYPE_CODES[problem.out_dtype],
                *map(pointer, (folded.down, folded.bias, folded.total, folded.up, folded.up_bias)),
                *map(pointer, (result.out, result.hidden, result.stats)),
                order=order,
            )
    problem.memory.check()
    return result


def forward_by_products(
    kernels: simt_build.Library, problem: Problem, folded: Folded, result: Forward, order: int
) -> None:
    stats = result.stats
    if problem.norm and stats.numel() == 0:
        stats = problem.empty(problem.shape[0], 2)
    sizes = library_sizes(problem)
    if problem.norm:
        strides = integers(problem.x.stride(0), 0)
        kernels.call(
            "norm_product_stats", sizes, pointer(problem.x), strides, EPS, pointer(stats), order=order
        )
    activated = problem.product(problem.x, folded.down.T, problem.dtype)
    finish = (stats, folded.bias, folded.total, activated, result.hidden)
    kernels.call("norm_product_activate", sizes, *map(pointer, finish), order=order)
    sums = problem.product(activated, folded.up.T, torch.float32)
    kernels.call(
        "adapter_finish",
        problem.sizes,
        problem.scale,
        *map(pointer, (sums, folded.up_bias)),
        *rows_of(problem.added),
        *rows_of(None),
        *map(pointer, (None, None)),
        DTYPE_CODES[problem.out_dtype],
        pointer(result.out),
        order=order,
    )


def check_forward(kernels: simt_build.Library, problem: Problem, *, fused: bool | None = None) -> None:
    found = forward(kernels, problem)
    assert fused is None or found.fused == fused
    exact, _ = problem.reference(torch.float64)
    eager, _ = problem.reference(problem.dtype)
    assert found.out.dtype == eager.dtype
    # Hidden values are rounded to the type of x, even if the result is wider.
    assert_close_to_reference(found.out, exact, eager, problem.dtype)
    if problem.norm and problem.x.numel() > 0:
        x = problem.x.double()
        deviation = (x.var(1, correction=0) + EPS).sqrt()
        torch.testing.assert_close(found.stats[:, 0].double(), x.mean(1), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.stats[:, 1].double(), 1 / deviation, rtol=1e-4, atol=0)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(("width", "bottleneck"), [(8, 8), (33, 5), (1100, 12), (64, 1)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_folded_weights(
    kernels: simt_build.Library, dtype: torch.dtype, width: int, bottleneck: int, norm: bool
) -> None:
    problem = Problem(dtype, (1, width, bottleneck), norm=norm)
    found = fold(kernels, problem)
    problem.memory.check()
    down = problem.down.double()
    bias = torch.zeros(bottleneck).double() if problem.down_bias is None else problem.down_bias.double()
    if problem.gain is not None and problem.shift is not None:
        bias = bias + down @ problem.shift.double()
        down = down * problem.gain.double()
        down = down - down.mean(1, keepdim=True)
        torch.testing.assert_close(found.total.double(), found.down.double().sum(1), rtol=1e-5, atol=1e-5)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found.down.double(), down, rtol=eps, atol=1e-6)
    torch.testing.assert_close(found.bias.double(), bias, rtol=1e-5, atol=1e-5)
    assert torch.equal(found.up, problem.up.to(dtype))
    assert found.up_bias is problem.up_bias


# Whole and partial tiles in every dimension, every padded bottleneck, few rows and several tiles per block, a
# last tile with idle warps, and widths that are not held.
FUSED_SHAPES = [
    (1, 8, 8),
    (64, 192, 64),
    (70, 200, 40),
    (400, 136, 64),
    (420, 40, 16),
    (450, 72, 128),
    (33, 264, 104),
    (100, 96, 192),
    (65, 80, 256),
    (5, 1800, 64),
    (200, 1800, 16),
]


@pytest.mark.parametrize("shape", FUSED_SHAPES)
@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_fused_forward(kernels: simt_build.Library, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    check_forward(kernels, Problem(dtype, shape), fused=True)


NARROW = replace(SMALL, shared_per_block=A10.shared_per_block)

# The widest rows, and the plans of smaller GPUs: rings of few slots, for every tile size.
NARROW_SHAPES = [(300, 768, 64), (70, 520, 128), (300, 520, 128), (40, 200, 192), (40, 200, 256)]


@pytest.mark.parametrize("residual", ["x", "none", "same", "float"])
@pytest.mark.parametrize("shape", NARROW_SHAPES)
def test_forward_in_little_shared_memory(
    kernels: simt_build.Library, shape: tuple[int, int, int], residual: str
) -> None:
    problem = Problem(torch.bfloat16, shape, residual=residual, device=NARROW)
    check_forward(kernels, problem, fused=True)


def test_widest_rows(kernels: simt_build.Library) -> None:
    problem = Problem(torch.float16, (20, 4096, 24))
    check_forward(kernels, problem, fused=True)
    check_backward(kernels, problem, fused=True)


PRODUCT_SHAPES = [(17, 33, 21), (20, 24, 264), (3, 64, 12), (300, 20, 12)]


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("shape", PRODUCT_SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_around_library_products(
    kernels: simt_build.Library, dtype: torch.dtype, shape: tuple[int, int, int], norm: bool
) -> None:
    check_forward(kernels, Problem(dtype, shape, norm=norm), fused=False)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("residual", ["none", "x", "same", "float"])
@pytest.mark.parametrize("shape", [(70, 136, 40), (9, 24, 6)])
def test_forward_options(
    kernels: simt_build.Library, shape: tuple[int, int, int], residual: str, norm: bool, bias: bool
) -> None:
    problem = Problem(torch.bfloat16, shape, residual=residual, norm=norm, bias=bias)
    check_forward(kernels, problem, fused=shape[2] % 8 == 0)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("dtype", "shape"), [(torch.float16, (40, 72, 24)), (torch.float32, (9, 24, 6))])
def test_activations(
    kernels: simt_build.Library, dtype: torch.dtype, shape: tuple[int, int, int], activation: str
) -> None:
    problem = Problem(dtype, shape, activation, norm=False)
    check_forward(kernels, problem)
    # Not relu in half precision: rounding may change the sign of z.
    if activation != "relu" or dtype == torch.float32:
        check_backward(kernels, problem)


@pytest.mark.parametrize(("offset", "gap"), [(1, 0), (0, 3), (0, 8), (8, 0), (4, 4)])
@pytest.mark.parametrize("residual", ["x", "same"])
def test_any_alignment(kernels: simt_build.Library, offset: int, gap: int, residual: str) -> None:
    problem = Problem(torch.bfloat16, (20, 64, 16), offset=offset, gap=gap, residual=residual)
    aligned = offset % 8 == 0 and gap % 8 == 0
    check_forward(kernels, problem, fused=aligned)
    check_backward(kernels, problem, fused=aligned)


@pytest.mark.parametrize("shape", [(40, 72, 24), (5, 12, 6)])
def test_forward_saves_nothing_unless_asked(kernels: simt_build.Library, shape: tuple[int, int, int]) -> None:
    problem = Problem(torch.bfloat16, shape)
    bare, saving = (forward(kernels, problem, save=save) for save in (False, True))
    assert bare.hidden.numel() == bare.stats.numel() == 0
    assert torch.equal(bare.out, saving.out)


@pytest.mark.parametrize("shape", [(20, 64, 16), (20, 64, 12)])
def test_a_large_mean_is_not_multiplied_by_rounded_weights(
    kernels: simt_build.Library, shape: tuple[int, int, int]
) -> None:
    # The first product is about mean(x) * sum(row of Vc): uncorrected, the error would be some 30 times this.
    problem = Problem(torch.bfloat16, shape, "none", residual="none", mean=64.0)
    found = forward(kernels, problem).out.double()
    exact, _ = problem.reference(torch.float64)
    assert (found - exact).square().mean().sqrt() < 2**-7 * exact.square().mean().sqrt()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("shape", [(40, 72, 24), (5, 12, 6)])
def test_what_is_not_finite_stays_in_its_row(
    kernels: simt_build.Library, shape: tuple[int, int, int], norm: bool, value: float
) -> None:
    problem = Problem(torch.float16, shape, norm=norm)
    before = forward(kernels, problem).out, backward(kernels, problem)["x"]
    problem.x[3, 5] = value
    problem.grad[3, 2] = value
    after = forward(kernels, problem).out, backward(kernels, problem)["x"]
    others = [row for row in range(shape[0]) if row != 3]
    for clean, poisoned in zip(before, after, strict=True):
        assert not poisoned[3].isfinite().all()
        assert torch.equal(clean[others], poisoned[others])


def test_padding_adds_nothing_to_a_row_with_an_infinity(kernels: simt_build.Library) -> None:
    problem = Problem(torch.float16, (3, 16, 8), "relu", norm=False)
    problem.down.abs_().neg_()
    problem.x[1, 0] = float("inf")
    found, (exact, _) = forward(kernels, problem).out, problem.reference(torch.float64)
    assert torch.equal(found.isfinite(), exact.isfinite())
    torch.testing.assert_close(found[1, 1:], exact[1, 1:].half())


@pytest.mark.parametrize("residual", ["x", "same", "float"])
@pytest.mark.parametrize("shape", [(40, 72, 24), (5, 12, 6)])
def test_zero_up_weight_is_exact(
    kernels: simt_build.Library, shape: tuple[int, int, int], residual: str
) -> None:
    problem = Problem(torch.bfloat16, shape, residual=residual)
    problem.up.zero_()
    assert problem.added is not None
    assert problem.up_bias is not None
    expected = problem.added.float() + problem.scale * problem.up_bias
    assert torch.equal(forward(kernels, problem).out, expected.to(problem.out_dtype))
    problem.up_bias.zero_()
    assert torch.equal(forward(kernels, problem).out, problem.added)
    if residual != "x":
        return
    gradients = backward(kernels, problem)
    assert (gradients["down_weight"] == 0).all()
    assert (gradients["norm_weight"] == 0).all()
    assert torch.equal(gradients["x"], problem.grad)


# ---- backward

ALL = frozenset({"x", "down", "up", "norm"})


@dataclass(frozen=True)
class Rows:
    """Results of the row-wise part of the backward pass; None if not needed."""

    dx: Tensor | None
    activated: Tensor | None
    scaled: Tensor | None
    bias_chunks: int
    partial_bias: Tensor | None
    up_bias_chunks: int
    partial_up_bias: Tensor | None


def backward(
    kernels: simt_build.Library,
    problem: Problem,
    need: frozenset[str] = ALL,
    *,
    order: int = 2,
    fused: bool | None = None,
) -> dict[str, Tensor]:
    """Gradients by name; with `fused`, checks whether the fused kernels run."""
    saved = forward(kernels, problem)
    takes = bool(need - {"up"}) and fuses(kernels, problem, problem.grad, problem.x, saved.hidden)
    assert fused is None or takes == fused
    step = rows_fused if takes else rows_by_products
    rows = step(kernels, problem, saved, need, order)
    found: dict[str, Tensor] = {} if rows.dx is None else {"x": rows.dx}
    if "up" in need:
        found |= up_gradients(kernels, problem, rows, order)
    if need & {"down", "norm"}:
        found |= down_gradients(kernels, problem, rows, "norm" in need and problem.norm, order)
    problem.memory.check()
    return found


def wanted_rows(problem: Problem, need: frozenset[str], chunks: tuple[int, int], need_scaled: bool) -> Rows:
    rows, width, bottleneck = problem.shape
    product = bool(need & {"down", "norm"})
    dtype = problem.dtype
    return Rows(
        problem.empty(rows, width, dtype=dtype) if "x" in need else None,
        problem.empty(rows, bottleneck, dtype=dtype) if "up" in need else None,
        problem.empty(rows, bottleneck, dtype=dtype) if need_scaled else None,
        chunks[0],
        problem.empty(chunks[0], bottleneck) if product else None,
        chunks[1],
        problem.empty(chunks[1], width) if "up" in need else None,
    )


def rows_fused(
    kernels: simt_build.Library, problem: Problem, saved: Forward, need: frozenset[str], order: int
) -> Rows:
    add_input = problem.residual == "x"
    planned = plan(kernels, problem, "x" in need and add_input)
    chunks = planned["tiles"], planned["column_sums"]
    result = wanted_rows(problem, need, chunks, bool(need & {"down", "norm"}))
    folded = fold(kernels, problem, order=order)
    with kernels.on(problem.device):
        kernels.call(
            "adapter_backward",
            problem.sizes,
            problem.scale,
            *rows_of(problem.grad),
            *rows_of(problem.x),
            add_input,
            *map(pointer, (folded.down, folded.bias, folded.up, saved.hidden, saved.stats)),
            *map(pointer, (result.dx, result.activated, result.scaled)),
            *map(pointer, (result.partial_bias, result.partial_up_bias)),
            order=order,
        )
    return result


def rows_by_products(
    kernels: simt_build.Library, problem: Problem, saved: Forward, need: frozenset[str], order: int
) -> Rows:
    rows, _, bottleneck = problem.shape
    chunks = -(-rows // CHUNK)
    need_hidden = bool(need - {"up"})
    result = wanted_rows(problem, need, (chunks, -(-rows // SUM_ROWS)), need_hidden)
    sizes = problem.sizes
    if "up" in need:
        activate = map(pointer, (saved.hidden, result.activated))
        kernels.call("adapter_activate", sizes, problem.scale, *activate, order=order)
        sums = (*rows_of(problem.grad), pointer(result.partial_up_bias))
        kernels.call("adapter_column_sums", sizes, *sums, order=order)
    if not need_hidden:
        return result
    folded = fold(kernels, problem, order=order)
    need_pull = "x" in need and problem.norm
    pull = problem.empty(rows if need_pull else 0)
    partial = problem.empty(chunks, bottleneck) if result.partial_bias is None else result.partial_bias
    d_activated = problem.product(problem.grad, folded.up, problem.dtype)
    kernels.call(
        "adapter_gradient",
        sizes,
        problem.scale,
        *map(pointer, (d_activated, saved.hidden, saved.stats, folded.bias if need_pull else None)),
        *map(pointer, (result.scaled, pull, partial)),
        order=order,
    )
    if result.dx is not None and result.scaled is not None:
        kernels.call(
            "adapter_finish",
            sizes,
            1.0,
            pointer(problem.product(result.scaled, folded.down, torch.float32)),
            pointer(None),
            *rows_of(problem.grad if problem.residual == "x" else None),
            *rows_of(problem.x),
            *map(pointer, (saved.stats, pull)),
            DTYPE_CODES[problem.dtype],
            pointer(result.dx),
            order=order,
        )
    return result


def up_gradients(kernels: simt_build.Library, problem: Problem, rows: Rows, order: int) -> dict[str, Tensor]:
    assert rows.activated is not None
    d_bias = problem.of_parameters(problem.shape[1])
    arguments = (problem.sizes, rows.up_bias_chunks, problem.scale)
    kernels.call("adapter_up_bias", *arguments, pointer(rows.partial_up_bias), pointer(d_bias), order=order)
    product = problem.product(problem.grad.T, rows.activated, problem.parameter_dtype)
    return {"up_weight": product, "up_bias": d_bias}


def test_parts_of_a_bias_gradient_are_added_in_double(kernels: simt_build.Library) -> None:
    problem = Problem(torch.float32, (1, 40, 8))
    partial = problem.of(torch.tensor([2.0**24, 1.0, -(2.0**24)])[:, None].repeat(1, 40))
    found = problem.of_parameters(40)
    kernels.call("adapter_up_bias", problem.sizes, 3, problem.scale, pointer(partial), pointer(found))
    problem.memory.check()
    assert (found == problem.scale).all()


def down_gradients(
    kernels: simt_build.Library, problem: Problem, rows: Rows, norm: bool, order: int
) -> dict[str, Tensor]:
    assert rows.scaled is not None
    _, width, bottleneck = problem.shape
    apart = problem.norm and problem.parameter_dtype != torch.float32
    dtype = torch.float32 if problem.norm else problem.parameter_dtype
    product = problem.product(rows.scaled.T, problem.x, dtype)
    found = {
        "down_weight": problem.of_parameters(bottleneck, width) if apart else product,
        "down_bias": problem.of_parameters(bottleneck),
    }
    if norm:
        found |= {"norm_weight": problem.of_parameters(width), "norm_bias": problem.of_parameters(width)}
    results = (*found.values(), *([] if norm else [None, None]), problem.empty(bottleneck, 2))
    kernels.call(
        "adapter_unfold",
        problem.sizes,
        rows.bias_chunks,
        *map(pointer, (rows.partial_bias, problem.down, problem.gain, problem.shift)),
        pointer(product if problem.norm else None),
        *map(pointer, results),
        order=order,
    )
    return found


def check_backward(
    kernels: simt_build.Library,
    problem: Problem,
    need: frozenset[str] = ALL,
    *,
    fused: bool | None = None,
) -> None:
    found = backward(kernels, problem, need, fused=fused)
    _, exact = problem.reference(torch.float64)
    _, eager = problem.reference(problem.dtype)
    expected = {"x"} if "x" in need else set()
    for group in need - {"x"}:
        expected |= {f"{group}_weight", f"{group}_bias"}
    if "norm" in need:
        expected |= {"down_weight", "down_bias"}
    if not problem.norm:
        expected -= {"norm_weight", "norm_bias"}
    assert set(found) == expected
    for name, value in found.items():
        if name in exact:
            # s and a are rounded to x's type before the products, as eager linear layers round them.
            assert_close_to_reference(value, exact[name], eager[name], problem.dtype, name)


@pytest.mark.parametrize("shape", FUSED_SHAPES)
@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_fused_backward(kernels: simt_build.Library, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    check_backward(kernels, Problem(dtype, shape), fused=True)


@pytest.mark.parametrize("residual", ["x", "none"])
@pytest.mark.parametrize("shape", NARROW_SHAPES)
def test_backward_in_little_shared_memory(
    kernels: simt_build.Library, shape: tuple[int, int, int], residual: str
) -> None:
    problem = Problem(torch.bfloat16, shape, residual=residual, device=NARROW)
    check_backward(kernels, problem, fused=True)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("shape", PRODUCT_SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_around_library_products(
    kernels: simt_build.Library, dtype: torch.dtype, shape: tuple[int, int, int], norm: bool
) -> None:
    check_backward(kernels, Problem(dtype, shape, norm=norm), fused=False)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("residual", ["none", "x", "same"])
@pytest.mark.parametrize("shape", [(70, 136, 40), (9, 24, 6)])
def test_backward_options(
    kernels: simt_build.Library, shape: tuple[int, int, int], residual: str, norm: bool, bias: bool
) -> None:
    problem = Problem(torch.bfloat16, shape, residual=residual, norm=norm, bias=bias)
    check_backward(kernels, problem, fused=shape[2] % 8 == 0)


# ---- parameters in the type of x


def with_wide_parameters(problem: Problem) -> Problem:
    """The same call with parameters of the same values in float32."""
    wide = replace(problem, parameter_dtype=torch.float32, memory=GuardedTensors())
    for name, parameter in problem.parameters.items():
        target = wide.parameters[name]
        assert (target is None) == (parameter is None)
        if target is not None and parameter is not None:
            target.copy_(parameter)
    return wide


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("shape", [(70, 136, 40), (300, 24, 8), (9, 24, 6), (7, 33, 5)])
@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_narrow_parameters(
    kernels: simt_build.Library, dtype: torch.dtype, shape: tuple[int, int, int], norm: bool, bias: bool
) -> None:
    """The bits are those of the same values in float32; a gradient is rounded once."""
    problem = Problem(dtype, shape, "silu", norm=norm, bias=bias, parameter_dtype=dtype)
    wide = with_wide_parameters(problem)
    found, expected = fold(kernels, problem), fold(kernels, wide)
    assert found.up is problem.up
    assert (found.down is problem.down) != norm
    for name in ("down", "bias", "total", "up"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    if bias:
        assert found.up_bias is not None
        assert wide.up_bias is not None
        assert torch.equal(found.up_bias, wide.up_bias)
    check_forward(kernels, problem, fused=shape[2] % 8 == 0)
    for name in ("out", "hidden", "stats"):
        assert torch.equal(getattr(forward(kernels, problem), name), getattr(forward(kernels, wide), name))
    gradients, sums = backward(kernels, problem), backward(kernels, wide)
    assert gradients.keys() == sums.keys()
    for name, gradient in gradients.items():
        assert gradient.dtype == dtype
        assert torch.equal(gradient, sums[name].to(dtype)), name


@pytest.mark.parametrize("offset", [1, 2, 4])
def test_narrow_weights_at_any_address_are_copied(kernels: simt_build.Library, offset: int) -> None:
    """The fused kernels copy 16 bytes at a time."""
    problem = Problem(torch.bfloat16, (5, 72, 24), norm=False, parameter_dtype=torch.bfloat16)
    up = problem.memory.of(problem.up, offset)
    target = problem.empty(72, 24, dtype=torch.bfloat16)
    bias = problem.empty(24)
    arguments = (problem.down, None, up, None, None, None, None, bias, None, target, None)
    kernels.call("adapter_fold", problem.sizes, *map(pointer, arguments))
    problem.memory.check()
    assert torch.equal(target, problem.up)
    assert (bias == 0).all()


def test_a_narrow_bias_without_hidden_units(kernels: simt_build.Library) -> None:
    problem = Problem(torch.bfloat16, (3, 600, 0), parameter_dtype=torch.bfloat16, residual="none")
    assert problem.up_bias is not None
    folded = fold(kernels, problem)
    assert folded.up_bias is not None
    assert torch.equal(folded.up_bias, problem.up_bias.float())
    expected = (problem.scale * problem.up_bias.float()).bfloat16().expand(3, 600)
    assert torch.equal(forward(kernels, problem).out, expected)


SUBSETS = [s for n in range(1, 4) for s in combinations(sorted(ALL), n)]


@pytest.mark.parametrize("need", [frozenset(s) for s in SUBSETS], ids=["-".join(s) for s in SUBSETS])
@pytest.mark.parametrize("shape", [(200, 72, 24), (9, 24, 6)])
def test_backward_computes_what_is_asked_for(
    kernels: simt_build.Library, shape: tuple[int, int, int], need: frozenset[str]
) -> None:
    problem = Problem(torch.bfloat16, shape)
    check_backward(kernels, problem, need, fused=shape[2] % 8 == 0 and need != {"up"})


# ---- both


#: Gradients with sums of the plan's tiles: d_bias, and of norm_bias and down_weight the terms with d_bias.
SUMS_OF_TILES = {"down_bias", "up_bias", "norm_bias", "down_weight"}
SLICE = replace(H100, name="slice", multiprocessors=7)


@pytest.mark.parametrize("device", [H100, A100, A10, L4, SLICE], ids=lambda device: device.name)
@pytest.mark.parametrize("shape", [(300, 64, 24), (140, 40, 200)])
def test_only_sums_of_tiles_depend_on_the_device(
    kernels: simt_build.Library, shape: tuple[int, int, int], device: Device
) -> None:
    here, there = Problem(torch.bfloat16, shape), Problem(torch.bfloat16, shape, device=device)
    assert plan(kernels, here, True)["blocks"] != plan(kernels, there, True)["blocks"]
    check_backward(kernels, there, fused=True)
    one, other = forward(kernels, here), forward(kernels, there)
    for name in ("out", "hidden", "stats"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    gradients = backward(kernels, here), backward(kernels, there)
    differ = {name for name, value in gradients[0].items() if not torch.equal(value, gradients[1][name])}
    # The docstring of mmkernels.adapter names exactly these.
    assert {"down_bias"} <= differ <= SUMS_OF_TILES


@pytest.mark.parametrize("shape", [(140, 72, 40), (300, 40, 128), (70, 72, 200), (9, 24, 6)])
def test_results_are_the_same_in_all_thread_orders(
    kernels: simt_build.Library, shape: tuple[int, int, int]
) -> None:
    problem = Problem(torch.bfloat16, shape)

    def run(order: int) -> np.ndarray:
        saved = forward(kernels, problem, order=order)
        tensors = [saved.out, saved.hidden, saved.stats, *backward(kernels, problem, order=order).values()]
        return np.concatenate([t.contiguous().view(torch.uint8).flatten().numpy() for t in tensors])

    simt_build.same_in_all_orders(run)


@pytest.mark.parametrize("bottleneck", [64, 128])
def test_a_row_does_not_depend_on_the_others(kernels: simt_build.Library, bottleneck: int) -> None:
    # Tiles of 128 rows, and of 64 for the first rows alone.
    many, few = (Problem(torch.float16, (rows, 136, bottleneck)) for rows in (300, 50))
    for name in ("x", "grad"):
        getattr(few, name).copy_(getattr(many, name)[:50])
    for name, parameter in few.parameters.items():
        other = many.parameters[name]
        assert parameter is not None
        assert other is not None
        parameter.copy_(other)
    assert plan(kernels, many, True)["tile_rows"] != plan(kernels, few, True)["tile_rows"]
    assert torch.equal(forward(kernels, many).out[:50], forward(kernels, few).out)
    assert torch.equal(backward(kernels, many)["x"][:50], backward(kernels, few)["x"])


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("shape", [(0, 16, 8), (3, 16, 0), (3, 0, 8), (0, 0, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_empty_problems(
    kernels: simt_build.Library, dtype: torch.dtype, shape: tuple[int, int, int], norm: bool
) -> None:
    problem = Problem(dtype, shape, norm=norm)
    check_forward(kernels, problem, fused=False)
    check_backward(kernels, problem, fused=False)


PLAN = (
    "tile_rows",
    "rows_per_block",
    "tiles_per_block",
    "blocks",
    "chunk_columns",
    "held",
    "shared_bytes",
    "tiles",
    "column_sums",
)


def plan(kernels: simt_build.Library, problem: Problem, hold: bool) -> dict[str, int]:
    return plan_of(kernels, problem.shape, hold, problem.device)


def plan_of(
    kernels: simt_build.Library, shape: tuple[int, int, int], hold: bool, device: Device
) -> dict[str, int]:
    values = integers(*[0] * len(PLAN))
    with kernels.on(device):
        kernels.call("adapter_plan", integers(DTYPE_CODES[torch.bfloat16], *shape, 0), hold, values)
    return dict(zip(PLAN, values.tolist(), strict=True))


#: Whole GPUs, and slices of one.
COUNTS = sorted({device.multiprocessors for device in DEVICES} | {7, 14, 16})


@settings(deadline=None)  # a time limit fails on a busy machine
@given(
    rows=st.integers(1, 2**40),
    width=st.integers(1, 512).map(lambda n: 8 * n),
    bottleneck=st.integers(1, 32).map(lambda n: 8 * n),
    hold=st.booleans(),
    multiprocessors=st.sampled_from(COUNTS) | st.integers(1, 170),
    device=st.sampled_from(DEVICES),
)
def test_plans_fit_and_cover_all_rows(
    kernels: simt_build.Library,
    rows: int,
    width: int,
    bottleneck: int,
    hold: bool,
    multiprocessors: int,
    device: Device,
) -> None:
    device = replace(device, multiprocessors=multiprocessors)
    found = plan_of(kernels, (rows, width, bottleneck), hold, device)
    assert found["shared_bytes"] <= device.shared_per_block
    assert 1 <= found["blocks"] <= multiprocessors
    assert (found["blocks"] - 1) * found["rows_per_block"] < rows <= found["blocks"] * found["rows_per_block"]
    # No block has 16 rows more than the average, or more than the 32 of one warp.
    assert found["rows_per_block"] <= max(32, -(-rows // multiprocessors) + 15)
    assert 0 <= found["tiles_per_block"] * found["tile_rows"] - found["rows_per_block"] < found["tile_rows"]
    assert hold or not found["held"]


def test_the_plan_of_an_audio_transformer_on_each_gpu(kernels: simt_build.Library) -> None:
    shape = (38_848, 768, 64)
    h100 = plan_of(kernels, shape, True, H100)
    assert (h100["tile_rows"], h100["held"], h100["shared_bytes"]) == (128, 1, 230_400)
    assert (h100["blocks"], h100["tiles_per_block"]) == (128, 3)
    a100 = plan_of(kernels, shape, True, A100)
    assert (a100["tile_rows"], a100["held"]) == (64, 1)
    l4 = plan_of(kernels, shape, True, L4)
    assert (l4["tile_rows"], l4["held"]) == (128, 0)
