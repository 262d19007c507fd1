"""The CUDA kernels of adapter, run on the CPU by the host SIMT runtime, against the float64 reference.

Folding the LayerNorm into the weights, and the library's products, are torch's here: layer_project's tests
have the kernels that fold and unfold.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
import simt_build
import torch
from hypothesis import given
from hypothesis import strategies as st
from simt_tensors import DTYPE_CODES, HALF_DTYPES, GuardedTensors, integers, pointer
from torch import Tensor

from mmkernels.ops._common import ACTIVATIONS
from mmkernels.ops.adapter import reference
from mmkernels.testing import assert_close_to_reference

pytestmark = pytest.mark.skipif(
    simt_build.missing_tools() is not None, reason=str(simt_build.missing_tools())
)

SOURCES = [
    "csrc/cuda/adapter.cu",
    "csrc/cuda/adapter_backward.cu",
    "csrc/cuda/adapter_fold.cu",
    "csrc/cuda/layer_project.cu",
    "csrc/cuda/layer_project_backward.cu",
    "tests/csrc/simt/adapter_shim.cpp",
    "tests/csrc/simt/layer_project_shim.cpp",
]
EPS = 1e-5
SHARED_BYTES = {"sm_80": 163 * 1024, "sm_90": 227 * 1024}
MULTIPROCESSORS = 3  # of the host runtime's device


@dataclass
class Problem:
    """Inputs of one call: rows of x and of the gradient `gap` elements apart, `offset` elements behind an
    aligned address. residual: "none", "x", "same" (of x's dtype), or "float"."""

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
        self.down = self.memory.of(random(bottleneck, width) / max(width, 1) ** 0.5)
        self.up = self.memory.of(random(width, bottleneck) / max(bottleneck, 1) ** 0.5)
        self.down_bias = self.memory.of(random(bottleneck)) if self.bias else None
        self.up_bias = self.memory.of(random(width)) if self.bias else None
        self.gain = self.memory.of(1 + 0.1 * random(width)) if self.norm else None
        self.shift = self.memory.of(random(width)) if self.norm and self.bias else None
        other = random(rows, width)
        residuals = {"same": of(other), "float": self.memory.of(other), "x": self.x, "none": None}
        self.added = residuals[self.residual]

    @property
    def sizes(self) -> np.ndarray:
        return integers(DTYPE_CODES[self.dtype], *self.shape, ACTIVATIONS.index(self.activation))

    @property
    def out_dtype(self) -> torch.dtype:
        return torch.float32 if self.residual == "float" else self.dtype

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.memory.empty(shape, dtype)

    def folded(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Vc, b', s and U as the kernels of layer_project make them."""
        bottleneck = self.shape[2]
        bias = torch.zeros(bottleneck) if self.down_bias is None else self.down_bias.clone()
        down, total = self.down, None
        if self.gain is not None:
            down = self.down * self.gain
            down = (down - down.mean(1, keepdim=True)).to(self.dtype)
            total = self.memory.of(down.float().sum(1))
        if self.shift is not None:
            bias += self.down @ self.shift
        of = self.memory.of
        return of(down.to(self.dtype)), of(bias), total, of(self.up.to(self.dtype))

    def reference(self, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
        """The reference's output in `dtype`, and its gradients by name."""
        accumulate = torch.float64 if dtype == torch.float64 else torch.float32
        leaves = {"x": self.x.detach().to(dtype)}
        parameters = {
            "down_weight": self.down,
            "down_bias": self.down_bias,
            "up_weight": self.up,
            "up_bias": self.up_bias,
            "norm_weight": self.gain,
            "norm_bias": self.shift,
        }
        leaves |= {name: p.detach().to(accumulate) for name, p in parameters.items() if p is not None}
        for leaf in leaves.values():
            leaf.requires_grad_()
        wide = dtype == torch.float64 or self.residual == "float"
        residual = None if self.added is None else self.added.to(accumulate if wide else dtype)
        out = reference.adapter(
            **{"down_bias": None, "up_bias": None, **leaves},
            residual=leaves["x"] if self.residual == "x" else residual,
            scale=self.scale,
            activation=self.activation,
            eps=EPS,
        )
        gradients = torch.autograd.grad(out, list(leaves.values()), self.grad.to(out.dtype))
        return out.detach(), dict(zip(leaves, gradients, strict=True))


@pytest.fixture(scope="module")
def kernels() -> simt_build.Library:
    return simt_build.load(simt_build.build("adapter", SOURCES))


@dataclass(frozen=True)
class Forward:
    out: Tensor
    hidden: Tensor
    stats: Tensor


def forward(kernels: simt_build.Library, problem: Problem, *, order: int = 2, save: bool = True) -> Forward:
    rows, width, bottleneck = problem.shape
    out = problem.empty(rows, width, dtype=problem.out_dtype)
    hidden = problem.empty(rows if save else 0, bottleneck, dtype=problem.dtype)
    stats = problem.empty(rows if save and problem.norm else 0, 2)
    down, bias, total, up = problem.folded()
    residual = problem.added if problem.residual in ("same", "float") else None
    kernels.call(
        "adapter_forward",
        problem.sizes,
        problem.scale,
        EPS,
        pointer(problem.x),
        problem.x.stride(0),
        pointer(residual),
        0 if residual is None else residual.stride(0),
        problem.residual == "x",
        DTYPE_CODES[problem.out_dtype],
        *map(pointer, (down, bias, total, up, problem.up_bias, out, hidden, stats)),
        order=order,
    )
    problem.memory.check()
    return Forward(out, hidden, stats)


def check_forward(kernels: simt_build.Library, problem: Problem) -> None:
    found = forward(kernels, problem)
    exact, _ = problem.reference(torch.float64)
    eager, _ = problem.reference(problem.dtype)
    assert found.out.dtype == eager.dtype
    # The hidden values are rounded to the type of x, wherever the result may be wider.
    assert_close_to_reference(found.out, exact, eager, problem.dtype)
    if problem.norm:
        x = problem.x.double()
        deviation = (x.var(1, correction=0) + EPS).sqrt()
        torch.testing.assert_close(found.stats[:, 0].double(), x.mean(1), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.stats[:, 1].double(), 1 / deviation, rtol=1e-4, atol=0)


# Whole tiles and ragged ones in every dimension, every padded bottleneck, few rows and several tiles a block,
# and a width that is not held.
FUSED_SHAPES = [
    (1, 8, 8),
    (64, 192, 64),
    (70, 200, 40),
    (400, 136, 64),
    (450, 72, 128),
    (33, 264, 104),
    (100, 96, 192),
    (65, 80, 256),
    (5, 1800, 64),
    (200, 1800, 16),
]


@pytest.mark.parametrize("shape", FUSED_SHAPES)
@pytest.mark.parametrize("dtype", HALF_DTYPES)
def test_fused_forward(
    kernels: simt_build.Library, dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    check_forward(kernels, Problem(dtype, shape))
