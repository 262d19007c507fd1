"""``mmkernels.nn.Featurizer`` against the arithmetic and conventions of s3prl's."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from mmkernels.nn import Featurizer

UPSTREAM = SimpleNamespace(num_layers=4, hidden_sizes=[16] * 4, downsample_rates=[320] * 4)


def make_layers(count: int = 4, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    layers = [torch.randn(2, 6, 16, generator=generator).to(dtype).requires_grad_() for _ in range(count)]
    return layers, [torch.tensor([6, 4])] * count


def eager(layers: list[Tensor], weights: Tensor, normalize: bool) -> Tensor:
    stacked = torch.stack(layers)
    if normalize:
        stacked = nn.functional.layer_norm(stacked, stacked.shape[-1:])
    return (weights.softmax(dim=-1).view(-1, 1, 1, 1) * stacked).sum(dim=0)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("selections", [None, [2, 0]])
def test_agrees_with_the_stacked_sum(selections: list[int] | None, normalize: bool) -> None:
    module = Featurizer(UPSTREAM, selections, normalize)
    assert (module.output_size, module.downsample_rate) == (16, 320)
    assert torch.equal(module.weights, torch.zeros(2 if selections else 4))
    nn.init.normal_(module.weights)
    weights = module.weights.detach().clone().requires_grad_()
    (layers, lens), (same, _) = make_layers(), make_layers()
    mixed, mixed_lens = module(layers, lens)
    chosen = [same[0], same[2]] if selections else same
    expected = eager(chosen, weights, normalize)
    assert mixed_lens is lens[0]
    torch.testing.assert_close(mixed, expected)
    mixed.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(module.weights.grad, weights.grad)
    for layer, other in zip(layers, same, strict=True):
        assert (layer.grad is None) == (other.grad is None)
        if other.grad is not None:
            torch.testing.assert_close(layer.grad, other.grad)


def test_loads_a_state_dict_of_s3prl() -> None:
    module = Featurizer(UPSTREAM)
    module.load_state_dict({"weights": torch.arange(4.0)}, strict=True)
    assert torch.equal(module.weights, torch.arange(4.0))
    Featurizer(1, hidden_size=16, downsample_rate=320).load_state_dict({}, strict=True)


def test_numbers_instead_of_an_upstream() -> None:
    module = Featurizer(4, hidden_size=16, downsample_rate=160)
    assert (module.output_size, module.downsample_rate, module.weights.numel()) == (16, 160, 4)


def test_one_layer_passes_through() -> None:
    module = Featurizer(1, hidden_size=16, downsample_rate=320, normalize=True)
    layers, lens = make_layers(1)
    mixed, mixed_lens = module(layers, lens)
    assert mixed is layers[0]
    assert mixed_lens is lens[0]
    assert list(module.parameters()) == []


@pytest.mark.parametrize("normalize", [False, True])
def test_padding_is_mixed_unless_it_is_skipped(normalize: bool) -> None:
    keeping = Featurizer(UPSTREAM, normalize=normalize)
    skipping = Featurizer(UPSTREAM, normalize=normalize, skip_padding=True)
    layers, lens = make_layers()
    kept, _ = keeping(layers, lens)
    skipped, _ = skipping(layers, lens)
    assert kept[1, 4:].abs().min() > 0
    assert torch.equal(skipped[1, 4:], torch.zeros(2, 16))
    torch.testing.assert_close(skipped[0], kept[0])
    torch.testing.assert_close(skipped[1, :4], kept[1, :4])
    beyond, _ = skipping(layers, [torch.tensor([9, 4])] * 4)
    assert torch.equal(beyond, skipped)


def test_dtype_is_that_of_the_stacked_sum() -> None:
    layers, lens = make_layers(dtype=torch.bfloat16)
    assert Featurizer(UPSTREAM)(layers, lens)[0].dtype == torch.float32
    assert Featurizer(UPSTREAM).bfloat16()(layers, lens)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("normalize", [False, True])
def test_float32_weights_lose_no_digits_beside_half_layers(normalize: bool, dtype: torch.dtype) -> None:
    """As in s3prl, whose product is in float32: the result and the gradient of the weights."""
    module = Featurizer(UPSTREAM, normalize=normalize)
    nn.init.normal_(module.weights)
    layers, lens = make_layers(dtype=dtype)
    exact_weights = module.weights.detach().double().requires_grad_()
    exact = eager([layer.detach().double() for layer in layers], exact_weights, normalize)
    mixed, _ = module(layers, lens)
    grad = torch.randn(mixed.shape, generator=torch.Generator().manual_seed(1))
    mixed.backward(grad)
    exact.backward(grad.double())
    torch.testing.assert_close(mixed.double(), exact, rtol=1e-5, atol=1e-5)
    assert module.weights.grad.dtype == torch.float32
    torch.testing.assert_close(module.weights.grad.double(), exact_weights.grad, rtol=1e-5, atol=1e-4)
    assert layers[0].grad.dtype == dtype


def test_compiles_without_a_break() -> None:
    module = Featurizer(UPSTREAM, normalize=True)
    layers, lens = make_layers()
    mixed, _ = torch.compile(module, backend="aot_eager", fullgraph=True)(layers, lens)
    torch.testing.assert_close(mixed, copy.deepcopy(module)(layers, lens)[0])


def test_missing_layers_are_an_error() -> None:
    with pytest.raises(
        ValueError, match=r"all_hs must have the layers \[0, 1, 2, 3\], .*got 3 entries; turn off layer drop"
    ):
        Featurizer(UPSTREAM)(*make_layers(3))
    layers, lens = make_layers()
    with pytest.raises(ValueError, match=r"all_lens must have the layers .*got 3 entries"):
        Featurizer(UPSTREAM)(layers, lens[1:])
    with pytest.raises(ValueError, match="all_hs must have one layer, as the upstream has, got 4"):
        Featurizer(1, hidden_size=16, downsample_rate=320)(layers, lens)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"upstream": 4}, "hidden_size and downsample_rate are needed"),
        ({"upstream": UPSTREAM, "hidden_size": 16}, "come from upstream"),
        ({"upstream": UPSTREAM, "layer_selections": [0, 4]}, r"must lie in \[0, 4\), got \[0, 4\]"),
        ({"upstream": UPSTREAM, "layer_selections": [1, 1]}, "distinct"),
        ({"upstream": UPSTREAM, "layer_selections": []}, "distinct"),
        (
            {"upstream": SimpleNamespace(num_layers=2, hidden_sizes=[8, 9], downsample_rates=[1, 1])},
            r"hidden_sizes of the upstream must be equal for all layers, got \[8, 9\]",
        ),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Featurizer(**arguments)


def test_repr_says_what_it_does() -> None:
    assert "normalize=True" in repr(Featurizer(UPSTREAM, normalize=True))
    assert "layer_selections=None" in repr(Featurizer(1, hidden_size=8, downsample_rate=320))
