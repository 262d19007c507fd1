"""The Triton kernels, run by Triton's interpreter on CPU tensors, against the float64 reference.

The interpreter replaces ``@triton.jit`` when Triton is imported, so this file needs a process of its own:
``TRITON_INTERPRET=1 pytest tests/triton/test_interpreter.py``.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

import pytest
import test_connector_oracles
import test_defects_of_peers
import test_segment_oracles
import torch
from ctc_cases import KINDS, Problem, random_problem
from torch import Tensor

from mmkernels import (
    adapter,
    cif,
    ctc_align,
    distill_loss,
    layer_mix,
    layer_project,
    merge,
    monotonic_align,
    segment_attention,
    segment_pool,
)
from mmkernels.activations import ACTIVATIONS
from mmkernels.backends import TRITON_INTERPRETED
from mmkernels.ops._common import ACTIVATION_CODES
from mmkernels.ops.adapter import reference as adapter_reference
from mmkernels.ops.adapter.schema import OPS as ADAPTER_OPS
from mmkernels.ops.cif import reference as cif_reference
from mmkernels.ops.cif.schema import OPS as CIF_OPS
from mmkernels.ops.ctc_align.schema import MOST_TRITON_TOKENS
from mmkernels.ops.ctc_align.schema import OPS as CTC_OPS
from mmkernels.ops.distill_loss import reference as distill_reference
from mmkernels.ops.distill_loss.schema import OPS as DISTILL_OPS
from mmkernels.ops.layer_mix import reference as mix_reference
from mmkernels.ops.layer_mix.schema import OPS as MIX_OPS
from mmkernels.ops.layer_project import reference as project_reference
from mmkernels.ops.layer_project.schema import OPS as PROJECT_OPS
from mmkernels.ops.merge import reference as merge_reference
from mmkernels.ops.merge.schema import OPS as MERGE_OPS
from mmkernels.ops.monotonic_align import reference as monotonic_reference
from mmkernels.ops.monotonic_align.schema import OPS as MONOTONIC_OPS
from mmkernels.ops.segment_attention import reference as attention_reference
from mmkernels.ops.segment_attention.schema import OPS as ATTENTION_OPS
from mmkernels.ops.segment_pool import reference as pool_reference
from mmkernels.ops.segment_pool.schema import ATTENTION, MAX, REDUCTIONS
from mmkernels.ops.segment_pool.schema import OPS as POOL_OPS
from op_tests import Call, assert_close_to_reference, poisoned_memory, value_and_gradients

if not TRITON_INTERPRETED:
    pytest.skip("needs Triton and TRITON_INTERPRET=1 set before Python starts", allow_module_level=True)

# Some of these tests are about NaN and inf, of which NumPy, the interpreter's arithmetic, warns.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
half = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
each_dtype = pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float16, torch.bfloat16, torch.float64],
    ids=["float32", "float16", "bfloat16", "float64"],
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(7)


def check(
    function: Any,
    reference: Any,
    call: Call,
    grad: Tensor,
    dtype: torch.dtype,
    out_dtype: torch.dtype | None = None,
) -> None:
    """Values and gradients by the project's tolerance rule; memory holds NaN before the kernels write it."""
    with poisoned_memory():
        out, gradients = value_and_gradients(function, call, grad, backend="triton")
    exact, exact_gradients = value_and_gradients(reference, wanting_as(call, torch.float64), grad.double())
    eager, eager_gradients = value_and_gradients(reference, wanting_as(call, None), grad)
    assert out.dtype == (out_dtype or dtype)
    assert out.is_contiguous()
    triples = zip((out, *gradients), (exact, *exact_gradients), (eager, *eager_gradients), strict=True)
    for index, (k, r, e) in enumerate(triples):
        coarsest = max(dtype, k.dtype, key=lambda of: torch.finfo(of).eps)
        if coarsest == torch.bfloat16:
            # The interpreter truncates to bfloat16 where hardware rounds, so its errors are twice as large.
            k = r + (k.double() - r) / 2
        assert_close_to_reference(k, r, e, coarsest, f"gradient {index - 1}" if index else "result")


def wanting_as(call: Call, dtype: torch.dtype | None) -> Call:
    """A copy that wants the gradients that ``call`` wants."""
    copy = call.detached(dtype)
    for mine, theirs in zip(copy.leaves(), call.leaves(), strict=True):
        mine.requires_grad_(theirs.requires_grad)
    return copy


def wide_parameter(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, dtype=torch.float64 if dtype == torch.float64 else torch.float32)


def narrow_parameter(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape).to(dtype)


def mix_call(
    dtype: torch.dtype,
    layers: int,
    width: int,
    *,
    frames: int = 6,
    affine: bool = False,
    norm: bool = False,
    lengths: tuple[int, ...] | None = (6, 0, 3),
) -> Call:
    """Layers that are slices of one buffer, as a packing encoder leaves them; padding holds NaN."""
    buffer = torch.randn(3, frames, layers, width, dtype=torch.float64).to(dtype)
    for row, length in enumerate(lengths or ()):
        buffer[row, length:] = math.nan
    arguments: dict[str, Any] = {
        "layers": [buffer[:, :, index] for index in range(layers)],
        "weights": wide_parameter(layers, dtype=dtype),
        "norm": norm or affine,
        "norm_weight": wide_parameter(layers, width, dtype=dtype) if affine else None,
        "norm_bias": wide_parameter(layers, width, dtype=dtype) if affine else None,
        "lengths": None if lengths is None else torch.tensor(lengths),
    }
    return Call(arguments, ("layers", "weights", "norm_weight", "norm_bias")).detached()


def check_mix(call: Call, dtype: torch.dtype) -> None:
    grad = torch.randn(call.arguments["layers"][0].shape, dtype=torch.float64).to(dtype)
    check(layer_mix, mix_reference.layer_mix, call, grad, dtype)


@each_dtype
@pytest.mark.parametrize("kind", ["plain", "norm", "affine"])
def test_mix(kind: str, dtype: torch.dtype) -> None:
    check_mix(mix_call(dtype, 3, 17, norm=kind == "norm", affine=kind == "affine"), dtype)


@pytest.mark.parametrize(
    ("layers", "width", "kind"),
    [
        *((1, 1, kind) for kind in ("plain", "norm", "affine")),
        *((13, 384, kind) for kind in ("plain", "norm", "affine")),
        *((64, 5, kind) for kind in ("plain", "norm")),
        *((2, 1024, kind) for kind in ("plain", "affine")),
        *((2, 8200, kind) for kind in ("norm", "affine")),
    ],
)
def test_mix_sizes(layers: int, width: int, kind: str) -> None:
    """The smallest; real models; as many layers as there may be; rows too wide for registers."""
    affine, lengths = kind == "affine", (2, 0, 1)
    call = mix_call(
        torch.bfloat16, layers, width, frames=2, norm=kind == "norm", affine=affine, lengths=lengths
    )
    check_mix(call, torch.bfloat16)


@half
@pytest.mark.parametrize("frozen", [(0,), (1, 2), (0, 1, 2)])
def test_mix_frozen_layers(frozen: tuple[int, ...], dtype: torch.dtype) -> None:
    call = mix_call(dtype, 3, 33, norm=True, lengths=None)
    for index in frozen:
        call.arguments["layers"][index].requires_grad_(False)
    check_mix(call, dtype)


@pytest.mark.parametrize("kind", ["plain", "norm"])
def test_mix_gradient_of_layers_alone(kind: str) -> None:
    call = mix_call(torch.float32, 3, 33, norm=kind == "norm")
    call.arguments["weights"].requires_grad_(False)
    call.arguments["layers"][1].requires_grad_(False)
    check_mix(call, torch.float32)


def test_mix_chunks_of_several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    from mmkernels.ops.layer_mix import triton as kernels

    monkeypatch.setattr(kernels, "MOST_AFFINE_CHUNKS", 2)
    call = mix_call(torch.float32, 2, 130, frames=40, affine=True, lengths=(40, 17, 0))
    check_mix(call, torch.float32)


def test_mix_unaligned_and_copied_layers() -> None:
    """Rows at odd addresses, a transposed layer, one with a last stride of two, an expanded one."""
    flat = torch.randn(3 * 6 * 19 + 1)
    layers = [
        flat[1:].view(3, 6, 19),
        torch.randn(3, 19, 6).transpose(1, 2),
        torch.randn(3, 6, 19, 2)[..., 0],
        torch.randn(1, 1, 19).expand(3, 6, 19),
    ]
    call = mix_call(torch.float32, 4, 19, norm=True)
    check_mix(call.with_arguments(layers=[layer.requires_grad_() for layer in layers]), torch.float32)


@pytest.mark.parametrize("norm", [False, True])
def test_mix_lengths_out_of_range_act_as_clamped(norm: bool) -> None:
    """The public function refuses them on the CPU, so this calls the op."""
    buffer = torch.randn(3, 5, 7)
    forward = functools.partial(MIX_OPS["triton"][0], [buffer], torch.ones(1), None, None)
    outside = forward(torch.tensor([9, -2, 2]), norm, 1e-5, True)
    clamped = forward(torch.tensor([5, 0, 2]), norm, 1e-5, True)
    assert torch.equal(outside[0], clamped[0])
    assert torch.equal(outside[1], clamped[1])
    assert outside[0][1].eq(0).all()


def test_mix_saves_zero_statistics_for_padding() -> None:
    layer = torch.full((1, 4, 3), math.nan)
    layer[0, 0] = torch.tensor([1.0, 2.0, 3.0])
    _, stats = MIX_OPS["triton"][0]([layer], torch.ones(1), None, None, torch.tensor([1]), True, 0.0, True)
    assert stats[1:].eq(0).all()
    torch.testing.assert_close(stats[0, 0], torch.tensor([2.0, 1.5**0.5]))


@pytest.mark.parametrize("kind", ["plain", "norm"])
def test_mix_is_batch_invariant_and_repeatable(kind: str) -> None:
    call = mix_call(torch.float32, 5, 40, norm=kind == "norm").detached(requires_grad=False)
    out = layer_mix(**call.arguments, backend="triton")
    assert torch.equal(out, layer_mix(**call.arguments, backend="triton"))
    alone = call.with_arguments(
        layers=[layer[2:, :3] for layer in call.arguments["layers"]], lengths=torch.tensor([3])
    )
    assert torch.equal(out[2:, :3], layer_mix(**alone.arguments, backend="triton"))


@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8), (2, 4, 0)])
@pytest.mark.parametrize("norm", [False, True])
def test_mix_of_nothing(shape: tuple[int, ...], norm: bool) -> None:
    layers = [torch.randn(shape, requires_grad=True) for _ in range(2)]
    weights = torch.ones(2, requires_grad=True)
    out = layer_mix(layers, weights, norm=norm, backend="triton")
    assert out.shape == shape
    gradients = torch.autograd.grad(out.sum(), [weights, *layers])
    assert all(g.eq(0).all() for g in gradients)


@pytest.mark.parametrize("norm", [False, True])
def test_mix_non_finite_values_stay_in_their_row(norm: bool) -> None:
    call = mix_call(torch.float32, 3, 20, norm=norm, lengths=None).detached(requires_grad=False)
    for frame, value in enumerate((math.nan, math.inf, -math.inf)):
        call.arguments["layers"][1][0, frame, 4] = value
    out = layer_mix(**call.arguments, backend="triton")
    expected = mix_reference.layer_mix(**call.arguments)
    assert torch.equal(out.isfinite(), expected.isfinite())
    torch.testing.assert_close(out, expected, equal_nan=True)


def project_call(
    dtype: torch.dtype,
    rows: int,
    taps: int,
    inputs: int,
    outputs: int,
    activation: str,
    *,
    norm: bool = True,
    shifts: bool = True,
    mean: float = 0.0,
    narrow: bool = False,
) -> Call:
    parameter = narrow_parameter if narrow else wide_parameter
    x = (torch.randn(rows, taps, inputs, dtype=torch.float64) + mean).to(dtype)
    arguments: dict[str, Any] = {
        "x": x,
        "weight": parameter(taps, outputs, inputs, dtype=dtype) / math.sqrt(inputs + 1),
        "bias": parameter(taps, outputs, dtype=dtype) if shifts else None,
        "norm_weight": parameter(taps, inputs, dtype=dtype) if norm else None,
        "norm_bias": parameter(taps, inputs, dtype=dtype) if norm and shifts else None,
        "activation": activation,
    }
    return Call(arguments, ("x", "weight", "bias", "norm_weight", "norm_bias")).detached()


def check_project(call: Call, dtype: torch.dtype) -> None:
    before = call.with_arguments(activation="none").detached(torch.float64, requires_grad=False)
    z = project_reference.layer_project(**before.arguments)
    # Near the bend of relu, rounding decides which slope holds: no gradient is sent there.
    grad = torch.where(z.abs() < 16 * torch.finfo(dtype).eps, 0.0, torch.randn(z.shape, dtype=torch.float64))
    check(layer_project, project_reference.layer_project, call, grad.to(dtype), dtype)


@each_dtype
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_project_activations(activation: str, dtype: torch.dtype) -> None:
    check_project(project_call(dtype, 11, 2, 40, 9, activation), dtype)


@pytest.mark.parametrize(
    ("rows", "taps", "inputs", "outputs"), [(5, 3, 17, 9), (5, 3, 1, 1), (2, 13, 16, 3), (66, 1, 70, 65)]
)
def test_project_shapes(rows: int, taps: int, inputs: int, outputs: int) -> None:
    """Small and odd; many taps; more than one tile in each direction."""
    check_project(project_call(torch.float32, rows, taps, inputs, outputs, "relu"), torch.float32)


def test_project_tiles_of_half_precision() -> None:
    check_project(project_call(torch.bfloat16, 130, 1, 65, 130, "relu"), torch.bfloat16)


@half
@pytest.mark.parametrize(("norm", "shifts"), [(False, True), (False, False), (True, False)])
def test_project_optional_parameters(norm: bool, shifts: bool, dtype: torch.dtype) -> None:
    check_project(project_call(dtype, 9, 2, 40, 12, "gelu", norm=norm, shifts=shifts), dtype)


@half
def test_project_mean_far_from_zero(dtype: torch.dtype) -> None:
    """The rows of the folded matrix, rounded, no longer sum to zero; the mean must not come through."""
    check_project(project_call(dtype, 20, 1, 200, 24, "silu", mean=30.0), dtype)


@pytest.mark.parametrize("frozen", ["x", "weight", "norm_weight", "all but bias"])
def test_project_frozen_inputs(frozen: str) -> None:
    call = project_call(torch.float32, 9, 2, 24, 8, "gelu_tanh")
    for name in ("x", "weight", "norm_weight", "norm_bias") if frozen == "all but bias" else (frozen,):
        call.arguments[name].requires_grad_(False)
    check_project(call, torch.float32)


def test_project_makes_no_gradient_of_frozen_input() -> None:
    call = project_call(torch.float32, 20, 2, 24, 16, "relu").detached(requires_grad=False)
    tensors = [call.arguments[name] for name in ("x", "weight", "bias", "norm_weight", "norm_bias")]
    y, _, stats = PROJECT_OPS["triton"][0](*tensors, 1e-5, ACTIVATION_CODES["relu"], True)
    dx, *_ = PROJECT_OPS["triton"][1](y, *tensors, y, stats, ACTIVATION_CODES["relu"], False, True, True)
    assert dx.shape == (0, 2, 24)


def test_project_strided_input() -> None:
    call = project_call(torch.float32, 6, 3, 17, 4, "silu")
    wide = torch.randn(6, 5, 23)
    permuted = torch.randn(17, 3, 6).permute(2, 1, 0)
    for x in (wide[:, 1:4, 3:20], permuted, torch.randn(1, 3, 17).expand(6, 3, 17)):
        check_project(call.with_arguments(x=x.requires_grad_()), torch.float32)


@pytest.mark.parametrize("shape", [(0, 3, 8, 4), (4, 3, 0, 4), (4, 3, 8, 0), (4, 0, 8, 4)])
@pytest.mark.parametrize("norm", [False, True])
def test_project_of_nothing(shape: tuple[int, ...], norm: bool) -> None:
    call = project_call(torch.float32, *shape, "gelu", norm=norm)
    out = layer_project(**call.arguments, backend="triton")
    expected = project_reference.layer_project(**call.arguments)
    torch.testing.assert_close(out, expected)
    leaves = call.leaves()
    found = torch.autograd.grad(out.sum(), leaves)
    reference = torch.autograd.grad(expected.sum(), leaves, allow_unused=True)
    for mine, theirs in zip(found, reference, strict=True):
        torch.testing.assert_close(mine, torch.zeros_like(mine) if theirs is None else theirs)


def test_project_non_finite_values_stay_in_their_row() -> None:
    call = project_call(torch.float32, 8, 2, 20, 9, "relu").detached(requires_grad=False)
    for row, value in enumerate((math.nan, math.inf, -math.inf)):
        call.arguments["x"][row, 1, 4] = value
    out = layer_project(**call.arguments, backend="triton")
    expected = project_reference.layer_project(**call.arguments)
    assert torch.equal(out.isfinite(), expected.isfinite())
    torch.testing.assert_close(out, expected, equal_nan=True)


def test_project_rows_do_not_depend_on_their_number() -> None:
    call = project_call(torch.float32, 70, 1, 24, 16, "relu").detached(requires_grad=False)
    out = layer_project(**call.arguments, backend="triton")
    alone = call.with_arguments(x=call.arguments["x"][65:])
    assert torch.equal(out[65:], layer_project(**alone.arguments, backend="triton"))


def adapter_call(
    dtype: torch.dtype,
    rows: int,
    width: int,
    bottleneck: int,
    activation: str = "gelu",
    *,
    norm: bool = True,
    shifts: bool = True,
    mean: float = 0.0,
    residual: str = "input",
    scale: float = 0.7,
    narrow: bool = False,
) -> Call:
    parameter = narrow_parameter if narrow else wide_parameter
    x = (torch.randn(rows, width, dtype=torch.float64) + mean).to(dtype)
    down_bias = parameter(bottleneck, dtype=dtype)
    if activation == "relu":
        # Near the bend of relu, rounding decides which slope holds: the bias keeps all values away from it.
        down_bias += 8 * down_bias.sign()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    residuals = {
        "input": x,
        "none": None,
        "same": torch.randn(rows, width, dtype=torch.float64).to(dtype),
        "wide": torch.randn(rows, width, dtype=wide),
    }
    arguments: dict[str, Any] = {
        "x": x,
        "down_weight": parameter(bottleneck, width, dtype=dtype) / math.sqrt(width + 1),
        "down_bias": down_bias if shifts else None,
        "up_weight": parameter(width, bottleneck, dtype=dtype) / math.sqrt(bottleneck + 1),
        "up_bias": parameter(width, dtype=dtype) if shifts else None,
        "residual": residuals[residual],
        "scale": scale,
        "activation": activation,
        "norm_weight": parameter(width, dtype=dtype) if norm else None,
        "norm_bias": parameter(width, dtype=dtype) if norm and shifts else None,
    }
    parameters = ("down_weight", "down_bias", "up_weight", "up_bias", "norm_weight", "norm_bias")
    call = Call(
        arguments, ("x", *parameters, *(["residual"] if residual in ("same", "wide") else []))
    ).detached()
    return call.with_arguments(residual=call.arguments["x"]) if residual == "input" else call


def check_adapter(call: Call, dtype: torch.dtype) -> None:
    x, residual = call.arguments["x"], call.arguments["residual"]
    add_input = residual is x

    def with_its_residual(function: Any) -> Any:
        """Copies of a call have copies of x and residual, but these are one tensor or two."""

        def run(x: Tensor, residual: Tensor | None, **options: Any) -> Tensor:
            return function(x=x, residual=x if add_input else residual, **options)

        return run

    out_dtype = dtype if residual is None else residual.dtype
    grad = torch.randn(x.shape, dtype=torch.float64).to(dtype)
    check(
        with_its_residual(adapter), with_its_residual(adapter_reference.adapter), call, grad, dtype, out_dtype
    )


#: Half precision runs the fused kernels, float32 those that go by way of a hidden layer in memory.
fused_or_not = pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["float16", "float32"])


@each_dtype
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_adapter_activations(activation: str, dtype: torch.dtype) -> None:
    check_adapter(adapter_call(dtype, 11, 40, 9, activation), dtype)


@pytest.mark.parametrize(
    ("dtype", "rows", "width", "bottleneck"),
    [
        *((torch.float16, *shape) for shape in ((5, 1, 1), (3, 64, 16), (130, 65, 20))),
        *((torch.float16, *shape) for shape in ((5, 70, 65), (66, 33, 130), (5, 33, 257))),
        *((torch.float32, *shape) for shape in ((5, 1, 1), (3, 64, 64), (66, 65, 70))),
    ],
)
def test_adapter_shapes(dtype: torch.dtype, rows: int, width: int, bottleneck: int) -> None:
    """The smallest; whole tiles; several, partial ones; every table entry; too wide for any."""
    check_adapter(adapter_call(dtype, rows, width, bottleneck, "silu"), dtype)


@fused_or_not
@pytest.mark.parametrize(("norm", "shifts"), [(False, True), (False, False), (True, False)])
@pytest.mark.parametrize("residual", ["input", "none", "same", "wide"])
def test_adapter_optional_parameters(residual: str, norm: bool, shifts: bool, dtype: torch.dtype) -> None:
    check_adapter(adapter_call(dtype, 9, 40, 12, norm=norm, shifts=shifts, residual=residual), dtype)


@half
def test_adapter_mean_far_from_zero(dtype: torch.dtype) -> None:
    """The rows of the folded matrix, rounded, no longer sum to zero; the mean must not come through."""
    check_adapter(adapter_call(dtype, 20, 200, 24, "silu", mean=30.0, residual="none"), dtype)


def test_adapter_statistics_of_rows_that_start_apart() -> None:
    """The forward kernel sums differences to the mean of the first columns."""
    x = torch.randn(6, 300)
    x[0] += 1000
    x[1, :64] += 1000
    x[2, :64] = 1000
    x[3] = 5
    x[4, -1] = 1000
    call = adapter_call(torch.float16, 6, 300, 8).detached(requires_grad=False)
    tensors = raw_tensors(call.with_arguments(x=x.half()))
    _, _, stats = ADAPTER_OPS["triton"][0](*tensors, 1.0, 1e-5, ACTIVATION_CODES["gelu"], True, True)
    exact = x.half().double()
    expected = torch.stack([exact.mean(1), (exact.var(1, correction=0) + 1e-5).rsqrt()], 1)
    torch.testing.assert_close(stats.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("op", ["layer_project", "adapter"])
@pytest.mark.parametrize(("norm", "shifts"), [(True, True), (True, False), (False, True), (False, False)])
def test_narrow_parameters(op: str, norm: bool, shifts: bool) -> None:
    """Of the dtype of x: the bits are those of the same values in float32, and a gradient is rounded once."""
    function: Any
    if op == "adapter":
        function = functools.partial(adapter, backend="triton")
        call = adapter_call(torch.float16, 70, 40, 12, norm=norm, shifts=shifts, residual="none", narrow=True)
    else:
        function = functools.partial(layer_project, backend="triton")
        call = project_call(torch.float16, 70, 2, 40, 12, "gelu", norm=norm, shifts=shifts, narrow=True)
    wide = call.detached(torch.float32)
    wide = wide.with_arguments(x=call.arguments["x"])
    grad = torch.randn(function(**call.arguments).shape).half()
    with poisoned_memory():
        out, gradients = value_and_gradients(function, call, grad)
        expected, sums = value_and_gradients(function, wide, grad)
    assert torch.equal(out, expected)
    names = [name for name in call.differentiable if call.tensors(name)]
    for name, found, total in zip(names, gradients, sums, strict=True):
        assert found.dtype == torch.float16
        if name in ("weight", "down_weight") and not norm:  # a product in half precision
            torch.testing.assert_close(found.float(), total, rtol=1e-3, atol=1e-3)
        else:
            assert torch.equal(found, total.half()), name


@half
@pytest.mark.parametrize("norm", [False, True])
def test_narrow_parameters_by_the_reference(norm: bool, dtype: torch.dtype) -> None:
    for width, bottleneck in ((40, 12), (33, 257)):  # the second in steps
        check_adapter(adapter_call(dtype, 20, width, bottleneck, norm=norm, narrow=True), dtype)
    check_project(project_call(dtype, 20, 2, 40, 12, "silu", norm=norm, narrow=True), dtype)


def raw_tensors(call: Call) -> list[Tensor | None]:
    """Arguments of the forward op before the numbers, ``x`` being the residual."""
    names = ("x", "down_weight", "down_bias", "up_weight", "up_bias", "", "norm_weight", "norm_bias")
    return [call.arguments.get(name) for name in names]


@fused_or_not
@pytest.mark.parametrize("frozen", ["x", "down", "up", "norm", "all but up", "all but x", "all but norm"])
def test_adapter_frozen_inputs(frozen: str, dtype: torch.dtype) -> None:
    call = adapter_call(dtype, 9, 24, 8, residual="none")
    for name in call.differentiable:
        chosen = name.startswith(frozen.removeprefix("all but "))
        call.arguments[name].requires_grad_(chosen == frozen.startswith("all but"))
    check_adapter(call, dtype)


@fused_or_not
def test_adapter_makes_only_what_is_asked_for(dtype: torch.dtype) -> None:
    bottleneck = 8
    call = adapter_call(dtype, 9, 24, bottleneck).detached(requires_grad=False)
    tensors, gelu = raw_tensors(call), ACTIVATION_CODES["gelu"]
    out, hidden, stats = ADAPTER_OPS["triton"][0](*tensors, 0.7, 1e-5, gelu, True, True)
    assert [t.shape for t in ADAPTER_OPS["triton"][0](*tensors, 0.7, 1e-5, gelu, True, False)[1:]] == [
        (0, bottleneck),
        (0, 2),
    ]
    backward = [out, *tensors[:4], *tensors[6:], hidden, stats, 0.7, gelu, True]
    x, down, up, norm = range(4)
    first_sizes = {x: [9], down: [bottleneck, bottleneck], up: [24, 24], norm: [24, 24]}
    for asked in first_sizes:
        found = ADAPTER_OPS["triton"][1](*backward, *(asked == kind for kind in first_sizes))
        made = {down, norm} if asked == norm else {asked}
        expected = [size if kind in made else 0 for kind, sizes in first_sizes.items() for size in sizes]
        assert [t.shape[0] for t in found] == expected


@fused_or_not
def test_adapter_at_its_start_is_exactly_its_residual(dtype: torch.dtype) -> None:
    """With an up-projection of zeros, as training starts, nothing reaches the down-projection."""
    call = adapter_call(dtype, 9, 40, 8, shifts=False)
    with torch.no_grad():
        call.arguments["up_weight"].zero_()
    out = adapter(**call.arguments, backend="triton")
    x, down, up = (call.arguments[name] for name in ("x", "down_weight", "up_weight"))
    assert torch.equal(out, x)
    dx, d_down, d_up = torch.autograd.grad(out, (x, down, up), torch.ones_like(out))
    assert dx.eq(1).all()
    assert d_down.eq(0).all()
    assert d_up.ne(0).any()


@fused_or_not
def test_adapter_strided_inputs(dtype: torch.dtype) -> None:
    call = adapter_call(dtype, 6, 17, 4, residual="same")
    own_residual = adapter_call(dtype, 6, 17, 4)
    wide = torch.randn(6, 23).to(dtype)
    permuted = torch.randn(17, 6).to(dtype).T
    single = torch.randn(1, 17).to(dtype).expand(6, 17)
    for x in (wide[:, 3:20], permuted, single):
        x = x.detach().requires_grad_()
        check_adapter(call.with_arguments(x=x), dtype)
        check_adapter(call.with_arguments(residual=x), dtype)
        check_adapter(own_residual.with_arguments(x=x, residual=x), dtype)


@pytest.mark.parametrize("shape", [(0, 8, 4), (4, 0, 4), (4, 8, 0)])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("residual", ["input", "none", "wide"])
@pytest.mark.parametrize("narrow", [False, True])
def test_adapter_of_nothing(shape: tuple[int, ...], norm: bool, residual: str, narrow: bool) -> None:
    call = adapter_call(torch.float16, *shape, norm=norm, residual=residual, narrow=narrow)
    out = adapter(**call.arguments, backend="triton")
    expected = adapter_reference.adapter(**call.arguments)
    torch.testing.assert_close(out, expected)
    leaves = call.leaves()
    found = torch.autograd.grad(out.sum(), leaves)
    reference = torch.autograd.grad(expected.sum(), leaves, allow_unused=True)
    for mine, theirs in zip(found, reference, strict=True):
        torch.testing.assert_close(mine, torch.zeros_like(mine) if theirs is None else theirs)


@pytest.mark.parametrize("norm", [False, True])
@fused_or_not
def test_adapter_non_finite_values_stay_in_their_row(dtype: torch.dtype, norm: bool) -> None:
    call = adapter_call(dtype, 8, 20, 9, "relu", norm=norm)
    x = call.arguments["x"].detach().clone()
    for row, value in enumerate((math.nan, math.inf, -math.inf)):
        x[row, 4] = value
    with torch.no_grad():
        # Without a LayerNorm, relu cuts off all that comes of -inf: that row stays finite.
        call.arguments["down_weight"][:, 4] = 1
    call = call.with_arguments(x=x.requires_grad_(), residual=None)
    results = []
    for function, options in ((adapter, {"backend": "triton"}), (adapter_reference.adapter, {})):
        out = function(**call.arguments, **options)
        grad = torch.ones_like(out)
        grad[4, 2] = math.inf
        results.append((out, *torch.autograd.grad(out, x, grad)))
    for mine, theirs in zip(*results, strict=True):
        assert torch.equal(mine.isfinite(), theirs.isfinite())
        others = [3, 5, 6, 7]
        assert mine[others].isfinite().all()
        torch.testing.assert_close(mine[others], theirs[others], rtol=1e-2, atol=1e-2)


@fused_or_not
def test_adapter_rows_do_not_depend_on_their_number(dtype: torch.dtype) -> None:
    call = adapter_call(dtype, 140, 24, 16, residual="none").detached(requires_grad=False)
    out = adapter(**call.arguments, backend="triton")
    # NumPy, the interpreter's arithmetic, adds up by the place in a tile: these rows keep theirs.
    alone = call.with_arguments(x=call.arguments["x"][128:])
    assert torch.equal(out[128:], adapter(**alone.arguments, backend="triton"))
    assert torch.equal(out, adapter(**call.arguments, backend="triton"))


def joined(function: Any) -> Any:
    """All results of merge in one vector."""

    def run(**arguments: Any) -> Tensor:
        return torch.cat([result.reshape(-1) for result in function(**arguments)])

    return run


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of two blocks of 32, launches of 4 pairs, sums of 8 parts at a time."""
    from mmkernels.ops.merge import triton as kernels

    for name, value in (("CHUNK", 64), ("BLOCK", 32), ("PAIRS", 4), ("SUMS", 8)):
        monkeypatch.setattr(kernels, name, value)


def merge_call(
    target: torch.dtype,
    source: torch.dtype,
    shapes: tuple[tuple[int, ...], ...] = ((5, 4), (3,), (0, 2), (), (2, 3, 2)),
    groups: tuple[int, ...] = (1, 0, 0, 1, 3),
) -> Call:
    arguments = {
        "target": [torch.randn(shape, dtype=torch.float64).to(target) for shape in shapes],
        "source": [torch.randn(shape, dtype=torch.float64).to(source) for shape in shapes],
        "lam": wide_parameter(max(groups) + 1, dtype=target),
        "groups": list(groups),
    }
    return Call(arguments, ("target", "source", "lam")).detached()


def check_merge(call: Call, dtype: torch.dtype) -> None:
    count = sum(tensor.numel() for tensor in call.arguments["target"])
    grad = torch.randn(count, dtype=torch.float64).to(dtype)
    check(joined(merge), joined(merge_reference.merge), call, grad, dtype)


@each_dtype
def test_merge(dtype: torch.dtype) -> None:
    check_merge(merge_call(dtype, dtype), dtype)


@half
def test_merge_of_two_dtypes(dtype: torch.dtype) -> None:
    check_merge(merge_call(dtype, torch.float32), dtype)
    check_merge(merge_call(torch.float32, dtype), torch.float32)


@pytest.mark.usefixtures("small_chunks")
@each_dtype
def test_merge_many_pairs_and_chunks(dtype: torch.dtype) -> None:
    """Whole and ragged chunks, groups over several launches, more partial sums than are added at a time."""
    shapes = ((64,), (2, 64), (0,), (65,), (63,), (7, 30), (1,), (600,), (), (128,), (3, 43))
    check_merge(merge_call(dtype, dtype, shapes, (0, 1, 0, 3, 3, 0, 1, 0, 3, 1, 0)), dtype)


@pytest.mark.parametrize("wanted", [("target",), ("source",), ("lam",), ("target", "lam"), ()])
@pytest.mark.usefixtures("small_chunks")
def test_merge_gradients_that_are_asked_for(wanted: tuple[str, ...]) -> None:
    call = merge_call(torch.float32, torch.float32, ((70,), (3, 4), (64,)), (1, 0, 1))
    for name in call.differentiable:
        for index, tensor in enumerate(call.tensors(name)):
            tensor.requires_grad_(name in wanted and index != 1)
    if not wanted:
        call.arguments["source"][1].requires_grad_()
    check_merge(call, torch.float32)


@pytest.mark.usefixtures("small_chunks")
def test_merge_unaligned_and_copied_tensors() -> None:
    flat = torch.randn(200)
    tensors = [flat[1:71], torch.randn(9, 8).T, torch.randn(65, 2)[:, 1], torch.randn(1, 5).expand(3, 5)]
    call = merge_call(torch.float32, torch.float32, tuple(tuple(t.shape) for t in tensors), (0, 1, 1, 0))
    check_merge(call.with_arguments(target=[t.requires_grad_() for t in tensors]), torch.float32)


@pytest.mark.usefixtures("small_chunks")
def test_merge_copies_at_the_ends() -> None:
    call = merge_call(torch.float32, torch.float32, ((70,), (70,)), (0, 1)).detached(requires_grad=False)
    target, source = call.arguments["target"], call.arguments["source"]
    expected = target[0].clone(), source[1].clone()
    source[0][5], source[0][66], target[1][8] = math.inf, math.nan, -math.inf
    out = merge(target, source, torch.tensor([0.0, 1.0]), backend="triton")
    assert all(map(torch.equal, out, expected))


@pytest.mark.usefixtures("small_chunks")
def test_merge_into_given_memory() -> None:
    call = merge_call(torch.float32, torch.float32, ((70,), (3, 4), (0,)), (1, 0, 1))
    arguments = call.detached(requires_grad=False).arguments
    expected = merge(**arguments, backend="triton")
    out = [torch.full_like(t, math.nan) for t in expected]
    assert merge(**arguments, out=out, backend="triton")[0] is out[0]
    assert all(map(torch.equal, out, expected))
    merge(**arguments, out=arguments["target"], backend="triton")
    assert all(map(torch.equal, arguments["target"], expected))


def test_merge_of_nothing() -> None:
    call = merge_call(torch.float32, torch.float32, ((0, 3), (2, 0)), (2, 0))
    out = merge(**call.arguments, backend="triton")
    assert [tuple(o.shape) for o in out] == [(0, 3), (2, 0)]
    gradients = torch.autograd.grad(sum(o.sum() for o in out), call.leaves())
    assert gradients[-1].tolist() == [0, 0, 0]


POOL_ENDS = ((3, 3, 20, 41), (0, 16, 17, 50), (5, 5, 5, 6))
each_reduction = pytest.mark.parametrize("reduce", REDUCTIONS)


@pytest.fixture
def short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of 16 frames, tiles of 4 rows and 16 columns; two segments are looked at at a time."""
    from mmkernels.ops.segment_pool import triton as kernels

    for name, value in (("PIECE", 16), ("BLOCK_ROWS", 4), ("WIDEST_BLOCK", 16), ("BLOCK_SEGMENTS", 2)):
        monkeypatch.setattr(kernels, name, value)


def pool_call(
    reduce: str,
    dtype: torch.dtype,
    width: int = 5,
    ends: tuple[tuple[int, ...], ...] = POOL_ENDS,
    counts: tuple[int, ...] | None = None,
    frames: int = 52,
) -> Call:
    """Frames in no segment hold NaN."""
    x = torch.randn(len(ends), frames, width, dtype=torch.float64).to(dtype)
    scores = 2 * wide_parameter(len(ends), frames, dtype=dtype)
    for row, stops in enumerate(ends):
        last = ([0, *stops][counts[row]] if counts else stops[-1]) if stops else 0
        x[row, last:], scores[row, last:] = math.nan, math.nan
    arguments = {
        "x": x,
        "ends": torch.tensor(ends, dtype=torch.int64).reshape(len(ends), -1),
        "reduce": reduce,
        "scores": scores if reduce == "attention" else None,
        "counts": None if counts is None else torch.tensor(counts),
    }
    return Call(arguments, ("x", "scores")).detached()


def check_pool(call: Call, dtype: torch.dtype) -> None:
    batch, _, width = call.arguments["x"].shape
    grad = torch.randn(batch, call.arguments["ends"].shape[1], width, dtype=torch.float64).to(dtype)
    check(segment_pool, pool_reference.segment_pool, call, grad, dtype)


@pytest.mark.usefixtures("short_pieces")
@each_dtype
@each_reduction
def test_pool(reduce: str, dtype: torch.dtype) -> None:
    """Whole segments, of several pieces, without frames; frames in none."""
    check_pool(pool_call(reduce, dtype), dtype)


@pytest.mark.usefixtures("short_pieces")
@each_reduction
def test_pool_sizes(reduce: str) -> None:
    check_pool(pool_call(reduce, torch.float32, 33, counts=(4, 1, 0)), torch.float32)
    check_pool(pool_call(reduce, torch.float32, 1, ((9,),), frames=9), torch.float32)
    check_pool(pool_call(reduce, torch.float32, 2, ((), ()), frames=9), torch.float32)
    check_pool(pool_call(reduce, torch.float32, 2, ((0, 0),), frames=0), torch.float32)


@pytest.mark.usefixtures("short_pieces")
@pytest.mark.parametrize("frozen", ["x", "scores"])
def test_pool_only_the_gradients_that_are_asked_for(frozen: str) -> None:
    call = pool_call("attention", torch.float32)
    call.arguments[frozen].requires_grad_(False)
    check_pool(call, torch.float32)


@pytest.mark.usefixtures("short_pieces")
@each_reduction
def test_pool_of_ends_of_any_value(reduce: str) -> None:
    """The raw op clamps them to the frames, and to their running maximum; counts too."""
    call = pool_call(reduce, torch.float32, ends=((52,),) * 3).detached(requires_grad=False).arguments
    ends = torch.tensor([[5, 2, 40, 30, 99], [-4, 3, 2, 1000, 4], [-(2**63), 7, 3, 2**63 - 1, -(2**63)]])
    code = REDUCTIONS.index(reduce)
    for counts in (None, torch.tensor([2, -3, 99])):
        out, stats, index = POOL_OPS["triton"][0](call["x"], ends, call["scores"], counts, code, True)
        x = call["x"].clone().requires_grad_()
        expected = pool_reference.segment_pool(x, ends, reduce=reduce, scores=call["scores"], counts=counts)
        torch.testing.assert_close(out, expected)
        inputs = torch.ones_like(out), call["x"], ends, call["scores"], counts, stats, index
        dx, _ = POOL_OPS["triton"][1](*inputs, 52, code, True, False)
        torch.testing.assert_close(dx, torch.autograd.grad(expected.sum(), x)[0])


@pytest.mark.usefixtures("short_pieces")
@pytest.mark.parametrize("frames", [5, 50])
def test_pool_of_special_values(frames: int) -> None:
    """The first of equal maxima and of NaN; scores of -inf; a segment of nothing else."""
    ends = torch.tensor([[frames]])
    x = torch.zeros(1, frames, 4)
    x[0, [3, frames - 1], 0] = 2.0
    x[0, [2, frames - 1], 1] = math.nan
    x[0, :, 2] = -math.inf
    out, _, index = POOL_OPS["triton"][0](x, ends, None, None, MAX, True)
    assert index.flatten().tolist() == [3, 2, 0, 0]
    torch.testing.assert_close(out, pool_reference.segment_pool(x, ends, reduce="max"), equal_nan=True)
    call = pool_call("attention", torch.float32, ends=((frames,),), frames=frames)
    with torch.no_grad():
        call.arguments["scores"][0, 1 : frames - 1] = -math.inf
    check_pool(call, torch.float32)
    with torch.no_grad():
        call.arguments["scores"].fill_(-math.inf)
    out = segment_pool(**call.arguments, backend="triton")
    assert out.eq(0).all()
    assert all(gradient.eq(0).all() for gradient in torch.autograd.grad(out.sum(), call.leaves()))


@pytest.mark.usefixtures("short_pieces")
@each_reduction
def test_pool_of_a_row_does_not_depend_on_the_batch(reduce: str) -> None:
    call = pool_call(reduce, torch.float32, 17).detached(requires_grad=False)
    a = call.arguments
    scores = None if a["scores"] is None else a["scores"][:1, :41]
    alone = call.with_arguments(x=a["x"][:1, :41], ends=a["ends"][:1], scores=scores)
    out = segment_pool(**a, backend="triton")
    assert torch.equal(out[:1], segment_pool(**alone.arguments, backend="triton"))


def check_ctc(problem: Problem) -> tuple[Tensor, ...]:
    """The bits of the reference, but for the order in which a total is added."""
    with poisoned_memory():
        found: tuple[Tensor, ...] = CTC_OPS["triton"][0](*vars(problem).values())
    paths, ends, totals = problem.expected()
    assert torch.equal(found[0], paths)
    assert torch.equal(found[1], ends)
    torch.testing.assert_close(found[2], totals, rtol=1e-6, atol=1e-6)
    return found


@each_dtype
@pytest.mark.parametrize("kind", KINDS)
def test_ctc_align(kind: str, dtype: torch.dtype) -> None:
    """Ragged, with ties, and with utterances that have no path; below and above the rescaling period."""
    check_ctc(random_problem(1, kind, dtype, batch=8, frames=7))
    check_ctc(random_problem(2, kind, dtype, batch=2, frames=39, tokens=12, classes=6))


@pytest.mark.parametrize("frames", [31, 32, 33, 64])
def test_ctc_align_around_the_rescaling_period(frames: int) -> None:
    problem = random_problem(frames, "grid", batch=2, frames=frames, tokens=12, classes=5)
    check_ctc(replace(problem, input_lengths=torch.full((2,), frames)))


def test_ctc_align_of_more_tokens_than_the_smallest_block() -> None:
    problem = random_problem(3, "grid", batch=1, frames=40, tokens=300, classes=50)
    problem = replace(problem, target_lengths=torch.tensor([30]), input_lengths=torch.tensor([40]))
    assert check_ctc(problem)[2] > -math.inf


def test_ctc_align_of_any_values() -> None:
    """Lengths and tokens that the host does not read; NaN; strides of audio with the time first."""
    problem = random_problem(5, batch=5, frames=12, tokens=3)
    log_probs = problem.log_probs.transpose(0, 1).contiguous().transpose(0, 1)
    log_probs[torch.rand(log_probs.shape) < 0.05] = math.nan
    targets = problem.targets.clone()
    targets[0, 1], targets[1, 2], targets[2, 0] = 1 << 40, -1, problem.blank
    wild = torch.tensor([1 << 40, 12, 12, -5, 12]), torch.tensor([3, 1 << 50, 3, 2, -(1 << 50)])
    check_ctc(Problem(log_probs, targets, *wild, problem.blank))
    wide = log_probs.mT.contiguous().mT
    check_ctc(replace(problem, log_probs=wide))


@pytest.mark.parametrize(("batch", "frames", "tokens"), [(0, 5, 2), (2, 0, 2), (2, 5, 0), (2, 0, 0)])
def test_ctc_align_of_nothing(batch: int, frames: int, tokens: int) -> None:
    check_ctc(random_problem(6, batch=batch, frames=frames, tokens=tokens))


def test_ctc_align_of_too_many_tokens_is_refused() -> None:
    log_probs, targets = torch.randn(1, 3, 4), torch.ones(1, MOST_TRITON_TOKENS + 1, dtype=torch.int64)
    with pytest.raises(
        ValueError, match=r"backend='triton' cannot be used: .* at most 8191 tokens, got 8192"
    ):
        ctc_align(log_probs, targets, backend="triton")


def test_ctc_align_scores_have_gradients() -> None:
    log_probs = torch.randn(1, 9, 4).log_softmax(2).requires_grad_()
    found = ctc_align(log_probs, torch.tensor([[1, 3]]), backend="triton")
    found.scores.sum().backward()
    assert log_probs.grad is not None
    assert torch.equal(log_probs.grad[0], torch.nn.functional.one_hot(found.paths[0], 4).float())


def cif_call(
    dtype: torch.dtype,
    frames: int,
    width: int,
    tokens: int,
    *,
    scaled: bool,
    high: float = 0.9,
    beta: float = 1.0,
) -> Call:
    """A ragged batch; padding of x holds NaN."""
    lengths = torch.tensor([frames, 0, max(frames - 3, 0)])
    x = torch.randn(3, frames, width, dtype=torch.float64)
    for row, length in enumerate(lengths):
        x[row, length:] = math.nan
    alpha = (0.05 + high * torch.rand(3, frames, dtype=torch.float64)) * beta
    arguments: dict[str, Any] = {
        "x": x.to(dtype),
        "alpha": alpha.to(torch.float64 if dtype == torch.float64 else torch.float32),
        "beta": beta,
        "lengths": lengths,
        "target_lengths": torch.tensor([tokens, 2, max(tokens - 2, 0)]) if scaled else None,
        "max_length": tokens,
    }
    return Call(arguments, ("x", "alpha")).detached()


def cif_features(**arguments: Any) -> Tensor:
    return cif(**arguments).features


def cif_reference_features(**arguments: Any) -> Tensor:
    return cif_reference.cif(**arguments).features


def check_cif(call: Call, dtype: torch.dtype) -> None:
    """Also the lengths and ends."""
    arguments = call.arguments
    shape = (3, arguments["max_length"], arguments["x"].shape[2])
    grad = torch.randn(shape, dtype=torch.float64).to(dtype)
    check(cif_features, cif_reference_features, call, grad, dtype)
    with poisoned_memory():
        found = cif(**call.arguments, backend="triton")
    expected = cif_reference.cif(**call.arguments)
    assert torch.equal(found.lengths, expected.lengths)
    assert torch.equal(found.ends, expected.ends)


@each_dtype
@pytest.mark.parametrize("scaled", [False, True])
def test_cif(scaled: bool, dtype: torch.dtype) -> None:
    check_cif(cif_call(dtype, 14, 17, 7, scaled=scaled), dtype)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(
    ("frames", "width", "tokens", "high"),
    [(1, 1, 1, 0.9), (5, 300, 4, 1.8), (6, 8, 25, 6.0), (15, 40, 3, 0.9)],
)
def test_cif_sizes(frames: int, width: int, tokens: int, high: float, scaled: bool) -> None:
    """Several blocks of columns; several tokens from a frame; more tokens than there is room for."""
    call = cif_call(torch.float32, frames, width, tokens, scaled=scaled, high=high, beta=0.7)
    check_cif(call, torch.float32)


@pytest.mark.parametrize("scaled", [False, True])
def test_cif_steps_of_a_whole_utterance(scaled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmkernels.ops.cif import triton as kernels

    monkeypatch.setattr(kernels, "BLOCK_T", 16)
    check_cif(cif_call(torch.float32, 40, 4, 20, scaled=scaled), torch.float32)


@pytest.mark.parametrize("name", ["x", "alpha"])
def test_cif_gradient_that_is_asked_for(name: str) -> None:
    call = cif_call(torch.float32, 14, 17, 7, scaled=True)
    call.arguments[name].requires_grad_(False)
    check_cif(call, torch.float32)


def test_cif_values_that_only_the_device_sees() -> None:
    x, alpha = torch.randn(3, 8, 4), torch.full((3, 8), 0.4)
    alpha[2] = torch.tensor([-1.0, math.nan, math.inf, 1e38, -0.0, 3e38, 0.5, -math.inf])
    lengths = torch.tensor([99, -4, 8])
    with poisoned_memory():
        out, counts, ends, *plan = CIF_OPS["triton"][0](x, alpha, lengths, None, 1.0, 0.5, 5)
        CIF_OPS["triton"][1](out, x, alpha, lengths, counts, *plan, 1.0, False, True, True)
    assert counts.tolist() == [3, 0, 5]
    assert out[1].eq(0).all()
    assert ((ends >= 0) & (ends <= 8)).all()


@pytest.mark.parametrize(("frames", "width", "tokens"), [(0, 4, 3), (5, 0, 3), (5, 4, 0)])
@pytest.mark.parametrize("scaled", [False, True])
def test_cif_of_nothing(frames: int, width: int, tokens: int, scaled: bool) -> None:
    call = cif_call(torch.float32, frames, width, tokens, scaled=scaled)
    found = cif(**call.arguments, backend="triton")
    expected = cif_reference.cif(**call.arguments)
    torch.testing.assert_close(found, expected)
    leaves = call.leaves()
    for gradient in torch.autograd.grad(found.features.sum(), leaves):
        assert gradient.eq(0).all()


def attention_call(
    dtype: torch.dtype,
    size: int = 16,
    ends: tuple[tuple[int, ...], ...] = ((3, 3, 70), (0, 40, 64)),
    *,
    frames: int = 70,
    heads: tuple[int, int] = (2, 1),
    lookback: int = 1,
    scale: float | None = None,
) -> Call:
    """Frames in no segment hold NaN."""

    def rows(count: int) -> Tensor:
        return torch.randn(len(ends), frames, count, size, dtype=torch.float64).to(dtype).transpose(1, 2)

    arguments: dict[str, Any] = dict(zip("qkv", map(rows, (heads[0], *heads[1:] * 2)), strict=True))
    stops = torch.tensor(ends, dtype=torch.int64).reshape(len(ends), -1)
    arguments |= {"ends": stops, "lookback": lookback, "scale": scale}
    return Call(arguments, ("q", "k", "v")).detached()


def check_attention(call: Call, dtype: torch.dtype) -> None:
    call = call.detached()
    a = call.arguments
    grad = torch.randn(a["q"].shape, dtype=torch.float64).to(dtype)
    exact = value_and_gradients(attention_reference.segment_attention, call.detached(torch.float64), grad)
    eager = value_and_gradients(attention_reference.segment_attention, call.detached(), grad)
    for row, ends in enumerate(a["ends"]):
        for tensor in (*call.leaves(), grad):
            tensor.data[row, :, ends[-1] if len(ends) else 0 :] = math.nan
    with poisoned_memory():
        out, gradients = value_and_gradients(segment_attention, call, grad, backend="triton")
    assert out.dtype == dtype
    for index, (k, r, e) in enumerate(zip((out, *gradients), flat(exact), flat(eager), strict=True)):
        if dtype == torch.bfloat16:
            k = r + (k.double() - r) / 2  # the interpreter truncates, see check()
        assert_close_to_reference(k, r, e, dtype, "qkv"[index - 1] if index else "result")


def test_a_query_that_sees_one_key_has_no_gradient() -> None:
    """Exactly: the products and the dots that are subtracted from them are the same sums."""
    call = attention_call(torch.float32, 72, (tuple(range(1, 21)),), frames=20, lookback=0)
    _, (dq, dk, _) = value_and_gradients(
        segment_attention, call, torch.randn(call.arguments["q"].shape), backend="triton"
    )
    assert dq.eq(0).all()
    assert dk.eq(0).all()


def flat(found: tuple[Tensor, list[Tensor]]) -> list[Tensor]:
    return [found[0], *found[1]]


@each_dtype
def test_attention(dtype: torch.dtype) -> None:
    """Segments without frames, of several blocks; frames in none; heads that share keys."""
    check_attention(attention_call(dtype), dtype)


def test_attention_sizes() -> None:
    check_attention(attention_call(torch.float32, 72, ((20,),), frames=20, heads=(4, 2)), torch.float32)
    check_attention(attention_call(torch.float32, 8, ((5,),), frames=20), torch.float32)
    check_attention(attention_call(torch.float16, 264, ((20,),), frames=20, heads=(1, 1)), torch.float16)
    check_attention(attention_call(torch.float32, 8, ((), ()), frames=9), torch.float32)


@pytest.mark.parametrize("lookback", [0, 5, 1000, 2**62])
def test_attention_lookback(lookback: int) -> None:
    """More segments than a program reads at a time, and more frames than a window."""
    ends = tuple(range(3, 225, 3))
    call = attention_call(torch.float32, 8, (ends,), frames=230, heads=(1, 1), lookback=lookback, scale=-0.2)
    check_attention(call, torch.float32)


@pytest.mark.parametrize("heads", [(0, 0), (0, 2), (2, 1)])
@pytest.mark.parametrize("shape", [(2, 0, 8), (2, 4, 0)])
def test_attention_of_nothing(heads: tuple[int, int], shape: tuple[int, int, int]) -> None:
    batch, frames, size = shape
    call = attention_call(torch.float32, size, ((0,),) * batch, frames=frames, heads=heads)
    out = segment_attention(**call.arguments, backend="triton")
    gradients = torch.autograd.grad(out.sum(), call.leaves())
    assert [g.shape for g in gradients] == [leaf.shape for leaf in call.leaves()]
    assert all(g.eq(0).all() for g in gradients)


def test_attention_of_ends_of_any_value() -> None:
    """The raw op clamps them to the frames, and to their running maximum."""
    call = attention_call(torch.float32, 8, ((20,),) * 3, frames=20).detached(requires_grad=False).arguments
    ends = torch.tensor([[5, 2, 17, 12, 99], [-4, 3, 2, 1000, 4], [-(2**63), 7, 3, 2**63 - 1, -(2**63)]])
    out, _, extents = ATTENTION_OPS["triton"][0](call["q"], call["k"], call["v"], ends, 1, None, True)
    assert torch.equal(extents[:, 0], attention_reference.key_starts(ends, 20, 1).int())
    expected = attention_reference.segment_attention(call["q"], call["k"], call["v"], ends)
    torch.testing.assert_close(out.transpose(1, 2), expected)


@pytest.mark.parametrize("needed", ["q", "k", "v"])
def test_attention_of_one_gradient(needed: str) -> None:
    call = attention_call(torch.float32, 8, ((5, 20),), frames=20)
    out = segment_attention(**call.arguments, backend="triton")
    together = dict(zip("qkv", torch.autograd.grad(out.sum(), call.leaves()), strict=True))
    for name in "qkv":
        call.arguments[name].requires_grad_(name == needed)
    out = segment_attention(**call.arguments, backend="triton")
    (alone,) = torch.autograd.grad(out.sum(), call.arguments[needed])
    assert torch.equal(alone, together[needed])


def test_attention_of_a_row_does_not_depend_on_the_batch() -> None:
    call = attention_call(torch.float32).detached(requires_grad=False)
    out = segment_attention(**call.arguments, backend="triton")
    alone = {name: call.arguments[name][1:, :, :64] for name in "qkv"}
    alone_out = segment_attention(**alone, ends=call.arguments["ends"][1:], backend="triton")
    assert torch.equal(alone_out, out[1:, :, :64])


def monotonic_batch(dtype: torch.dtype, frames: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Three utterances on a grid of 0.5, so that many paths are equally good; padding holds NaN."""
    x = (2 * torch.randn(3, frames, tokens)).round() / 2
    lengths = torch.tensor([frames, tokens, frames]), torch.tensor([tokens, tokens, (tokens + 1) // 2])
    for row, (length, count) in enumerate(zip(*lengths, strict=True)):
        x[row, length:] = math.nan
        x[row, :, count:] = math.nan
    return x.to(dtype), *lengths


@each_dtype
@pytest.mark.parametrize(("frames", "tokens"), [(1, 1), (33, 5), (64, 32), (40, 40)])
def test_monotonic(frames: int, tokens: int, dtype: torch.dtype) -> None:
    batch = monotonic_batch(dtype, frames, tokens)
    with poisoned_memory():
        durations = monotonic_align(*batch, backend="triton")
    assert torch.equal(durations, monotonic_reference.monotonic_align(*batch))


def test_monotonic_panels_and_layouts(monkeypatch: pytest.MonkeyPatch) -> None:
    from mmkernels.ops.monotonic_align import triton as kernels

    monkeypatch.setattr(kernels, "PANEL", 16)
    x, *lengths = monotonic_batch(torch.float32, 50, 40)
    for given in (x, x.mT.contiguous().mT, x.transpose(0, 1).contiguous().transpose(0, 1)):
        durations = monotonic_align(given, *lengths, backend="triton")
        assert torch.equal(durations, monotonic_reference.monotonic_align(x, *lengths))


def test_monotonic_values_that_only_the_device_sees() -> None:
    x = torch.randn(5, 20, 9)
    x[4, 3, 2] = math.nan
    frames, tokens = torch.tensor([99, -3, 4, 20, 20]), torch.tensor([99, 5, 9, -1, 9])
    with poisoned_memory():
        found = MONOTONIC_OPS["triton"][0](x, frames, tokens)
    assert found[1:].eq(0).all()
    assert torch.equal(found[:1], monotonic_reference.monotonic_align(x[:1]))


def test_monotonic_infinite_scores() -> None:
    x = torch.randn(2, 20, 9)
    x.view(-1)[::7] = math.inf
    x.view(-1)[::5] = -math.inf
    durations = monotonic_align(x, backend="triton")
    assert torch.equal(durations, monotonic_reference.monotonic_align(x))


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 0), (2, 4, 0)])
def test_monotonic_of_nothing(shape: tuple[int, ...]) -> None:
    out = monotonic_align(torch.zeros(shape), backend="triton")
    assert torch.equal(out, torch.zeros(shape[0], shape[2], dtype=torch.int64))


def distill_call(dtype: torch.dtype, table_dtype: torch.dtype, width: int, *, tokens: int = 4) -> Call:
    """A ragged batch; padding holds NaN, and ids outside the table."""
    table = torch.randn(6, width, dtype=torch.float64)
    ids, counts = torch.randint(6, (3, tokens)), torch.tensor([tokens, 0, max(tokens - 2, 0)])
    pred = table[ids] + 0.5 * torch.randn(3, tokens, width, dtype=torch.float64)
    for row, count in enumerate(counts):
        pred[row, count:], ids[row, count:] = math.nan, -100
    arguments = {"pred": pred.to(dtype), "table": table.to(table_dtype), "ids": ids, "counts": counts}
    return Call(arguments, ("pred",)).detached()


def check_distill(call: Call) -> None:
    dtype = call.arguments["pred"].dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    check(distill_loss, distill_reference.distill_loss, call, torch.tensor(0.7), wide)
    leaf = call.arguments["pred"]
    loss = distill_loss(**call.arguments, backend="triton")
    (gradient,) = torch.autograd.grad(loss, leaf)
    for row, count in enumerate(call.arguments["counts"]):
        assert gradient[row, count:].eq(0).all()


@each_dtype
def test_distill_loss(dtype: torch.dtype) -> None:
    check_distill(distill_call(dtype, dtype, 17))


@half
def test_distill_loss_of_two_dtypes(dtype: torch.dtype) -> None:
    check_distill(distill_call(dtype, torch.float32, 40))
    check_distill(distill_call(torch.float32, dtype, 40))


@pytest.mark.parametrize(("width", "tokens"), [(1, 1), (5000, 2), (4, 6)])
def test_distill_loss_sizes(width: int, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of columns, of tokens and of rows."""
    from mmkernels.ops.distill_loss import triton as kernels

    monkeypatch.setattr(kernels, "BLOCK_TOKENS", 2)
    check_distill(distill_call(torch.float32, torch.float32, width, tokens=tokens))


def test_distill_loss_values_that_only_the_device_sees() -> None:
    pred, table = torch.randn(3, 3, 5), torch.randn(6, 5)
    ids, counts = torch.tensor([[0, 5, 6], [1, -1, 2], [9, 9, 9]]), torch.tensor([99, 2, -7])
    with poisoned_memory():
        loss, *saved = DISTILL_OPS["triton"][0](pred, table, ids, counts, 5.0)
        d_pred = DISTILL_OPS["triton"][1](torch.ones(()), pred, table, ids, counts, *saved, 5.0)
    assert loss.isnan()
    assert saved[1] == 5
    wrong = [[False, False, True], [False, True, False], [False] * 3]
    assert d_pred.isnan().all(-1).tolist() == wrong
    assert d_pred.isnan().any(-1).tolist() == wrong
    assert d_pred[2].eq(0).all()


def test_distill_loss_of_vectors_without_direction() -> None:
    table = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    pred = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]]).requires_grad_()
    ids = torch.tensor([0, 1, 1])
    loss = distill_loss(pred, table, ids, backend="triton")
    (gradient,) = torch.autograd.grad(loss, pred)
    torch.testing.assert_close(loss.detach(), torch.tensor(50 / 3 + 5))
    torch.testing.assert_close(gradient, (pred - table[ids]).detach() * 2 / 3)


@pytest.mark.parametrize(("batch", "tokens", "width"), [(0, 4, 3), (3, 0, 3), (3, 4, 0)])
def test_distill_loss_of_nothing(batch: int, tokens: int, width: int) -> None:
    pred = torch.zeros(batch, tokens, width).requires_grad_()
    ids = torch.zeros(batch, tokens, dtype=torch.int64)
    loss = distill_loss(pred, torch.zeros(2, width), ids, backend="triton")
    assert loss == (5 if batch * tokens else 0)
    (gradient,) = torch.autograd.grad(loss, pred)
    assert gradient.shape == pred.shape


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("narrow", [False, True])
def test_fakes_tell_what_the_kernels_return(norm: bool, narrow: bool) -> None:
    mix = mix_call(torch.bfloat16, 3, 17, affine=norm).detached(requires_grad=False).arguments
    names = ("layers", "weights", "norm_weight", "norm_bias", "lengths")
    forward = [mix[name] for name in names]
    opcheck = functools.partial(torch.library.opcheck, test_utils=("test_schema", "test_faketensor"))
    opcheck(MIX_OPS["triton"][0], (*forward, norm, 1e-5, True))
    out, stats = MIX_OPS["triton"][0](*forward, norm, 1e-5, True)
    opcheck(MIX_OPS["triton"][1], (out, *forward, stats, norm, True, norm, [0, 2]))

    project = project_call(torch.bfloat16, 3, 2, 5, 3, "gelu", norm=norm, narrow=narrow)
    project = project.detached(requires_grad=False).arguments
    tensors = [project[name] for name in ("x", "weight", "bias", "norm_weight", "norm_bias")]
    gelu = ACTIVATION_CODES["gelu"]
    opcheck(PROJECT_OPS["triton"][0], (*tensors, 1e-5, gelu, True))
    y, value, stats = PROJECT_OPS["triton"][0](*tensors, 1e-5, gelu, True)
    opcheck(PROJECT_OPS["triton"][1], (y, *tensors, value, stats, gelu, True, True, norm))

    call = adapter_call(torch.bfloat16, 3, 5, 4, norm=norm, residual="wide", narrow=narrow)
    call = call.detached(requires_grad=False)
    tensors = raw_tensors(call)
    tensors[5] = call.arguments["residual"]
    opcheck(ADAPTER_OPS["triton"][0], (*tensors, 0.7, 1e-5, gelu, False, True))
    out, hidden, stats = ADAPTER_OPS["triton"][0](*tensors, 0.7, 1e-5, gelu, False, True)
    backward = (out.bfloat16(), *tensors[:4], *tensors[6:], hidden, stats, 0.7, gelu, False)
    opcheck(ADAPTER_OPS["triton"][1], (*backward, True, True, True, norm))

    pairs = merge_call(torch.bfloat16, torch.float32).detached(requires_grad=False).arguments.values()
    out = MERGE_OPS["triton"][0](*pairs, torch.float32)
    opcheck(MERGE_OPS["triton"][0], (*pairs, torch.float32))
    opcheck(MERGE_OPS["triton"][1], (*pairs, out))
    opcheck(MERGE_OPS["triton"][2], (out, *pairs, norm, [0, 4], [3] if narrow else []))

    code = ATTENTION if norm else MAX
    pool = (
        pool_call(REDUCTIONS[code], torch.bfloat16, counts=(1, 0, 4)).detached(requires_grad=False).arguments
    )
    inputs = [pool[name] for name in ("x", "ends", "scores", "counts")]
    opcheck(POOL_OPS["triton"][0], (*inputs, code, not narrow))
    out, *saved = POOL_OPS["triton"][0](*inputs, code, True)
    opcheck(POOL_OPS["triton"][1], (out, *inputs, *saved, 52, code, not narrow, norm))
    opcheck(CTC_OPS["triton"][0], tuple(vars(random_problem(7, dtype=torch.bfloat16, batch=2)).values()))
    call = cif_call(torch.bfloat16, 9, 5, 4, scaled=norm).detached(requires_grad=False).arguments
    inputs = (call["x"], call["alpha"].float(), call["lengths"])
    forward = (*inputs, call["target_lengths"], 1.0, 0.5, 4)
    opcheck(CIF_OPS["triton"][0], forward)
    out, counts, _, *plan = CIF_OPS["triton"][0](*forward)
    opcheck(CIF_OPS["triton"][1], (out, *inputs, counts, *plan, 1.0, norm, narrow, True))

    call = distill_call(torch.bfloat16, torch.float32, 5).detached(requires_grad=False).arguments
    counts = call["counts"] if norm else None
    inputs = (call["pred"].nan_to_num(), call["table"], call["ids"].clamp(min=0), counts)
    opcheck(DISTILL_OPS["triton"][0], (*inputs, 5.0))
    loss, *saved = DISTILL_OPS["triton"][0](*inputs, 5.0)
    opcheck(DISTILL_OPS["triton"][1], (loss, *inputs, *saved, 5.0))

    lengths = torch.tensor([6, 4]) if norm else None
    opcheck(MONOTONIC_OPS["triton"][0], (torch.randn(2, 6, 4), lengths, lengths if narrow else None))


def test_ops_refuse_what_would_read_past_the_end() -> None:
    layer = torch.randn(2, 3, 4)
    with pytest.raises(ValueError, match="weights: expected shape"):
        MIX_OPS["triton"][0]([layer], torch.ones(2), None, None, None, False, 1e-5, False)
    with pytest.raises(ValueError, match="layers: expected one shape"):
        MIX_OPS["triton"][0]([layer, layer[:1]], torch.ones(2), None, None, None, False, 1e-5, False)
    with pytest.raises(ValueError, match="norm_weight: expected shape"):
        PROJECT_OPS["triton"][0](layer, torch.ones(3, 5, 4), None, torch.ones(3, 5), None, 1e-5, 0, False)
    down, up, options = torch.ones(5, 4), torch.ones(4, 5), (1.0, 1e-5, 0, False, False)
    for name, residual, up_weight in (("residual", layer[0, :2], up), ("up_weight", None, up[:3])):
        with pytest.raises(ValueError, match=f"{name}: expected shape"):
            ADAPTER_OPS["triton"][0](layer[0], down, None, up_weight, None, residual, None, None, *options)
    with pytest.raises(ValueError, match="targets: expected shape"):
        CTC_OPS["triton"][0](layer, torch.ones(3, 2, dtype=torch.int64), None, None, 0)
    with pytest.raises(ValueError, match="blank: expected a class below 4, got 4"):
        CTC_OPS["triton"][0](layer, torch.ones(2, 2, dtype=torch.int64), None, None, 4)
    forward, into, backward = MERGE_OPS["triton"]
    with pytest.raises(ValueError, match="target, source and groups: expected lists of one length"):
        forward([layer], [layer, layer], torch.ones(1), [0], torch.float32)
    with pytest.raises(ValueError, match="source: expected the shapes of target"):
        forward([layer], [layer[:1]], torch.ones(1), [0], torch.float32)
    with pytest.raises(ValueError, match="groups: expected indices below 1, got"):
        forward([layer], [layer], torch.ones(1), [1], torch.float32)
    with pytest.raises(ValueError, match="out: expected contiguous tensors"):
        into([layer], [layer], torch.ones(1), [0], [layer[:1]])
    with pytest.raises(ValueError, match="grad: expected tensors like those of target"):
        backward([layer[:1]], [layer], [layer], torch.ones(1), [0], True, [], [])
    with pytest.raises(ValueError, match="need_source: expected indices of pairs"):
        backward([layer], [layer], [layer], torch.ones(1), [0], True, [0], [1])


def test_pool_ops_refuse_what_would_read_past_the_end() -> None:
    forward, backward = POOL_OPS["triton"]
    x, ends, scores = torch.randn(2, 5, 3), torch.tensor([[1, 2], [1, 2]]), torch.zeros(2, 5)
    for arguments, message in (
        ((x[0], ends, None, None, 0, True), "expected frames of three dimensions"),
        ((x, ends[:1], None, None, 0, True), "ends: expected shape"),
        ((x, ends.int(), None, None, 0, True), "ends: expected shape"),
        ((x, ends, scores, None, 0, True), "reduce: expected below 5, with scores for 4 alone"),
        ((x, ends, scores[:, 1:], None, 4, True), "scores: expected shape"),
        ((x, ends, None, torch.ones(1), 0, True), "counts: expected shape"),
    ):
        with pytest.raises(ValueError, match=message):
            forward(*arguments)
    grad, stats = torch.randn(2, 2, 3), torch.zeros(2, 2, 2)
    index = torch.zeros(2, 2, 3, dtype=torch.int32)
    for arguments, message in (
        ((grad[:, :1], None, ends, None, None, stats, index, 5, 0, True, False), "grad: expected 2 segments"),
        ((grad, None, ends, None, None, stats, index[:1], 5, 2, True, False), "index: expected shape"),
        ((grad, None, ends, scores, None, stats[:1], index, 5, 4, True, False), "stats: expected shape"),
        ((grad, None, ends, scores, None, stats, index, 5, 4, True, True), "need_scores: expected attention"),
        ((grad, x[:, :4], ends, scores, None, stats, index, 5, 4, True, True), "x: expected shape"),
        ((grad, None, ends, None, None, stats, index, -1, 0, True, False), "frames: expected below"),
    ):
        with pytest.raises(ValueError, match=message):
            backward(*arguments)


@pytest.mark.parametrize("op", ["layer_project", "adapter"])
def test_backward_inside_autocast_keeps_float32(op: str) -> None:
    if op == "adapter":
        call, function = adapter_call(torch.float32, 9, 24, 8, "silu"), adapter
    else:
        call, function = project_call(torch.float32, 9, 2, 24, 8, "silu"), layer_project
    out = function(**call.arguments, backend="triton")
    outside = torch.autograd.grad(out.sum(), call.leaves(), retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = torch.autograd.grad(out, call.leaves(), torch.ones_like(out))
    for a, b in zip(inside, outside, strict=True):
        assert torch.equal(a, b)


@pytest.mark.usefixtures("short_pieces")
class TestSegmentOracles(test_segment_oracles.OnEveryBackend):
    """An utterance takes 20 ms to 80 ms here."""

    served = (("cpu", "triton"),)
    dtypes = (torch.float32, torch.bfloat16)
    calls = 1
    aligned = 80
    pooled = 10
    longer = 40


class TestConnectorOracles(test_connector_oracles.OnEveryBackend):
    served = (("cpu", "triton"),)
    dtypes = (torch.float32, torch.bfloat16)
    calls = 4
    attended = 4
    losses = 10
    long_calls = 1
    long = 1
    longer = 70
    rounding = 2.0  # the interpreter truncates to bfloat16


class TestDefectsOfPeers(test_defects_of_peers.DefectsOfPeers):
    served = (("cpu", "triton"),)
