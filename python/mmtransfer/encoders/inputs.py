"""Checks of an encoder's main input: what people give by mistake, with what to do about it."""

from __future__ import annotations

from typing import Any

import torch

from .encoder import Encoder


def check_input(encoder: Encoder, tensor: Any) -> None:
    """Raise unless `tensor` can be the main input of the encoder.

    Raises:
        TypeError: no tensor, integers where floating numbers go, or the other way round.
        ValueError: a wrong number of dimensions, an empty batch, sizes that the configuration does not have
            (mel bins, channels), an input too short for one frame or longer than the positions.
    """
    row = encoder.description
    name = f"{row.main_input} of {row.model_type}"
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{row.main_input} must be a tensor, got {type(tensor).__name__}")
    _check_dtype(name, row.main_input, tensor)
    expected = _expected(encoder)
    shape = tuple(tensor.shape)
    if len(shape) != row.input_dims:
        raise ValueError(
            f"{name} must have {row.input_dims} dimensions, {_format(expected)}, got shape {shape}"
            + _advice_on_rank(shape, row.input_dims)
        )
    if not shape[0]:
        raise ValueError(f"{name} must have at least one example, got shape {shape}")
    if wrong := [size for dim, size in expected.items() if isinstance(size, int) and shape[dim] != size]:
        raise ValueError(
            f"{name} must be {_format(expected)}, got shape {shape}: no dimension of {wrong[0]} in its place"
            + _advice_on_order(shape, expected)
        )
    _check_length(encoder, name, shape)


def _check_dtype(name: str, main_input: str, tensor: torch.Tensor) -> None:
    integers = not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
    if main_input == "input_ids":
        if not integers:
            raise TypeError(f"{name} must be integers, the numbers of tokens, got {tensor.dtype}")
    elif not tensor.is_floating_point():
        scale = {torch.int16: "32768", torch.int32: "2147483648", torch.uint8: "255"}.get(tensor.dtype)
        advice = f"; divide {str(tensor.dtype).removeprefix('torch.')} by {scale}" if scale else ""
        raise TypeError(f"{name} must be floating, got {tensor.dtype}{advice}")


def _expected(encoder: Encoder) -> dict[int, int | str]:
    """What each dimension is: a size that the configuration gives, or a name."""
    row = encoder.description
    config: Any = getattr(encoder.model, "config", None)
    expected: dict[int, int | str] = {0: "batch", row.time_dim: "time"}
    for dim, attribute in row.input_sizes:
        size = getattr(config, attribute, None)
        if isinstance(size, (list, tuple)):
            # Height and width of an image.
            size = size[dim - row.input_dims]
        if size is not None:
            expected[dim] = int(size)
    return dict(sorted(expected.items()))


def _format(expected: dict[int, int | str]) -> str:
    return f"({', '.join(map(str, expected.values()))})"


def _advice_on_rank(shape: tuple[int, ...], dims: int) -> str:
    if len(shape) == dims - 1:
        return "; a single example needs a batch dimension in front: unsqueeze(0)"
    if len(shape) == dims + 1 and 1 in shape[1:]:
        return "; take the dimension of size 1 away: squeeze"
    return ""


def _advice_on_order(shape: tuple[int, ...], expected: dict[int, int | str]) -> str:
    turned = (*shape[:-2], shape[-1], shape[-2])
    if all(turned[dim] == size for dim, size in expected.items() if isinstance(size, int)):
        return "; it looks transposed: transpose(1, 2)" if len(shape) == 3 else "; it looks transposed"
    return ""


def _check_length(encoder: Encoder, name: str, shape: tuple[int, ...]) -> None:
    row = encoder.description
    size, least = shape[row.time_dim], encoder.minimum_length
    if size < least:
        raise ValueError(
            f"{name} must be at least {least} long to make one frame, got {size} (shape {shape}, time is "
            f"dimension {row.time_dim})"
        )
    most = _longest(encoder)
    if most is not None and size > most:
        raise ValueError(f"{name} must be at most {most} long, got {size} (shape {shape}); cut it in pieces")


def _longest(encoder: Encoder) -> int | None:
    """The longest text that there are position embeddings for; None elsewhere (Whisper says it itself)."""
    row = encoder.description
    config: Any = getattr(encoder.model, "config", None)
    most = getattr(config, "max_position_embeddings", None)
    if row.main_input != "input_ids" or most is None:
        return None
    # Its positions start behind that of the padding.
    return most - config.pad_token_id - 1 if row.model_type in ("roberta", "xlm-roberta") else most
