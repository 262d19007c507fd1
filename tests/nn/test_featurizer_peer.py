"""``mmkernels.nn.Featurizer`` and s3prl's, on random settings: the same results, gradients and states."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peers.featurizers import FEATURIZERS
from torch import Tensor

from mmkernels.nn import Featurizer

HALF = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, torch.float64, *HALF)


@st.composite
def cases(draw: Any) -> dict[str, Any]:
    num_layers = draw(st.integers(1, 6))
    indices = st.lists(st.integers(0, num_layers - 1), min_size=1, unique=True)
    return {
        "num_layers": num_layers,
        "layer_selections": draw(st.none() | indices),
        "normalize": draw(st.booleans()),
        "given": draw(st.integers(1, num_layers + 2)),
        "lens_given": draw(st.integers(0, 1)),
        "weights": draw(st.sampled_from(DTYPES)),
        "layers": draw(st.sampled_from(DTYPES)),
        "other": draw(st.sampled_from(DTYPES)),
        "frames": draw(st.integers(1, 5)),
        "seed": draw(st.integers(0, 99)),
        "reselect": draw(st.booleans()),
        "layer_grad": draw(st.booleans()),
    }


def run(cls: Any, case: dict[str, Any]) -> dict[str, Any]:
    upstream = SimpleNamespace(
        num_layers=case["num_layers"],
        hidden_sizes=[16] * case["num_layers"],
        downsample_rates=[320] * case["num_layers"],
    )
    module = cls(upstream, case["layer_selections"], case["normalize"]).to(case["weights"])
    generator = torch.Generator().manual_seed(case["seed"])
    if hasattr(module, "weights"):
        with torch.no_grad():
            module.weights.copy_(torch.randn(module.weights.shape, generator=generator))
        if case["reselect"]:
            # The order of a selection says nothing: weights belong to the layers as they come.
            module.layer_selections = module.layer_selections[::-1]
    layers = [
        torch.randn(2, case["frames"], 16, generator=generator).to(case["other" if i % 3 == 1 else "layers"])
        for i in range(case["given"])
    ]
    for layer in layers:
        layer.requires_grad_(case["layer_grad"])
    lens = [torch.tensor([5, 3])] * (case["given"] + case["lens_given"])
    mixed, mixed_lens = module(layers, lens)
    if mixed.requires_grad:
        mixed.double().square().sum().backward()
    outcome = {"mixed": mixed, "lens": mixed_lens, "output_size": module.output_size}
    outcome |= {"downsample_rate": module.downsample_rate, "state": list(module.state_dict())}
    outcome |= {f"layer {i}": layer.grad for i, layer in enumerate(layers)}
    return outcome | {name: p.grad for name, p in module.named_parameters()}


def tolerance(case: dict[str, Any]) -> dict[str, float]:
    """The sum is rounded once, to the dtype of the stacked layers; s3prl rounds each product and the sum."""
    used = {case["weights"], case["layers"], case["other"]}
    if used & {torch.bfloat16}:
        return {"rtol": 3e-2, "atol": 6e-2}
    return {"rtol": 4e-3, "atol": 1e-2} if used & {torch.float16} else {"rtol": 1e-4, "atol": 1e-5}


@pytest.mark.parametrize("peer", FEATURIZERS)
@settings(max_examples=150, deadline=None, derandomize=True)
@given(case=cases())
def test_same_outcome(peer: str, case: dict[str, Any]) -> None:
    try:
        expected = run(FEATURIZERS[peer], case)
    except (AssertionError, RuntimeError, AttributeError):
        selected = case["layer_selections"]
        alone = selected is not None and len(selected) == 1 and selected[0] < case["given"]
        if case["num_layers"] > 1 and alone:
            assert torch.isfinite(run(Featurizer, case)["mixed"]).all()
            return
        with pytest.raises(ValueError, match=r"all_(hs|lens) must have"):
            run(Featurizer, case)
        return
    got = run(Featurizer, case)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, Tensor):
            assert got[name].dtype == value.dtype, name
            torch.testing.assert_close(
                got[name], value, **tolerance(case), msg=lambda text, name=name: f"{name}: {text}"
            )
        else:
            assert got[name] == value, name


@pytest.mark.parametrize("count", [6, 3])
def test_layers_that_are_not_selected_are_ignored(count: int) -> None:
    upstream = SimpleNamespace(num_layers=4, hidden_sizes=[16] * 4, downsample_rates=[320] * 4)
    layers = [torch.full((1, 2, 16), float(i)) for i in range(count)]
    mixed, _ = Featurizer(upstream, [0, 2])(layers, [torch.tensor([2])] * count)
    assert torch.equal(mixed, torch.ones(1, 2, 16))
