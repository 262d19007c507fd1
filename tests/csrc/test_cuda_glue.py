"""The torch ops of the CUDA kernels, including their glue, on CPU tensors.

csrc/torch/*_cuda.cpp and its kernels, compiled for the host SIMT runtime, replace the CPU kernels behind the
functions of mmkernels.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator
from types import ModuleType

import pytest
import simt_build
import test_adapter
import test_cif
import test_connector_oracles
import test_ctc_align
import test_defects_of_peers
import test_distill_loss
import test_layer_mix
import test_layer_project
import test_merge
import test_monotonic_align
import test_segment_attention
import test_segment_oracles
import test_segment_pool
import torch
from torch import Tensor

import mmkernels
from mmkernels.ops.adapter import schema as adapter_schema
from mmkernels.ops.cif import schema as cif_schema
from mmkernels.ops.ctc_align import schema as ctc_align_schema
from mmkernels.ops.distill_loss import schema as distill_loss_schema
from mmkernels.ops.layer_mix import schema as layer_mix_schema
from mmkernels.ops.layer_project import schema as layer_project_schema
from mmkernels.ops.merge import schema as merge_schema
from mmkernels.ops.monotonic_align import schema as monotonic_align_schema
from mmkernels.ops.segment_attention import schema as segment_attention_schema
from mmkernels.ops.segment_pool import schema as segment_pool_schema
from op_tests import (
    BackendNames,
    Call,
    Compile,
    Derivatives,
    Fuzz,
    Gradcheck,
    InferenceTensors,
    MetaTensors,
    Opcheck,
    OpSpec,
    check_against_reference,
    generator_for,
    op_tests,
    value_and_gradients,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(simt_build.missing_tools() is not None, reason=str(simt_build.missing_tools())),
]
NAMESPACE = "mmkernels_simt"
SCHEMAS: dict[str, ModuleType] = {
    "adapter": adapter_schema,
    "ctc_align": ctc_align_schema,
    "layer_mix": layer_mix_schema,
    "layer_project": layer_project_schema,
    "merge": merge_schema,
    "segment_attention": segment_attention_schema,
    "segment_pool": segment_pool_schema,
    "cif": cif_schema,
    "distill_loss": distill_loss_schema,
    "monotonic_align": monotonic_align_schema,
}
#: The suffixes of an op's torch ops, in the order of its schema's OPS, and the fakes.
FAKES = {"fwd": "_forward_fake", "out": "_out_fake", "bwd": "_backward_fake"}


def parts(module: ModuleType) -> list[str]:
    return [part for part, fake in FAKES.items() if hasattr(module, fake)]


SOURCES = sorted(
    path.relative_to(simt_build.ROOT)
    for folder, pattern in (("cuda", "**/*.cu"), ("torch", "*_cuda.cpp"))
    for path in (simt_build.ROOT / "csrc" / folder).glob(pattern)
)
# CUDA kernels have no float64, and these tests do not depend on the device.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ELSEWHERE = (Gradcheck, Derivatives, InferenceTensors, MetaTensors, Opcheck, Compile, BackendNames)


@functools.cache
def library() -> tuple[simt_build.Library, torch.library.Library]:
    """The loaded library, and the definitions of its ops, which are those of mmkernels under another name."""
    definitions = torch.library.Library(NAMESPACE, "DEF")
    for name, module in SCHEMAS.items():
        for part in parts(module):
            schema = str(getattr(torch.ops.mmkernels, f"{name}_{part}").default._schema)
            definitions.define(schema.removeprefix("mmkernels::"))
            fake = getattr(module, FAKES[part])
            torch.library.register_fake(f"{NAMESPACE}::{name}_{part}", fake, lib=definitions)
    path = simt_build.build("glue", SOURCES, races=True)
    torch.ops.load_library(str(path))
    return simt_build.load(path), definitions


@pytest.fixture(autouse=True)
def _cuda_kernels_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    kernels, _ = library()
    for name, module in SCHEMAS.items():
        ops = getattr(torch.ops, NAMESPACE)
        replaced = tuple(getattr(ops, f"{name}_{part}").default for part in parts(module))
        monkeypatch.setitem(module.OPS, "native", replaced)
    kernels.set_order(2)
    yield
    # A fault fails the op with the same message; the next test must not see it.
    kernels.functions.mmk_simt_clear_error()


def on_the_cpu(spec: OpSpec, without: Collection[type] = ()) -> type:
    products = [("cpu", backend) for device, backend in spec.library_products if device == "cuda"]
    # Cases of many rows take minutes here; the tests of the kernels have such sizes.
    cases = {name: case for name, case in spec.cases.items() if name != "many_rows"}
    rounded = {("cpu", name): names for (_, name), names in spec.rounded_by_library.items()}
    changes = {"library_products": products, "cases": cases, "rounded_by_library": rounded}
    return op_tests(dataclasses.replace(spec, **changes), DTYPES, {*ELSEWHERE, *without})


def test_every_op_is_here() -> None:
    assert set(SCHEMAS) == {path.parent.name for path in simt_build.ROOT.glob("mmkernels/ops/*/schema.py")}


# For the fused kernel, and for library products with kernels after them.
each_path = pytest.mark.parametrize(("width", "bottleneck"), [(64, 24), (33, 17)], ids=["fused", "products"])
each_half = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [False, True])
@each_path
def test_an_adapter_adds_its_input(width: int, bottleneck: int, norm: bool, dtype: torch.dtype) -> None:
    """If the residual is x, the op reads it once and adds its gradient to dx."""

    def added(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, residual, **arguments: function(x=x, residual=x, **arguments)

    spec = dataclasses.replace(
        test_adapter.SPEC,
        function=added(mmkernels.adapter),
        reference=added(test_adapter.SPEC.reference),
        eager=added(test_adapter.eager),
    )
    shape = {"N": (70,), "D": width, "d": bottleneck, "norm": norm, "activation": "silu"}

    def make(seed: int) -> Call:
        return test_adapter.make(shape, dtype, torch.device("cpu"), generator_for(seed))

    check_against_reference(spec, make, "native")


@each_half
@each_path
def test_a_large_mean_of_an_adapter(width: int, bottleneck: int, dtype: torch.dtype) -> None:
    """The mean must not be multiplied with the rounding error of centred weights."""
    shape = {"N": (70,), "D": width, "d": bottleneck, "norm": True, "activation": "none"}

    def make(seed: int) -> Call:
        call = test_adapter.make(shape, dtype, torch.device("cpu"), generator_for(seed))
        return call.mapped(lambda name, tensor: tensor + 40 if name == "x" else tensor)

    check_against_reference(test_adapter.SPEC, make, "native")


@each_half
def test_a_large_mean_of_layer_project(dtype: torch.dtype) -> None:
    shape = {"N": 70, "L": 2, "C": 64, "O": 17, "norm": True, "activation": "none"}

    def make(seed: int) -> Call:
        call = test_layer_project.make(shape, dtype, torch.device("cpu"), generator_for(seed))
        return call.mapped(lambda name, tensor: tensor + 40 if name == "x" else tensor)

    check_against_reference(test_layer_project.SPEC, make, "native")


@pytest.mark.parametrize("norm", [False, True])
def test_rows_of_a_fused_adapter_do_not_depend_on_each_other(norm: bool) -> None:
    shape = {"N": (150,), "D": 64, "d": 24, "norm": norm, "residual": "own", "activation": "gelu"}
    call = test_adapter.make(shape, torch.bfloat16, torch.device("cpu"), generator_for(0))
    together = mmkernels.adapter(**call.arguments)
    for begin, end in ((0, 1), (7, 90), (149, 150)):
        rows = call.mapped(lambda name, t, b=begin, e=end: t[b:e] if name in ("x", "residual") else t)
        assert torch.equal(mmkernels.adapter(**rows.arguments), together[begin:end])


def at_an_odd_address(tensor: Tensor) -> Tensor:
    """A copy that starts two bytes past a vector, as a parameter in a flat buffer may."""
    return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)


HALF_MODELS = {
    "fused adapter": (test_adapter.SPEC, {"N": (70,), "D": 64, "d": 24, "residual": "own"}),
    "adapter": (test_adapter.SPEC, {"N": (20,), "D": 33, "d": 17, "residual": "own"}),
    "fused layer_project": (test_layer_project.SPEC, {"N": 20, "L": 2, "C": 64, "O": 24}),
    "layer_project": (test_layer_project.SPEC, {"N": 20, "L": 2, "C": 33, "O": 17}),
}


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("name", HALF_MODELS)
def test_parameters_of_half_precision_anywhere(name: str, norm: bool) -> None:
    """The same kernels run as with float32 parameters, and the address of a parameter changes no bit."""
    kernels, _ = library()
    spec, sizes = HALF_MODELS[name]
    shape = {**sizes, "norm": norm, "activation": "silu"}
    call = spec.make(shape, torch.bfloat16, torch.device("cpu"), generator_for(0))
    grad = torch.randn(spec.reference(**call.arguments).shape).bfloat16()
    changes: dict[str, Callable[[Tensor], Tensor]] = {
        "as they are": lambda tensor: tensor,
        "float32": lambda tensor: tensor.float(),
        "at odd addresses": at_an_odd_address,
    }
    found, launched = {}, {}
    for kind, change in changes.items():
        changed = call.mapped(lambda name, t, f=change: t if name in spec.activations else f(t)).detached()
        with kernels.recording(run=True) as launches:
            found[kind] = value_and_gradients(spec.function, changed, grad, backend="native")
        launched[kind] = len(launches)
    assert len(set(launched.values())) == 1
    (out, gradients), (moved, moved_gradients) = found["as they are"], found["at odd addresses"]
    assert torch.equal(out, moved)
    assert torch.equal(out, found["float32"][0])
    for a, b in zip(gradients, moved_gradients, strict=True):
        assert a.dtype == torch.bfloat16
        assert torch.equal(a, b)


def odd_strides(tensor: Tensor) -> Tensor:
    """The same tensor, with strides of 1 where a dimension has one element: torch allows any there."""
    strides = [1 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
    return tensor.as_strided(tensor.shape, strides)


def adapt(x: Tensor) -> Tensor:
    down, up = torch.ones(24, x.shape[-1]), torch.ones(x.shape[-1], 24)
    native_forward, _ = adapter_schema.OPS["native"]
    out: Tensor = native_forward(x, down, None, up, None, None, None, None, 0.5, 1e-5, 0, True, False)[0]
    return out


def mix(x: Tensor) -> Tensor:
    return mmkernels.layer_mix([x, x], torch.ones(2), norm=True, backend="native")


def project(x: Tensor) -> Tensor:
    weight = torch.ones(x.shape[1], 24, x.shape[2])
    return mmkernels.layer_project(x, weight, None, norm_weight=torch.ones(x.shape[1:]), backend="native")


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (adapt, (1, 64)),
        (mix, (1, 3, 64)),
        (mix, (3, 1, 64)),
        (project, (1, 3, 64)),
        (project, (3, 1, 64)),
    ],
)
def test_strides_of_single_elements_choose_no_kernel(
    function: Callable[[Tensor], Tensor], shape: tuple[int, ...]
) -> None:
    kernels, _ = library()
    launched, results = [], []
    x = torch.randn(shape).bfloat16()
    for given in (x, odd_strides(x)):
        given = given.requires_grad_(function is not adapt)
        with kernels.recording(run=True) as launches:
            results.append(function(given))
            if given.requires_grad:
                results[-1].backward(odd_strides(torch.ones_like(results[-1])))
        launched.append([launch.kernel for launch in launches])
    assert launched[0] == launched[1]
    assert torch.equal(*results)


TestAdapter = on_the_cpu(test_adapter.SPEC)
TestCtcAlign = on_the_cpu(test_ctc_align.SPEC, test_ctc_align.LEFT_OUT)
TestLayerMix = on_the_cpu(test_layer_mix.SPEC)
TestLayerProject = on_the_cpu(test_layer_project.SPEC)
TestMerge = on_the_cpu(test_merge.SPEC)
TestSegmentAttention = on_the_cpu(test_segment_attention.SPEC, test_segment_attention.LEFT_OUT)
TestSegmentPool = on_the_cpu(test_segment_pool.ATTENTION)
TestSegmentPoolWithoutScores = on_the_cpu(test_segment_pool.SPEC, test_segment_pool.OF_PARAMETERS)
TestCif = on_the_cpu(test_cif.SPEC)
TestDistillLoss = on_the_cpu(test_distill_loss.SPEC, {*test_distill_loss.WITHOUT, Fuzz})


class TestMonotonicAlign(test_monotonic_align.OnEveryBackend):
    served = (("cpu", "native"),)
    dtypes = DTYPES
    many = 30


class TestSegmentOracles(test_segment_oracles.OnEveryBackend):
    served = (("cpu", "native"),)
    pooled = 160


class TestConnectorOracles(test_connector_oracles.OnEveryBackend):
    served = (("cpu", "native"),)
    calls = 3
    attended = 32
    losses = 100
    long_calls = 1
    long = 1
    longer = 150


class TestDefectsOfPeers(test_defects_of_peers.DefectsOfPeers):
    served = (("cpu", "native"),)
