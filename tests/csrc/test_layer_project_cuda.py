"""The CUDA kernels of layer_project, run on the CPU by the host SIMT runtime, against the float64 reference.

The library's products, which run between the kernels on a GPU, are torch's here.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import simt_build
import torch
from devices import A100, H100, LEAST_SHARED, RESERVED_SHARED
from hypothesis import given, settings
from hypothesis import strategies as st
from simt_tensors import DTYPE_CODES, HALF_DTYPES, GuardedTensors, integers, pointer
from torch import Tensor

from mmkernels._library import compiled_module
from mmkernels.activations import ACTIVATIONS
from mmkernels.ops._common import ACTIVATION_CODES
from mmkernels.ops.layer_project import reference
from op_tests import assert_close_to_reference

pytestmark = pytest.mark.skipif(
    simt_build.missing_tools() is not None, reason=str(simt_build.missing_tools())
)

SOURCES = [
    "csrc/cuda/layer_project.cu",
    "csrc/cuda/norm_product.cu",
    "csrc/cuda/norm_product_backward.cu",
    "tests/csrc/layer_project_shim.cpp",
    "tests/csrc/norm_product_shim.cpp",
]
DTYPES = tuple(DTYPE_CODES)
EPS = 1e-5
CHUNK = 64


@dataclass
class Problem:
    """Inputs of one call: rows `gap` elements apart, `offset` elements past an aligned address.
    parameter_dtype: float32, or that of x."""

    dtype: torch.dtype
    shape: tuple[int, int, int]
    outputs: int
    activation: str = "relu"
    norm: bool = True
    bias: bool = True
    offset: int = 0
    gap: int = 0
    mean: float = 0.0
    parameter_dtype: torch.dtype = torch.float32
    memory: GuardedTensors = field(default_factory=GuardedTensors)

    def __post_init__(self) -> None:
        rows, taps, inputs = self.shape
        generator = torch.Generator().manual_seed(rows * 1000 + inputs)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        values = (self.mean + random(rows, taps, inputs + self.gap)).to(self.dtype)
        self.x = self.memory.of(values, self.offset)[:, :, :inputs]

        def parameter(values: Tensor) -> Tensor:
            return self.memory.of(values.to(self.parameter_dtype))

        self.weight = parameter(random(taps, self.outputs, inputs) / max(inputs, 1) ** 0.5)
        self.b = parameter(random(taps, self.outputs)) if self.bias else None
        self.gain = parameter(1 + 0.1 * random(taps, inputs)) if self.norm else None
        self.shift = parameter(random(taps, inputs)) if self.norm and self.bias else None
        self.grad = self.memory.of(random(rows, taps, self.outputs).to(self.dtype))

    @property
    def sizes(self) -> np.ndarray:
        codes = DTYPE_CODES[self.dtype], ACTIVATION_CODES[self.activation], DTYPE_CODES[self.parameter_dtype]
        return integers(codes[0], *self.shape, self.outputs, *codes[1:])

    @property
    def strides(self) -> np.ndarray:
        return integers(*self.x.stride()[:2])

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.memory.empty(shape, dtype)

    def of_parameters(self, *shape: int) -> Tensor:
        """Memory for one of their gradients."""
        return self.memory.empty(shape, self.parameter_dtype)

    @property
    def parameters(self) -> dict[str, Tensor | None]:
        return {
            "weight": self.weight,
            "bias": self.b,
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
        y = reference.layer_project(**leaves, eps=EPS, activation=self.activation)
        gradients = torch.autograd.grad(y, list(leaves.values()), self.grad.to(dtype))
        return y.detach(), dict(zip(leaves, gradients, strict=True))


@pytest.fixture(scope="module")
def kernels() -> simt_build.Library:
    return simt_build.load(simt_build.build("layer_project", SOURCES, races=True))


@dataclass(frozen=True)
class Forward:
    y: Tensor
    value: Tensor
    stats: Tensor
    folded_weight: Tensor
    folded_bias: Tensor
    fused: bool


def forward(kernels: simt_build.Library, problem: Problem, *, order: int = 2) -> Forward:
    rows, taps, inputs = problem.shape
    outputs, dtype = problem.outputs, problem.dtype
    saves_value = problem.activation not in ("none", "relu")
    y = problem.empty(rows, taps, outputs, dtype=dtype)
    value = problem.empty(rows if saves_value else 0, taps, outputs, dtype=dtype)
    stats = problem.empty(rows if problem.norm else 0, taps, 2)
    as_it_is = not problem.norm and dtype == problem.parameter_dtype
    folded_weight = problem.weight if as_it_is else problem.empty(taps, outputs, inputs, dtype=dtype)
    folded_bias = problem.empty(taps, outputs)
    folded_sum = problem.empty(taps if problem.norm else 0, outputs)
    parameters = map(pointer, (problem.weight, problem.b, problem.gain, problem.shift))
    folded = map(pointer, (None if as_it_is else folded_weight, folded_bias, folded_sum))
    kernels.call("norm_product_fold", problem.sizes, *parameters, *folded, order=order)
    x = (problem.sizes, pointer(problem.x), problem.strides)
    if problem.norm:
        kernels.call("norm_product_stats", *x, EPS, pointer(stats), order=order)
    fused = integers(0)
    kernels.call("project_fuses", *x, fused)
    finish = map(pointer, (stats, folded_bias, folded_sum, y, value))
    if fused[0]:
        kernels.call("project_product", *x, pointer(folded_weight), *finish, order=order)
    else:
        product = torch.einsum("nlc,loc->nlo", problem.x.double(), folded_weight.double())
        y.copy_(product)
        kernels.call("norm_product_activate", problem.sizes, *finish, order=order)
    problem.memory.check()
    return Forward(y, value if saves_value else y, stats, folded_weight, folded_bias, bool(fused[0]))


def check_forward(kernels: simt_build.Library, problem: Problem, *, fused: bool | None = None) -> None:
    found = forward(kernels, problem)
    assert fused is None or found.fused == fused
    exact, _ = problem.reference(torch.float64)
    eager, _ = problem.reference(problem.dtype)
    assert_close_to_reference(found.y, exact, eager, problem.dtype)


# Whole and partial tiles in every dimension, both tile widths, fewer and more steps than tiles in a block.
FUSED_SHAPES = [
    ((1, 1, 8), 8),
    ((128, 1, 32), 128),
    ((130, 2, 40), 72),
    ((3, 2, 200), 64),
    ((40, 1, 96), 136),
    ((20, 1, 456), 72),
]


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(("shape", "outputs"), FUSED_SHAPES)
@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_fused_forward(
    kernels: simt_build.Library, dtype: torch.dtype, shape: tuple[int, int, int], outputs: int, norm: bool
) -> None:
    check_forward(kernels, Problem(dtype, shape, outputs, norm=norm), fused=True)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(("shape", "outputs"), [((5, 2, 33), 7), ((3, 1, 64), 12), ((2, 3, 1), 1)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_around_the_library_product(
    kernels: simt_build.Library, dtype: torch.dtype, shape: tuple[int, int, int], outputs: int, norm: bool
) -> None:
    check_forward(kernels, Problem(dtype, shape, outputs, norm=norm), fused=False)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_activations(kernels: simt_build.Library, dtype: torch.dtype, activation: str) -> None:
    check_forward(kernels, Problem(dtype, (9, 2, 48), 40, activation, bias=False))


@pytest.mark.parametrize(("offset", "gap"), [(1, 0), (0, 3), (0, 8), (8, 0)])
def test_forward_of_any_alignment(kernels: simt_build.Library, offset: int, gap: int) -> None:
    aligned = offset % 8 == 0 and gap % 8 == 0
    check_forward(kernels, Problem(torch.bfloat16, (9, 3, 64), 16, offset=offset, gap=gap), fused=aligned)


@pytest.mark.parametrize("inputs", [16, 33, 1032, 1288, 4104])
def test_statistics_are_those_of_the_rows(kernels: simt_build.Library, inputs: int) -> None:
    problem = Problem(torch.float16, (2, 2, inputs), 8)
    x = problem.x.double()
    rstd = (x.var(-1, unbiased=False) + EPS).rsqrt()
    expected = torch.stack([x.mean(-1), rstd], -1).float()
    torch.testing.assert_close(forward(kernels, problem).stats, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("outputs", [8, 7])
def test_a_large_mean_is_not_multiplied_by_rounded_weights(kernels: simt_build.Library, outputs: int) -> None:
    # The product is about mean(x) * sum(row of Vc): uncorrected, the error would be some 30 times this.
    problem = Problem(torch.bfloat16, (16, 1, 64), outputs, "none", mean=64.0)
    found = forward(kernels, problem).y.double()
    exact, _ = problem.reference(torch.float64)
    assert (found - exact).square().mean().sqrt() < 2**-7 * exact.square().mean().sqrt()


def backward(
    kernels: simt_build.Library, problem: Problem, *, need_x: bool, need_product: bool, order: int = 2
) -> dict[str, Tensor]:
    rows, taps, inputs = problem.shape
    outputs, dtype = problem.outputs, problem.dtype
    saved = forward(kernels, problem)
    need_pull = need_x and problem.norm
    scaled = problem.empty(rows, taps, outputs, dtype=dtype)
    pull = problem.empty(rows if need_pull else 0, taps)
    chunks = -(-rows // CHUNK)
    partial_bias = problem.empty(chunks, taps, outputs)
    gradient = (problem.grad, saved.value, saved.stats, saved.folded_bias, scaled, pull, partial_bias)
    kernels.call("norm_product_gradient", problem.sizes, *map(pointer, gradient), order=order)
    found: dict[str, Tensor] = {}
    if need_x:
        dx = problem.empty(*problem.shape, dtype=dtype)
        dx.copy_(torch.einsum("nlo,loc->nlc", scaled.double(), saved.folded_weight.double()))
        if need_pull:
            x = problem.sizes, pointer(problem.x), problem.strides
            kernels.call(
                "norm_product_input_gradient", *x, *map(pointer, (saved.stats, pull, dx)), order=order
            )
        found["x"] = dx
    d_weight = problem.of_parameters(taps if need_product else 0, outputs, inputs)
    apart = problem.norm and problem.parameter_dtype != torch.float32
    product = problem.empty(*d_weight.shape) if apart else d_weight
    if need_product:
        product.copy_(torch.einsum("nlo,nlc->loc", scaled.double(), problem.x.double()))
        found["weight"] = d_weight
    found["bias"] = problem.of_parameters(taps, outputs)
    norm_taps = taps if problem.norm else 0
    d_gain, d_shift = (problem.of_parameters(norm_taps, inputs) for _ in range(2))
    row_sums = problem.empty(taps, outputs, 2)
    inputs_of_unfold = (partial_bias, problem.weight, problem.gain, problem.shift)
    results = (product if problem.norm else None, d_weight, found["bias"], d_gain, d_shift, row_sums)
    kernels.call("norm_product_unfold", problem.sizes, *map(pointer, inputs_of_unfold + results), order=order)
    problem.memory.check()
    if problem.norm and need_product:
        found["norm_weight"] = d_gain
    if problem.norm:
        found["norm_bias"] = d_shift
    return found


def check_backward(
    kernels: simt_build.Library, problem: Problem, *, need_x: bool = True, need_product: bool = True
) -> None:
    found = backward(kernels, problem, need_x=need_x, need_product=need_product)
    _, exact = problem.reference(torch.float64)
    _, eager = problem.reference(problem.dtype)
    for name, value in found.items():
        if name in exact:
            # g is rounded to x's type before the products, as eager linear layers round it.
            assert_close_to_reference(value, exact[name], eager[name], problem.dtype, name)


# Rows of one and of two chunks, outputs of one and of two column tiles, partial vectors.
BACKWARD_SHAPES = [((5, 2, 33), 7), ((9, 3, 64), 24), ((300, 1, 8), 16), ((2, 1, 40), 264)]


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(("shape", "outputs"), BACKWARD_SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_backward(
    kernels: simt_build.Library, dtype: torch.dtype, shape: tuple[int, int, int], outputs: int, norm: bool
) -> None:
    # Not relu in half precision: rounding may change the sign of z.
    activation = "relu" if dtype == torch.float32 else "silu"
    check_backward(kernels, Problem(dtype, shape, outputs, activation, norm=norm))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_backward_activations(kernels: simt_build.Library, dtype: torch.dtype, activation: str) -> None:
    check_backward(kernels, Problem(dtype, (9, 2, 48), 40, activation))


@pytest.mark.parametrize(("need_x", "need_product"), [(True, False), (False, True), (False, False)])
def test_backward_computes_what_is_asked_for(
    kernels: simt_build.Library, need_x: bool, need_product: bool
) -> None:
    problem = Problem(torch.float32, (6, 2, 24), 16)
    check_backward(kernels, problem, need_x=need_x, need_product=need_product)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(("shape", "outputs"), [((5, 2, 33), 7), ((30, 3, 64), 24), ((300, 1, 12), 9)])
@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_narrow_parameters(
    kernels: simt_build.Library,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    outputs: int,
    norm: bool,
    bias: bool,
) -> None:
    """Of the type of x: the bits are those of the same values in float32, and a gradient is rounded once."""
    problem = Problem(dtype, shape, outputs, "silu", norm=norm, bias=bias, parameter_dtype=dtype)
    wide = replace(problem, parameter_dtype=torch.float32, memory=GuardedTensors())
    for name, parameter in problem.parameters.items():
        target = wide.parameters[name]
        if parameter is not None and target is not None:
            target.copy_(parameter)
    check_forward(kernels, problem)
    found, expected = forward(kernels, problem), forward(kernels, wide)
    for name in ("y", "value", "stats", "folded_weight", "folded_bias"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    gradients = backward(kernels, problem, need_x=True, need_product=True)
    sums = backward(kernels, wide, need_x=True, need_product=True)
    assert gradients.keys() == sums.keys()
    for name, gradient in gradients.items():
        assert gradient.dtype == dtype
        assert torch.equal(gradient, sums[name].to(dtype)), name


def test_results_are_the_same_in_all_thread_orders(kernels: simt_build.Library) -> None:
    problem = Problem(torch.bfloat16, (140, 2, 48), 72, "gelu")

    def run(order: int) -> np.ndarray:
        found = backward(kernels, problem, need_x=True, need_product=True, order=order)
        tensors = [forward(kernels, problem, order=order).y, *found.values()]
        return np.concatenate([t.contiguous().view(torch.uint8).flatten().numpy() for t in tensors])

    simt_build.same_in_all_orders(run)


def launch_of(kernels: simt_build.Library, name: str, *arguments: object) -> simt_build.Launch:
    """What a launcher asks for, without running it."""
    with kernels.recording(run=False) as launches:
        kernels.call(name, *arguments)
    return launches[0]


@pytest.mark.parametrize("outputs", [64, 512])
def test_two_blocks_of_the_product_share_a_multiprocessor(kernels: simt_build.Library, outputs: int) -> None:
    """Of 256 threads, on GPUs with the shared memory of an A100 or more; one fits any other."""
    memory = ctypes.c_void_p(1 << 20)  # an aligned address that no launcher reads
    sizes = integers(DTYPE_CODES[torch.bfloat16], 4096, 12, 1024, outputs, 1)
    launch = launch_of(kernels, "project_product", sizes, memory, integers(12 * 1024, 1024), *[memory] * 6)
    assert launch.threads == 256
    for device in (A100, H100):
        assert 2 * (launch.dynamic_shared + RESERVED_SHARED) <= device.shared_per_multiprocessor
    assert launch.dynamic_shared <= LEAST_SHARED


def test_the_gradient_of_a_small_batch_fills_a_gpu(kernels: simt_build.Library) -> None:
    """Five blocks of 128 threads on each multiprocessor have 80 KB of rows in flight."""
    memory = ctypes.c_void_p(1 << 20)
    sizes = integers(DTYPE_CODES[torch.bfloat16], 4096, 12, 1024, 512, 1)
    launch = launch_of(kernels, "norm_product_gradient", sizes, *[memory] * 7)
    assert launch.blocks * launch.threads >= 5 * 128 * H100.multiprocessors


@pytest.mark.parametrize("shape", [(0, 2, 8), (3, 0, 8)])
def test_empty_problems(kernels: simt_build.Library, shape: tuple[int, int, int]) -> None:
    found = backward(kernels, Problem(torch.bfloat16, shape, 8), need_x=True, need_product=True)
    assert all((t == 0).all() for name, t in found.items() if name != "x")


_C = compiled_module()


@pytest.mark.skipif(_C is None, reason="mmkernels._C is not built")
@settings(deadline=None)  # a time limit fails on a busy machine
@given(st.integers(0, 2**36), st.integers(1, 64), st.integers(0, 2**16))
def test_tiles_cover_the_result_once(rows: int, taps: int, outputs: int) -> None:
    assert _C is not None
    tiles = _C.layer_project_tiles(rows, taps, outputs)
    for size, tile, count in [
        (rows, tiles["tile_rows"], tiles["row_tiles"]),
        (outputs, tiles["tile_outputs"], tiles["output_tiles"]),
    ]:
        assert (count - 1) * tile < size <= count * tile or (size == 0 and count == 0)
    assert tiles["blocks"] == tiles["row_tiles"] * tiles["output_tiles"] * taps
    # A GPU accepts 2^31 - 1 blocks; a result that needs more would not fit its memory.
    assert tiles["blocks"] < 2**31 or rows * taps * outputs > 2**36
