from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

import mmkernels
from mmkernels.activations import ACTIVATIONS
from mmkernels.nn import Adapter
from mmkernels.ops._common import ACTIVATION_CODES, accumulate_dtype
from mmkernels.ops.adapter import reference
from op_tests import Call, OpSpec, Shape, assert_close_to_reference, away_from_zero, op_tests

PARAMETERS = ("down_weight", "down_bias", "up_weight", "up_bias", "norm_weight", "norm_bias")


def make(shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Call:
    rows, width, bottleneck = (shape[key] for key in "NDd")

    def random(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(device, dtype)

    norm, bias = shape.get("norm", False), shape.get("bias", True)

    def draw() -> Call:
        arguments = {
            "x": random(*rows, width) * 2 + 0.5,
            "down_weight": random(bottleneck, width) / max(width, 1) ** 0.5,
            "down_bias": random(bottleneck) if bias else None,
            "up_weight": random(width, bottleneck) / max(bottleneck, 1) ** 0.5,
            "up_bias": random(width) if bias else None,
            "residual": random(*rows, width) if shape.get("residual", "none") == "own" else None,
            "norm_weight": 1 + 0.3 * random(width) if norm else None,
            "norm_bias": random(width) if norm else None,
            "scale": shape.get("scale", 1.0),
            "activation": shape.get("activation", "relu"),
        }
        return Call(arguments, ("x", "residual", *PARAMETERS))

    return away_from_zero(draw, hidden)


def hidden(
    x: Tensor, down_weight: Tensor, down_bias: Any, *, norm_weight: Any, norm_bias: Any, **_: Any
) -> Tensor:
    """What the activation gets."""
    return mmkernels.layer_project(
        x.reshape(-1, 1, x.shape[-1]),
        down_weight.unsqueeze(0),
        None if down_bias is None else down_bias.unsqueeze(0),
        norm_weight=None if norm_weight is None else norm_weight.unsqueeze(0),
        norm_bias=None if norm_bias is None else norm_bias.unsqueeze(0),
        activation="none",
        backend="reference",
    )


def eager(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Any,
    up_weight: Tensor,
    up_bias: Any,
    *,
    residual: Any,
    norm_weight: Any,
    norm_bias: Any,
    scale: float,
    activation: str,
) -> Tensor:
    """The usual way, in the dtype of x."""

    def like(tensor: Any) -> Any:
        return None if tensor is None else tensor.to(x.dtype)

    h = x
    if norm_weight is not None:
        h = functional.layer_norm(h, h.shape[-1:], like(norm_weight), like(norm_bias))
    h = ACTIVATIONS[activation](functional.linear(h, like(down_weight), like(down_bias)))
    y = scale * functional.linear(h, like(up_weight), like(up_bias))
    return y if residual is None else residual + y


def raw(call: Call) -> list[tuple[Any, tuple[Any, ...]]]:
    dtype = call.arguments["x"].dtype
    return [found for of in sorted({dtype, accumulate_dtype(dtype)}, key=str) for found in raw_of(call, of)]


def raw_of(call: Call, dtype: torch.dtype) -> list[tuple[Any, tuple[Any, ...]]]:
    """With parameters of this dtype."""
    a = call.arguments
    p = {name: None if a[name] is None else a[name].to(dtype) for name in PARAMETERS}
    width = a["x"].shape[-1]
    x = a["x"].reshape(-1, width)
    residual = None if a["residual"] is None else a["residual"].reshape(-1, width)
    activation, norm = ACTIVATION_CODES[a["activation"]], p["norm_weight"] is not None
    add_input = residual is None and norm
    down, up = (p["down_weight"], p["down_bias"]), (p["up_weight"], p["up_bias"])
    gain = (p["norm_weight"], p["norm_bias"])
    forward = (x, *down, *up, residual, *gain, a["scale"], 1e-5, activation, add_input, True)
    out, hidden, stats = torch.ops.mmkernels.adapter_fwd(*forward)
    grad = torch.randn_like(out).to(x.dtype)
    saved = (x, *down, p["up_weight"], *gain, hidden, stats)
    backward = (grad, *saved, a["scale"], activation, add_input, True, True, True, norm)
    return [(torch.ops.mmkernels.adapter_fwd, forward), (torch.ops.mmkernels.adapter_bwd, backward)]


def alone(call: Call, index: int) -> tuple[Call, Any]:
    def entry(name: str, tensor: Tensor) -> Tensor:
        return tensor[index : index + 1] if name in ("x", "residual") else tensor

    return call.mapped(entry), lambda out: out[index : index + 1]


@st.composite
def shapes(draw: Any) -> Shape:
    return {
        "N": (draw(st.sampled_from([1, 2, 5, 47, 50, 130])),),
        # Sums of two or three terms may cancel, and then the rounding of a single one is the whole error.
        "D": draw(st.sampled_from([8, 15, 17, 32, 65])),
        "d": draw(st.sampled_from([5, 8, 16, 33])),
        "norm": draw(st.booleans()),
        "bias": draw(st.booleans()),
        "residual": draw(st.sampled_from(["none", "own"])),
        "scale": draw(st.sampled_from([1.0, 0.5, -2.0])),
        # relu is left to the fixed cases: a value that rounds across zero has another derivative.
        "activation": draw(st.sampled_from(["none", "gelu", "gelu_tanh", "silu"])),
    }


SPEC = OpSpec(
    name="adapter",
    function=mmkernels.adapter,
    reference=reference.adapter,
    eager=eager,
    make=make,
    cases={
        "plain": {"N": (9,), "D": 24, "d": 16},
        "residual": {"N": (3, 4), "D": 32, "d": 8, "residual": "own", "scale": 0.5},
        "norm": {"N": (11,), "D": 33, "d": 17, "norm": True, "residual": "own"},
        "no_bias": {"N": (6,), "D": 16, "d": 8, "bias": False, "activation": "none"},
        "gelu": {"N": (3, 5), "D": 20, "d": 12, "norm": True, "activation": "gelu", "residual": "own"},
        "gelu_tanh": {"N": (5,), "D": 16, "d": 8, "norm": True, "activation": "gelu_tanh"},
        "silu": {"N": (5,), "D": 16, "d": 8, "norm": True, "activation": "silu", "scale": 2.0},
        "one_unit": {"N": (40,), "D": 8, "d": 1, "norm": True},
        "blocks": {"N": (300,), "D": 24, "d": 5, "norm": True, "activation": "silu", "residual": "own"},
    },
    zero_cases={
        "no_rows": {"N": (0,), "D": 8, "d": 4, "norm": True, "residual": "own"},
        "no_batch": {"N": (0, 3), "D": 8, "d": 4},
        "no_bottleneck": {"N": (3,), "D": 8, "d": 0, "residual": "own"},
    },
    raw=raw,
    shapes=shapes,
    dynamic=({"N": (9,)}, {"N": (14,)}),
    activations=("x", "residual"),
    rounds_products=True,
    rounded_by_library={
        ("cuda", "native"): ("down_weight", "up_weight"),
        ("cuda", "triton"): ("down_weight",),
    },
    alone=alone,
    library_products=(("cuda", "native"), ("cpu", "triton"), ("cuda", "triton")),
)
TestAdapter = op_tests(SPEC)


def inputs(rows: int = 40, width: int = 24, bottleneck: int = 8, norm: bool = False) -> dict[str, Any]:
    """Arguments whose tensors all require gradients, as leaves."""
    shape = {"N": (rows,), "D": width, "d": bottleneck, "norm": norm, "activation": "gelu"}
    call = make(shape, torch.float32, torch.device("cpu"), torch.Generator().manual_seed(3))
    return call.detached().arguments


def leaves(arguments: dict[str, Any]) -> list[Tensor]:
    return [t for t in arguments.values() if isinstance(t, Tensor) and t.requires_grad]


@pytest.mark.parametrize("norm", [False, True])
def test_input_as_residual(norm: bool) -> None:
    """The same result and gradients as with a copy of the input beside it."""
    own = inputs(norm=norm)
    out = mmkernels.adapter(**{**own, "residual": own["x"]})
    grad = torch.randn_like(out)
    gradients = torch.autograd.grad(out, leaves(own), grad)

    wide = {n: t.detach().double().requires_grad_() if isinstance(t, Tensor) else t for n, t in own.items()}
    exact = reference.adapter(**{**wide, "residual": wide["x"]})
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
    expected = torch.autograd.grad(exact, leaves(wide), grad.double())
    for found, target in zip(gradients, expected, strict=True):
        torch.testing.assert_close(found.double(), target, rtol=1e-5, atol=1e-4)


def test_wide_residual_beside_half_precision() -> None:
    arguments = {name: t.detach() if isinstance(t, Tensor) else t for name, t in inputs().items()}
    arguments["x"] = arguments["x"].bfloat16()
    residual = torch.randn(40, 24) * 1000
    out = mmkernels.adapter(**{**arguments, "residual": residual})
    added = mmkernels.adapter(**arguments)
    assert out.dtype == torch.float32
    assert added.dtype == torch.bfloat16
    torch.testing.assert_close(out - residual, added.float(), rtol=0.02, atol=0.02)


def test_autocast_keeps_the_residual_stream() -> None:
    """Under autocast the adapter computes in bfloat16, and what it is added to stays in float32."""
    module = Adapter(24, 8)
    torch.nn.init.normal_(module.up_weight, std=1e-3)
    x = torch.randn(5, 24) * 100
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(x)
    assert out.dtype == torch.float32
    assert (out - x).abs().max() < 1


@pytest.mark.parametrize("norm", [False, True])
def test_first_step_is_exact(norm: bool) -> None:
    """With the up-projection at zero the input passes unchanged and the down-projection gets no gradient."""
    module = Adapter(48, 12, activation="gelu", norm=norm)
    x = torch.randn(70, 48, requires_grad=True)
    out = module(x)
    assert torch.equal(out, x)
    grad = torch.randn_like(out)
    out.backward(grad)
    assert torch.equal(x.grad, grad)
    assert module.down_weight.grad.count_nonzero() == 0
    assert module.down_bias.grad.count_nonzero() == 0
    assert module.up_weight.grad.count_nonzero() > 0


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("window", [(-12.0, -6.0), (-6.0, -3.0), (-3.0, 3.0), (3.0, 6.0), (6.0, 12.0)])
def test_activations_keep_their_digits(activation: str, window: tuple[float, float]) -> None:
    """Where most of the sigmoid's or the normal distribution's digits are those of 0 or 1, too."""
    one = torch.ones(1, 1)
    z = torch.linspace(*window, 4001)[:, None]

    def run(function: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        x = z.to(dtype).requires_grad_()
        out = function(x, one.to(dtype))
        (slope,) = torch.autograd.grad(out, x, torch.ones_like(out))
        return out.detach(), slope

    ours = run(lambda x, w: mmkernels.adapter(x, w, None, w, None, activation=activation), torch.float32)
    theirs = run(lambda x, _: ACTIVATIONS[activation](x), torch.float32)
    exact = run(lambda x, _: ACTIVATIONS[activation](x), torch.float64)
    for name, k, r, e in zip(("value", "slope"), ours, exact, theirs, strict=True):
        assert_close_to_reference(k, r, e, torch.float32, name)


def saved_bytes(run: Any, parameters: list[Tensor]) -> int:
    kept = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in kept:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run()
    del out
    return sum(sizes.values())


@pytest.mark.parametrize(
    ("norm", "activation", "eager_keeps"),
    [
        (False, "relu", 16),
        (False, "gelu", 2 * 16),
        (True, "relu", 64 + 16 + 2),
        (True, "gelu", 64 + 2 * 16 + 2),
    ],
)
def test_saves_the_input_and_one_hidden_tensor(norm: bool, activation: str, eager_keeps: int) -> None:
    rows, width, bottleneck = 256, 64, 16
    arguments = inputs(rows, width, bottleneck, norm)
    x = arguments["x"] * 1  # the output of another module, which the adapter keeps alive
    parameters = [arguments[name] for name in PARAMETERS if arguments[name] is not None]
    call = {**arguments, "x": x, "residual": x, "activation": activation}
    ours = saved_bytes(lambda: mmkernels.adapter(**call), parameters)
    assert ours == 4 * rows * (width + bottleneck + 2 * norm)
    theirs = saved_bytes(lambda: eager(**call), parameters)
    assert theirs == 4 * rows * (width + eager_keeps)


@pytest.mark.parametrize("norm", [False, True])
def test_a_model_of_half_precision_saves_no_wider_parameters(norm: bool) -> None:
    rows, width, bottleneck = 256, 64, 16
    arguments = {
        name: value.detach().bfloat16().requires_grad_() if isinstance(value, Tensor) else value
        for name, value in inputs(rows, width, bottleneck, norm).items()
    }
    x = arguments["x"] * 1
    parameters = [arguments[name] for name in PARAMETERS if arguments[name] is not None]
    found = saved_bytes(lambda: mmkernels.adapter(**{**arguments, "x": x, "residual": x}), parameters)
    assert found == rows * (2 * (width + bottleneck) + 8 * norm)


@pytest.mark.parametrize("norm", [False, True])
def test_no_gradient_is_computed_for_frozen_parameters(norm: bool) -> None:
    call = make(
        {"N": (6,), "D": 8, "d": 4, "norm": norm}, torch.float32, torch.device("cpu"), torch.Generator()
    )
    (_, _), (op, arguments) = raw(call)
    wanted = list(arguments)
    wanted[-4:] = [True, False, False, False]
    dx, *others = op(*wanted)
    assert dx.shape == (6, 8)
    assert all(other.numel() == 0 for other in others)
    assert torch.equal(dx, op(*arguments)[0])


class TestBadInput:
    def test_shapes(self) -> None:
        good = inputs(5, 8, 4)
        bad = {
            r"down_weight must have shape \(d, D\) = \(d, 8\)": {"down_weight": torch.randn(4, 7)},
            r"down_bias must have shape \(4,\), got \(8,\)": {"down_bias": torch.randn(8)},
            r"up_weight must have shape \(8, 4\), got \(4, 8\)": {"up_weight": torch.randn(4, 8)},
            r"up_bias must have shape \(8,\), got \(4,\)": {"up_bias": torch.randn(4)},
            r"norm_weight must have shape \(8,\), got \(4,\)": {"norm_weight": torch.randn(4)},
            "norm_bias needs norm_weight": {"norm_bias": torch.randn(8)},
            r"residual must have the shape of x, \(5, 8\), got \(8,\)": {"residual": torch.randn(8)},
            "activation must be one of none, relu, gelu, gelu_tanh, silu, got 'swish'": {
                "activation": "swish"
            },
        }
        for message, change in bad.items():
            with pytest.raises(ValueError, match=message):
                mmkernels.adapter(**{**good, **change})

    def test_types_and_devices(self) -> None:
        good = inputs(5, 8, 4)
        with pytest.raises(TypeError, match="x must be a tensor, got list"):
            mmkernels.adapter(**{**good, "x": [good["x"]]})
        with pytest.raises(TypeError, match="up_weight must be a tensor, got None"):
            mmkernels.adapter(**{**good, "up_weight": None})
        with pytest.raises(TypeError, match=r"residual must be torch.float32 like x"):
            mmkernels.adapter(**{**good, "residual": torch.randn(5, 8).half()})
        with pytest.raises(ValueError, match="up_weight is on meta, the other tensors are on cpu"):
            mmkernels.adapter(**{**good, "up_weight": good["up_weight"].to("meta")})
        with pytest.raises(ValueError, match="residual is on meta, x is on cpu"):
            mmkernels.adapter(**{**good, "residual": torch.randn(5, 8, device="meta")})

    def test_module(self) -> None:
        with pytest.raises(ValueError, match="bottleneck must be at least 1, got 0"):
            Adapter(8, 0)
        with pytest.raises(ValueError, match="activation must be one of"):
            Adapter(8, 4, activation="swish")

    def test_raw_op_survives_bad_input(self) -> None:
        x, down, up = torch.randn(5, 8), torch.randn(4, 8), torch.randn(8, 4)
        rest = (None, 1.0, 1e-5, 1, False, True)
        op = torch.ops.mmkernels.adapter_fwd
        for arguments in (
            (x, down[:, :7], None, up, None, None, None, *rest),
            (x, down, None, up[:7], None, None, None, *rest),
            (x, down.double(), None, up, None, None, None, *rest),
            (x, down.bfloat16(), None, up.bfloat16(), None, None, None, *rest),
            (x.bfloat16(), down, None, up.bfloat16(), None, None, None, *rest),
            (x.bfloat16(), down.bfloat16(), torch.randn(4), up.bfloat16(), None, None, None, *rest),
            (x[0], down, None, up, None, None, None, *rest),
            (x, down, None, up, None, torch.randn(5, 7), None, *rest),
            (x, down, None, up, None, None, None, torch.randn(8), *rest[1:]),
            (x, down, None, up, None, None, None, None, 1.0, 1e-5, 9, False, True),
            (x, down, None, up, None, x, None, None, 1.0, 1e-5, 1, True, True),
        ):
            with pytest.raises(RuntimeError):
                op(*arguments)


def test_parameter_counts() -> None:
    """AAT's adapter, and HFF's with its LayerNorm."""
    assert sum(p.numel() for p in Adapter(768, 192, activation="gelu").parameters()) == 295_872
    assert sum(p.numel() for p in Adapter(1024, 128, norm=True).parameters()) == 265_344


def test_a_learnt_scale_is_refused() -> None:
    x, down, up = torch.randn(3, 8), torch.randn(4, 8), torch.randn(8, 4)
    with pytest.raises(TypeError, match=r"scale must be a number, .* multiply the result"):
        mmkernels.adapter(x, down, None, up, None, scale=torch.ones((), requires_grad=True))
