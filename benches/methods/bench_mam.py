"""L-MAM: one training step of a Whisper-tiny-shaped classifier, by the way its attention is merged.

The model has random weights and 8 clips of 5 seconds; noise stands for the source, which changes no timing.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import WhisperConfig, WhisperForAudioClassification

from benches.case import Candidate, Case
from benches.methods.step import StepProblem
from mmtransfer import mam, prepare

CLASSES = 50
CLIPS = 8
#: Whisper tiny, with positions for 5 seconds: 500 mel frames, 250 tokens.
WHISPER_TINY = WhisperConfig(
    d_model=384,
    encoder_layers=4,
    encoder_attention_heads=6,
    encoder_ffn_dim=1536,
    max_source_positions=250,
    num_labels=CLASSES,
)
_TINY = WhisperConfig(
    d_model=32,
    encoder_layers=2,
    encoder_attention_heads=2,
    encoder_ffn_dim=64,
    max_source_positions=12,
    num_mel_bins=8,
    num_labels=CLASSES,
)
_MATRICES = ("q_proj", "k_proj", "v_proj")


class NaiveMerge(nn.Module):
    """A layer's share and its source's matrices, by the names that `mmtransfer` gives them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        # So small that full fine-tuning computes the same; at 0 merging would not read the source.
        self.lam = nn.Parameter(torch.full((1,), 1e-6))
        for part in "qkv":
            self.register_buffer(f"source_{part}_weight", torch.randn(width, width) * width**-0.5)


def _project(linear: nn.Linear, merge: NaiveMerge, part: str, x: Tensor) -> Tensor:
    source = merge.get_buffer(f"source_{part}_weight")
    return functional.linear(x, merge.lam * source + (1 - merge.lam) * linear.weight, linear.bias)


def eager(config: WhisperConfig) -> nn.Module:
    """L-MAM as published, in plain PyTorch: equation 3 of the paper in every forward pass."""
    model = WhisperForAudioClassification(config).requires_grad_(True)
    for layer in model.encoder.layers:
        layer.attention_merge = NaiveMerge(config.d_model)
        for name in _MATRICES:
            linear = getattr(layer.self_attn, name)
            linear.forward = functools.partial(_project, linear, layer.attention_merge, name[0])
    return model


def adapted(config: WhisperConfig, method: str, **options: Any) -> nn.Module:
    """A classifier prepared for a method of `mmtransfer`."""
    model = WhisperForAudioClassification(config)
    prepare(model, method, **options)
    return model


def _problem(config: WhisperConfig, dtype: torch.dtype, device: str) -> StepProblem:
    frames = 2 * config.max_source_positions
    return StepProblem(
        functools.partial(eager, config),
        {"input_features": torch.randn(CLIPS, config.num_mel_bins, frames, device=device)},
        torch.randint(CLASSES, (CLIPS,), device=device),
        parameters=torch.float32,
        activations=dtype,
    )


def cases(device: str, tiny: bool = False) -> Iterator[Case]:
    config = _TINY if tiny else WHISPER_TINY
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    width, layers, tokens = config.d_model, config.encoder_layers, config.max_source_positions
    stem = 3 * width * (config.num_mel_bins + width)
    trained = layers * (4 * width * width + 2 * width * config.encoder_ffn_dim) + stem
    merged = 3 * layers * width * width
    method = functools.partial(functools.partial, adapted, config)
    as_published = functools.partial(eager, config)
    yield Case(
        op="l-mam",
        shape=f"whisper-tiny, {CLIPS} clips",
        variant="l-mam",
        direction="training step",
        dtype=dtype,
        device=device,
        sizes={"B": CLIPS, "N": tokens, "layers": layers, "D": width},
        # Weights twice, gradients and moments; merging reads the source and writes, and in the backward pass
        # reads, the merged weights.
        minimum_bytes=4 * (9 * trained + 6 * merged),
        # A product forwards and two backwards; attention 4 N / D forwards, 8 N / D backwards.
        flops=int(CLIPS * tokens * (6 * trained + 12 * layers * tokens * width)),
        output_bytes=4 * CLIPS * CLASSES,
        candidates=(
            Candidate("mmkernels native", "kernel", method("l-mam", source=mam.Noise(), backend="native")),
            Candidate("eager L-MAM", "papers", as_published),
            Candidate("torch.compile", "compile", as_published),
            Candidate("full fine-tuning", "different", method("full")),
        ),
        bound="compute",
        headline=True,
        tolerance=1e-3 if dtype == torch.float32 else 0.1,
        problem=functools.partial(_problem, config, dtype, device),
    )
