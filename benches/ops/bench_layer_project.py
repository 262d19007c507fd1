"""layer_project: the feature projections of HFF, a LayerNorm, Linear and activation for each tap."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benches.case import WAV2VEC2_LARGE, WHISPER_TINY, Candidate, Case, Direction, OpProblem, in_double
from benches.registry import kernel_candidates
from mmkernels.ops.layer_project import layer_project
from mmkernels.ops.layer_project.reference import layer_project as reference


def projection_list(
    taps: list[Tensor], weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor
) -> Tensor:
    """A list of LayerNorm, Linear and ReLU, and a concatenation, as in the paper."""
    halves = []
    for index, tap in enumerate(taps):
        normalised = functional.layer_norm(tap, tap.shape[-1:], norm_weight[index], norm_bias[index])
        halves.append(functional.linear(normalised, weight[index], bias[index]).relu())
    return torch.cat(halves, dim=1).view(len(taps[0]), len(taps), -1)


def folded_product(x: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor) -> Tensor:
    """The best eager form: one LayerNorm, its gain and shift folded into one batched product."""
    normalised = functional.layer_norm(x, x.shape[-1:]).transpose(0, 1)
    folded = (weight * norm_weight.unsqueeze(1)).transpose(1, 2)
    shift = bias.unsqueeze(1) + norm_bias.unsqueeze(1) @ weight.transpose(1, 2)
    return torch.baddbmm(shift, normalised, folded).relu_().transpose(0, 1).contiguous()


def as_taps(inputs: dict[str, Any]) -> dict[str, Any]:
    """The taps in one tensor each, as an encoder returns them, instead of packed."""
    x = inputs["x"]
    taps = [tap.detach().clone().requires_grad_(x.requires_grad) for tap in x.unbind(1)]
    return {"taps": taps} | {name: value for name, value in inputs.items() if name != "x"}


def pack_gradients(results: list[Tensor], taps: int) -> list[Tensor]:
    """The same results with the gradients of the taps, if any, packed into the gradient of ``x``."""
    out, *gradients = results
    if len(gradients) <= 4:
        return results
    return [out, torch.stack(gradients[:taps], dim=1), *gradients[taps:]]


def _case(
    shape: str,
    sizes: tuple[int, int, int],
    direction: Direction,
    device: str,
    tiny: bool,
    *,
    dtype: torch.dtype = torch.float32,
    input_gradient: bool = False,
    headline: bool = False,
) -> Case:
    rows, taps, width = (9, 4, 40) if tiny else sizes
    half, item = width // 2, dtype.itemsize
    x, y = rows * taps * width, rows * taps * half
    parameters = taps * (width * half + half + 2 * width)
    product = 2 * rows * taps * width * half
    forward = x + y + parameters
    # The gradient and its mask, x, the parameters and their gradients; with input_gradient that of x as well.
    backward = 2 * y + x + 2 * parameters + input_gradient * x
    collect = functools.partial(pack_gradients, taps=taps)
    return Case(
        op="layer_project",
        shape=shape,
        variant="norm+relu" + "+input gradient" * input_gradient,
        direction=direction,
        dtype=dtype,
        device=device,
        sizes={"N": rows, "L": taps, "C": width, "C_out": half},
        minimum_bytes=item * (forward if direction == "forward" else forward + backward),
        flops=product if direction == "forward" else product * (3 if input_gradient else 2),
        output_bytes=item * y,
        candidates=(
            *kernel_candidates(layer_project, device),
            Candidate("eager list", "papers", projection_list, as_taps, collect),
            Candidate("eager baddbmm", "hand_written", folded_product),
            Candidate("torch.compile", "compile", projection_list, as_taps, collect),
        ),
        problem=functools.partial(_problem, (rows, taps, width), direction, dtype, device, input_gradient),
        bound="compute",
        headline=headline,
    )


def _problem(
    sizes: tuple[int, int, int], direction: Direction, dtype: torch.dtype, device: str, input_gradient: bool
) -> OpProblem:
    rows, taps, width = sizes
    make = functools.partial(torch.randn, dtype=dtype, device=device)
    inputs = {
        "x": make(rows, taps, width).requires_grad_(input_gradient),
        "weight": (make(taps, width // 2, width) / width**0.5).requires_grad_(),
        "bias": (0.1 * make(taps, width // 2)).requires_grad_(),
        "norm_weight": (1 + 0.1 * make(taps, width)).requires_grad_(),
        "norm_bias": (0.1 * make(taps, width)).requires_grad_(),
    }
    mask = None if direction == "forward" else away_from_kink(inputs, dtype)
    return OpProblem(inputs, reference, direction, dtype, gradient_mask=mask)


@torch.no_grad()
def away_from_kink(inputs: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """Where rounding cannot change the sign of the ReLU's input, and with it a term of a gradient."""
    before = reference(**{name: in_double(value) for name, value in inputs.items()}, activation="none")
    return before.abs() > 64 * torch.finfo(dtype).eps * before.std()


def cases(device: str, tiny: bool = False) -> Iterator[Case]:
    case = functools.partial(_case, device=device, tiny=tiny)
    rows = 4096
    if device == "cuda":
        case, rows = functools.partial(case, dtype=torch.bfloat16), 12000
    large, small = WAV2VEC2_LARGE, WHISPER_TINY
    for direction in ("forward", "forward_backward"):
        yield case(f"{large.name}, 12 taps", (rows, 12, large.width), direction, headline=True)
        yield case(f"{small.name}, 4 taps", (rows, 4, small.width), direction)
    yield case(f"{large.name}, level 2", (rows // 2, 6, large.width), "forward_backward", input_gradient=True)
