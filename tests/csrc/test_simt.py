"""The host SIMT runtime: correct kernels are right in any thread order, planted faults are found."""

from __future__ import annotations

import mmap
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import simt_build
from devices import DEVICES, H100, Device
from simt_build import ORDERS, Guarded, Library, SimtFault

KERNELS = Path("tests/simt/cases")
SOURCES = sorted((simt_build.ROOT / KERNELS).glob("*.cu"))
STATM = Path("/proc/self/statm")

MISSING = simt_build.missing_tools()
needs_headers = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))


def open_library(name: str, *defines: str, races: bool = True) -> Library:
    return simt_build.load(simt_build.build(name, [KERNELS / f"{name}.cu"], races=races, defines=defines))


def bfloat16(values: np.ndarray) -> np.ndarray:
    """The bits of float32 values rounded to bfloat16, to nearest even."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


# ---- correct kernels --------------------------------------------------------------------------------------


@needs_headers
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", ["float", "half", "bfloat16"])
@pytest.mark.parametrize("columns", [8, 333, 1000])
def test_row_statistics(rng: np.random.Generator, dtype: str, columns: int, order: int) -> None:
    x = rng.standard_normal((3, columns)).astype(np.float32)
    stored = bfloat16(x) if dtype == "bfloat16" else x.astype(np.float16 if dtype == "half" else np.float32)
    exact = from_bfloat16(stored) if dtype == "bfloat16" else stored.astype(np.float32)
    mean, largest = Guarded(3, np.float32), Guarded(3, np.float32)
    open_library("row_stats").call(
        f"row_stats_{dtype}", Guarded.of(stored).array, mean.array, largest.array, 3, columns, order=order
    )
    mean.check()
    largest.check()
    np.testing.assert_allclose(mean.array, exact.mean(1, dtype=np.float64), atol=1e-6)
    np.testing.assert_array_equal(largest.array, np.abs(exact).max(1))


@needs_headers
@pytest.mark.parametrize("count", [1, 5, 8])
def test_vector_mix_of_bfloat16_layers(rng: np.random.Generator, count: int) -> None:
    size = 2 * 128 * 8 + 40
    layers = bfloat16(rng.standard_normal((count, size)))
    weights = rng.standard_normal(count).astype(np.float32)
    out = Guarded(size, np.uint16)
    open_library("vector_mix").call("vector_mix_bfloat16", layers, weights, out.array, count, size, order=2)
    out.check()
    exact = np.einsum("l,ls->s", weights.astype(np.float64), from_bfloat16(layers).astype(np.float64))
    np.testing.assert_allclose(from_bfloat16(out.array), exact, rtol=2**-8, atol=1e-5)


@needs_headers
@pytest.mark.parametrize("dtype", ["half", "bfloat16"])
@pytest.mark.parametrize(("m", "n", "k"), [(64, 64, 64), (37, 64, 16), (100, 128, 80)])
def test_tensor_core_gemm(rng: np.random.Generator, dtype: str, m: int, n: int, k: int) -> None:
    a, b = rng.standard_normal((m, k)).astype(np.float32), rng.standard_normal((k, n)).astype(np.float32)
    if dtype == "half":
        stored_a, stored_b = a.astype(np.float16), b.astype(np.float16)
        exact = stored_a.astype(np.float64) @ stored_b.astype(np.float64)
    else:
        stored_a, stored_b = bfloat16(a), bfloat16(b)
        exact = from_bfloat16(stored_a).astype(np.float64) @ from_bfloat16(stored_b).astype(np.float64)

    def compute(order: int) -> np.ndarray:
        out = Guarded((m, n), np.float32)
        open_library("gemm").call(f"gemm_{dtype}", stored_a, stored_b, out.array, m, n, k, order=order)
        out.check()
        return out.array

    np.testing.assert_allclose(simt_build.same_in_all_orders(compute), exact, atol=1e-4)


@needs_headers
@pytest.mark.parametrize("count", [4, 8, 16])
def test_async_copies_land_and_fill_with_zeros(rng: np.random.Generator, count: int) -> None:
    words = rng.integers(1, 2**32, (32, count // 4), dtype=np.uint32)
    whole, filled = Guarded(words.shape, np.uint32), Guarded(words.shape, np.uint32)
    open_library("async_copy").call(
        "async_copies", Guarded.of(words).array, whole.array, filled.array, count, 20
    )
    np.testing.assert_array_equal(whole.array, words)
    np.testing.assert_array_equal(filled.array, np.where(np.arange(32)[:, None] < 20, words, 0))


@needs_headers
def test_thread_and_block_orders() -> None:
    def places(order: int) -> list[int]:
        counter, place = np.zeros(1, np.uint32), np.empty(3 * 50, np.uint32)
        open_library("collectives").call("arrival_order", counter, place, 3, 50, order=order)
        return place.tolist()

    by_index = list(range(150))
    assert places(0) == by_index
    assert places(1) == by_index[::-1]
    assert places(2) == places(2) != places(3)
    assert sorted(places(2)) == by_index != places(2)


@needs_headers
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("whole_block", [False, True])
@pytest.mark.parametrize("staying", [64, 40, 32, 6])
def test_barriers_do_not_wait_for_threads_that_have_exited(
    staying: int, whole_block: bool, order: int
) -> None:
    values, out = np.arange(64.0), Guarded(64, np.float64)
    open_library("collectives").call(
        "swap_with_early_exit", values, out.array, staying, whole_block, order=order
    )
    np.testing.assert_array_equal(out.array[:staying], np.arange(staying) ^ 1)
    assert np.isnan(out.array[staying:]).all()


@needs_headers
def test_shuffles_follow_the_ptx_definition(rng: np.random.Generator) -> None:
    """PTX ISA, shfl.sync: source lane and predicate from segment mask and clamp; no change if false."""
    values = rng.standard_normal(64)
    library = open_library("collectives")
    for kind, name in enumerate(["idx", "up", "down", "bfly"]):
        for width in [4, 16, 32]:
            for argument in [0, 1, 3, 8, 17]:
                out = np.empty(64)
                library.call("shuffle_values", values, out, kind, argument, width, order=2)
                sources = [ptx_source(name, lane, argument, width) for lane in range(32)]
                expected = np.concatenate([values[:32][sources], values[32:][sources]])
                np.testing.assert_array_equal(out, expected, err_msg=f"{name} {argument} width {width}")


def ptx_source(mode: str, lane: int, b: int, width: int) -> int:
    segment_mask = (32 - width) & 0x1F
    clamp = 0 if mode == "up" else 0x1F
    highest = (lane & segment_mask) | (clamp & ~segment_mask & 0x1F)
    lowest = lane & segment_mask
    source, valid = {
        "up": (lane - b, lane - b >= highest),
        "down": (lane + b, lane + b <= highest),
        "bfly": (lane ^ b, lane ^ b <= highest),
        "idx": (lowest | (b & ~segment_mask & 0x1F), (lowest | (b & ~segment_mask & 0x1F)) <= highest),
    }[mode]
    return source if valid else lane


@needs_headers
@pytest.mark.parametrize("order", ORDERS)
def test_ballot_compaction(rng: np.random.Generator, order: int) -> None:
    size, blocks = 250, 3
    values = rng.integers(-5, 6, size).astype(np.int32)
    packed, counts = Guarded((blocks, 96), np.int32), Guarded(blocks, np.int32)
    open_library("collectives").call(
        "compact_values", values, packed.array, counts.array, size, blocks, order=order
    )
    packed.check()
    for block in range(blocks):
        kept = [v for v in values[block * 96 : (block + 1) * 96] if v > 0]
        assert counts.array[block] == len(kept)
        np.testing.assert_array_equal(packed.array[block, : len(kept)], kept)
        assert (packed.array[block, len(kept) :] == -1).all(), "unwritten outputs stay poisoned"


@needs_headers
@pytest.mark.parametrize("order", ORDERS)
def test_atomics(rng: np.random.Generator, order: int) -> None:
    library = open_library("collectives")
    values = rng.integers(-1000, 1000, 333).astype(np.int32)
    bins, tickets = np.empty(16, np.uint32), np.zeros(1, np.uint32)
    frequencies = np.full(16, np.nan, np.float32)
    library.call("histogram_of", np.abs(values), bins, frequencies, tickets, values.size, order=order)
    expected = np.bincount(np.abs(values) % 16, minlength=16)
    np.testing.assert_array_equal(bins, expected)
    np.testing.assert_allclose(frequencies, expected / values.size, rtol=1e-6)

    integers, floats = np.array([-5000, 5000, 0], np.int32), np.array([-1e9, 0], np.float32)
    longs, doubles = np.zeros(1, np.uint64), np.zeros(1)
    library.call("extremes_of", values, integers, floats, longs, doubles, values.size, order=order)
    assert integers.tolist() == [values.max(), values.min(), values.sum()]
    assert floats.tolist() == [values.max(), values.size / 2]
    assert longs[0] == values.size << 40
    assert doubles[0] == values.size / 4


# ---- lane layouts, from the tables of the PTX ISA ---------------------------------------------------------


@needs_headers
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix_layout(count: int, transposed: bool) -> None:
    """PTX ISA, ldmatrix .m8n8: thread i gets row-major elements 2i and 2i+1 of each matrix or transpose."""
    tiles = np.arange(32 * 8, dtype=np.uint16).reshape(32, 8)
    out = Guarded((32, count), np.uint32)
    open_library("fragments").call("ldmatrix_fragments", tiles, out.array, count, int(transposed), order=2)
    out.check()
    for tile in range(count):
        matrix = tiles[8 * tile : 8 * tile + 8]
        elements = (matrix.T if transposed else matrix).flatten().astype(np.uint32)
        np.testing.assert_array_equal(out.array[:, tile], elements[0::2] | elements[1::2] << 16)


def a_element(lane: int, i: int) -> tuple[int, int]:
    """PTX ISA, mma.m16n8k16, matrix A of .f16 / .bf16: row and column of a_i, i in 0..7."""
    group, thread = lane >> 2, lane % 4
    row = group if 0 <= i < 2 or 4 <= i < 6 else group + 8
    column = thread * 2 + (i & 1) + (8 if i >= 4 else 0)
    return row, column


def b_element(lane: int, i: int) -> tuple[int, int]:
    """Matrix B: row and column of b_i, i in 0..3."""
    return lane % 4 * 2 + (i & 1) + (8 if i >= 2 else 0), lane >> 2


def c_element(lane: int, i: int) -> tuple[int, int]:
    """Accumulators C and D: row and column of c_i, i in 0..3."""
    return (lane >> 2) + (8 if i >= 2 else 0), lane % 4 * 2 + (i & 1)


@needs_headers
@pytest.mark.parametrize("dtype", ["half", "bfloat16"])
def test_mma_layout(rng: np.random.Generator, dtype: str) -> None:
    # Small integers: exact in every type, and no two rows or columns alike.
    a, b = rng.integers(-8, 9, (16, 16)).astype(np.float32), rng.integers(-8, 9, (16, 8)).astype(np.float32)
    c = rng.integers(-99, 100, (16, 8)).astype(np.float32)
    encode = bfloat16 if dtype == "bfloat16" else lambda x: x.astype(np.float16).view(np.uint16)

    def fragment(matrix: np.ndarray, place, count: int) -> np.ndarray:
        return np.array([[matrix[place(lane, i)] for i in range(count)] for lane in range(32)], matrix.dtype)

    lanes_a = fragment(encode(a), a_element, 8).view(np.uint32)
    lanes_b = fragment(encode(b), b_element, 4).view(np.uint32)
    lanes_d = fragment(c, c_element, 4)
    open_library("fragments").call(f"mma_{dtype}", lanes_a, lanes_b, lanes_d, order=1)
    np.testing.assert_array_equal(lanes_d, fragment(a @ b + c, c_element, 4))


# ---- planted faults ---------------------------------------------------------------------------------------


def run_fault(name: str, order: int, fixed: bool) -> np.ndarray:
    """Runs one kernel of faults.cu; raises SimtFault if the runtime or the guards find a fault."""
    values = Guarded.of(np.linspace(1, 2, 64).astype(np.float32))
    out = Guarded(64, np.float32)
    open_library("faults", races=False).call(
        f"{name}_fault", values.array, out.array, int(fixed), order=order
    )
    out.check()
    return out.array


# Faults that the runtime reports, with the place if it is known.
REPORTED = {
    "divergent_barrier": r"deadlock.*\n  40 threads from \(0, 0, 0\) on wait at __syncthreads, "
    r"tests/simt/cases/faults\.cu.*\n.*24 threads from \(40, 0, 0\) on wait at __syncthreads",
    "lost_lanes": r"deadlock.*\n  62 threads from \(0, 0, 0\) on wait at __shfl_xor_sync mask 0xffffffff",
    "exited_lanes": r"shuffle: lane 0 reads lane 16, which does not take part \(present 0x0000ffff\)",
    "lane_not_in_mask": r"\(\d+, 0, 0\): __shfl_sync: mask 0x7fffffff does not include the calling lane 31",
    "past_static_shared": r"wrote outside the bounds of shared array tile",
    "past_dynamic_shared": r"wrote outside the bounds of shared array dynamic shared memory",
    "no_opt_in": r"uses 256 bytes of static and 49152 of dynamic shared memory; over 48 KB a launch needs",
    "past_global": r"wrote 4 bytes after an array",
    "copy_left_behind": r"exits without waiting for 1 cp\.async copies",
    "misaligned_copy": r"thread \(3, 0, 0\): misaligned access of 16 bytes at \S+",
    "partial_warp_matrix": r"ldmatrix needs all 32 lanes of the warp, only 0x[0-9a-f]{8} are live",
    "endless_wait": r"atomics without end",
}
# Faults that make results differ between thread orders.
RACES = ["missing_barrier", "missing_second_barrier", "missing_warp_barrier"]
# Faults that give NaN in every thread order.
POISONED = ["unwritten_shared", "copy_not_awaited", "wrong_group_awaited", "missing_barrier"]


@needs_headers
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", REPORTED)
def test_reported_faults(name: str, order: int) -> None:
    with pytest.raises(SimtFault, match=REPORTED[name]) as caught:
        run_fault(name, order, fixed=False)
    if name != "past_global":
        message = str(caught.value)
        assert message.startswith(f"kernel void (anonymous namespace)::{name}<false>(")
        assert re.search(r"block \([01], 0, 0\)", message)


@needs_headers
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", POISONED)
def test_poison_shows(name: str, order: int) -> None:
    assert np.isnan(run_fault(name, order, fixed=False)).any()


@needs_headers
@pytest.mark.parametrize("name", RACES)
def test_missing_barriers_make_results_depend_on_the_order(name: str) -> None:
    with pytest.raises(SimtFault, match="a barrier is missing"):
        simt_build.same_in_all_orders(lambda order: run_fault(name, order, fixed=False))


@needs_headers
@pytest.mark.parametrize("name", sorted({*REPORTED, *POISONED, *RACES}))
def test_fixed_twins_pass(name: str) -> None:
    out = simt_build.same_in_all_orders(lambda order: run_fault(name, order, fixed=True))
    assert np.isfinite(out).all()


@needs_headers
def test_gemm_without_its_wait_is_found(rng: np.random.Generator) -> None:
    a, b = bfloat16(rng.standard_normal((64, 64))), bfloat16(rng.standard_normal((64, 64)))
    out = np.zeros((64, 64), np.float32)
    open_library("gemm").call("gemm_without_wait", a, b, out, 64, 64, 64)
    assert np.isnan(out).all()


@needs_headers
@pytest.mark.parametrize(
    ("geometry", "reason"),
    [
        ((0, 1, 1, 32, 1, 1, 0), "the grid is empty"),
        ((1, 65536, 1, 32, 1, 1, 0), "the grid is larger"),
        ((1, 1, 65536, 32, 1, 1, 0), "the grid is larger"),
        ((1, 1, 1, 0, 1, 1, 0), "the block is empty"),
        ((1, 1, 1, 1025, 1, 1, 0), "more than 1024 threads"),
        ((1, 1, 1, 32, 33, 1, 0), "more than 1024 threads"),
        ((1, 1, 1, 1, 1, 65, 0), "block is larger"),
        ((1, 1, 1, 32, 1, 1, 227 * 1024 + 1), "more shared memory than the device has"),
    ],
)
def test_geometry_no_gpu_takes(geometry: tuple[int, ...], reason: str) -> None:
    with pytest.raises(SimtFault, match=rf"nothing\(.*{reason}"):
        open_library("faults").call("launch_nothing", *geometry)


@needs_headers
def test_largest_geometry_runs() -> None:
    open_library("faults").call("launch_nothing", 2, 2, 2, 32, 4, 8, 227 * 1024)


@needs_headers
@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
def test_launches_over_the_limit_of_a_device_are_refused(device: Device) -> None:
    library = open_library("faults")
    limit = device.shared_per_block
    with library.on(device):
        library.call("launch_nothing", 1, 1, 1, 32, 1, 1, limit)
        with pytest.raises(SimtFault, match="more shared memory than the device has"):
            library.call("launch_nothing", 1, 1, 1, 32, 1, 1, limit + 1)
        # 256 bytes of static shared memory.
        values, out = np.zeros(64, np.float32), np.zeros(64, np.float32)
        library.call("static_and_dynamic", values, out, limit - 256)
        with pytest.raises(SimtFault, match=rf"256 bytes of static and {limit - 252} of dynamic"):
            library.call("static_and_dynamic", values, out, limit - 252)
    library.call("launch_nothing", 1, 1, 1, 32, 1, 1, H100.shared_per_block)


@needs_headers
def test_launches_are_recorded() -> None:
    library = open_library("faults")
    out = Guarded(64, np.float32)
    for run in (False, True):
        with library.recording(run=run) as launches:
            library.call("static_and_dynamic", np.ones(64, np.float32), out.array, 40_000)
        (launch,) = launches
        assert "no_opt_in" in launch.kernel
        assert (launch.blocks, launch.threads) == (1, 64)
        assert (launch.dynamic_shared, launch.opted_in) == (40_000, 40_000)
        assert np.isfinite(out.array).all() == run


@needs_headers
def test_faults_leave_nothing_behind() -> None:
    library = open_library("faults", races=False)
    with pytest.raises(SimtFault):
        run_fault("divergent_barrier", 0, fixed=False)
    assert library.last_error() == ""
    assert np.isfinite(run_fault("divergent_barrier", 0, fixed=True)).all()


# ---- planted races, in the build with the race detector ----------------------------------------------------


def resident_bytes() -> int:
    return int(STATM.read_text().split()[1]) * mmap.PAGESIZE


def run_race(name: str, order: int, fixed: bool) -> np.ndarray:
    values, scratch = np.linspace(1, 2, 64).astype(np.float32), np.zeros(129, np.float32)
    out = Guarded(128, np.float32)
    open_library("races").call(f"{name}_race", values, out.array, scratch, int(fixed), order=order)
    out.check()
    return out.array


# The places of the two accesses, either of which may come first, and the memory.
COPY = r"ptx\.cuh:\d+ in races\.cu:\d+"
PLACE = r"races\.cu:\d+"
FOUND = {
    "read_before_barrier": (f"read at {PLACE}", f"write at {PLACE}", "shared array tile"),
    "write_before_barrier": (f"read at {PLACE}", f"write at {PLACE}", "shared array tile"),
    "same_value": (f"write at {PLACE}", f"write at {PLACE}", "shared array value, byte 0"),
    "shuffle_for_barrier": (f"read at {PLACE}", f"write at {PLACE}", "shared array tile"),
    "barrier_of_half_a_warp": (f"read at {PLACE}", f"write at {PLACE}", "shared array tile"),
    "matrix_of_other_lanes": (f"read at {COPY}", f"write at {PLACE}", "shared array tile"),
    "copy_to_a_stage_in_use": (f"read at {PLACE}", f"write at {COPY}", "shared array stage"),
    "write_to_a_copied_place": (f"read at {COPY}", f"write at {PLACE}", "global memory"),
    "blocks_write_the_same": (f"write at {PLACE}", f"write at {PLACE}", "global memory"),
    "read_of_another_block": (f"read at {PLACE}", f"write at {PLACE}", "global memory"),
    "ticket_without_fence": (f"read at {PLACE}", f"write at {PLACE}", "global memory"),
    "atomic_and_plain": (r"atomic at atomics\.h", f"write at {PLACE}", "shared array count, byte 0"),
    "read_before_grid_dependency": (f"read at {PLACE}", f"write at {PLACE}", "global memory"),
}
OTHERS = {
    "blocks_write_the_same": "of another block",
    "read_of_another_block": "of another block",
    "ticket_without_fence": "of another block",
    "read_before_grid_dependency": "of the previous grid",
}


@needs_headers
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", FOUND)
def test_races_are_found(name: str, order: int) -> None:
    one, other, memory = FOUND[name]
    of = OTHERS.get(name, "of the same block")
    pairs = "|".join(f"{a}.*, and {b}.* by thread .* {of}" for a, b in ((one, other), (other, one)))
    with pytest.raises(SimtFault, match=f"race on {memory}.*: ({pairs})"):
        run_race(name, order, fixed=False)


@needs_headers
@pytest.mark.parametrize("name", FOUND)
def test_fixed_races_are_none(name: str) -> None:
    out = simt_build.same_in_all_orders(lambda order: run_race(name, order, fixed=True))
    assert np.isfinite(out).all()


@needs_headers
@pytest.mark.skipif(not STATM.exists(), reason="no /proc")
def test_the_race_detector_uses_its_memory_again() -> None:
    """It needs 72 times the memory that a kernel uses, and once the next grid has begun, for nothing."""
    size, arrays = 2**15, []
    for launch in range(20):
        arrays += [np.zeros((1, size), np.uint16), np.empty(size, np.uint16)]  # at other addresses each time
        open_library("vector_mix").call(
            "vector_mix_bfloat16", arrays[-2], np.ones(1, "f4"), arrays[-1], 1, size
        )
        if launch == 0:
            first = resident_bytes()
    assert resident_bytes() - first < 5 * 72 * 4 * size


# ---- other builds -----------------------------------------------------------------------------------------


@needs_headers
def test_portable_context_switch(rng: np.random.Generator) -> None:
    """ucontext, for machines other than x86-64, runs the same kernels."""
    library = open_library("row_stats", "MMK_SIMT_UCONTEXT")
    x = rng.standard_normal((2, 100)).astype(np.float32)
    mean, largest = np.empty(2, np.float32), np.empty(2, np.float32)
    library.call("row_stats_float", x, mean, largest, 2, 100, order=2)
    np.testing.assert_allclose(mean, x.mean(1), atol=1e-6)


@pytest.fixture(scope="module")
def sanitized() -> Path:
    names = ["sanitized.cpp", "row_stats.cu", "gemm.cu", "collectives.cu", "faults.cu"]
    return simt_build.build("sanitized", [KERNELS / name for name in names], sanitize=True)


@needs_headers
@pytest.mark.parametrize("case", ["correct", "after_faults"])
def test_sanitizers_pass_correct_kernels(sanitized: Path, case: str) -> None:
    done = simt_build.run_program(sanitized, case)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done\n"


@needs_headers
@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("past_global", "heap-buffer-overflow"),
        ("copy_past_global", "heap-buffer-overflow"),
        ("past_static_shared", "index 64 out of bounds"),
        ("past_dynamic_shared", "use-after-poison"),
    ],
)
def test_sanitizers_name_the_line_of_a_bad_access(sanitized: Path, case: str, message: str) -> None:
    done = simt_build.run_program(sanitized, case)
    assert done.returncode in (98, 99)
    assert message in done.stderr
    assert "faults.cu" in done.stderr


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_the_same_files_compile_for_gpus(source: Path) -> None:
    assert simt_build.compile_for_gpus(source).exists()
