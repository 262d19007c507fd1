"""``LayerMix``, ``LayerProject`` and ``Adapter``: parameters, initial values, and the op that they call."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

import mmkernels
from mmkernels.nn import Adapter, LayerMix, LayerProject


def make_layers(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 5, 8, generator=generator).to(dtype) for _ in range(3)]


def randomize(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        nn.init.normal_(parameter, generator=generator)


def test_layer_mix_starts_from_the_mean() -> None:
    layers = make_layers()
    mean = torch.stack(layers).mean(dim=0)
    for softmax in (True, False):
        torch.testing.assert_close(LayerMix(3, softmax=softmax)(layers), mean)
    normalised = torch.stack([nn.functional.layer_norm(layer, (8,)) for layer in layers]).mean(dim=0)
    torch.testing.assert_close(LayerMix(3, 8, norm=True, affine=True)(layers), normalised)


@pytest.mark.parametrize(
    ("norm", "affine", "softmax"), [(n, a, s) for n, a, s in itertools.product((0, 1), repeat=3) if n >= a]
)
def test_layer_mix_follows_its_definition(norm: int, affine: int, softmax: int) -> None:
    module = LayerMix(3, 8, norm=bool(norm), affine=bool(affine), softmax=bool(softmax), eps=1e-3)
    randomize(module)
    expected = torch.zeros(2, 5, 8)
    weights = module.weights.softmax(dim=-1) if softmax else module.weights
    for index, layer in enumerate(make_layers()):
        gain = (module.norm_weight[index], module.norm_bias[index]) if affine else ()
        expected = expected + weights[index] * (
            nn.functional.layer_norm(layer, (8,), *gain, eps=1e-3) if norm else layer
        )
    mixed = module(make_layers())
    torch.testing.assert_close(mixed, expected)
    mixed.square().sum().backward()
    got = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    expected.square().sum().backward()
    assert len(got) == (3 if affine else 1)
    for gradient, parameter in zip(got, module.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-4)


def test_layer_mix_takes_a_tensor_lengths_and_mixed_dtypes() -> None:
    module = LayerMix(3, norm=True)
    randomize(module)
    layers = make_layers()
    torch.testing.assert_close(module(torch.stack(layers)), module(layers))
    shorter = module(layers, lengths=torch.tensor([5, 2]))
    assert torch.equal(shorter[1, 2:], torch.zeros(3, 8))
    torch.testing.assert_close(shorter[0], module(layers)[0])
    mixed = module([layers[0], layers[1].bfloat16(), layers[2]])
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, module(layers), rtol=2e-2, atol=2e-2)
    assert module(make_layers(torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"num_layers": 2, "dim": 8, "affine": True}, "affine=True needs norm=True"),
        ({"num_layers": 2, "norm": True, "affine": True}, "affine=True needs dim"),
    ],
)
def test_layer_mix_rejects(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LayerMix(**arguments)


@pytest.mark.parametrize(
    ("bias", "norm", "activation"), [(True, True, "relu"), (False, True, "gelu"), (True, False, "none")]
)
def test_layer_project_is_a_linear_map_for_each_tap(bias: bool, norm: bool, activation: str) -> None:
    module = LayerProject(4, 6, 3, bias=bias, norm=norm, activation=activation, eps=1e-3)
    randomize(module)
    x = torch.randn(7, 4, 6, generator=torch.Generator().manual_seed(2))
    act = {"relu": torch.relu, "gelu": nn.functional.gelu, "none": lambda y: y}[activation]
    columns = []
    for tap in range(4):
        linear, layer_norm = nn.Linear(6, 3, bias=bias), nn.LayerNorm(6, eps=1e-3) if norm else nn.Identity()
        linear.weight = nn.Parameter(module.weight[tap].detach())
        if bias:
            linear.bias = nn.Parameter(module.bias[tap].detach())
        if norm:
            layer_norm.weight = nn.Parameter(module.norm_weight[tap].detach())
            layer_norm.bias = nn.Parameter(module.norm_bias[tap].detach())
        columns.append(act(linear(layer_norm(x[:, tap]))))
    projected = module(x)
    assert projected.is_contiguous()
    torch.testing.assert_close(projected, torch.stack(columns, dim=1), rtol=1e-4, atol=1e-5)


def test_layer_project_starts_like_linear_layers() -> None:
    torch.manual_seed(0)
    module = LayerProject(8, 100, 50)
    assert {name: tuple(p.shape) for name, p in module.named_parameters()} == {
        "weight": (8, 50, 100),
        "bias": (8, 50),
        "norm_weight": (8, 100),
        "norm_bias": (8, 100),
    }
    linear = nn.Linear(100, 50)
    for own, fresh in ((module.weight, linear.weight), (module.bias, linear.bias)):
        bound = 100**-0.5
        assert 0.9 * bound < own.abs().max() <= bound
        assert 0.8 * bound < fresh.abs().max() <= bound
        torch.testing.assert_close(own.std(), fresh.std(), rtol=0.25, atol=0.0)
    assert torch.equal(module.norm_weight, torch.ones(8, 100))
    assert torch.equal(module.norm_bias, torch.zeros(8, 100))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 6, 3), "taps must be at least 1, got 0"),
        ((4, 6, 0), "out_features must be at least 1, got 0"),
        ((4, 6, 3, True, True, "tanh"), "activation must be one of .*relu.*, got 'tanh'"),
    ],
)
def test_layer_project_rejects(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LayerProject(*arguments)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    "module",
    [LayerMix(3, 8, norm=True, affine=True), LayerProject(3, 8, 4), Adapter(8, 4)],
    ids=["mix", "project", "adapter"],
)
def test_modules_compile_copy_and_print(module: nn.Module, dynamic: bool) -> None:
    torch.compiler.reset()
    x = make_layers() if isinstance(module, LayerMix) else torch.randn(5, 3, 8)
    compiled = torch.compile(copy.deepcopy(module), backend="aot_eager", fullgraph=True, dynamic=dynamic)
    torch.testing.assert_close(compiled(x), module(x))
    assert "eps=1e-05" in repr(module)


def test_nothing_to_accelerate_here() -> None:
    report = mmkernels.accelerate(nn.Sequential(LayerMix(3), LayerProject(3, 8, 4)))
    assert report.replaced == report.skipped == []
