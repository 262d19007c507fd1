"""The kernels that a case of an op launches on CUDA, and the work of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from benches.case import Case

STATISTICS = 8  # bytes of a row's mean and 1 / standard deviation
#: Frames of an iteration of the loops of ctc_align and monotonic_align.
FRAMES = 8
#: Layers of one block, as in csrc/include/mmkernels/layer_mix.h.
GROUP = 8


@dataclass(frozen=True)
class Launch:
    """One kernel, or one product of the library.

    Attributes:
        kernel: its name in kernels.json, or those of its hot loops, joined by " + "; "" for a product of the
            library, and for short kernels between the others, of which the launch is all that counts.
        moved: bytes of device memory that it reads and writes, each once.
        loaded: bytes that the loads of its hot loop ask for, those that a cache serves included.
        flops: on tensor cores; of each hot loop where there are several.
        steps: iterations of its hot loop that one warp does, one after another; where that limits it.
    """

    kernel: str
    moved: float = 0.0
    loaded: float = 0.0
    flops: float = 0.0
    steps: float = 0.0


Launches = Iterator[Launch]


def launches(case: Case) -> list[Launch] | None:
    """Those of a case, None where there are none to predict: training steps, calls, imports."""
    if case.op not in _OPS or case.direction not in ("forward", "backward", "forward_backward"):
        return None
    forward, backward = _OPS[case.op]
    found: list[Launch] = []
    if case.direction != "backward":
        found += forward(case)
    if case.direction != "forward":
        found += backward(case)
    return found


def _options(case: Case) -> set[str]:
    return set(case.variant.replace(", ", "+").split("+"))


def _is_half(case: Case) -> bool:
    return case.dtype in (torch.float16, torch.bfloat16)


# ---- layer_mix


def _mix_sizes(case: Case) -> tuple[int, int, int, int, int]:
    sizes = case.sizes
    rows = sizes["B"] * sizes["T"]
    valid = round(rows * 0.6) if "lengths" in _options(case) else rows
    return rows, valid, sizes["L"], sizes["D"], case.dtype.itemsize


def _mix_forward(case: Case) -> Launches:
    rows, valid, layers, width, item = _mix_sizes(case)
    options = _options(case)
    read, written = layers * valid * width * item, rows * width * item
    if "norm" not in options:
        yield Launch("mix_plain", read + written, read)
        return
    if "affine" in options:
        yield Launch("")
        # The loop loads the float32 gain too, which a cache serves.
        yield Launch("mix_norm affine", read + written, read * (1 + 4 / item))
        return
    stats = rows * layers * STATISTICS if case.direction != "forward" else 0
    yield Launch("mix_norm", read + written + stats, read)


def _mix_backward(case: Case) -> Launches:
    rows, valid, layers, width, item = _mix_sizes(case)
    options = _options(case)
    norm, trainable = "norm" in options, "trainable layers" in options
    layer, grad = layers * valid * width * item, valid * width * item
    stats = rows * layers * STATISTICS if norm else 0
    if trainable and norm and "affine" not in options:
        written = layers * rows * width * item
        # The path that is walked loads a float32 parameter too.
        yield Launch("gradients_norm", layer + grad + stats + written, layer * (1 + 4 / item))
    else:
        groups = -(-layers // GROUP)
        name = "sum_rows norm" if norm else "sum_rows"
        yield Launch(name, layer + grad + stats, layer + groups * grad)
        if trainable:
            written = layers * rows * width * item
            yield Launch(
                "gradients_plain", grad + written, written / 2
            )  # 256 bytes of loads to 512 of stores
    yield Launch("")
    if "affine" in options:
        yield Launch("")


# ---- products with a LayerNorm folded in


def _project_forward(case: Case) -> Launches:
    rows, taps, width, out = (case.sizes[name] for name in ("N", "L", "C", "C_out"))
    item = case.dtype.itemsize
    x, y = rows * taps * width * item, rows * taps * out * item
    yield Launch("")  # the fold
    yield Launch("row_moments", x + rows * taps * STATISTICS, x)
    yield Launch("project", x + y, flops=2 * rows * taps * width * out)


def _project_backward(case: Case) -> Launches:
    rows, taps, width, out = (case.sizes[name] for name in ("N", "L", "C", "C_out"))
    item = case.dtype.itemsize
    x, y, weight = rows * taps * width * item, rows * taps * out * item, taps * out * width
    flops = 2 * rows * taps * width * out
    yield Launch("gradient", 3 * y, 2 * y)
    yield Launch("", x + y + 4 * weight, flops=flops)
    if "input gradient" in _options(case):
        yield Launch("")
        yield Launch("", x + y, flops=flops)
        yield Launch("finish_input_gradient", 3 * x, 2 * x)
    yield Launch("")
    # dVc in float32, of which alone the loads are wide; weights and their gradients.
    yield Launch("unfold_columns", (4 + 2 * item) * weight, 4 * weight)


def _adapter_forward(case: Case) -> Launches:
    rows, width, bottleneck = (case.sizes[name] for name in ("R", "D", "d"))
    item = case.dtype.itemsize
    x, hidden = rows * width * item, rows * bottleneck * item
    flops = 2 * rows * width * bottleneck
    saved = hidden if case.direction != "forward" else 0
    yield Launch("")  # the fold
    if _is_half(case):
        first = "adapt first, norm" if "norm" in _options(case) else "adapt first"
        yield Launch(f"{first} + adapt second", 2 * x + saved, flops=flops)
        return
    yield Launch("", x + hidden, flops=flops)
    yield Launch("", 3 * hidden)
    yield Launch("", x + hidden, flops=flops)
    yield Launch("", 3 * x)


def _adapter_backward(case: Case) -> Launches:
    rows, width, bottleneck = (case.sizes[name] for name in ("R", "D", "d"))
    item, norm = case.dtype.itemsize, "norm" in _options(case)
    x, hidden = rows * width * item, rows * bottleneck * item
    flops = 2 * rows * width * bottleneck
    if _is_half(case):
        yield Launch("")
        second = "adapt_backward second, norm" if norm else "adapt_backward second"
        yield Launch(f"adapt_backward first + {second}", (2 + norm) * x + 3 * hidden, flops=flops)
    else:
        yield Launch("", x + hidden, flops=flops)
        yield Launch("", 4 * hidden)
        yield Launch("", x + hidden, flops=flops)
        yield Launch("", (2 + norm) * x)
        yield Launch("", x)
    yield Launch("", x + hidden, flops=flops)
    yield Launch("", x + hidden, flops=flops)
    for _ in range(2 + norm):
        yield Launch("")  # second stages of sums


# ---- merge


def _merge_elements(case: Case) -> int:
    return case.sizes["pairs"] * case.sizes["D"] ** 2


def _merge_forward(case: Case) -> Launches:
    size = _merge_elements(case) * case.dtype.itemsize
    yield Launch("interpolate", 3 * size, 2 * size)


def _merge_backward(case: Case) -> Launches:
    size = _merge_elements(case) * case.dtype.itemsize
    # The source has no gradient in these cases.
    yield Launch("interpolate_gradients", 4 * size, 3 * size)
    yield Launch("")


# ---- segments


def _pool_sizes(case: Case) -> tuple[float, float, float]:
    """Bytes of x, of the result, and of the scores."""
    sizes, item = case.sizes, case.dtype.itemsize
    return (
        sizes["B"] * sizes["T"] * sizes["D"] * item,
        sizes["B"] * sizes["M"] * sizes["D"] * item,
        sizes["B"] * sizes["T"] * 4,
    )


def _pool_forward(case: Case) -> Launches:
    x, out, scores = _pool_sizes(case)
    options = _options(case)
    yield Launch("")  # the stops
    if "last" in options:
        yield Launch("", 2 * out)
        return
    reduce = next(name for name in ("mean", "max", "attention") if name in options)
    extra = {"mean": 0.0, "max": 4 * out / case.dtype.itemsize, "attention": scores}[reduce]
    yield Launch(f"pool_pieces {reduce}", x + out + extra, x)
    yield Launch("")


def _pool_backward(case: Case) -> Launches:
    x, out, scores = _pool_sizes(case)
    options = _options(case)
    yield Launch("")
    if "attention" in options:
        yield Launch("score_gradients", 2 * x + out + 2 * scores, x)
        yield Launch("")
        return
    yield Launch("", x + out + (4 * out / case.dtype.itemsize if "max" in options else 0))


def _cif_forward(case: Case) -> Launches:
    x, out, alpha = _pool_sizes(case)
    yield Launch("", alpha)
    yield Launch("sum_tokens", x + out, x)


def _cif_backward(case: Case) -> Launches:
    x, out, alpha = _pool_sizes(case)
    yield Launch("frame_gradients", 2 * x + out, 2 * x)
    yield Launch("", 2 * alpha)


def _attention_tiles(case: Case) -> tuple[float, float]:
    """Bytes of q, and the FLOPs of the scores' tiles of 64 x 64 that a causal block visits."""
    batch, heads, frames, size = (case.sizes[name] for name in ("B", "H", "T", "d"))
    query_tiles = -(-frames // 64)
    segment = -(-frames // case.sizes["M"])
    key_tiles = sum(min(tile + 1, -(-(segment + 64) // 64) + 1) for tile in range(query_tiles))
    return batch * heads * frames * size * case.dtype.itemsize, 2 * batch * heads * key_tiles * 64 * 64 * size


def _attention_forward(case: Case) -> Launches:
    q, flops = _attention_tiles(case)
    yield Launch("")
    name = "attend" if _is_half(case) else ""
    yield Launch(name, 4 * q, flops=2 * flops)


def _attention_backward(case: Case) -> Launches:
    q, flops = _attention_tiles(case)
    half = _is_half(case)
    yield Launch("attention_dots" if half else "", 2 * q, 2 * q)
    yield Launch("query_gradients" if half else "", 5 * q, flops=3 * flops)
    yield Launch("key_gradients" if half else "", 6 * q, flops=4 * flops)


# ---- alignments and losses


def _align_forward(case: Case) -> Launches:
    yield Launch("align ctc", case.minimum_bytes, steps=case.sizes["T"] / FRAMES)


def _align_backward(case: Case) -> Launches:
    """The gradient of a score is a scatter by torch."""
    yield Launch("", case.minimum_bytes / 2)


def _monotonic_forward(case: Case) -> Launches:
    yield Launch("align monotonic", case.minimum_bytes, steps=case.sizes["T"] / FRAMES)


def _distill_forward(case: Case) -> Launches:
    pred = case.sizes["B"] * case.sizes["M"] * case.sizes["H"] * case.dtype.itemsize
    yield Launch("measure_tokens", 2 * pred, 2 * pred)
    yield Launch("")


def _distill_backward(case: Case) -> Launches:
    pred = case.sizes["B"] * case.sizes["M"] * case.sizes["H"] * case.dtype.itemsize
    yield Launch("token_gradients", 3 * pred, 2 * pred)


_Pair = tuple[Callable[[Case], Launches], Callable[[Case], Launches]]
_OPS: dict[str, _Pair] = {
    "layer_mix": (_mix_forward, _mix_backward),
    "layer_project": (_project_forward, _project_backward),
    "adapter": (_adapter_forward, _adapter_backward),
    "merge": (_merge_forward, _merge_backward),
    "segment_pool": (_pool_forward, _pool_backward),
    "cif": (_cif_forward, _cif_backward),
    "segment_attention": (_attention_forward, _attention_backward),
    "ctc_align": (_align_forward, _align_backward),
    "monotonic_align": (_monotonic_forward, _align_backward),
    "distill_loss": (_distill_forward, _distill_backward),
}
