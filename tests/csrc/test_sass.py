"""Bounds of the machine code of hot loops, of which registers and memory say nothing (sass.py)."""

from __future__ import annotations

import functools
import itertools
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pytest
import sass
from machine_code import NO_SCOREBOARD, Instruction, compile_cubin, demangle, disassemble, elf, missing_tools
from sass import ARCHITECTURES, Figures, Loop
from test_ptxas import MOST_REGISTERS

#: Instance -> figures of its hot loop on sm_80, and on sm_90: instructions, branches, loads of less than 16
#: bytes, loads in flight, round trips to memory. `python tests/csrc/sass.py` prints these lines. They are of
#: nvcc 13.0 and of the shapes of the benches: half precision, rows of 1,024 columns, a bottleneck of 64. A
#: comment says which figures are known to be bad.
MEASURED: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    # The step of the second product, and in #2 that of the first; branches are those of the stream.
    "adapt<AdapterTile<bfloat16, 128, 64>, false, false>": ((660, 59, 16, 26, 1), (682, 57, 16, 26, 1)),
    "adapt<AdapterTile<bfloat16, 128, 64>, false, false> #2": ((259, 27, 0, 18, 0), (262, 26, 0, 18, 0)),
    "adapt<AdapterTile<bfloat16, 128, 64>, false, true>": ((606, 38, 48, 42, 1), (632, 37, 48, 42, 1)),
    "adapt<AdapterTile<bfloat16, 128, 64>, false, true> #2": ((257, 27, 0, 18, 0), (262, 26, 0, 18, 0)),
    "adapt<AdapterTile<bfloat16, 128, 64>, true, false>": ((661, 59, 16, 26, 1), (685, 57, 16, 26, 1)),
    "adapt<AdapterTile<bfloat16, 128, 64>, true, false> #2": ((487, 30, 0, 18, 0), (505, 29, 0, 18, 0)),
    "adapt<AdapterTile<bfloat16, 128, 64>, true, true>": ((600, 38, 48, 42, 1), (623, 37, 48, 42, 1)),
    "adapt<AdapterTile<bfloat16, 128, 64>, true, true> #2": ((478, 30, 0, 18, 0), (499, 29, 0, 18, 0)),
    "adapt_backward<AdapterTile<bfloat16, 128, 64>, false>": ((509, 42, 0, 18, 0), (534, 40, 0, 18, 0)),
    "adapt_backward<AdapterTile<bfloat16, 128, 64>, false> #2": ((289, 32, 0, 18, 0), (301, 31, 0, 18, 0)),
    "adapt_backward<AdapterTile<bfloat16, 128, 64>, true>": ((833, 61, 32, 34, 0), (872, 59, 32, 34, 0)),
    "adapt_backward<AdapterTile<bfloat16, 128, 64>, true> #2": ((281, 32, 0, 18, 0), (294, 31, 0, 18, 0)),
    # Branches on the activation for each element.
    "activate_hidden<float, true>": ((197, 36, 0, 1, 1), (197, 36, 0, 1, 1)),
    "finish_rows<float, float, true>": ((129, 8, 2, 3, 2), (144, 8, 2, 3, 2)),
    # Waits for each row in turn.
    "column_sums<float>": ((145, 13, 16, 2, 12), (145, 13, 16, 2, 12)),
    "add_partials<32, bfloat16>": ((43, 1, 4, 4, 1), (43, 1, 4, 2, 3)),
    "align<bfloat16, 4, 8>": ((815, 5, 40, 40, 0), (814, 4, 40, 40, 0)),
    # Of monotonic_align: waits for its loads in turn, inside branches.
    "align<bfloat16, true, true>": ((646, 86, 32, 4, 10), (687, 85, 32, 4, 10)),
    "align<bfloat16, true, false>": ((591, 82, 16, 1, 8), (592, 81, 16, 1, 8)),
    "align_wide<bfloat16>": ((113, 3, 14, 6, 4), (117, 3, 14, 6, 4)),
    "mix_plain<bfloat16, true>": ((263, 2, 8, 16, 1), (261, 1, 8, 16, 1)),
    "mix_bias": ((87, 1, 32, 17, 2), (87, 1, 32, 16, 2)),
    "mix_norm<RowShape<bfloat16, 32, 4, true, true>, false>": ((251, 3, 1, 9, 1), (250, 2, 1, 9, 1)),
    "mix_norm<RowShape<bfloat16, 32, 4, true, true>, true>": ((311, 3, 1, 17, 1), (301, 2, 1, 15, 2)),
    "mix_norm<RowShape<bfloat16, 64, 4, true, true>, false>": ((321, 10, 1, 9, 1), (266, 2, 1, 9, 0)),
    "mix_norm<RowShape<bfloat16, 64, 4, true, true>, true>": ((374, 10, 1, 17, 1), (311, 2, 1, 15, 2)),
    "mix_norm_wide<bfloat16, true>": ((121, 1, 0, 2, 1), (129, 1, 0, 2, 1)),
    "sum_rows<bfloat16, true, false>": ((389, 20, 1, 10, 1), (390, 18, 1, 10, 1)),
    "sum_rows<bfloat16, true, true>": ((566, 22, 2, 11, 1), (565, 20, 2, 11, 1)),
    "reduce_affine": ((41, 1, 4, 2, 3), (43, 1, 4, 4, 1)),
    # Waits for each weight.
    "gradients_plain<bfloat16, true>": ((59, 3, 2, 1, 2), (59, 3, 2, 1, 2)),
    "gradients_norm<RowShape<bfloat16, 32, 4, true, true>, false>": ((460, 9, 2, 16, 2), (445, 8, 2, 13, 4)),
    "gradients_norm<RowShape<bfloat16, 32, 4, true, true>, true>": ((565, 9, 2, 18, 2), (550, 8, 2, 17, 3)),
    "gradients_norm<RowShape<bfloat16, 64, 4, true, true>, false>": ((488, 9, 2, 16, 2), (476, 8, 2, 13, 4)),
    "gradients_norm<RowShape<bfloat16, 64, 4, true, true>, true>": ((587, 9, 2, 18, 2), (573, 8, 2, 17, 3)),
    "gradients_norm_wide<bfloat16, true>": ((102, 3, 0, 3, 3), (103, 3, 0, 3, 3)),
    "fold<bfloat16, float, true>": ((78, 1, 0, 2, 2), (84, 1, 0, 2, 2)),
    "row_moments<RowShape<bfloat16, 32, 4, true, false>>": ((348, 6, 0, 4, 1), (363, 6, 0, 4, 1)),
    "row_moments_wide<bfloat16, true>": ((119, 1, 0, 2, 1), (127, 1, 0, 2, 1)),
    "activate_rows<bfloat16, true, 2>": ((400, 9, 1, 5, 2), (413, 9, 1, 5, 2)),
    "project<bfloat16, 128, 128>": ((142, 1, 0, 12, 0), (139, 1, 0, 12, 0)),
    "gradient<bfloat16, true, 2>": ((1688, 14, 0, 7, 2), (1680, 13, 0, 7, 2)),
    "finish_input_gradient<bfloat16, true>": ((184, 6, 2, 4, 1), (196, 6, 2, 4, 1)),
    "unfold_rows<bfloat16, true>": ((44, 1, 4, 4, 1), (43, 1, 4, 3, 2)),
    "unfold_columns<bfloat16, true, true>": ((284, 6, 8, 11, 2), (299, 5, 8, 11, 2)),
    "interpolate<bfloat16, bfloat16, bfloat16>": ((205, 1, 0, 8, 1), (237, 1, 0, 8, 1)),
    "interpolate_gradients<true, bfloat16, bfloat16, bfloat16>": ((322, 10, 0, 12, 1), (372, 9, 0, 12, 1)),
    "reduce_lam": ((55, 1, 16, 15, 2), (55, 1, 16, 14, 2)),
    "segment_stops": ((142, 1, 1, 1, 1), (148, 1, 1, 1, 1)),
    "pool_pieces<bfloat16, 0, true>": ((159, 1, 0, 8, 1), (190, 1, 0, 8, 1)),
    "pool_pieces<bfloat16, 4, true>": ((200, 1, 0, 8, 1), (232, 1, 0, 8, 1)),
    "take_last<bfloat16, true>": ((135, 7, 2, 2, 2), (147, 7, 2, 2, 2)),
    # Waits for each piece in turn.
    "combine_pieces<bfloat16, 4>": ((347, 2, 48, 9, 13), (363, 1, 48, 8, 15)),
    "spread_pieces<bfloat16, 0, true>": ((57, 1, 0, 0, 0), (58, 1, 0, 0, 0)),
    "spread_pieces<bfloat16, 4, true>": ((101, 1, 0, 0, 0), (99, 1, 0, 0, 0)),
    "score_gradients<bfloat16, true, true>": ((192, 1, 0, 8, 1), (221, 1, 0, 8, 1)),
    "score_gradients<bfloat16, true, false>": ((121, 1, 0, 8, 1), (153, 1, 0, 8, 1)),
    "score_gradients<bfloat16, false, true>": ((154, 1, 32, 32, 1), (154, 1, 32, 32, 1)),
    "finish_scores": ((29, 1, 4, 4, 1), (29, 1, 4, 4, 1)),
    "attention_extents": ((394, 17, 1, 1, 1), (431, 16, 1, 1, 1)),
    "attention_dots<true, bfloat16>": ((131, 1, 0, 2, 2), (131, 1, 0, 4, 1)),
    "attention_dots<false, bfloat16>": ((97, 1, 16, 8, 2), (95, 1, 16, 10, 2)),
    "attend<TensorTiles<bfloat16, 64, 64, 1>>": ((720, 4, 0, 8, 0), (725, 3, 0, 8, 0)),
    "query_gradients<TensorTiles<bfloat16, 64, 32, 2>>": ((354, 3, 0, 4, 0), (360, 2, 0, 4, 0)),
    # The narrow load is a copy that is under way during a step.
    "key_gradients<TensorTiles<bfloat16, 64, 32, 2>>": ((578, 7, 1, 5, 0), (585, 6, 1, 5, 0)),
    "plan<true>": ((286, 17, 3, 2, 2), (286, 16, 3, 2, 2)),
    "plan<false>": ((284, 17, 3, 3, 1), (300, 16, 3, 3, 1)),
    "sum_tokens<bfloat16, true>": ((253, 2, 0, 8, 1), (286, 1, 0, 8, 1)),
    "frame_gradients<bfloat16, true, true, true>": ((161, 1, 0, 4, 1), (171, 1, 0, 4, 1)),
    "alpha_gradients<true>": ((115, 1, 3, 2, 2), (118, 1, 3, 2, 2)),
    "alpha_gradients<false>": ((117, 2, 4, 4, 1), (121, 2, 4, 4, 1)),
    "measure_tokens<Shape<bfloat16, bfloat16, 256, true>>": ((206, 1, 0, 4, 1), (209, 1, 0, 4, 1)),
    "measure_tokens<Shape<bfloat16, bfloat16, 32, true>>": ((206, 1, 0, 4, 1), (207, 1, 0, 4, 1)),
    "mean_loss": ((232, 1, 16, 7, 3), (236, 1, 16, 5, 4)),
    "token_gradients<Shape<bfloat16, bfloat16, 256, true>>": ((218, 3, 0, 4, 1), (230, 3, 0, 4, 1)),
    "token_gradients<Shape<bfloat16, bfloat16, 32, true>>": ((218, 3, 0, 4, 1), (230, 3, 0, 4, 1)),
}
#: A change elsewhere in a kernel moves a few instructions in or out of its hot loop.
MORE_INSTRUCTIONS = 1.05

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(missing_tools() is not None, reason=str(missing_tools())),
]


def excess(found: Figures, measured: Sequence[int]) -> dict[str, str]:
    """The figures that are worse than those measured: name -> what is wrong."""
    known = Figures(*measured)
    most = known._replace(
        instructions=int(known.instructions * MORE_INSTRUCTIONS),
        branches=int(known.branches * MORE_INSTRUCTIONS),
    )
    high = {name for name in Figures._fields if name != "in_flight"}
    worse = {name for name in high if getattr(found, name) > getattr(most, name)}
    worse |= {"in_flight"} if found.in_flight < known.in_flight else set()
    return {name: f"{name} {getattr(found, name)}, bound {getattr(most, name)}" for name in worse}


def instances(architecture: int, names: Iterable[str]) -> list[sass.Kernel]:
    """Instances, with their instructions read."""
    wanted = {sass.split(name)[0] for name in names}
    kernels = [kernel for kernel in sass.kernels(architecture).values() if kernel.instance in wanted]
    assert {kernel.instance for kernel in kernels} == wanted, "an instance is gone: choose another"
    sass.read(kernels)
    return kernels


def unreached(code: Sequence[Instruction]) -> set[int]:
    """Instructions that the walk does not find, but for those that only a diverged warp runs, and padding."""
    reached = {k for block in sass.blocks(code) for k in range(block.begin, block.end)}
    diverged = min((k for i in code if i.only_diverged for k in i.targets), default=len(code))
    jumped = {k for at, i in enumerate(code) if i.opcode == "BRA.CONV" for k in range(at, i.targets[0])}
    padding = {k for k, i in enumerate(code) if i.name == "NOP" or i.targets == (k,)}
    return {k for k in range(diverged) if k not in reached | jumped | padding}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_hot_loops_keep_their_cost(architecture: int) -> None:
    """After an improvement, or a change that is worth its cost: python tests/csrc/sass.py --write."""
    kernels = instances(architecture, MEASURED)
    assert [kernel.instance for kernel in kernels if unreached(sass.instructions_of(kernel))] == []
    column = ARCHITECTURES.index(architecture)
    found = sass.measure(MEASURED, architecture)
    assert set(found) == set(MEASURED), "a loop is gone"
    worse = {name: [*excess(found[name], MEASURED[name][column]).values()] for name in MEASURED}
    assert {name: figures for name, figures in worse.items() if figures} == {}


def test_every_kernel_has_bounds() -> None:
    assert {instance.split("<")[0] for instance in MEASURED} == set(MOST_REGISTERS)


# ---- The control bits, which no disassembler prints: the code would not work if they were others.

#: Of two files, since each takes half a second; with tables of jumps, copies to shared memory, tensor cores.
SAMPLES = [name for name in MEASURED if name.startswith(("adapt_backward<", "project<", "activate_rows<"))]


def first_waits(code: Sequence[Instruction]) -> Iterator[tuple[Instruction, bool]]:
    """Each load into a register, and whether its scoreboard is waited for before the register is named again.

    Without a scoreboard, a load relies on that of a later one.
    """
    for block in sass.blocks(code):
        for k in range(block.begin, block.end):
            load, register = code[k], re.match(r"R\d+\b", code[k].operands)
            if load.name not in ("LDG", "LD", "LDS", "LDC", "MUFU") or load.predicate or register is None:
                continue
            for later in code[k + 1 : block.end] if load.write_scoreboard != NO_SCOREBOARD else ():
                waits = bool(later.waits >> load.write_scoreboard & 1)
                if waits or re.search(rf"\b{register[0]}\b", later.operands):
                    yield load, waits
                    break


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loads_are_waited_for_before_their_use(architecture: int) -> None:
    kernels = instances(architecture, SAMPLES)
    loads = [load for kernel in kernels for load in first_waits(sass.instructions_of(kernel))]
    assert len(loads) > 100
    assert [load for load, waited in loads if not waited] == []


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_branch_stalls_for_its_predicate(architecture: int) -> None:
    stalls = []
    for kernel in instances(architecture, SAMPLES):
        for compare, branch in itertools.pairwise(sass.instructions_of(kernel)):
            predicate = branch.predicate.removeprefix("@").removeprefix("!")
            if (
                branch.name == "BRA"
                and compare.name == "ISETP"
                and compare.operands.split(",")[0] == predicate
            ):
                stalls.append(compare.stall)
    assert len(stalls) > 100
    assert min(stalls) >= 10


# ---- Planted faults, each of which one figure has to show.

PLANTED = Path(__file__).parent / "planted_loops.cu"


@functools.cache
def planted(architecture: int) -> dict[str, Loop]:
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    cubin = compile_cubin(PLANTED, architecture)
    names = {symbol: demangle(symbol) for symbol in elf(cubin).functions if symbol.startswith("_Z")}
    code = disassemble(cubin, names)
    return {
        name: sass.walk_loops(code[symbol], sass.PREFERRED, sass.MEMORY_LATENCY)[0]
        for symbol, name in names.items()
    }


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    ("name", "figures"),
    [
        ("good", set()),
        ("switched", {"instructions", "branches"}),
        ("narrow", {"narrow"}),
        ("used_at_once", {"in_flight"}),
        ("one_after_the_other", {"in_flight", "round_trips"}),
    ],
)
def test_planted_faults_exceed_bounds(name: str, figures: set[str], architecture: int) -> None:
    loops = planted(architecture)
    measured = loops["good"].figures
    assert figures <= set(excess(loops[name].figures, measured))
    assert figures or not excess(loops[name].figures, measured)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_figures_of_known_loops(architecture: int) -> None:
    loops = planted(architecture)
    good = loops["good"]
    assert good.widths == {"LDG": {16: 4}}
    assert (good.branches, good.in_flight, good.bytes_in_flight, good.round_trips) == (1, 4, 64, 1)
    assert good.critical_path > sass.MEMORY_LATENCY
    assert loops["narrow"].least_width == 4
    assert loops["used_at_once"].in_flight == 1
    assert loops["one_after_the_other"].round_trips == 4
    assert loops["ring"].widths["LDGSTS"] == {16: 1}
    assert loops["ring"].in_flight == 3
    assert loops["straight"].whole
    assert loops["straight"].widths == {"LDG": {16: 1}, "STG": {16: 1}}


def test_a_path_through_a_loop_takes_the_longer_side() -> None:
    """Blocks 1 to 4 are a loop, whose block 1 goes to 2 or 3; 0 leads to it."""
    edges = [[1], [2, 3], [4], [4], [1, 5], []]
    graph = [sass.Block(10 * k, 10 * k + 10, after) for k, after in enumerate(edges)]
    graph[3].end += 5
    for k, after in enumerate(edges):
        for target in after:
            graph[target].predecessors.append(k)
    assert sass.natural_loops(graph) == {1: {1, 2, 3, 4}}
    assert sass.longest_path(graph, 1, {1, 2, 3, 4}, {4}) == [1, 3, 4]
