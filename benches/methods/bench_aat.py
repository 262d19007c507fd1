"""AAT: one training step of an AST-base-shaped classifier, by the method that adapts it.

The model has random weights and 602 tokens per clip, as ESC-50's clips have in the paper. There is one clip,
so that the case ends in minutes on two cores; the optimiser, whose work does not grow with the clips, weighs
more than in real training, and most for full fine-tuning (about a tenth of its step).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import ASTConfig, ASTForAudioClassification

from benches.case import Candidate, Case
from benches.methods.step import StepProblem
from mmtransfer import prepare

CLASSES = 50
#: 602 tokens: 12 x 50 patches of 16 x 16, 10 apart, and two class tokens.
AST_BASE = ASTConfig(num_mel_bins=128, max_length=512)
_TINY = ASTConfig(
    num_mel_bins=26,
    max_length=36,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
)


class EagerAdapter(nn.Module):
    """The adapter as published, with the parameters of `mmkernels.nn.Adapter`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        down = nn.init.trunc_normal_(torch.empty(width // 4, width), std=0.02)
        self.down_weight, self.down_bias = nn.Parameter(down), nn.Parameter(torch.zeros(width // 4))
        self.up_weight = nn.Parameter(torch.zeros(width, width // 4))
        self.up_bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        hidden = functional.gelu(functional.linear(x, self.down_weight, self.down_bias))
        return functional.linear(hidden, self.up_weight, self.up_bias)


def adapted(config: ASTConfig, method: str, **options: Any) -> nn.Module:
    """A classifier prepared for a method of `mmtransfer`."""
    model = ASTForAudioClassification(config)
    prepare(model, method, **options)
    return model


def eager(config: ASTConfig) -> nn.Module:
    """AAT^MS in plain PyTorch, with the same state dict: S after the attention, M parallel to the MLP."""
    model = ASTForAudioClassification(config)
    model.audio_spectrogram_transformer.requires_grad_(False)
    for layer in model.audio_spectrogram_transformer.layers:
        serial, parallel = (EagerAdapter(config.hidden_size) for _ in range(2))
        layer.adapter_attention, layer.adapter_mlp = serial, parallel
        layer.attention.o_proj.register_forward_hook(lambda _, args, y, adapter=serial: y + adapter(y))
        layer.mlp.register_forward_hook(lambda _, args, y, adapter=parallel: y + adapter(args[0]))
    return model


def compile_layers(model: nn.Module) -> None:
    """Layer by layer: they share their code, which is compiled once."""
    for layer in model.audio_spectrogram_transformer.layers:
        layer.compile(dynamic=False)


def _problem(config: ASTConfig, clips: int, dtype: torch.dtype, device: str) -> StepProblem:
    return StepProblem(
        functools.partial(eager, config),
        {"input_values": torch.randn(clips, config.max_length, config.num_mel_bins, device=device)},
        torch.randint(CLASSES, (clips,), device=device),
        parameters=torch.float32,
        activations=dtype,
        compiler=compile_layers,
    )


def _case(config: ASTConfig, device: str, clips: int, dtype: torch.dtype) -> Case:
    width, layers = config.hidden_size, config.num_hidden_layers
    patch: Any = config.patch_size
    high = (config.num_mel_bins - patch) // config.frequency_stride + 1
    wide = (config.max_length - patch) // config.time_stride + 1
    tokens = high * wide + 2
    adapter = 2 * width * (width // 4) + width + width // 4
    trained = 2 * layers * adapter + 2 * width + (width + 1) * CLASSES
    frozen = layers * (4 * width * (width + 1) + 2 * width * config.intermediate_size)
    method = functools.partial(functools.partial, adapted, config)
    as_published = functools.partial(eager, config)
    return Case(
        op="aat",
        shape=f"ast-base, {clips} clip{'s' * (clips > 1)}",
        variant="aat-ms",
        direction="training step",
        dtype=dtype,
        device=device,
        sizes={"B": clips, "N": tokens, "layers": layers, "D": width, "bottleneck": width // 4},
        # Frozen weights forwards and backwards; of trained ones gradient and moments too.
        minimum_bytes=4 * (2 * frozen + 9 * trained),
        # Forwards 24 and an adapter 1 each; backwards 24, for the gradients of the frozen layers' inputs
        # alone, and an adapter 2 each; attention 4 N / D forwards, 8 N / D backwards.
        flops=int(clips * tokens * layers * width * (54 * width + 12 * tokens)),
        output_bytes=4 * clips * CLASSES,
        candidates=(
            Candidate("mmkernels native", "kernel", method("aat-ms", backend="native")),
            Candidate(
                "mmkernels native, rewritten", "kernel", method("aat-ms", backend="native", rewrite=True)
            ),
            Candidate(
                "mmkernels native, recomputed",
                "kernel",
                method("aat-ms", backend="native", recompute="selective"),
            ),
            Candidate("eager AAT^MS", "papers", as_published),
            Candidate("torch.compile of layers", "compile", as_published),
            Candidate("full fine-tuning", "different", method("full")),
            Candidate("mmkernels native, AAT^M", "different", method("aat-m", backend="native")),
            Candidate("head alone", "different", method("head")),
        ),
        bound="compute",
        headline=True,
        tolerance=1e-3 if dtype == torch.float32 else 0.1,
        max_rounds=7,
        problem=functools.partial(_problem, config, clips, dtype, device),
    )


def cases(device: str, tiny: bool = False) -> Iterator[Case]:
    config = _TINY if tiny else AST_BASE
    config.num_labels = CLASSES
    if device == "cuda":
        yield _case(config, device, 32, torch.bfloat16)
    else:
        yield _case(config, device, 1, torch.float32)
