"""adapter: bottleneck adapters between the blocks of a transformer, with and without LayerNorm."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benches.case import Candidate, Case, Direction, OpProblem
from benches.registry import kernel_candidates
from mmkernels.activations import ACTIVATIONS
from mmkernels.ops.adapter import adapter
from mmkernels.ops.adapter.reference import adapter as reference


@dataclass(frozen=True)
class Shape:
    """Rows of a batch, width of the model, and the adapter's bottleneck."""

    name: str
    rows: int
    width: int
    bottleneck: int


HUBERT_BASE = Shape("hubert-base, d=64", 4096, 768, 64)
#: AAT on AST base: 7 clips of 602 tokens, a quarter of the width.
AST_BASE = Shape("ast-base, d=192", 4214, 768, 192)
#: HFF's adapters, of a large encoder.
WAV2VEC2_LARGE = Shape("wav2vec2-large, d=128", 4096, 1024, 128)
#: A language's adapters in MMS-1B.
MMS_1B = Shape("mms-1b, d=16", 4096, 1280, 16)
#: 32 clips of 1214 tokens.
AST_BATCH = Shape("ast-base, 32 clips, d=64", 38848, 768, 64)


def modules(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    *,
    activation: str,
    **norm: Tensor,
) -> Tensor:
    """Linear, activation, Linear, residual, as every adapter library has it."""
    h = ACTIVATIONS[activation](functional.linear(_normalised(x, **norm), down_weight, down_bias))
    return x + functional.linear(h, up_weight, up_bias)


def in_place(
    x: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    *,
    activation: str,
    **norm: Tensor,
) -> Tensor:
    """The best eager form: the products add a bias and the residual."""
    z = torch.addmm(down_bias, _normalised(x, **norm), down_weight.t())
    a = z.relu_() if activation == "relu" else ACTIVATIONS[activation](z)
    return torch.addmm(x, a, up_weight.t()) + up_bias


def _normalised(x: Tensor, norm_weight: Tensor | None = None, norm_bias: Tensor | None = None) -> Tensor:
    return x if norm_weight is None else functional.layer_norm(x, x.shape[-1:], norm_weight, norm_bias)


def _with_residual(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``adapter`` or its reference with the arguments of the baselines."""
    return lambda x, **inputs: call(x, **inputs, residual=x)


def _case(
    shape: Shape,
    direction: Direction,
    device: str,
    tiny: bool,
    *,
    norm: bool = False,
    activation: str = "relu",
    input_gradient: bool = True,
    dtype: torch.dtype = torch.float32,
    headline: bool = False,
) -> Case:
    rows, width, bottleneck = (9, 40, 16) if tiny else (shape.rows, shape.width, shape.bottleneck)
    item = dtype.itemsize
    x, hidden = rows * width, rows * bottleneck
    parameters = 2 * width * bottleneck + width + bottleneck + 2 * width * norm
    product = 2 * rows * width * bottleneck
    forward = 2 * x + parameters + hidden * (direction != "forward")
    # x, the gradient and the saved hidden layer; the gradients of x and of the parameters.
    backward = (2 + input_gradient) * x + hidden + 2 * parameters
    flops = {"forward": 2 * product, "backward": (3 + input_gradient) * product}
    variant = "+".join(
        [*(["norm"] if norm else []), activation, *([] if input_gradient else ["frozen input"])]
    )
    return Case(
        op="adapter",
        shape=shape.name,
        variant=variant,
        direction=direction,
        dtype=dtype,
        device=device,
        sizes={"R": rows, "D": width, "d": bottleneck},
        minimum_bytes=item * {"forward": forward, "backward": backward}.get(direction, forward + backward),
        flops=flops.get(direction, sum(flops.values())),
        output_bytes=item * x,
        candidates=(
            *(Candidate(c.name, c.role, _with_residual(c.call)) for c in kernel_candidates(adapter, device)),
            Candidate("eager modules", "papers", modules),
            Candidate("eager addmm", "hand_written", in_place),
            Candidate("torch.compile", "compile", modules),
        ),
        problem=functools.partial(
            _problem, (rows, width, bottleneck), norm, activation, input_gradient, direction, dtype, device
        ),
        bound="memory" if device == "cuda" else "compute",
        # The gradient of the gain is a small difference of large sums over the rows.
        tolerance=6e-2 if norm and dtype == torch.bfloat16 else None,
        headline=headline,
    )


def _problem(
    sizes: tuple[int, int, int],
    norm: bool,
    activation: str,
    input_gradient: bool,
    direction: Direction,
    dtype: torch.dtype,
    device: str,
) -> OpProblem:
    rows, width, bottleneck = sizes
    make = functools.partial(torch.randn, dtype=dtype, device=device)
    inputs: dict[str, Any] = {
        "x": make(rows, width).requires_grad_(input_gradient),
        "down_weight": (make(bottleneck, width) / width**0.5).requires_grad_(),
        "down_bias": (0.1 * make(bottleneck)).requires_grad_(),
        "up_weight": (make(width, bottleneck) / bottleneck**0.5).requires_grad_(),
        "up_bias": (0.1 * make(width)).requires_grad_(),
        "activation": activation,
    }
    if norm:
        inputs["norm_weight"] = (1 + 0.1 * make(width)).requires_grad_()
        inputs["norm_bias"] = (0.1 * make(width)).requires_grad_()
    return OpProblem(inputs, _with_residual(reference), direction, dtype)


def cases(device: str, tiny: bool = False) -> Iterator[Case]:
    case = functools.partial(_case, device=device, tiny=tiny)
    if device == "cuda":
        bf16 = functools.partial(case, dtype=torch.bfloat16)
        for norm in (False, True):
            for direction in ("forward", "backward", "forward_backward"):
                yield bf16(AST_BATCH, direction, norm=norm, headline=True)
        yield bf16(AST_BASE, "forward_backward", activation="gelu")
        yield bf16(WAV2VEC2_LARGE, "forward_backward", norm=True)
        yield case(HUBERT_BASE, "forward_backward")
        return
    for norm in (False, True):
        for direction in ("forward", "forward_backward"):
            yield case(HUBERT_BASE, direction, norm=norm, headline=True)
    yield case(HUBERT_BASE, "forward_backward", input_gradient=False)
    for direction in ("forward", "forward_backward"):
        yield case(AST_BASE, direction, activation="gelu")
    yield case(MMS_1B, "forward_backward", norm=True)
    yield case(WAV2VEC2_LARGE, "forward_backward", norm=True)
