"""The CUDA kernels of layer_mix, run on the CPU by the host SIMT runtime, against the float64 reference."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

import simt_build
from mmkernels.ops.layer_mix import reference
from mmkernels.testing import assert_close_to_reference
from simt_tensors import DTYPE_CODES, HALF_DTYPES, GuardedTensors, integers, pointer, pointers

pytestmark = pytest.mark.skipif(
    simt_build.missing_tools() is not None, reason=str(simt_build.missing_tools())
)

SOURCES = ["csrc/cuda/layer_mix.cu", "tests/csrc/simt/layer_mix_shim.cpp"]
DTYPES = tuple(DTYPE_CODES)
EPS = 1e-5


@dataclass
class Problem:
    """Inputs of one call. Layers lie in guarded memory, `gap` elements apart, from `offset` elements behind an aligned address."""

    dtype: torch.dtype
    shape: tuple[int, int, int]
    layers: int
    norm: bool = False
    affine: bool = False
    lengths: tuple[int, ...] | None = None
    offset: int = 0
    gap: int = 0
    mean: float = 0.0
    memory: GuardedTensors = field(default_factory=GuardedTensors)

    def __post_init__(self) -> None:
        batch, frames, width = self.shape
        generator = torch.Generator().manual_seed(frames * 1000 + width)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        self.inputs: list[Tensor] = []
        for _ in range(self.layers):
            values = (self.mean + random(batch, frames, width + self.gap)).to(self.dtype)
            layer = self.memory.of(values, self.offset)[:, :, :width]
            if self.lengths is not None:
                for index, length in enumerate(self.lengths):
                    layer[index, max(length, 0) :] = torch.nan
            self.inputs.append(layer)
        self.weights = self.memory.of(random(self.layers))
        self.gain = self.memory.of(1 + 0.1 * random(self.layers, width)) if self.affine else None
        self.bias = self.memory.of(random(self.layers, width)) if self.affine else None
        self.grad = self.memory.of(random(batch, frames, width + self.gap).to(self.dtype), self.offset)[
            :, :, :width
        ]
        self.counts = None if self.lengths is None else torch.tensor(self.lengths, dtype=torch.int64)

    def common_arguments(self) -> tuple[object, ...]:
        sizes = integers(DTYPE_CODES[self.dtype], self.layers, *self.shape, self.norm)
        strides = integers(*(s for layer in self.inputs for s in layer.stride()[:2]))
        parameters = (pointer(t) for t in (self.counts, self.weights, self.gain, self.bias))
        return sizes, pointers(self.inputs), strides, *parameters

    def reference(self, dtype: torch.dtype, *, grads: bool = False) -> tuple[Tensor, list[Tensor]]:
        """The reference's output in `dtype`; with `grads` also those of weights, gain, bias and the layers."""
        accumulate = torch.float64 if dtype == torch.float64 else torch.float32
        layers = [layer.detach().to(dtype).requires_grad_(grads) for layer in self.inputs]
        parameters = [self.weights, self.gain, self.bias]
        weights, gain, bias = (
            None if p is None else p.detach().to(accumulate).requires_grad_(grads) for p in parameters
        )
        counts = None if self.counts is None else self.counts.clamp(0, self.shape[1])
        assert weights is not None
        out = reference.layer_mix(
            layers, weights, norm=self.norm, eps=EPS, norm_weight=gain, norm_bias=bias, lengths=counts
        )
        if not grads:
            return out, []
        wanted = [p for p in (weights, gain, bias) if p is not None] + layers
        return out, list(torch.autograd.grad(out, wanted, self.grad.to(dtype)))


@pytest.fixture(scope="module")
def kernels() -> simt_build.Library:
    return simt_build.load(simt_build.build("layer_mix", SOURCES))


def forward(
    kernels: simt_build.Library, problem: Problem, *, save_stats: bool = False, order: int = 2
) -> tuple[Tensor, Tensor]:
    batch, frames, width = problem.shape
    out = problem.memory.empty(problem.shape, problem.dtype)
    stats = problem.memory.empty((batch * frames if save_stats else 0, problem.layers, 2), torch.float32)
    mixed_bias = problem.memory.empty((width if problem.affine else 0,), torch.float32)
    kernels.call(
        "layer_mix_forward",
        *problem.common_arguments(),
        EPS,
        *map(pointer, (out, stats, mixed_bias)),
        order=order,
    )
    problem.memory.check()
    return out, stats


def check_forward(kernels: simt_build.Library, problem: Problem) -> None:
    out, _ = forward(kernels, problem)
    exact, _ = problem.reference(torch.float64)
    eager, _ = problem.reference(problem.dtype)
    assert_close_to_reference(out, exact, eager, problem.dtype)


PLAIN_SHAPES = [((1, 3, 8), 1), ((2, 5, 72), 5), ((3, 2, 33), 13), ((2, 1, 1), 3), ((1, 2, 264), 64)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "layers"), PLAIN_SHAPES)
def test_forward_without_norm(
    kernels: simt_build.Library, dtype: torch.dtype, shape: tuple[int, int, int], layers: int
) -> None:
    check_forward(kernels, Problem(dtype, shape, layers))


# One width for each row shape: a warp with 1 to 5 vectors, a block, rows too wide for registers; and ragged ones of each.
NORM_WIDTHS = [8, 256, 264, 760, 1024, 1280, 1288, 4096, 4104, 1, 33, 511, 513, 4099]


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("width", NORM_WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_with_norm(kernels: simt_build.Library, dtype: torch.dtype, width: int, affine: bool) -> None:
    check_forward(kernels, Problem(dtype, (1, 3, width), 3, norm=True, affine=affine))


@pytest.mark.parametrize("layers", [1, 2, 7, 8, 25, 64])
def test_forward_with_norm_of_many_layers(kernels: simt_build.Library, layers: int) -> None:
    check_forward(kernels, Problem(torch.float16, (1, 2, 40), layers, norm=True, affine=True))


@pytest.mark.parametrize("width", [64, 2048, 4104])
def test_a_large_mean_costs_little_precision(kernels: simt_build.Library, width: int) -> None:
    problem = Problem(torch.float32, (1, 2, width), 2, norm=True, mean=1000.0)
    out, _ = forward(kernels, problem)
    # The mean itself is rounded to float32; a variance of differences of squares would be wrong in the first digit.
    rounding = 1000.0 * torch.finfo(torch.float32).eps * problem.weights.abs().sum().item()
    assert (out - problem.reference(torch.float64)[0]).abs().max() < 2 * rounding


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize(("offset", "gap"), [(1, 0), (0, 3), (0, 8), (8, 0), (2, 6)])
def test_forward_of_any_alignment(
    kernels: simt_build.Library, dtype: torch.dtype, offset: int, gap: int, norm: bool
) -> None:
    check_forward(kernels, Problem(dtype, (2, 3, 64), 3, norm=norm, affine=norm, offset=offset, gap=gap))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("width", [32, 33, 2048, 4104])
def test_padding_is_not_read_and_written_as_zero(kernels: simt_build.Library, width: int, norm: bool) -> None:
    # Lengths outside [0, T] are clamped by the kernel.
    problem = Problem(torch.bfloat16, (4, 3, width), 2, norm=norm, affine=norm, lengths=(2, -5, 9, 0))
    out, stats = forward(kernels, problem, save_stats=norm)
    for index, length in enumerate([2, 0, 3, 0]):
        assert (out[index, length:] == 0).all()
        assert torch.isfinite(out[index, :length]).all()
        if norm:
            assert (stats.view(4, 3, 2, 2)[index, length:] == 0).all()
    check_forward(kernels, problem)


@pytest.mark.parametrize("width", [40, 2056, 4104])
def test_statistics_are_those_of_the_rows(kernels: simt_build.Library, width: int) -> None:
    problem = Problem(torch.float32, (2, 2, width), 3, norm=True)
    _, stats = forward(kernels, problem, save_stats=True)
    x = torch.stack(problem.inputs, 2).double().reshape(4, 3, width)
    rstd = (x.var(-1, unbiased=False) + EPS).rsqrt()
    torch.testing.assert_close(stats, torch.stack([x.mean(-1), rstd], -1).float(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("width", [40, 1032])
def test_forward_is_the_same_in_all_thread_orders(kernels: simt_build.Library, width: int) -> None:
    problem = Problem(torch.float16, (2, 3, width), 3, norm=True, affine=True, lengths=(3, 1))
    simt_build.same_in_all_orders(lambda order: forward(kernels, problem, order=order)[0].numpy())


def test_empty_problems_launch_nothing(kernels: simt_build.Library) -> None:
    for shape in [(0, 3, 8), (2, 0, 8), (2, 3, 0)]:
        forward(kernels, Problem(torch.float32, shape, 2, norm=True))
