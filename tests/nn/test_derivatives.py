"""The modules in the parts of torch that go past one backward pass, and on tensors of unusual kinds."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn import functional

from mmkernels.nn import Adapter, Featurizer, LayerMix, LayerProject, Merge


def mix(weights: Tensor, layers: list[Tensor], norm: bool) -> Tensor:
    stacked = torch.stack(layers)
    stacked = functional.layer_norm(stacked, stacked.shape[-1:]) if norm else stacked
    return torch.tensordot(weights.softmax(-1), stacked, dims=1)


def project(p: dict[str, Tensor], x: Tensor) -> Tensor:
    h = functional.layer_norm(x, x.shape[-1:]) * p["norm_weight"] + p["norm_bias"]
    return functional.gelu(torch.einsum("nlc,loc->nlo", h, p["weight"]) + p["bias"])


def adapt(p: dict[str, Tensor], x: Tensor) -> Tensor:
    h = functional.layer_norm(x, x.shape[-1:], p["norm_weight"], p["norm_bias"])
    h = functional.gelu(functional.linear(h, p["down_weight"], p["down_bias"]))
    return x + functional.linear(h, p["up_weight"], p["up_bias"])


def layers_of(x: Tensor) -> list[Tensor]:
    return list(x.unbind(-2))


class Feature(nn.Module):
    """``Featurizer`` as a function of one tensor."""

    def __init__(self) -> None:
        super().__init__()
        upstream = SimpleNamespace(num_layers=4, hidden_sizes=[8] * 4, downsample_rates=[320] * 4)
        self.featurizer = Featurizer(upstream, normalize=True)

    def forward(self, layers: list[Tensor]) -> Tensor:
        lengths = torch.full(layers[0].shape[:1], layers[0].shape[1], device=layers[0].device)
        return self.featurizer(layers, [lengths] * len(layers))[0]


class Merged(nn.Module):
    """``Merge`` as a function to one tensor."""

    def __init__(self, constraint: str) -> None:
        super().__init__()
        self.merge = Merge(2, init=0.5, constraint=constraint)

    def forward(self, pairs: tuple[list[Tensor], list[Tensor]]) -> Tensor:
        return torch.stack(self.merge(*pairs, groups=[1, 0]))


def merged(lam: Tensor, pairs: tuple[list[Tensor], list[Tensor]]) -> Tensor:
    target, source = pairs
    return torch.stack([t + lam[g] * (s - t) for t, s, g in zip(target, source, (1, 0), strict=True)])


def pairs_of(x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    first, second, third, fourth = x.unbind(-2)
    return [first, second], [third, fourth]


class Case(NamedTuple):
    module: Callable[[], nn.Module]
    #: From one tensor ``(5, 4, 8)`` to the argument of the module.
    given: Callable[[Tensor], Any]
    eager: Callable[[dict[str, Tensor], Any], Tensor]


CASES = {
    "LayerMix": Case(lambda: LayerMix(4, norm=True), layers_of, lambda p, x: mix(p["weights"], x, True)),
    "Featurizer": Case(
        Feature, lambda x: layers_of(x[None]), lambda p, x: mix(p["featurizer.weights"], x, True)
    ),
    "LayerProject": Case(lambda: LayerProject(4, 8, 3, activation="gelu"), lambda x: x, project),
    "Merge": Case(lambda: Merged("none"), pairs_of, lambda p, x: merged(p["merge.weights"], x)),
    "Merge of sigmoid": Case(
        lambda: Merged("sigmoid"), pairs_of, lambda p, x: merged(p["merge.weights"].sigmoid(), x)
    ),
    "Adapter": Case(lambda: Adapter(8, 4, activation="gelu", norm=True), lambda x: x, adapt),
}
every_module = pytest.mark.parametrize("name", CASES)


def build(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    module = CASES[name].module().to(dtype)
    for parameter in module.parameters():
        nn.init.normal_(parameter, generator=generator)
    parameters = {key: p.detach() for key, p in module.named_parameters()}
    return module, parameters, torch.randn(5, 4, 8, generator=generator).to(dtype)


def both(name: str) -> tuple[list[Callable[..., Tensor]], dict[str, Tensor], Tensor]:
    """The module and its eager twin as functions of parameters and one tensor."""
    module, parameters, x = build(name)
    case = CASES[name]
    return (
        [
            lambda p, x: functional_call(module, p, (case.given(x),)),
            lambda p, x: case.eager(p, case.given(x)),
        ],
        parameters,
        x,
    )


@every_module
def test_forward_mode(name: str) -> None:
    functions, parameters, x = both(name)
    along = {key: p.square() for key, p in parameters.items()}
    found, expected = (jvp(f, (parameters, x), (along, x.square())) for f in functions)
    assert expected[1].abs().max() > 0
    torch.testing.assert_close(found, expected)


@every_module
def test_gradients_of_samples(name: str) -> None:
    functions, parameters, x = both(name)
    samples = torch.stack([x, 2 * x, x + 1])
    found, expected = (
        vmap(grad(lambda p, x, f=f: f(p, x).square().sum()), in_dims=(None, 0))(parameters, samples)
        for f in functions
    )
    torch.testing.assert_close(found, expected)


@every_module
def test_penalty_on_gradients(name: str) -> None:
    functions, parameters, x = both(name)
    results = []
    for function in functions:
        leaves = {key: p.clone().requires_grad_() for key, p in parameters.items()}
        inputs = x.clone().requires_grad_()
        loss = function(leaves, inputs).square().sum()
        first = torch.autograd.grad(loss, [*leaves.values(), inputs], create_graph=True)
        (loss + sum(g.square().sum() for g in first)).backward()
        results.append([leaf.grad for leaf in (*leaves.values(), inputs)])
    torch.testing.assert_close(*results)


@every_module
def test_inputs_made_for_inference(name: str) -> None:
    module, _, x = build(name, torch.float32)
    with torch.inference_mode():
        given = CASES[name].given(x.clone())
    twin = copy.deepcopy(module)
    module(given).square().sum().backward()
    twin(CASES[name].given(x)).square().sum().backward()
    for parameter, other in zip(module.parameters(), twin.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad)


@every_module
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shapes_on_the_meta_device(name: str, dtype: torch.dtype, autocast: bool) -> None:
    """As ``init_empty_weights`` and other propagation of shapes need it; meta tensors have no autocast."""
    module, _, x = build(name, torch.float32)
    expected = module(CASES[name].given(x.to(dtype)))
    meta = module.to("meta")
    context = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    with context:
        found = meta(CASES[name].given(x.to("meta", dtype).requires_grad_()))
    assert (found.shape, found.dtype, found.device.type) == (expected.shape, expected.dtype, "meta")
    found.sum().backward()
    for parameter in meta.parameters():
        assert parameter.grad.shape == parameter.shape
