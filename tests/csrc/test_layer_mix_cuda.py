"""The CUDA kernels of layer_mix, run on the CPU by the host SIMT runtime, against the float64 reference."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import numpy as np
import pytest
import simt_build
import torch
from devices import DEVICES
from hypothesis import given, settings
from hypothesis import strategies as st
from simt_tensors import DTYPE_CODES, HALF_DTYPES, GuardedTensors, integers, pointer, pointers
from torch import Tensor

from mmkernels._library import compiled_module
from mmkernels.ops.layer_mix import reference
from op_tests import assert_close_to_reference

pytestmark = pytest.mark.skipif(
    simt_build.missing_tools() is not None, reason=str(simt_build.missing_tools())
)

SOURCES = ["csrc/cuda/layer_mix.cu", "csrc/cuda/layer_mix_backward.cu", "tests/csrc/layer_mix_shim.cpp"]
DTYPES = tuple(DTYPE_CODES)
EPS = 1e-5


@dataclass
class Problem:
    """Inputs of one call: rows `gap` elements apart, `offset` elements past an aligned address.

    With `uneven` each layer has its own strides, and frames that belong to no utterance between two.
    """

    dtype: torch.dtype
    shape: tuple[int, int, int]
    layers: int
    norm: bool = False
    affine: bool = False
    lengths: tuple[int, ...] | None = None
    offset: int = 0
    gap: int = 0
    mean: float = 0.0
    uneven: bool = False
    memory: GuardedTensors = field(default_factory=GuardedTensors)

    def __post_init__(self) -> None:
        batch, frames, width = self.shape
        generator = torch.Generator().manual_seed(frames * 1000 + width)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        self.inputs: list[Tensor] = []
        for index in range(self.layers):
            spare, gap = (1 + index % 3, 8 * (index % 2)) if self.uneven else (0, self.gap)
            values = (self.mean + random(batch, frames + spare, width + gap)).to(self.dtype)
            values[:, frames:] = torch.nan
            layer = self.memory.of(values, self.offset)[:, :frames, :width]
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
        """The reference's output in `dtype`; with `grads` gradients of weights, gain, bias and layers."""
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
    return simt_build.load(simt_build.build("layer_mix", SOURCES, races=True))


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


# One width for each row shape: a warp with 1 to 5 vectors, two warps with 3 and 4, a block, too wide for
# registers; those that fill their shape; partial vectors.
NORM_WIDTHS = [8, 264, 760, 776, 1032, 1288, 1544, 4096, 4104]
NORM_WIDTHS += [256, 512, 768, 1024, 1280, 2048]
NORM_WIDTHS += [1, 33, 511, 513, 4099]


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
    # The mean itself is rounded to float32; a variance by E[x^2] - mean^2 would be wrong in the first digit.
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


@pytest.mark.parametrize("width", [40, 1032, 1544])
def test_forward_is_the_same_in_all_thread_orders(kernels: simt_build.Library, width: int) -> None:
    problem = Problem(torch.float16, (2, 3, width), 3, norm=True, affine=True, lengths=(3, 1))
    simt_build.same_in_all_orders(lambda order: forward(kernels, problem, order=order)[0].numpy())


def test_empty_problems_launch_nothing(kernels: simt_build.Library) -> None:
    for shape in [(0, 3, 8), (2, 0, 8), (2, 3, 0)]:
        forward(kernels, Problem(torch.float32, shape, 2, norm=True))


@dataclass(frozen=True)
class Gradients:
    weights: Tensor
    gain: Tensor
    bias: Tensor
    layers: list[Tensor | None]


def backward(
    kernels: simt_build.Library,
    problem: Problem,
    *,
    weights: bool = True,
    affine: bool | None = None,
    wanted: tuple[int, ...] | None = None,
    order: int = 2,
) -> Gradients:
    """Runs the backward kernels; by default for all gradients that the problem has."""
    width = problem.shape[2]
    affine = problem.affine if affine is None else affine
    wanted = tuple(range(problem.layers)) if wanted is None else wanted
    arguments = problem.common_arguments()
    partials = integers(0, 0)
    kernels.call("layer_mix_partials", arguments[0], integers(weights, affine, len(wanted) > 0), partials)

    def sums(*shape: int) -> Tensor:
        return problem.memory.empty(shape, torch.float32)

    _, stats = forward(kernels, problem, save_stats=problem.norm)
    d_layers = [
        problem.memory.empty(problem.shape, problem.dtype) if index in wanted else None
        for index in range(problem.layers)
    ]
    partial_sums = [
        sums(partials[0], problem.layers),
        sums(partials[1], problem.layers, width),
        sums(partials[1], width),
    ]
    affine_layers = problem.layers if affine else 0
    results = [sums(problem.layers if weights else 0), sums(affine_layers, width), sums(affine_layers, width)]
    kernels.call(
        "layer_mix_backward",
        *arguments,
        pointer(problem.grad),
        integers(*problem.grad.stride()[:2]),
        pointer(stats),
        pointers(d_layers),
        integers(weights, affine),
        *map(pointer, partial_sums + results),
        order=order,
    )
    problem.memory.check()
    return Gradients(*results, d_layers)


def check_backward(
    kernels: simt_build.Library,
    problem: Problem,
    *,
    weights: bool = True,
    affine: bool | None = None,
    wanted: tuple[int, ...] | None = None,
) -> None:
    found = backward(kernels, problem, weights=weights, affine=affine, wanted=wanted)
    _, exact = problem.reference(torch.float64, grads=True)
    _, eager = problem.reference(problem.dtype, grads=True)
    parameters = 3 if problem.affine else 1
    if weights:
        # Few sums, whose terms cancel: their error scales with the terms.
        terms = problem.grad.double().nan_to_num().norm() * problem.grad[..., 0].numel() ** 0.5
        terms *= problem.shape[2] ** 0.5 * (2 if problem.affine else 1)
        assert (found.weights - exact[0]).abs().max() <= 4 * torch.finfo(torch.float32).eps * terms
    if found.gain.numel() > 0:
        assert_close_to_reference(found.gain, exact[1], eager[1], torch.float32, "d_norm_weight")
        assert_close_to_reference(found.bias, exact[2], eager[2], torch.float32, "d_norm_bias")
    for index, d_layer in enumerate(found.layers):
        if d_layer is not None:
            r, e = exact[parameters + index], eager[parameters + index]
            assert_close_to_reference(d_layer, r, e, problem.dtype, f"d_layers[{index}]")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "layers"), PLAIN_SHAPES)
def test_backward_without_norm(
    kernels: simt_build.Library, dtype: torch.dtype, shape: tuple[int, int, int], layers: int
) -> None:
    check_backward(kernels, Problem(dtype, shape, layers))


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("width", NORM_WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_with_norm(
    kernels: simt_build.Library, dtype: torch.dtype, width: int, affine: bool
) -> None:
    check_backward(kernels, Problem(dtype, (1, 3, width), 3, norm=True, affine=affine))


# The needed gradients decide which kernels run, and which of them computes d_weights.
NEEDS = [
    (True, False, ()),
    (True, True, ()),
    (False, True, (1,)),
    (True, False, (0, 2)),
    (False, False, (1,)),
]


@pytest.mark.parametrize(("weights", "affine", "wanted"), NEEDS)
@pytest.mark.parametrize("width", [40, 33, 2056, 4104])
def test_backward_computes_what_is_asked_for(
    kernels: simt_build.Library, width: int, weights: bool, affine: bool, wanted: tuple[int, ...]
) -> None:
    problem = Problem(torch.float16, (2, 5, width), 3, norm=True, affine=True, lengths=(5, 2))
    check_backward(kernels, problem, weights=weights, affine=affine, wanted=wanted)


@pytest.mark.parametrize("layers", [1, 8, 9, 25, 64])
def test_backward_of_many_layers(kernels: simt_build.Library, layers: int) -> None:
    check_backward(
        kernels, Problem(torch.bfloat16, (2, 9, 24), layers, norm=True, affine=True), wanted=(layers - 1,)
    )


@pytest.mark.parametrize("frames", [1, 7, 200])
def test_backward_sums_over_chunks_and_utterances(kernels: simt_build.Library, frames: int) -> None:
    lengths = (frames, frames // 2, 0)
    check_backward(
        kernels, Problem(torch.float32, (3, frames, 8), 2, norm=True, affine=True, lengths=lengths)
    )


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("lengths", [None, (11, 0, 3, 9)])
@pytest.mark.parametrize("wanted", [(), (0, 8)])
def test_each_layer_has_its_own_strides(
    kernels: simt_build.Library, lengths: tuple[int, ...] | None, norm: bool, wanted: tuple[int, ...]
) -> None:
    shape = (4, 11, 264)
    problem = Problem(torch.bfloat16, shape, 9, norm=norm, affine=norm, lengths=lengths, uneven=True)
    check_forward(kernels, problem)
    check_backward(kernels, problem, wanted=wanted)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(("offset", "gap"), [(1, 0), (0, 3), (0, 8)])
def test_backward_of_any_alignment(kernels: simt_build.Library, offset: int, gap: int, norm: bool) -> None:
    problem = Problem(torch.bfloat16, (2, 3, 64), 3, norm=norm, affine=norm, offset=offset, gap=gap)
    check_backward(kernels, problem)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("width", [32, 33, 2048, 4104])
def test_padding_gives_no_gradient_and_gets_zero(kernels: simt_build.Library, width: int, norm: bool) -> None:
    problem = Problem(torch.bfloat16, (4, 3, width), 2, norm=norm, affine=norm, lengths=(2, -5, 9, 0))
    for index, length in enumerate([2, 0, 3, 0]):
        problem.grad[index, length:] = torch.nan
    found = backward(kernels, problem)
    for index, length in enumerate([2, 0, 3, 0]):
        assert all(d is not None and (d[index, length:] == 0).all() for d in found.layers)
    assert all(torch.isfinite(t).all() for t in (found.weights, found.gain, found.bias))
    problem.grad.nan_to_num_()
    check_backward(kernels, problem)


@pytest.mark.parametrize("width", [40, 1032, 1544])
@pytest.mark.parametrize("wanted", [(), (0, 1)])
def test_backward_is_the_same_in_all_thread_orders(
    kernels: simt_build.Library, width: int, wanted: tuple[int, ...]
) -> None:
    problem = Problem(torch.float16, (2, 9, width), 2, norm=True, affine=True, lengths=(9, 4))

    def run(order: int) -> np.ndarray:
        found = backward(kernels, problem, wanted=wanted, order=order)
        tensors = [found.weights, found.gain, found.bias, *(d for d in found.layers if d is not None)]
        return np.concatenate([t.contiguous().view(torch.uint8).flatten().numpy() for t in tensors])

    simt_build.same_in_all_orders(run)


def test_sums_of_no_rows_are_zero(kernels: simt_build.Library) -> None:
    for shape in [(0, 3, 8), (2, 0, 8)]:
        found = backward(kernels, Problem(torch.float32, shape, 2, norm=True, affine=True))
        assert all((t == 0).all() and t.numel() > 0 for t in (found.weights, found.gain, found.bias))


# ---- launch plans


@given(
    st.sampled_from(DTYPES),
    st.integers(1, 10**7),
    st.sampled_from([384, 768, 1024, 1280, 2048]),
    st.integers(1, 25),
    st.booleans(),
)
def test_backward_fills_every_device_evenly(
    kernels: simt_build.Library, dtype: torch.dtype, rows: int, width: int, layers: int, affine: bool
) -> None:
    """No block is empty, and one is a small part of the work of a multiprocessor, or as small as can be."""
    found = integers(*[0] * 5)
    kernels.call(
        "layer_mix_plan",
        integers(DTYPE_CODES[dtype], layers, 1, rows, width, True),
        integers(True, affine, True),
        found,
    )
    block_rows, blocks, chunk_rows, chunks, sum_blocks = found.tolist()
    assert (blocks - 1) * block_rows < rows <= blocks * block_rows
    assert (chunks - 1) * chunk_rows < rows <= chunks * chunk_rows
    most = max(device.multiprocessors for device in DEVICES)
    assert block_rows == 4 or blocks >= 6 * most
    assert chunk_rows == 16 or sum_blocks >= 6 * most


_C = compiled_module()
sizes = st.integers(0, 2**20) | st.integers(0, 2**40)


@pytest.mark.skipif(_C is None, reason="mmkernels._C is not built")
@settings(deadline=None)  # a time limit fails on a busy machine
@given(st.sampled_from(["float32", "float16", "bfloat16"]), sizes, sizes, st.integers(1, 64))
def test_backward_sums_cover_everything_once(dtype: str, rows: int, width: int, layers: int) -> None:
    assert _C is not None
    plan = _C.layer_mix_sums(dtype, rows, width, layers)
    chunks, slices, groups = plan["chunks"], plan["slices"], plan["groups"]
    # The parts are contiguous and the last one starts inside, so they cover all.
    if width > 0 and rows > 0:
        assert (chunks - 1) * plan["rows_per_chunk"] < rows <= chunks * plan["rows_per_chunk"]
    assert slices == 0 or (slices - 1) * plan["slice_columns"] < width <= slices * plan["slice_columns"]
    bounds = [group * layers // groups for group in range(groups + 1)]
    assert bounds[0] == 0
    assert bounds[-1] == layers
    assert all(0 < end - begin <= 8 for begin, end in itertools.pairwise(bounds))
    assert plan["blocks"] == chunks * slices * groups
    # A GPU accepts 2^31 - 1 blocks; a tensor that needs more would not fit its memory.
    assert plan["blocks"] < 2**31 or rows * width > 2**37
    # The partial sums stay small compared with the layers.
    assert chunks * width * layers * 4 <= 2 * 2**24 + rows * width // 4 + 4 * width * layers
