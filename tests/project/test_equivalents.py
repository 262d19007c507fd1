"""The eager code under "Equivalent to" in the public docstrings runs, and gives the results of the op."""

from __future__ import annotations

import copy
import inspect
import itertools
import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mmkernels
import mmkernels.nn
import mmkernels.patch
from mmkernels.activations import ACTIVATIONS

LAYERS = [torch.randn(2, 3, 8, dtype=torch.float64) for _ in range(4)]
MATRICES = [torch.randn(2, 3, 8, dtype=torch.float64) for _ in range(3)]
X = torch.randn(5, 4, 8, dtype=torch.float64)


def random(*size: int) -> Tensor:
    return torch.randn(size, dtype=torch.float64)


def equivalent(documented: object) -> str:
    """The code block after "Equivalent to" in a docstring."""
    _, _, rest = (inspect.getdoc(documented) or "").partition("Equivalent to")
    lines = rest.partition("::\n")[2].lstrip("\n").splitlines()
    end = next((i for i, line in enumerate(lines) if line and not line.startswith(" ")), len(lines))
    return textwrap.dedent("\n".join(lines[:end])).strip()


def run(documented: object, **names: Any) -> Any:
    code = equivalent(documented)
    assert 1 <= len(code.splitlines()) <= 4
    scope = {"torch": torch, "F": nn.functional, "ACTIVATIONS": ACTIVATIONS, "mmkernels": mmkernels, **names}
    exec(code, scope)
    return scope["out"]


def of_module(module: nn.Module, *inputs: Any, **names: Any) -> tuple[Any, Any]:
    """Results of a module with random parameters, and of the code in its docstring."""
    module = module.double()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module(*inputs), run(type(module), module=module, **names)


def adapter(**options: Any) -> tuple[Any, Any]:
    arguments = {
        **{"x": X, "down_weight": random(3, 8), "down_bias": random(3), "up_weight": random(8, 3)},
        **{"up_bias": random(8), "residual": random(5, 4, 8), "norm_weight": None, "norm_bias": None},
        **{"eps": 1e-5, "scale": 0.5, "activation": "gelu_tanh", **options},
    }
    return mmkernels.adapter(**arguments), run(mmkernels.adapter, **arguments)


def layer_mix(**options: Any) -> tuple[Any, Any]:
    arguments = {"layers": LAYERS, "weights": random(4), "norm": False, "eps": 1e-5}
    arguments |= {"norm_weight": None, "norm_bias": None, **options}
    return mmkernels.layer_mix(**arguments), run(mmkernels.layer_mix, **arguments)


def layer_project(**options: Any) -> tuple[Any, Any]:
    arguments = {"x": X, "weight": random(4, 3, 8), "bias": random(4, 3), "eps": 1e-5, "activation": "silu"}
    arguments |= {"norm_weight": None, "norm_bias": None, **options}
    return mmkernels.layer_project(**arguments), run(mmkernels.layer_project, **arguments)


def merge(**options: Any) -> tuple[Any, Any]:
    arguments = {"target": MATRICES, "source": LAYERS[:3], "lam": random(3), "groups": None, **options}
    return mmkernels.merge(**arguments), run(mmkernels.merge, **arguments)


def merge_module() -> tuple[Any, Any]:
    module = mmkernels.nn.Merge(2, constraint="sigmoid")
    names = {"target": MATRICES, "source": LAYERS[:3], "groups": [1, 0, 1]}
    return of_module(module, *names.values(), **names)


ENDS = torch.tensor([[2, 2, 4], [1, 3, 3], [0, 4, 4], [1, 2, 3], [4, 4, 4]])


def segment_attention() -> tuple[Any, Any]:
    q, k, v = (random(2, 3, 4, 8) for _ in range(3))
    arguments = {"q": q, "k": k, "v": v, "ends": ENDS[::4], "lookback": 2, "scale": 0.5}
    return mmkernels.segment_attention(**arguments), run(mmkernels.segment_attention, **arguments)


def segment_attention_module() -> tuple[Any, Any]:
    module, x = mmkernels.nn.SegmentAttention(32, 4, 2, lookback=3), random(2, 4, 32)
    return of_module(module, x, ENDS[::4], x=x, ends=ENDS[::4])


def segment_pool() -> tuple[Any, Any]:
    return mmkernels.segment_pool(X, ENDS), run(mmkernels.segment_pool, x=X, ends=ENDS)


def segment_pool_module() -> tuple[Any, Any]:
    return of_module(mmkernels.nn.SegmentPool(), X, ENDS, x=X, ends=ENDS)


def ctc_align() -> tuple[Any, Any]:
    arguments = {"log_probs": random(1, 5, 3).log_softmax(2), "targets": torch.tensor([[1, 1]]), "blank": 2}
    path = mmkernels.ctc_align(**arguments).paths[0].tolist()
    return path, list(run(mmkernels.ctc_align, itertools=itertools, **arguments))


def ctc_aligner() -> tuple[Any, Any]:
    names = {"log_probs": random(2, 6, 4).log_softmax(2), "targets": torch.tensor([[1, 3], [0, 0]])}
    return of_module(mmkernels.nn.CTCAligner(blank=2), *names.values(), mmkernels=mmkernels, **names)


def cif() -> tuple[Any, Any]:
    alpha = torch.full((5,), 0.7, dtype=torch.float64)
    names = {"x": X[:, 0], "alpha": alpha, "beta": 0.8, "max_length": 4}
    found = mmkernels.cif(X[None, :, 0], alpha[None], beta=0.8, tail_threshold=2.0, max_length=4)
    return found.features[0], run(mmkernels.cif, **names)


def cif_module() -> tuple[Any, Any]:
    return of_module(mmkernels.nn.CIF(8, beta=0.5), X, x=X)


def distill_loss() -> tuple[Any, Any]:
    names = {"pred": random(7, 6), "table": random(4, 6), "ids": torch.arange(7) % 4, "cosine_weight": 0.7}
    return mmkernels.distill_loss(**names), run(mmkernels.distill_loss, **names)


def distill_loss_module() -> tuple[Any, Any]:
    names = {"pred": random(2, 3, 6), "table": random(4, 6), "ids": torch.arange(6).reshape(2, 3) % 4}
    return of_module(mmkernels.nn.DistillLoss(2.0), *names.values(), **names)


def monotonic_align() -> tuple[Any, Any]:
    log_probs = random(7, 4)
    out = run(mmkernels.monotonic_align, log_probs=log_probs, T=7, U=4)
    return mmkernels.monotonic_align(log_probs[None])[0], out


def aligner() -> tuple[Any, Any]:
    frames, tokens = X[:2].repeat(1, 2, 1) + random(2, 8, 8), X[2:4]
    module = mmkernels.nn.MonotonicAlign(scale=0.5)
    return of_module(module, frames, tokens, frames=frames, tokens=tokens)


def featurizer() -> tuple[Any, Any]:
    lengths = [torch.tensor([3, 2])] * 4
    module = mmkernels.nn.Featurizer(4, hidden_size=8, downsample_rate=320)
    return of_module(module, LAYERS, lengths, all_hs=LAYERS, all_lens=lengths)


def accelerate() -> tuple[Any, Any]:
    plain = nn.Module()
    plain.adapter = nn.Sequential(nn.Linear(8, 3), nn.ReLU(), nn.Linear(3, 8)).double()
    model = copy.deepcopy(plain)
    assert mmkernels.accelerate(model, adapters=["adapter"]).replaced
    torch.testing.assert_close(model.adapter(X), plain.adapter(X))
    return model.adapter(X), run(mmkernels.patch.accelerate, model=model, x=X)


CASES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "adapter": adapter,
    "adapter_norm": lambda: adapter(norm_weight=random(8), norm_bias=random(8)),
    "ctc_align": ctc_align,
    "layer_mix": layer_mix,
    "layer_mix_norm": lambda: layer_mix(norm=True, norm_weight=random(8), norm_bias=random(8)),
    "layer_project": layer_project,
    "layer_project_norm": lambda: layer_project(norm_weight=random(4, 8), norm_bias=random(4, 8)),
    "merge": merge,
    "merge_one": lambda: merge(lam=random(1)),
    "merge_groups": lambda: merge(lam=random(2), groups=[1, 0, 1]),
    "segment_attention": segment_attention,
    "segment_pool": segment_pool,
    "cif": cif,
    "distill_loss": distill_loss,
    "monotonic_align": monotonic_align,
    "Adapter": lambda: of_module(mmkernels.nn.Adapter(8, 3, activation="gelu", scale=0.5), X, x=X),
    "CTCAligner": ctc_aligner,
    "LayerMix": lambda: of_module(mmkernels.nn.LayerMix(4), LAYERS, layers=LAYERS),
    "LayerProject": lambda: of_module(mmkernels.nn.LayerProject(4, 8, 3), X, x=X),
    "Merge": merge_module,
    "SegmentAttention": segment_attention_module,
    "SegmentPool": segment_pool_module,
    "CIF": cif_module,
    "DistillLoss": distill_loss_module,
    "MonotonicAlign": aligner,
    "Featurizer": featurizer,
    "accelerate": accelerate,
}


@pytest.mark.parametrize("case", CASES)
def test_equivalent_code_gives_the_same_numbers(case: str) -> None:
    found, expected = CASES[case]()
    torch.testing.assert_close(found, expected)


def test_every_public_name_has_equivalent_code() -> None:
    functions = {*mmkernels.__all__} - {"__version__", "info"}
    assert functions | {*mmkernels.nn.__all__} <= set(CASES)
