"""Bank conflicts, sectors and bytes in flight of every CUDA kernel, counted by the host SIMT runtime.

`python tests/csrc/print_memory_traffic.py` prints the table that the bounds come from.
"""

from __future__ import annotations

import ctypes
import math
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import sass
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
from ctc_cases import random_problem
from devices import H100, KIB, resident_blocks
from simt_build import Guarded, Library
from simt_traffic import Place, Traffic, counting
from test_ptxas import MOST_REGISTERS, kernel_name, usages

from mmkernels.ops.segment_pool.schema import REDUCTIONS

pytestmark = pytest.mark.skipif(
    simt_build.missing_tools() is not None, reason=str(simt_build.missing_tools())
)
HALF, FLOAT = torch.bfloat16, torch.float32


# ---- the launches: few rows of the widths of real models --------------------------------------------------


def run_adapter(library: Library) -> None:
    adapter = test_adapter_cuda
    for dtype, shape, residual in (
        (HALF, (390, 256, 64), "x"),
        (HALF, (64, 256, 128), "same"),
        (HALF, (64, 256, 192), "float"),
        (FLOAT, (20, 256, 64), "x"),
    ):
        problem = adapter.Problem(dtype, shape, residual=residual)
        problem.up_bias = problem.memory.of(problem.up_bias)  # aligned to vectors
        adapter.backward(library, problem)


def run_layer_mix(library: Library) -> None:
    mix = test_layer_mix_cuda
    for dtype in (HALF, FLOAT):
        mix.backward(library, mix.Problem(dtype, (1, 9, 1024), 5))
        mix.backward(library, mix.Problem(dtype, (1, 9, 512), 9, norm=True), wanted=())
    for width in (768, 1024, 2048, 5120):
        problem = mix.Problem(HALF, (1, 4, width), 3, norm=True, affine=True)
        mix.backward(library, problem)
    mix.backward(library, mix.Problem(FLOAT, (1, 4, 768), 3, norm=True, affine=True))


def run_layer_project(library: Library) -> None:
    project = test_layer_project_cuda
    for dtype in (HALF, FLOAT):
        problem = project.Problem(dtype, (24, 1, 768), 128, "silu")
        project.backward(library, problem, need_x=True, need_product=True)
    project.forward(library, project.Problem(HALF, (130, 1, 256), 64))
    project.forward(library, project.Problem(FLOAT, (2, 1, 5120), 8))


def run_merge(library: Library) -> None:
    merge = test_merge_cuda
    for types in (merge.FLOAT32, (HALF,) * 3):
        problem = merge.Problem(types, sizes=(merge.CHUNK,) * 2, groups=(0, 1))
        merge.forward(library, problem)
        merge.backward(library, problem)


def run_segment_pool(library: Library) -> None:
    pool = test_segment_pool_cuda
    for dtype in (HALF, FLOAT):
        for reduce in REDUCTIONS:
            pool.backward(library, pool.Problem(reduce, dtype, 512, ends=((4, 8, 12, 100),), frames=104))


def run_segment_attention(library: Library) -> None:
    attention = test_segment_attention_cuda
    for dtype, size in ((HALF, 64), (HALF, 128), (FLOAT, 64)):
        attention.run(library, attention.Problem(dtype, size, ends=((3, 20, 64),), frames=64))


def run_cif(library: Library) -> None:
    cif = test_cif_cuda
    for dtype in (HALF, FLOAT):
        problem = cif.Problem(40, 512, 12, dtype, scaled=True)
        *_, plan = cif.forward(library, problem)
        cif.backward(library, problem, plan)


def run_distill_loss(library: Library) -> None:
    distill = test_distill_loss_cuda
    for dtype in (HALF, FLOAT):
        for width in (1024, 4096):
            problem = distill.Problem(width, dtype, dtype, ragged=False)
            _, saved = distill.forward(library, problem)
            distill.backward(library, problem, saved)


def run_ctc_align(library: Library) -> None:
    ctc = test_ctc_align_cuda
    library.functions.ctc_align_workspace.restype = ctypes.c_int64
    for frames, tokens in ((80, 30), (450, 200), (64, 480), (64, 2100)):
        problem = random_problem(2, dtype=FLOAT, batch=1, frames=frames, tokens=tokens, classes=32)
        ctc.align(library, problem)


def run_monotonic_align(library: Library) -> None:
    monotonic = test_monotonic_align_cuda
    for dtype in (HALF, FLOAT):
        monotonic.align(library, monotonic.Problem(2, 100, 200, dtype))


#: For each op: the sources of its library, and its launches.
OPS: dict[str, tuple[list[str], Callable[[Library], None]]] = {
    "adapter": (test_adapter_cuda.SOURCES, run_adapter),
    "cif": (test_cif_cuda.SOURCES, run_cif),
    "ctc_align": (test_ctc_align_cuda.SOURCES, run_ctc_align),
    "distill_loss": (test_distill_loss_cuda.SOURCES, run_distill_loss),
    "layer_mix": (test_layer_mix_cuda.SOURCES, run_layer_mix),
    "layer_project": (test_layer_project_cuda.SOURCES, run_layer_project),
    "merge": (test_merge_cuda.SOURCES, run_merge),
    "monotonic_align": (test_monotonic_align_cuda.SOURCES, run_monotonic_align),
    "segment_attention": (test_segment_attention_cuda.SOURCES, run_segment_attention),
    "segment_pool": (test_segment_pool_cuda.SOURCES, run_segment_pool),
}


@cache
def traffic_of(op: str) -> dict[str, list[Traffic]]:
    """Traffic of the launches of an op, by kernel."""
    sources, run = OPS[op]
    library = simt_build.load(simt_build.build(op, sources, races=True))
    with counting(library) as launches:
        run(library)
    found: dict[str, list[Traffic]] = {}
    for launch in launches:
        found.setdefault(kernel_name(launch.kernel), []).append(launch)
    return found


def worst_place(places: Iterable[Place], space: str) -> tuple[float, Place | None]:
    """The most passes per ideal pass of a place that makes at least 2 % of the passes, and that place."""
    found = [place for place in places if place.space == space]
    least = 0.02 * sum(place.passes for place in found)
    heavy = [place for place in found if place.passes >= least]
    worst = max(heavy, key=lambda place: place.passes / place.ideal, default=None)
    return (1.0, None) if worst is None else (worst.passes / worst.ideal, worst)


# ---- bounds -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bound:
    """Passes per ideal pass: of all shared memory accesses of a launch and of their worst place; the same of
    global memory."""

    wavefronts: float = 1.0
    wavefronts_of_place: float = 1.0
    sectors: float = 1.0
    sectors_of_place: float = 1.0


def worst_sources(launches: Iterable[Traffic]) -> set[str]:
    places = (worst_place(launch.places, space)[1] for launch in launches for space in ("shared", "global"))
    return {place.source for place in places if place is not None}


def measured(launches: Iterable[Traffic]) -> Bound:
    """The most of any launch, rounded up."""
    worst = [0.0] * 4
    for launch in launches:
        values = (
            launch.conflicts,
            worst_place(launch.places, "shared")[0],
            launch.sector_ratio,
            worst_place(launch.places, "global")[0],
        )
        worst = [max(pair) for pair in zip(worst, values, strict=True)]
    return Bound(*(math.ceil(value * 100 - 1e-6) / 100 for value in worst))


@dataclass(frozen=True)
class Flight:
    """KiB that an H100's multiprocessor has in flight, at least: copies by cp.async, or without them the
    plain loads of the hot loop before the first is used. Below 40 there is a reason."""

    least: int = 40
    reason: str = ""


IN_FLIGHT: dict[str, Flight | str] = {
    "adapt": Flight(),
    "adapt_backward": Flight(),
    "activate_hidden": Flight(32, "a vector a thread, of as many threads as fit"),
    "finish_rows": Flight(),
    "column_sums": Flight(16, "2 bytes a lane, around a product of the library"),
    "add_partials": "second stage: few partial sums",
    "align": "a block an utterance: bound by the chain of frames",
    "align_wide": "a block an utterance: bound by the chain of frames",
    "mix_plain": Flight(),
    "mix_bias": "one row of each layer's parameters",
    "mix_norm": Flight(),
    "mix_norm_wide": Flight(32, "rows of more than 4,096 columns, which it reads a second time from L2"),
    "sum_rows": Flight(),
    "reduce_affine": "second stage: few partial sums",
    "gradients_plain": "writes a vector for each layer, and reads one before its loop",
    "gradients_norm": Flight(),
    "gradients_norm_wide": Flight(),
    "fold": Flight(),
    "row_moments": Flight(32, "float32: a row of 768 columns a warp, of as many warps as fit"),
    "row_moments_wide": Flight(),
    "activate_rows": Flight(),
    "project": Flight(),
    "gradient": Flight(),
    "finish_input_gradient": Flight(),
    "unfold_rows": Flight(18, "a second stage, and the sum of a row of the weights"),
    "unfold_columns": Flight(),
    "interpolate": Flight(),
    "interpolate_gradients": Flight(),
    "reduce_lam": "second stage: few partial sums",
    "segment_stops": "a number a segment",
    "pool_pieces": Flight(),
    "take_last": Flight(32, "a vector a thread, of as many threads as fit"),
    "combine_pieces": "second stage: few partial sums",
    "spread_pieces": "writes the rows of a segment, and reads one",
    "score_gradients": Flight(),
    "finish_scores": "a number a frame",
    "attention_extents": "a number a segment",
    "attention_dots": Flight(),
    "attend": Flight(),
    "query_gradients": Flight(),
    "key_gradients": Flight(),
    "plan": "a number a frame",
    "sum_tokens": Flight(),
    "frame_gradients": Flight(),
    "alpha_gradients": "a number a frame",
    "measure_tokens": Flight(),
    "mean_loss": "a number a token",
    "token_gradients": Flight(),
}


def in_flight(launches: Sequence[Traffic]) -> float:
    """KiB of a multiprocessor: the least of any instance of the kernel, of which the launch with the fullest
    tiles counts. Instances without copies of tiles, for float32, are left out where others have them."""
    usage = {usage.symbol: usage for usage in usages(H100.cubin)}
    copies = any(launch.copies_of_block >= KIB for launch in launches)
    of_instance: dict[str, float] = {}
    for launch in launches:
        instance = usage[launch.kernel]
        blocks = resident_blocks(
            H100, launch.threads, instance.registers, instance.shared + launch.dynamic_shared
        )
        of_block = launch.copies_of_block if launch.copies_of_block >= KIB else 0
        if not copies:
            of_block = launch.threads * sass.hot_loop(launch.kernel, H100.cubin).bytes_in_flight
        of_instance[launch.kernel] = max(of_instance.get(launch.kernel, 0), blocks * of_block / KIB)
    return min((kib for kib in of_instance.values() if kib > 0), default=0.0)


#: Today's: 1 is ideal. A note says where a kernel takes more; an improvement lowers its bound.
BOUNDS: dict[str, dict[str, Bound]] = {
    "adapter": {
        "fold": Bound(),
        # x, hidden values and float32 addends of 4 bytes a lane
        "adapt": Bound(wavefronts=1.01, sectors=1.06, sectors_of_place=2.0),
        # x and hidden values of 4 bytes a lane
        "adapt_backward": Bound(sectors=1.3, sectors_of_place=2.0),
        "add_partials": Bound(),
        "unfold_rows": Bound(),
        "unfold_columns": Bound(),
        "row_moments": Bound(),
        "activate_rows": Bound(),
        "finish_rows": Bound(),
        "activate_hidden": Bound(),
        "column_sums": Bound(),
        "gradient": Bound(sectors=1.01),
    },
    "cif": {
        # numbers of frames
        "plan": Bound(sectors=1.08, sectors_of_place=1.33),
        "sum_tokens": Bound(sectors=1.01),
        "frame_gradients": Bound(),
        # numbers of frames
        "alpha_gradients": Bound(sectors=1.19, sectors_of_place=2.1),
    },
    "ctc_align": {
        # gathers the emissions of tokens
        "align": Bound(sectors=1.66, sectors_of_place=7.9),
        # states of few tokens
        "align_wide": Bound(sectors=1.07, sectors_of_place=1.13),
    },
    "distill_loss": {
        "measure_tokens": Bound(),
        "mean_loss": Bound(),
        "token_gradients": Bound(),
    },
    "layer_mix": {
        "mix_plain": Bound(),
        # float32 sums and parameters of 8 columns a lane, in two vectors
        "sum_rows": Bound(wavefronts=1.21, wavefronts_of_place=2.0, sectors=1.67, sectors_of_place=2.0),
        "gradients_plain": Bound(),
        # a word of each row of partial sums
        "add_partials": Bound(sectors=2.4, sectors_of_place=2.6),
        # float32 parameters of 8 columns a lane, in two vectors
        "mix_norm": Bound(sectors=1.67, sectors_of_place=2.0),
        "mix_bias": Bound(),
        # the same
        "gradients_norm": Bound(sectors=1.46, sectors_of_place=2.0),
        "reduce_affine": Bound(),
        # the same
        "mix_norm_wide": Bound(sectors=1.44, sectors_of_place=2.0),
        # the same
        "gradients_norm_wide": Bound(sectors=1.45, sectors_of_place=2.0),
    },
    "layer_project": {
        "fold": Bound(),
        "row_moments": Bound(),
        "project": Bound(),
        # float32 sums and bias of 8 columns a lane, in two vectors
        "gradient": Bound(wavefronts=1.26, wavefronts_of_place=2.0, sectors=1.09, sectors_of_place=2.0),
        "finish_input_gradient": Bound(),
        "unfold_rows": Bound(),
        "unfold_columns": Bound(),
        "activate_rows": Bound(),
        "row_moments_wide": Bound(),
    },
    "merge": {
        "interpolate": Bound(),
        "interpolate_gradients": Bound(),
        "reduce_lam": Bound(),
    },
    "monotonic_align": {
        "align": Bound(),
    },
    "segment_attention": {
        # segments of different lengths
        "attention_extents": Bound(wavefronts=1.01, wavefronts_of_place=1.08),
        # float32 tiles store single words, 16-bit tiles 4 bytes a lane
        "attend": Bound(wavefronts=1.02, wavefronts_of_place=2.0, sectors=1.59, sectors_of_place=4.0),
        # a number a row
        "attention_dots": Bound(sectors=1.04, sectors_of_place=2.0),
        # the same
        "query_gradients": Bound(wavefronts=1.01, sectors=1.22, sectors_of_place=4.0),
        # the same
        "key_gradients": Bound(wavefronts=1.02, sectors=1.34, sectors_of_place=4.0),
    },
    "segment_pool": {
        "segment_stops": Bound(),
        # float32 partial sums of 8 columns a lane, in two vectors
        "pool_pieces": Bound(sectors=1.12, sectors_of_place=2.0),
        # rows of any alignment, in single words
        "combine_pieces": Bound(wavefronts=3.0, wavefronts_of_place=5.54, sectors=3.12, sectors_of_place=4.0),
        # indices of maxima of 8 columns a lane, in two vectors
        "spread_pieces": Bound(sectors=1.09, sectors_of_place=2.0),
        "take_last": Bound(),
        "score_gradients": Bound(sectors=1.01),
        # numbers of frames
        "finish_scores": Bound(sectors=1.18, sectors_of_place=1.34),
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_wavefronts_sectors_and_bytes_in_flight(op: str) -> None:
    found = traffic_of(op)
    shared = set().union(*BOUNDS.values()) - set(BOUNDS[op])  # with another op, which bounds them
    assert set(found) - shared == set(BOUNDS[op]), "keep the table in step with the kernels"
    for kernel, bound in BOUNDS[op].items():
        now = vars(measured(found[kernel]))
        worse = {name: value for name, value in now.items() if value > getattr(bound, name)}
        assert not worse, (kernel, worse, worst_sources(found[kernel]))
    if shutil.which("nvcc") is None:  # ptxas knows the registers
        return
    for kernel in BOUNDS[op]:
        flight = IN_FLIGHT[kernel]
        if isinstance(flight, Flight):
            assert in_flight(found[kernel]) >= flight.least, kernel


def test_the_tables_have_every_kernel() -> None:
    assert set().union(*BOUNDS.values()) == set(IN_FLIGHT) == set(MOST_REGISTERS)
    low = [flight for flight in IN_FLIGHT.values() if isinstance(flight, Flight) and flight.least < 40]
    assert all(flight.reason for flight in low)


# ---- the counts themselves --------------------------------------------------------------------------------


CASES = Path("tests/simt/cases/traffic.cu")
#: Of each kernel in the file: requests, bytes, passes and ideal passes, by space and operation.
Counts = tuple[int, int, int, int]
PLANTED: list[dict[str, Counts]] = [
    # Columns of a tile of 32 floats a row, and of one with padded rows.
    {"shared write": (32, 4096, 32, 32), "shared read": (32, 4096, 1024, 32)},
    {"shared write": (32, 4096, 32, 32), "shared read": (32, 4096, 32, 32)},
    # ldmatrix of rows 64 and 80 bytes apart.
    {"shared matrix_load": (1, 512, 16, 4)},
    {"shared matrix_load": (1, 512, 4, 4)},
    # 16 bytes a lane, at steps of 16 and of 32 bytes; of 32 in scalar accesses that nvcc joins.
    {"shared read": (1, 512, 4, 4), "shared write": (4, 512, 4, 4)},
    {"shared read": (1, 512, 8, 4), "shared write": (8, 1024, 8, 8)},
    {"shared read": (1, 512, 8, 4), "shared write": (8, 1024, 8, 8)},
    # All lanes read a word; half of them write 8 bytes each.
    {"global read": (1, 4, 1, 1), "shared write": (1, 128, 1, 1), "shared read": (1, 128, 1, 1)},
    # cp.async to rows 64 and 80 bytes apart; the last row is filled with zeros.
    {"shared async_copy": (3, 1536, 12, 12), "global async_copy": (3, 1344, 42, 42)},
    {"shared async_copy": (3, 1536, 24, 12), "global async_copy": (3, 1344, 42, 42)},
]


@pytest.fixture(scope="module")
def cases() -> Library:
    return simt_build.load(simt_build.build("traffic", [CASES], races=True))


def count(library: Library, function: str, *arguments: object, order: int = 0) -> Traffic:
    with counting(library) as launches:
        library.call(function, *arguments, order=order)
    (launch,) = launches
    return launch


def counts_of(launch: Traffic) -> dict[str, Counts]:
    totals: dict[str, Counts] = {}
    for place in launch.places:
        key = f"{place.space} {place.operation}"
        counts = place.requests, place.bytes, place.passes, place.ideal
        before = totals.get(key, (0, 0, 0, 0))
        totals[key] = tuple(map(sum, zip(before, counts, strict=True)))  # type: ignore[assignment]
    return totals


def buffers() -> tuple[np.ndarray, np.ndarray]:
    return Guarded.of(np.arange(1024, dtype=np.float32)).array, Guarded(1024, np.float32).array


@pytest.mark.parametrize("order", simt_build.ORDERS)
@pytest.mark.parametrize("kernel", range(len(PLANTED)))
def test_planted_conflicts_are_counted(cases: Library, kernel: int, order: int) -> None:
    counts = counts_of(count(cases, "memory_traffic", kernel, *buffers(), order=order))
    assert {key: counts[key] for key in PLANTED[kernel]} == PLANTED[kernel]


@pytest.mark.parametrize(("stride", "sectors"), [(0, 1), (1, 4), (2, 8), (8, 32), (32, 32)])
def test_sectors_of_strided_loads(cases: Library, stride: int, sectors: int) -> None:
    launch = count(cases, "strided_traffic", *buffers(), stride)
    bytes_read = 4 if stride == 0 else 128
    ideal = -(-bytes_read // 32)
    assert counts_of(launch) == {
        "global read": (1, bytes_read, sectors, ideal),
        "global write": (1, 128, 4, 4),
    }
    assert (launch.requests, launch.bytes) == (2, bytes_read + 128)
    assert launch.sector_ratio == (sectors + 4) / (ideal + 4)


def test_outstanding_copies_are_counted(cases: Library) -> None:
    launch = count(cases, "memory_traffic", 8, *buffers())
    assert launch.copies_of_thread == 3 * 16
    assert launch.copies_of_block == 28 * 3 * 16  # the last lanes read nothing
    assert (launch.blocks, launch.threads, launch.static_shared) == (1, 32, 3 * 8 * 64)


def test_places_are_named(cases: Library) -> None:
    launch = count(cases, "memory_traffic", 0, *buffers())
    ratio, place = worst_place(launch.places, "shared")
    assert place is not None
    line = (simt_build.ROOT / CASES).read_text().splitlines()[int(place.source.rpartition(":")[2]) - 1]
    assert ratio == 32
    assert "tile[lane][row]" in line


def test_nothing_is_counted_unless_asked(cases: Library) -> None:
    with counting(cases) as launches:
        pass
    cases.call("memory_traffic", 0, *buffers())
    assert launches == []
