"""AAT: one whole training step of an AST-base-shaped classifier, by what of it is trained and how.

The model has random weights and 602 tokens per clip, as ESC-50's clips have in the paper. There is one clip,
so that the case ends in minutes on two cores; the optimiser, whose work does not grow with the clips, weighs
more than in real training, and most for full fine-tuning (about a tenth of its step).
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import ASTConfig, ASTForAudioClassification

from benches.case import Candidate, Case, Runner
from benches.measure.harness import relative_error
from benches.measure.record import Row
from mmtransfer import aat, models
from mmtransfer.measure import allocations

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
#: Bytes that a candidate holds for its backward pass, by case and candidate; see `StepProblem.runner`.
_HELD: dict[tuple[str, str], int] = {}


class EagerAdapter(nn.Module):
    """The adapter as the code released with the paper has it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(width, width // 4), nn.Linear(width // 4, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(functional.gelu(self.down(x)))


class Serial(nn.Module):
    """The attention's output projection and the S adapter after it."""

    def __init__(self, inner: nn.Module, adapter: EagerAdapter) -> None:
        super().__init__()
        self.inner, self.adapter = inner, adapter

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        return y + self.adapter(y)


class Parallel(nn.Module):
    """The MLP and the M adapter beside it."""

    def __init__(self, inner: nn.Module, adapter: EagerAdapter) -> None:
        super().__init__()
        self.inner, self.adapter = inner, adapter

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.adapter(x)


@dataclass(frozen=True)
class Trained:
    """What a candidate trains: a method of `mmtransfer.aat` with options, or adapters in plain PyTorch."""

    method: str
    options: tuple[tuple[str, Any], ...] = ()
    eager: bool = False

    def __call__(self, model: nn.Module) -> None:
        if not self.eager:
            aat.prepare(model, self.method, **dict(self.options))
            return
        encoder = models.find_encoder(model)
        encoder.requires_grad_(False)
        layers: Any = models.get_layers(encoder)
        width = models.hidden_size(encoder)
        dtype = next(encoder.parameters()).dtype
        for layer in layers:
            serial, parallel = (EagerAdapter(width).to(dtype) for _ in range(2))
            layer.attention.o_proj = Serial(layer.attention.o_proj, serial)
            layer.mlp = Parallel(layer.mlp, parallel)


def _trained(method: str, **options: Any) -> Trained:
    return Trained(method, tuple(options.items()))


def adapters(model: nn.Module) -> list[list[nn.Parameter]]:
    """Weights and biases of each S and M adapter of AAT^MS, layer after layer; empty without both."""
    found: list[list[nn.Parameter]] = []
    layers: Any = models.get_layers(models.find_encoder(model))
    pair: Any
    for layer in layers:
        if isinstance(layer.mlp, Parallel):
            pair = layer.attention.o_proj.adapter, layer.mlp.adapter
            found += [[a.down.weight, a.down.bias, a.up.weight, a.up.bias] for a in pair]
        elif hasattr(layer, "adapter_mlp") and hasattr(layer, "adapter_attention"):
            pair = layer.adapter_attention, layer.adapter_mlp
            found += [[a.down_weight, a.down_bias, a.up_weight, a.up_bias] for a in pair]
    return found


class StepProblem:
    """Forward, loss, backward and the update of what is trained; all candidates start from one model.

    Adapters start as zero, so that all candidates have the same logits and gradients of the head in their
    first step, full fine-tuning too. Those are compared; with them, where a candidate has the adapters of
    AAT^MS, the gradients of these.
    """

    def __init__(
        self, config: ASTConfig, clips: int, dtype: torch.dtype, device: str, case: str, tolerance: float
    ) -> None:
        self.config, self.dtype, self.device = config, dtype, device
        self.case, self.tolerance = case, tolerance
        config.num_labels = CLASSES
        model = ASTForAudioClassification(config)
        self.state = model.state_dict()
        down = config.hidden_size // 4, config.hidden_size
        count = 2 * config.num_hidden_layers
        self.down = [nn.init.trunc_normal_(torch.empty(down), std=0.02) for _ in range(count)]
        self.x = torch.randn(clips, config.max_length, config.num_mel_bins, device=device)
        self.labels = torch.randint(CLASSES, (clips,), device=device)
        self.adapter_gradients: list[Tensor] = []

    def runner(self, candidate: Candidate) -> Runner:
        """Its first call, off the clock, also tells what is held for the backward pass."""
        model = self._model(candidate.call, torch.float32)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
        if candidate.role == "compile":
            # Layer by layer, whose code is the same: compiled once.
            for layer in models.get_layers(models.find_encoder(model)):
                layer.compile(dynamic=False)

        def step(_: None) -> list[Tensor]:
            optimizer.zero_grad()
            key = self.case, candidate.name
            forward = functools.partial(self._loss, model)
            if key in _HELD:
                logits, loss = forward()
            else:
                logits, loss, _HELD[key] = held(forward)
            loss.backward()
            optimizer.step()
            return [logits]

        def timer() -> float:
            start = time.perf_counter()
            step(None)
            return time.perf_counter() - start

        # A step takes seconds; two have run for the check and the memory, and no other is needed to warm up.
        return Runner(
            step,
            collect=lambda results: self._collect(model, results),
            timer=timer if self.device == "cpu" else None,
        )

    def expected(self) -> list[Tensor]:
        model = self._model(Trained("aat_ms", eager=True), torch.float64)
        logits, loss = self._loss(model)
        loss.backward()
        self.adapter_gradients = _adapter_gradients(model)
        return [logits.detach(), *_head_gradients(model)]

    def _model(self, prepare: Any, dtype: torch.dtype) -> ASTForAudioClassification:
        model = ASTForAudioClassification(self.config)
        model.load_state_dict(self.state)
        nn.Module.to(model, self.device, dtype)
        prepare(model)
        with torch.no_grad():
            for (weight, bias, *_), start in zip(adapters(model), self.down, strict=False):
                weight.copy_(start)
                bias.zero_()
        return model

    def _loss(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        x = self.x.to(next(model.parameters()).dtype)
        autocast: Any = contextlib.nullcontext()
        if self.dtype != torch.float32 and x.dtype == torch.float32:
            autocast = torch.autocast(x.device.type, self.dtype)
        with autocast:
            logits = model(x).logits
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return logits, functional.cross_entropy(logits, self.labels)

    def _collect(self, model: nn.Module, results: list[Tensor]) -> list[Tensor]:
        found = _adapter_gradients(model)
        if found and (error := relative_error(found, self.adapter_gradients)) > self.tolerance:
            raise ValueError(f"wrong gradient of an adapter: relative error {error:.1e}")
        return [*results, *_head_gradients(model)]


def held(forward: Any) -> tuple[Tensor, Tensor, int]:
    """Logits, loss, and the bytes that the pass has left allocated, which is what backward needs."""
    (logits, loss), changes = allocations(forward)
    return logits, loss, sum(changes)


def _adapter_gradients(model: nn.Module) -> list[Tensor]:
    """Of weights that the first step moves: those of the down-projections are zero."""
    gradients = [parameter.grad for _, _, *up in adapters(model) for parameter in up]
    return [gradient.clone() for gradient in gradients if gradient is not None]


def _head_gradients(model: Any) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in model.classifier.parameters()]


def _case(config: ASTConfig, device: str, clips: int, dtype: torch.dtype) -> Case:
    width, layers = config.hidden_size, config.num_hidden_layers
    patch: Any = config.patch_size
    high = (config.num_mel_bins - patch) // config.frequency_stride + 1
    wide = (config.max_length - patch) // config.time_stride + 1
    tokens = high * wide + 2
    adapter = 2 * width * (width // 4) + width + width // 4
    trained = 2 * layers * adapter + 2 * width + (width + 1) * CLASSES
    frozen = layers * (4 * width * (width + 1) + 2 * width * config.intermediate_size)
    tolerance = 1e-3 if dtype == torch.float32 else 0.1
    shape = f"ast-base, {clips} clip{'s' * (clips > 1)}"
    aat_ms = functools.partial(_trained, "aat_ms", backend="native")
    return Case(
        op="aat",
        shape=shape,
        variant="aat_ms",
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
            Candidate("mmkernels native", "kernel", aat_ms()),
            Candidate("mmkernels native, rewritten", "kernel", aat_ms(rewrite=True)),
            Candidate("mmkernels native, recomputed", "kernel", aat_ms(recompute="selective")),
            Candidate("eager AAT^MS", "papers", Trained("aat_ms", eager=True)),
            Candidate("torch.compile of layers", "compile", Trained("aat_ms", eager=True)),
            Candidate("full fine-tuning", "different", _trained("full")),
            Candidate("mmkernels native, AAT^M", "different", _trained("aat_m", backend="native")),
            Candidate("head alone", "different", _trained("head")),
        ),
        bound="compute",
        headline=True,
        tolerance=tolerance,
        max_rounds=7,
        problem=functools.partial(StepProblem, config, clips, dtype, device, shape, tolerance),
    )


def cases(device: str, tiny: bool = False) -> Iterator[Case]:
    config = _TINY if tiny else AST_BASE
    if device == "cuda":
        yield _case(config, device, 32, torch.bfloat16)
    else:
        yield _case(config, device, 1, torch.float32)


def bench_aat(row: Row) -> None:
    """The record also has ``held_bytes``, what is kept from the forward pass to the backward pass."""
    row.record()
    benchmark = row.request.getfixturevalue("benchmark")
    benchmark.extra_info["held_bytes"] = _HELD.get((row.case.shape, row.candidate.name))
