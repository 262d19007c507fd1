"""The public names and signatures; a change here is a change that users see, and belongs in CHANGELOG.md."""

from __future__ import annotations

import inspect

import mmkernels
import mmkernels.nn

SIGNATURES = {
    "accelerate": "(model, *, adapters=())",
    "adapter": (
        "(x, down_weight, down_bias, up_weight, up_bias, *, residual=None, scale=1.0, activation='relu', "
        "norm_weight=None, norm_bias=None, eps=1e-05, backend='auto')"
    ),
    "ctc_align": "(log_probs, targets, input_lengths=None, target_lengths=None, *, blank=0, backend='auto')",
    "cif": (
        "(x, alpha, *, beta=1.0, lengths=None, target_lengths=None, tail_threshold=0.5, max_length=None, "
        "backend='auto')"
    ),
    "distill_loss": "(pred, table, ids, *, counts=None, cosine_weight=5.0, backend='auto')",
    "info": "()",
    "layer_mix": (
        "(layers, weights, *, norm=False, eps=1e-05, norm_weight=None, norm_bias=None, lengths=None, "
        "backend='auto')"
    ),
    "layer_project": (
        "(x, weight, bias=None, *, norm_weight=None, norm_bias=None, eps=1e-05, activation='relu', "
        "backend='auto')"
    ),
    "merge": "(target, source, lam, *, groups=None, dtype=None, out=None, backend='auto')",
    "monotonic_align": "(log_probs, frame_lengths=None, token_lengths=None, *, backend='auto')",
    "segment_attention": "(q, k, v, ends, *, lookback=1, scale=None, backend='auto')",
    "segment_pool": "(x, ends, *, reduce='mean', scores=None, counts=None, backend='auto')",
}
MODULES = {
    *("Adapter", "CIF", "CTCAligner", "DistillLoss", "Featurizer", "LayerMix", "LayerProject", "Merge"),
    *("MonotonicAlign", "SegmentAttention", "SegmentPool"),
}


def bare(function: object) -> str:
    signature = inspect.signature(function)  # type: ignore[arg-type]
    parameters = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(inspect.Signature(parameters))


def test_functions() -> None:
    assert set(mmkernels.__all__) == {*SIGNATURES, "__version__"}
    assert {name: bare(getattr(mmkernels, name)) for name in SIGNATURES} == SIGNATURES


def test_modules() -> None:
    assert set(mmkernels.nn.__all__) == MODULES


def test_public_docstrings_say_what_users_need() -> None:
    for name in SIGNATURES.keys() - {"accelerate", "info"}:
        text = inspect.getdoc(getattr(mmkernels, name)) or ""
        for part in ("Equivalent to", "Args:", "Returns:", "Raises:", "Gradients", "Source:"):
            assert part in text, f"{name}: {part}"
