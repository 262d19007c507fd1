"""MMS: one training step of a language's adapters in an encoder of MMS-1B's width.

The encoder has random weights and 4 of the 48 layers, which are alike, and gets projected features: the
frozen convolutions before it are the same for all. A label for each frame stands in for CTC.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import Wav2Vec2Config
from transformers.models.wav2vec2.modeling_wav2vec2 import (
    Wav2Vec2AttnAdapterLayer,
    Wav2Vec2EncoderStableLayerNorm,
)

import mmkernels
from benches.case import Candidate, Case
from benches.methods.step import StepProblem

LETTERS = 48
#: A clip of 5 s.
FRAMES = 249


def _config(width: int, layers: int, heads: int, bottleneck: int) -> Wav2Vec2Config:
    rates = {f"{name}_dropout": 0.0 for name in ("hidden", "attention", "activation", "feat_proj", "final")}
    return Wav2Vec2Config(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        adapter_attn_dim=bottleneck,
        do_stable_layer_norm=True,
        layerdrop=0.0,
        attn_implementation="sdpa",
        **rates,
    )


MMS_1B = _config(1280, 4, 16, 16)
_TINY = _config(64, 2, 4, 8)


class SpeechRecogniser(nn.Module):
    """The encoder and a linear head; the adapters and the head are trained."""

    def __init__(self, config: Wav2Vec2Config) -> None:
        super().__init__()
        self.encoder = Wav2Vec2EncoderStableLayerNorm(config).requires_grad_(False)
        for module in self.encoder.modules():
            if isinstance(module, Wav2Vec2AttnAdapterLayer):
                module.requires_grad_(True)
        self.lm_head = nn.Linear(config.hidden_size, LETTERS)

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.lm_head(self.encoder(features).last_hidden_state)
        return logits.flatten(0, 1)


def accelerated(config: Wav2Vec2Config) -> nn.Module:
    model = SpeechRecogniser(config)
    report = mmkernels.accelerate(model)
    assert len(report.replaced) == config.num_hidden_layers, str(report)
    return model


def compile_layers(model: nn.Module) -> None:
    """Layer by layer: they share their code, which is compiled once."""
    for layer in model.encoder.layers:
        layer.compile(dynamic=False)


def _problem(config: Wav2Vec2Config, clips: int, frames: int, dtype: torch.dtype, device: str) -> StepProblem:
    return StepProblem(
        functools.partial(SpeechRecogniser, config),
        {"features": torch.randn(clips, frames, config.hidden_size, device=device)},
        torch.randint(LETTERS, (clips * frames,), device=device),
        parameters=torch.float32,
        activations=dtype,
        compiler=compile_layers,
    )


def _case(config: Wav2Vec2Config, device: str, clips: int, frames: int, dtype: torch.dtype) -> Case:
    width, layers, bottleneck = config.hidden_size, config.num_hidden_layers, config.adapter_attn_dim
    frozen = layers * (4 * width * (width + 1) + 2 * width * config.intermediate_size)
    trained = layers * (2 * width * bottleneck + 3 * width + bottleneck) + (width + 1) * LETTERS
    # Of a frozen layer forwards, and backwards the gradient of its input alone; of an adapter both gradients;
    # attention 4 T D forwards and 8 backwards.
    layer = 16 * width * width + 8 * width * config.intermediate_size
    layer += 12 * width * bottleneck + 12 * frames * width
    as_published = functools.partial(SpeechRecogniser, config)
    return Case(
        op="mms",
        shape=f"mms-1b, 4 of 48 layers, {clips} clip{'s' * (clips > 1)}",
        variant="adapters",
        direction="training step",
        dtype=dtype,
        device=device,
        sizes={"B": clips, "T": frames, "layers": layers, "D": width, "bottleneck": bottleneck},
        # Frozen weights forwards and backwards; of trained ones gradient and moments too.
        minimum_bytes=4 * (2 * frozen + 9 * trained),
        flops=clips * frames * (layers * layer + 6 * width * LETTERS),
        output_bytes=4 * clips * frames * LETTERS,
        candidates=(
            Candidate("mmkernels.accelerate", "kernel", functools.partial(accelerated, config)),
            Candidate("transformers", "papers", as_published),
            Candidate("torch.compile of layers", "compile", as_published),
        ),
        bound="compute",
        tolerance=1e-3 if dtype == torch.float32 else 0.1,
        max_rounds=15,
        problem=functools.partial(_problem, config, clips, frames, dtype, device),
    )


def cases(device: str, tiny: bool = False) -> Iterator[Case]:
    config, frames = (_TINY, 9) if tiny else (MMS_1B, FRAMES)
    if device == "cuda":
        yield _case(config, device, 16, frames, torch.bfloat16)
    else:
        yield _case(config, device, 1, frames, torch.float32)
