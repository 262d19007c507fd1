"""Every op at the sizes of real encoders, on the device: the sizes of tests/ops are small."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ctc_cases import KINDS, random_problem
from test_adapter import SPEC as ADAPTER
from test_distill_loss import SPEC as DISTILL_LOSS
from test_layer_mix import SPEC as LAYER_MIX
from test_layer_project import SPEC as LAYER_PROJECT
from test_merge import SPEC as MERGE
from test_segment_attention import SPEC as SEGMENT_ATTENTION
from test_segment_pool import ATTENTION as SEGMENT_POOL

from mmkernels import ctc_align
from op_tests import (
    Call,
    OpSpec,
    Shape,
    assert_close_to_reference,
    backends,
    check_against_reference,
    generator_for,
    value_and_gradients,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs a CUDA GPU; run `make gpu` on a machine with one"
    ),
]
each_backend = pytest.mark.parametrize("backend", backends("cuda", torch.float32))
each_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["float32", "bfloat16", "float16"]
)
#: Whisper tiny, base and large, the base and large models of wav2vec2 and HuBERT, XLS-R's two larger ones.
WIDTHS = (384, 512, 768, 1024, 1280, 1920, 2048)


def check(
    spec: OpSpec, shape: Shape, dtype: torch.dtype, backend: str, parameters: torch.dtype | None = None
) -> None:
    """``parameters``: their dtype, by default that of the activations."""

    def make(seed: int) -> Call:
        call = spec.make(shape, dtype, torch.device("cuda"), generator_for(seed))
        names = set(call.differentiable) - set(spec.activations)
        return call.mapped(lambda name, t: t.to(parameters or dtype) if name in names else t)

    check_against_reference(spec, make, backend)


@each_backend
@each_dtype
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", ["plain", "norm", "affine"])
def test_layer_mix(kind: str, width: int, dtype: torch.dtype, backend: str) -> None:
    shape: dict[str, Any] = {"L": 13, "B": 3, "T": 149, "D": width, "lengths": True}
    check(
        LAYER_MIX,
        shape | {"norm": kind != "plain", "affine": kind == "affine"},
        dtype,
        backend,
    )


@each_backend
@each_dtype
@pytest.mark.parametrize("width", WIDTHS)
def test_layer_project(width: int, dtype: torch.dtype, backend: str) -> None:
    shape = {"N": 447, "L": 5, "C": width, "O": 240, "norm": True, "activation": "gelu"}
    check(LAYER_PROJECT, shape, dtype, backend)


@each_backend
@each_dtype
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(
    ("bottleneck", "norm"), [(64, False), (64, True), (128, True), (192, False), (256, True)]
)
def test_adapter(norm: bool, bottleneck: int, width: int, dtype: torch.dtype, backend: str) -> None:
    shape = {"N": (1057,), "D": width, "d": bottleneck, "norm": norm, "residual": "own", "activation": "gelu"}
    check(ADAPTER, shape, dtype, backend)


@each_backend
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("op", ["adapter", "layer_project"])
def test_float32_parameters_beside_half_precision(op: str, width: int, backend: str) -> None:
    shape: dict[str, Any] = {"norm": True, "activation": "gelu"}
    if op == "adapter":
        shape |= {"N": (1057,), "D": width, "d": 64, "residual": "own"}
        check(ADAPTER, shape, torch.bfloat16, backend, torch.float32)
    else:
        shape |= {"N": 447, "L": 5, "C": width, "O": 240}
        check(LAYER_PROJECT, shape, torch.bfloat16, backend, torch.float32)


@each_backend
@each_dtype
@pytest.mark.parametrize("width", WIDTHS)
def test_merge(width: int, dtype: torch.dtype, backend: str) -> None:
    """Query, key, value and their biases of four layers."""
    layer = [(width, width), (width,)] * 3
    shape = {"sizes": layer * 4, "groups": [index // len(layer) for index in range(4 * len(layer))]}
    check(MERGE, shape, dtype, backend, torch.float32)


@each_backend
@each_dtype
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("segments", [1, 12, 300])
@pytest.mark.parametrize("reduce", ["mean", "sum", "max", "last", "attention"])
def test_segment_pool(reduce: str, segments: int, width: int, dtype: torch.dtype, backend: str) -> None:
    shape = {"B": 3, "T": 1500, "M": segments, "D": width, "reduce": reduce, "counts": segments > 1}
    check(SEGMENT_POOL, shape, dtype, backend, torch.float32)


@each_backend
@each_dtype
@pytest.mark.parametrize("width", [768, 4096, 8192])
@pytest.mark.parametrize("of_table", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_distill_loss(of_table: torch.dtype, width: int, dtype: torch.dtype, backend: str) -> None:
    """Embeddings as wide as those of BERT and of two sizes of Llama."""
    shape = {"B": 12, "M": 40, "H": width, "V": 300}
    call = DISTILL_LOSS.make(shape, dtype, torch.device("cuda"), generator_for(width))
    call = call.with_arguments(table=call.arguments["table"].to(of_table))
    grad = torch.tensor([0.7], device="cuda")
    function, reference = DISTILL_LOSS.function, DISTILL_LOSS.reference
    loss, (found,) = value_and_gradients(function, call.detached(), grad, backend=backend)
    exact, (r,) = value_and_gradients(reference, call.detached(torch.float64), grad)
    _, (e,) = value_and_gradients(reference, call.detached(), grad)
    torch.testing.assert_close(loss, exact.float(), rtol=2e-6, atol=0.0)
    assert_close_to_reference(found, r, e, dtype)


@each_backend
@each_dtype
@pytest.mark.parametrize(("size", "segments"), [(64, 150), (64, 3), (128, 40), (128, 1), (80, 40), (192, 40)])
def test_segment_attention(size: int, segments: int, dtype: torch.dtype, backend: str) -> None:
    """The connector of SSR, and heads of other sizes."""
    shape = {"B": 2, "H": 8, "G": 2, "T": 1000, "M": segments, "d": size}
    check(SEGMENT_ATTENTION, shape, dtype, backend)


@each_backend
@each_dtype
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("frames", "tokens"), [(60, 40), (1500, 200), (1500, 450), (3000, 900), (4000, 1900), (4500, 2500)]
)
def test_ctc_align(frames: int, tokens: int, kind: str, dtype: torch.dtype, backend: str) -> None:
    """Targets for each of the compiled kernels, on the device and on the CPU: the same paths."""
    problem = random_problem(frames, kind, dtype, batch=5, frames=frames, tokens=tokens, classes=32)
    on_device = {
        name: value.cuda() if isinstance(value, torch.Tensor) else value
        for name, value in vars(problem).items()
    }
    found, expected = ctc_align(**on_device, backend=backend), ctc_align(**vars(problem))
    for name in ("paths", "ends", "feasible", "scores"):
        assert torch.equal(getattr(found, name).cpu(), getattr(expected, name)), name
    torch.testing.assert_close(found.total.cpu(), expected.total, rtol=1e-6, atol=1e-6)
