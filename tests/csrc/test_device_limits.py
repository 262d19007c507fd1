"""The launches of real shapes against the limits of real GPUs: shared memory, opt-in, registers.

The launchers run on the host SIMT runtime, which records what they ask for and starts no thread; static
shared memory and registers of each kernel are those of ptxas. Only the two together decide whether a GPU
accepts a launch.
"""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Iterator
from functools import cache
from itertools import product

import pytest
import simt_build
import test_adapter_cuda
import test_cif_cuda
import test_ctc_align_cuda
import test_distill_loss_cuda
import test_layer_mix_cuda
import test_layer_project_cuda
import test_merge_cuda
import test_monotonic_align_cuda
import test_segment_attention_cuda
import test_segment_pool_cuda
import torch
from devices import (
    DEVICES,
    H100,
    REGISTERS,
    SHARED_WITHOUT_OPT_IN,
    Device,
    registers_of_block,
    resident_blocks,
)
from simt_build import Launch, Library
from simt_tensors import DTYPE_CODES, integers
from test_ptxas import MOST_REGISTERS, Usage, usages

from mmkernels.ops.segment_pool.schema import REDUCTIONS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc"),
    pytest.mark.skipif(simt_build.missing_tools() is not None, reason=str(simt_build.missing_tools())),
]
SOURCES = sorted(
    {
        *test_adapter_cuda.SOURCES,
        *test_ctc_align_cuda.SOURCES,
        *test_layer_mix_cuda.SOURCES,
        *test_layer_project_cuda.SOURCES,
        *test_merge_cuda.SOURCES,
        *test_segment_attention_cuda.SOURCES,
        *test_segment_pool_cuda.SOURCES,
        *test_cif_cuda.SOURCES,
        *test_monotonic_align_cuda.SOURCES,
        *test_distill_loss_cuda.SOURCES,
    }
)
#: Of wav2vec2, HuBERT, WavLM, Whisper and their kind; the last is too wide for the registers of a block.
WIDTHS = (384, 512, 768, 1024, 1280, 1920, 2048, 5120)
LAYERS = (5, 13, 25)
BOTTLENECKS = (64, 96, 128, 192, 256)
ROWS = 38_848
MEMORY = ctypes.c_void_p(1 << 20)  # an aligned address that no launcher reads
UNALIGNED = ctypes.c_void_p((1 << 20) + 4)
OUTPUTS = 250


@cache
def library() -> Library:
    return simt_build.load(simt_build.build("limits", SOURCES, races=True))


def some(wanted: object) -> ctypes.c_void_p | None:
    return MEMORY if wanted else None


def launch_layer_mix(width: int, layers: int, dtype: torch.dtype, norm: bool, affine: bool) -> None:
    call = library().call
    sizes = integers(DTYPE_CODES[dtype], layers, 1, ROWS, width, norm)
    for address in (MEMORY, UNALIGNED):
        pointers = integers(*[address.value or 0] * layers)
        strides = integers(*[ROWS * width, width] * layers)
        inputs = (sizes, pointers, strides, None, MEMORY, some(affine), some(affine))
        call("layer_mix_forward", *inputs, 1e-5, MEMORY, some(norm), some(affine))
        for wanted, needs_affine in ((True, False), (True, affine), (False, affine)):
            d_layers = integers(*[(address.value or 0) if wanted else 0] * layers)
            gradients = (address, integers(ROWS * width, width), some(norm), d_layers)
            call("layer_mix_backward", *inputs, *gradients, integers(True, needs_affine), *[MEMORY] * 6)


def parameter_codes(dtype: torch.dtype) -> list[int]:
    return sorted({DTYPE_CODES[torch.float32], DTYPE_CODES[dtype]})


def launch_layer_project(width: int, taps: int, dtype: torch.dtype, norm: bool) -> None:
    call = library().call
    for outputs, address, parameters in product(
        (OUTPUTS, 64, 128), (MEMORY, UNALIGNED), parameter_codes(dtype)
    ):
        sizes = integers(DTYPE_CODES[dtype], 500, taps, width, outputs, 1, parameters)
        strides, stats = integers(taps * width, width), some(norm)
        call("norm_product_fold", sizes, address, MEMORY, *[stats] * 2, MEMORY, MEMORY, stats)
        call("norm_product_stats", sizes, address, strides, 1e-5, MEMORY)
        fuses = integers(0)
        call("project_fuses", sizes, address, strides, fuses)
        if fuses[0]:
            call("project_product", sizes, address, strides, MEMORY, stats, MEMORY, stats, MEMORY, MEMORY)
        call("norm_product_activate", sizes, stats, MEMORY, stats, address, MEMORY)
        call("norm_product_gradient", sizes, address, MEMORY, stats, MEMORY, MEMORY, stats, MEMORY)
        call("norm_product_input_gradient", sizes, address, strides, MEMORY, MEMORY, MEMORY)
        call("norm_product_unfold", sizes, MEMORY, MEMORY, *[stats] * 3, *[MEMORY] * 2, *[stats] * 2, MEMORY)


def launch_adapter(width: int, bottleneck: int, dtype: torch.dtype, norm: bool) -> None:
    call, code = library().call, DTYPE_CODES[dtype]
    stats, nothing = some(norm), (None, 0)
    for parameters in parameter_codes(dtype):
        sizes = integers(code, ROWS, width, bottleneck, 1, parameters)
        for address in (MEMORY, UNALIGNED):
            folded = (MEMORY, MEMORY, stats, MEMORY, MEMORY)
            call("adapter_fold", sizes, address, *[MEMORY] * 3, stats, stats, *folded)
        call("adapter_up_bias", sizes, 100, 0.5, MEMORY, MEMORY)
    if dtype == torch.float32:
        for address in (MEMORY, UNALIGNED):
            call("adapter_activate", sizes, 0.5, address, MEMORY)
            addend, x = (address, width), (MEMORY, width)
            call("adapter_finish", sizes, 0.5, MEMORY, MEMORY, *addend, *x, stats, stats, code, MEMORY)
        call("adapter_column_sums", sizes, MEMORY, width, MEMORY)
        return
    float_code, rows = DTYPE_CODES[torch.float32], (MEMORY, width)
    for residual, add_input, out in ((nothing, True, code), (rows, False, code), (rows, False, float_code)):
        options = (0.5, 1e-5, *rows, *residual, add_input, out)
        weights = (MEMORY, MEMORY, stats, MEMORY, MEMORY)
        call("adapter_forward", sizes, *options, *weights, MEMORY, MEMORY, stats)
        inputs = (*rows, *rows, add_input, *[MEMORY] * 4, stats)
        call("adapter_backward", sizes, 0.5, *inputs, *[MEMORY] * 5)


def launch_merge(types: tuple[torch.dtype, ...]) -> None:
    """The attention matrices of a large model, all for one call."""
    pairs, layers = 96, 24
    codes, sizes = integers(*(DTYPE_CODES[dtype] for dtype in types)), integers(*[1024 * 1024] * pairs)
    for address in (MEMORY, UNALIGNED):
        tensors = integers(*[address.value or 0] * pairs)
        inputs = (codes, pairs, sizes, integers(*[k // 4 for k in range(pairs)]), tensors, tensors, MEMORY)
        library().call("merge_forward", *inputs, tensors)
        for needed in (MEMORY, None):
            library().call("merge_backward", *inputs, layers, tensors, tensors, tensors, needed, needed)


def launch_segment_pool(width: int, dtype: torch.dtype) -> None:
    """Segments of 4 frames, and those of many pieces that may be among them."""
    call, strides = library().call, integers(1500 * width, width)
    for code, reduce in enumerate(REDUCTIONS):
        sizes = integers(DTYPE_CODES[dtype], code, 8, 1500, 375, width)
        ends = (sizes, MEMORY, None, MEMORY)
        for address in (MEMORY, UNALIGNED):
            call("segment_pool_forward", *ends, address, strides, *[MEMORY] * 7)
            wanted = [(address, None), (address, MEMORY), (None, MEMORY)]
            for dx, d_scores in wanted if reduce == "attention" else wanted[:1]:
                gradients = (address, strides, address, strides, *[MEMORY] * 3, dx, d_scores, MEMORY)
                call("segment_pool_backward", *ends, *gradients)


def launch_segment_attention(dtype: torch.dtype, size: int) -> None:
    """The connector of SSR: heads of queries that share keys; also rows that tensor cores do not take."""
    batch, heads, key_heads, frames = 12, 32, 8, 385
    sizes = integers(DTYPE_CODES[dtype], batch, heads, key_heads, frames, size, 40, 1)
    counts = (heads, key_heads, key_heads, heads, heads)
    strides = integers(*(s for count in counts for s in (frames * count * size, size, count * size)))
    for address in (MEMORY, UNALIGNED):
        inputs = (address, address, address)
        library().call(
            "segment_attention_forward", sizes, MEMORY, MEMORY, *inputs, strides, 0.1, *[MEMORY] * 2
        )
        gradients = (*inputs, address, address, strides, 0.1, *[MEMORY] * 5)
        library().call("segment_attention_backward", sizes, MEMORY, *gradients)


def launch_ctc_align(dtype: torch.dtype, tokens: int) -> None:
    """A batch of clips of half a minute; blocks of every size, and the kernel for more tokens."""
    batch, frames, classes = 32, 1500, 32
    sizes = integers(DTYPE_CODES[dtype], batch, frames, classes, tokens, 0, frames * classes, classes)
    for lengths in (MEMORY, None):
        library().call("ctc_align", sizes, MEMORY, MEMORY, lengths, lengths, *[MEMORY] * 4)


def launch_monotonic_align(dtype: torch.dtype) -> None:
    """A batch of sentences, and a chapter."""
    for (frames, tokens), address in product(((800, 200), (30_000, 6_000)), (MEMORY, UNALIGNED)):
        sizes = integers(DTYPE_CODES[dtype], 16, frames, tokens, frames * tokens, tokens)
        library().call("monotonic_align", sizes, address, *[MEMORY] * 5)


def launch_cif(width: int, dtype: torch.dtype) -> None:
    frames, tokens = 1500, 300
    sizes = integers(DTYPE_CODES[dtype], 24, frames, width, tokens, frames * width, width)
    for address, scaled in product((MEMORY, UNALIGNED), (False, True)):
        inputs = (address, MEMORY, None)
        library().call("cif_forward", sizes, 1.0, 0.5, *inputs, some(scaled), *[MEMORY] * 7)
        grad = (address, integers(tokens * width, width))
        for dx, d_alpha in ((MEMORY, MEMORY), (MEMORY, None), (None, MEMORY)):
            outputs = (*[MEMORY] * 4, dx, d_alpha, MEMORY, MEMORY)
            library().call("cif_backward", sizes, 1.0, scaled, *grad, *inputs, *outputs)


def launch_distill_loss(width: int, dtype: torch.dtype, table: torch.dtype) -> None:
    batch, tokens, vocabulary = 12, 40, 128_256
    codes = (DTYPE_CODES[dtype], DTYPE_CODES[table])
    sizes = integers(*codes, batch, tokens, width, vocabulary, tokens * width, width, width)
    for address in (MEMORY, UNALIGNED):
        inputs = (sizes, 5.0, address, MEMORY, MEMORY, None)
        library().call("distill_loss_forward", *inputs, *[MEMORY] * 4)
        library().call("distill_loss_backward", *inputs, *[MEMORY] * 4)


def launch_everything() -> None:
    for width, dtype, table in product((512, 4096), DTYPE_CODES, DTYPE_CODES):
        launch_distill_loss(width, dtype, table)
    for dtype, pairs in product(DTYPE_CODES, (*test_ctc_align_cuda.LAYOUTS.values(), 40_000)):
        launch_ctc_align(dtype, pairs - 1)
    for dtype in DTYPE_CODES:
        launch_monotonic_align(dtype)
        for size in (64, 128, 256):
            launch_segment_attention(dtype, size)
    for types in test_merge_cuda.TYPES:
        launch_merge(types)
    for width, dtype in product(WIDTHS, DTYPE_CODES):
        launch_segment_pool(width, dtype)
        launch_cif(width, dtype)
        for count, norm in product(LAYERS, (False, True)):
            for affine in {False, norm}:
                launch_layer_mix(width, count, dtype, norm, affine)
            launch_layer_project(width, count, dtype, norm)
        for bottleneck, norm in product(BOTTLENECKS, (False, True)):
            launch_adapter(width, bottleneck, dtype, norm)


@cache
def launches(device: Device) -> frozenset[Launch]:
    with library().on(device), library().recording(run=False) as found:
        launch_everything()
    return frozenset(found)


@cache
def usage_of(architecture: int) -> dict[str, Usage]:
    return {usage.symbol: usage for usage in usages(architecture)}


def refusals(launch: Launch, usage: Usage, device: Device) -> Iterator[str]:
    """Why the device would not run a launch."""
    shared = usage.shared + launch.dynamic_shared
    sizes = f"{usage.shared} bytes of static and {launch.dynamic_shared} of dynamic shared memory"
    if shared > device.shared_per_block:
        yield f"{sizes}: a block may have {device.shared_per_block}"
    if shared > SHARED_WITHOUT_OPT_IN and launch.opted_in < launch.dynamic_shared:
        yield f"{sizes}, without opt-in"
    registers = registers_of_block(launch.threads, usage.registers)
    if registers > REGISTERS:
        yield f"{registers} registers: a block may have {REGISTERS}"
        return
    resident = resident_blocks(device, launch.threads, usage.registers, shared)
    if resident < 1:
        yield "no block fits a multiprocessor"


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
def test_devices_accept_the_launches_of_real_shapes(device: Device) -> None:
    usage = usage_of(device.cubin)
    found = launches(device)
    assert {usage[launch.kernel].kernel for launch in found} == set(MOST_REGISTERS), "launch every kernel"
    refused = {
        f"{usage[launch.kernel].kernel}: {reason}"
        for launch in found
        for reason in refusals(launch, usage[launch.kernel], device)
    }
    assert not refused


def test_only_the_plan_of_the_adapter_depends_on_the_device() -> None:
    fused = {"adapt", "adapt_backward"}

    def others(device: Device) -> set[Launch]:
        names = usage_of(device.cubin)
        return {launch for launch in launches(device) if names[launch.kernel].kernel not in fused}

    first, *rest = map(others, DEVICES)
    assert all(found == first for found in rest)


def test_refusals_are_found() -> None:
    def found(dynamic: int, opted_in: int, registers: int = 32, threads: int = 128) -> list[str]:
        launch = Launch("", 1, threads, dynamic, opted_in)
        usage = Usage("", "", registers, shared=1024, stack=0, spilled=0)
        return list(refusals(launch, usage, H100))

    assert found(47 * 1024, 0) == []
    assert found(48 * 1024, 48 * 1024) == []
    assert "without opt-in" in found(48 * 1024, 0)[0]
    assert found(226 * 1024, 226 * 1024) == []
    assert "may have 232448" in found(227 * 1024, 227 * 1024)[0]
    assert found(0, 0, registers=255, threads=256) == []
    assert "registers" in found(0, 0, registers=72, threads=1024)[0]
