"""A walk over the machine code of the kernels: the cost of one iteration of a hot loop.

    python tests/csrc/sass.py [kernel ...]            the lines of the bounds in test_sass.py
    python tests/csrc/sass.py --write [kernel ...]    puts them there
    python tests/csrc/sass.py --details [kernel ...]  all figures, of all instances

`kernels(architecture)` lists the instances of the kernels, `hot_loop(symbol, architecture)` walks one.

The walk follows one warp along the longest path through the loop. A nested loop counts as one iteration; code
that only a diverged warp runs counts nothing.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from machine_code import NO_SCOREBOARD, Instruction, cubin, demangle, disassemble, elf
from test_ptxas import SOURCES, host_symbol, kernel_name

ARCHITECTURES = (80, 90)

#: Clocks from the issue of an instruction until it releases its scoreboard. All are assumed: measurements by
#: others on sm_80 and sm_90 agree with them to about 30 %. A load of global memory takes MEMORY_LATENCY, or
#: L1_LATENCY if the caller says that the L1 cache has its data.
LATENCIES = {"LDS": 30, "LDSM": 33, "HMMA": 33, "SHFL": 24, "LDC": 30, "LDL": 38}
OTHER_LATENCY = 20
READ_LATENCY = 14
L1_LATENCY = 38
MEMORY_LATENCY = 700

GLOBAL_LOADS = ("LDG", "LD", "LDGSTS")
MEMORY_ACCESSES = (*GLOBAL_LOADS, "STG", "ST", "LDS", "STS", "LDSM", "LDL", "STL")
BRANCHES = ("BRA", "BRX", "BRXU", "CALL")

#: The hot loop is the longest that has the first of these that any loop has: products on tensor cores, copies
#: to shared memory, loads, anything.
PREFERRED = ("HMMA", "LDGSTS", "LDG|LD", ".*")
#: Kernels whose hot loop has something else: the loads of spread_pieces search the ends of segments.
HOT = {"spread_pieces": "STG"}

#: Iterations before the walk counts, until the rings are full, and those that it counts.
WARM_UP, COUNTED = 12, 4


class Figures(NamedTuple):
    """What test_sass.py has bounds of; narrow: loads of global memory of less than 16 bytes a lane."""

    instructions: int
    branches: int
    narrow: int
    in_flight: int
    round_trips: int


@dataclass(frozen=True)
class Loop:
    """One iteration of a loop, or where `whole` is set, one pass through a kernel without loops.

    Along the longest path:
    instructions     how many
    critical_path    clocks of a warp that has the multiprocessor to itself
    in_flight        the most loads of global memory that are under way when one of them is waited for
    bytes_in_flight  their bytes per lane
    round_trips      waits that last half of the latency of memory or longer: loads one after the other
    constants        LDC, loads of parameters that go through a scoreboard
    wide_products    IMAD.WIDE, 64-bit results, mostly addresses
    opcodes          without modifiers -> how often

    In the whole body:
    branches         without those that only a diverged warp takes
    widths           kind of access to memory -> bytes per lane -> how often
    """

    instructions: int
    critical_path: float
    in_flight: int
    bytes_in_flight: int
    round_trips: float
    constants: int
    wide_products: int
    opcodes: dict[str, int]
    branches: int
    widths: dict[str, dict[int, int]]
    whole: bool

    @property
    def narrow(self) -> int:
        """Loads of global memory of less than 16 bytes a lane."""
        widths = [width for name in GLOBAL_LOADS for width in self.widths.get(name, {}).items()]
        return sum(count for width, count in widths if width < 16)

    @property
    def figures(self) -> Figures:
        trips = math.ceil(self.round_trips)
        return Figures(self.instructions, self.branches, self.narrow, self.in_flight, trips)

    @property
    def least_width(self) -> int:
        """Bytes a lane of the narrowest load of global memory, 0 without any."""
        return min((width for name in GLOBAL_LOADS for width in self.widths.get(name, ())), default=0)


@dataclass(frozen=True)
class Kernel:
    """An instance of a kernel, and where its machine code is; `symbol` is that of g++."""

    name: str
    symbol: str
    cubin: Path
    mangled: str

    @property
    def instance(self) -> str:
        """Its name and template arguments in C++."""
        return demangle(self.symbol)


@dataclass
class Block:
    """Instructions begin..end-1, which run one after another; the blocks that may follow and precede."""

    begin: int
    end: int
    successors: list[int] = field(default_factory=list)
    predecessors: list[int] = field(default_factory=list)


def successors(instruction: Instruction, at: int) -> list[int]:
    """The instructions that may follow the one at index `at`, but for those of BSYNC."""
    predicated = instruction.predicate not in ("", "@PT")
    if instruction.name in ("EXIT", "RET"):
        return [at + 1] if predicated else []
    if instruction.opcode == "BRA.CONV":  # of a warp that has not diverged
        return list(instruction.targets)
    if instruction.name in ("BRA", "CALL") and instruction.targets and not instruction.only_diverged:
        return [*instruction.targets, *([at + 1] if predicated or "," in instruction.operands else [])]
    if instruction.name in ("BRX", "BRXU"):
        return sorted(set(instruction.targets))
    return [at + 1]


def blocks(code: Sequence[Instruction]) -> list[Block]:
    """The basic blocks that can be reached, in reverse postorder: the entry first."""
    leaders = {0}
    for k, instruction in enumerate(code):
        leaders |= {*instruction.targets}
        if instruction.name == "BSYNC" or successors(instruction, k) != [k + 1]:
            leaders |= {k + 1}
    starts = sorted(start for start in leaders if start < len(code))
    found = {start: Block(start, end) for start, end in zip(starts, [*starts[1:], len(code)], strict=True)}
    following = connect(code, found)
    order: list[int] = []
    seen = {0}
    stack = [(0, iter(following[0]))]
    while stack:
        start, targets = stack[-1]
        target = next((target for target in targets if target not in seen), None)
        if target is None:
            order.append(start)
            stack.pop()
        else:
            seen.add(target)
            stack.append((target, iter(following[target])))
    order.reverse()
    position = {start: k for k, start in enumerate(order)}
    result = [found[start] for start in order]
    for k, block in enumerate(result):
        block.successors = sorted(position[target] for target in following[block.begin])
        for target in block.successors:
            result[target].predecessors.append(k)
    return result


def connect(code: Sequence[Instruction], found: Mapping[int, Block]) -> dict[int, list[int]]:
    """Start of a block -> starts of those that may follow. BSYNC goes on where the BSSY before it says."""
    following: dict[int, set[int]] = defaultdict(set)
    # The targets of each convergence barrier at the start of a block, over all paths that lead there.
    states: dict[int, dict[str, set[int]]] = {0: {}}
    todo = [0]
    while todo:
        block = found[todo.pop()]
        state = {name: set(targets) for name, targets in states[block.begin].items()}
        for k in range(block.begin, block.end):
            if code[k].name == "BSSY":
                state[code[k].operands.split(",")[0]] = set(code[k].targets)
        last = code[block.end - 1]
        after = set(successors(last, block.end - 1))
        if last.name == "BSYNC":
            after = state.pop(last.operands, after)
        following[block.begin] |= {start for start in after if start in found}
        for start in following[block.begin]:
            known = states.get(start)
            merged = {name: set(targets) for name, targets in (known or {}).items()}
            for name, targets in state.items():
                merged.setdefault(name, set()).update(targets)
            if known is None or merged != known:
                states[start] = merged
                todo.append(start)
    return {start: sorted(targets) for start, targets in following.items()}


def natural_loops(graph: Sequence[Block]) -> dict[int, set[int]]:
    """The header of each loop -> the blocks of its body."""
    everything = (1 << len(graph)) - 1
    dominators = [1, *[everything] * (len(graph) - 1)]
    changed = True
    while changed:
        changed = False
        for k in range(1, len(graph)):
            common = everything
            for predecessor in graph[k].predecessors:
                common &= dominators[predecessor]
            if (common | 1 << k) != dominators[k]:
                dominators[k], changed = common | 1 << k, True
    loops: dict[int, set[int]] = defaultdict(set)
    for k, block in enumerate(graph):
        for header in block.successors:
            if dominators[k] >> header & 1:
                body, todo = {header}, [k]
                while todo:
                    if (member := todo.pop()) not in body:
                        body.add(member)
                        todo += graph[member].predecessors
                loops[header] |= body
    return loops


def longest_path(
    graph: Sequence[Block],
    header: int,
    body: set[int],
    latches: set[int],
    length_of: Callable[[Block], int] = lambda block: block.end - block.begin,
) -> list[int]:
    """The blocks of the longest path from the header to one of `latches`, by default in instructions."""
    # Blocks are in reverse postorder: an edge to an earlier block goes back.
    best: dict[int, tuple[int, int]] = {header: (length_of(graph[header]), -1)}
    for k in sorted(body):
        if k not in best:
            continue
        for target in graph[k].successors:
            if target > k and target in body:
                length = best[k][0] + length_of(graph[target])
                if target not in best or length > best[target][0]:
                    best[target] = (length, k)
    at = max((k for k in latches if k in best), key=lambda k: best[k][0])
    path = [at]
    while at != header:
        at = best[at][1]
        path.append(at)
    return path[::-1]


@dataclass
class Release:
    """What a scoreboard waits for: until when, and the loads of global memory that it stands for."""

    clock: float
    loads: int = 0
    bytes: int = 0


@dataclass
class Warp:
    """One warp that runs alone: its clock and its scoreboards."""

    memory_latency: int
    clock: float = 0
    pending: list[list[Release]] = field(default_factory=lambda: [[] for _ in range(6)])
    #: Copies to shared memory since the last LDGDEPBAR, which makes a group of them
    copies: list[Release] = field(default_factory=list)
    round_trips: int = 0
    in_flight: int = 0
    bytes_in_flight: int = 0

    def run(self, instruction: Instruction) -> None:
        if instruction.waits:
            for scoreboard in range(6):
                if instruction.waits >> scoreboard & 1:
                    self.wait(scoreboard)
        # "DEPBAR.LE SB0,0x2" waits until two groups or fewer are left.
        if found := re.match(r"SB(\d),0x([0-9a-f]+)", instruction.operands):
            self.wait(int(found[1]), left=int(found[2], 16))
        release = self.release(instruction)
        if instruction.write_scoreboard != NO_SCOREBOARD:
            self.pending[instruction.write_scoreboard].append(release)
        if instruction.read_scoreboard != NO_SCOREBOARD:
            self.pending[instruction.read_scoreboard].append(Release(self.clock + READ_LATENCY))
        self.clock += max(instruction.stall, 1)

    def wait(self, scoreboard: int, left: int = 0) -> None:
        queue = self.pending[scoreboard]
        done = queue[: max(len(queue) - left, 0)]
        if any(release.loads for release in done):
            under_way = [*self.copies, *(release for queue in self.pending for release in queue)]
            self.in_flight = max(self.in_flight, sum(release.loads for release in under_way))
            self.bytes_in_flight = max(self.bytes_in_flight, sum(release.bytes for release in under_way))
        self.pending[scoreboard] = queue[len(done) :]
        end = max([self.clock, *(release.clock for release in done)])
        self.round_trips += end - self.clock >= MEMORY_LATENCY / 2
        self.clock = end

    def release(self, instruction: Instruction) -> Release:
        if instruction.name == "LDGDEPBAR":
            group, self.copies = self.copies, []
            return Release(
                max([self.clock, *(copy.clock for copy in group)]),
                sum(copy.loads for copy in group),
                sum(copy.bytes for copy in group),
            )
        if instruction.name in GLOBAL_LOADS:
            load = Release(self.clock + self.memory_latency, 1, instruction.width)
            if instruction.name != "LDGSTS":
                return load
            self.copies.append(load)
        return Release(self.clock + LATENCIES.get(instruction.name, OTHER_LATENCY))


def walk(path: Sequence[Instruction], body: Sequence[Instruction], whole: bool, memory_latency: int) -> Loop:
    """The figures of a path through a loop, in its steady state, or `whole` through a kernel, once."""
    warp = Warp(memory_latency)
    iterations = 1 if whole else COUNTED
    for _ in range(0 if whole else WARM_UP):
        for instruction in path:
            warp.run(instruction)
    start, warp.round_trips, warp.in_flight, warp.bytes_in_flight = warp.clock, 0, 0, 0
    for _ in range(iterations):
        for instruction in path:
            warp.run(instruction)
    widths: dict[str, Counter[int]] = defaultdict(Counter)
    for instruction in body:
        if instruction.name in MEMORY_ACCESSES and instruction.predicate != "@!PT":
            widths[instruction.name][instruction.width] += 1
    return Loop(
        instructions=len(path),
        critical_path=(warp.clock - start) / iterations,
        in_flight=warp.in_flight,
        bytes_in_flight=warp.bytes_in_flight,
        round_trips=warp.round_trips / iterations,
        constants=sum(i.name == "LDC" for i in path),
        wide_products=sum(i.opcode.startswith("IMAD.WIDE") for i in path),
        opcodes=dict(Counter(i.name for i in path).most_common()),
        branches=sum(i.name in BRANCHES and not i.only_diverged for i in body),
        widths={name: dict(sorted(counts.items())) for name, counts in sorted(widths.items())},
        whole=whole,
    )


def walk_loops(
    code: Sequence[Instruction], preferred: Sequence[str], memory_latency: int, *, full: bool = False
) -> list[Loop]:
    """The innermost loops that have the first instruction of `preferred` that any loop has, longest first.

    A kernel without such a loop is walked as a whole. full: take the path with the most products and wide
    accesses, and of those the shortest: that of full tiles, where others have a second copy of the code. All
    figures are then of this path.
    """
    graph = blocks(code)

    def work(block: Block) -> int:
        busy = sum(i.name == "HMMA" or i.width == 16 for i in code[block.begin : block.end])
        return 1000 * busy - (block.end - block.begin)

    def instructions(members: Iterable[int]) -> list[Instruction]:
        return [instruction for k in members for instruction in code[graph[k].begin : graph[k].end]]

    bodies = natural_loops(graph)
    names = {header: {instruction.name for instruction in instructions(bodies[header])} for header in bodies}
    for pattern in preferred:
        having = [header for header in bodies if any(re.fullmatch(pattern, name) for name in names[header])]
        found = []
        for header in having:
            body = bodies[header]
            if not any(other != header and other in body for other in having):
                latches = {k for k in body if header in graph[k].successors}
                longest = instructions(longest_path(graph, header, body, latches))
                path = instructions(longest_path(graph, header, body, latches, work)) if full else longest
                whole_body = path if full else instructions(sorted(body))
                loop = walk(path, whole_body, False, memory_latency)
                found.append((len(longest), loop))
        if found:
            return [loop for _, loop in sorted(found, key=lambda item: -item[0])]
    everything = set(range(len(graph)))
    ends = {k for k in everything if not graph[k].successors}
    path = instructions(longest_path(graph, 0, everything, ends))
    return [walk(path, instructions(sorted(everything)), True, memory_latency)]


@functools.cache
def kernels(architecture: int) -> dict[str, Kernel]:
    """All instances of all kernels, by the symbols with which g++ compiles them (test_ptxas.host_symbol)."""
    with concurrent.futures.ThreadPoolExecutor(max_workers=2) as pool:
        cubins = list(pool.map(lambda source: cubin(source, architecture), SOURCES))
    return {
        host_symbol(mangled): Kernel(kernel_name(mangled), host_symbol(mangled), path, mangled)
        for path in cubins
        for mangled in elf(path).functions
        if mangled.startswith("_Z")
    }


_instructions: dict[tuple[Path, str], list[Instruction]] = {}


def read(wanted: Sequence[Kernel]) -> None:
    """Disassembles instances at once: one run of nvdisasm for each cubin instead of one for each instance."""
    missing: dict[Path, set[str]] = defaultdict(set)
    for kernel in wanted:
        if (kernel.cubin, kernel.mangled) not in _instructions:
            missing[kernel.cubin].add(kernel.mangled)
    with concurrent.futures.ThreadPoolExecutor(max_workers=2) as pool:
        for path, code in zip(missing, pool.map(disassemble, missing, missing.values()), strict=True):
            _instructions.update({(path, mangled): lines for mangled, lines in code.items()})


def instructions_of(kernel: Kernel) -> list[Instruction]:
    read([kernel])
    return _instructions[kernel.cubin, kernel.mangled]


@functools.cache
def hot_loops(
    symbol: str, architecture: int, memory_latency: int = MEMORY_LATENCY, *, full: bool = False
) -> list[Loop]:
    """Loops of an instance that `kernels` lists under its symbol, the hot one first."""
    kernel = kernels(architecture)[symbol]
    preferred = (HOT[kernel.name],) if kernel.name in HOT else PREFERRED
    return walk_loops(instructions_of(kernel), preferred, memory_latency, full=full)


def hot_loop(symbol: str, architecture: int, memory_latency: int = MEMORY_LATENCY) -> Loop:
    """One iteration of the hot loop of an instance."""
    return hot_loops(symbol, architecture, memory_latency)[0]


def measure(instances: Iterable[str], architecture: int) -> dict[str, Figures]:
    """The figures of hot loops that exist; "NAME<ARGUMENTS> #2" is the second loop of an instance."""
    of = {kernel.instance: kernel for kernel in kernels(architecture).values()}
    wanted = [(name, *split(name)) for name in instances]
    read([of[instance] for _, instance, _ in wanted if instance in of])
    found = {}
    for name, instance, number in wanted:
        loops = hot_loops(of[instance].symbol, architecture) if instance in of else []
        if number <= len(loops):
            found[name] = loops[number - 1].figures
    return found


def split(name: str) -> tuple[str, int]:
    instance, _, number = name.partition(" #")
    return instance, int(number or 1)


def main() -> None:
    import test_sass

    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("names", nargs="*", metavar="kernel")
    parser.add_argument("--details", action="store_true", help="all figures of all instances")
    parser.add_argument("--write", action="store_true", help="put the lines into test_sass.py")
    options = parser.parse_args()

    def chosen(name: str) -> bool:
        return not options.names or name.split("<")[0] in options.names

    if options.details:
        for architecture in ARCHITECTURES:
            of = [kernel for kernel in kernels(architecture).values() if chosen(kernel.name)]
            read(of)
            for kernel in of:
                print_details(kernel, architecture)
        return
    instances = [name for name in test_sass.MEASURED if chosen(name)]
    columns = [measure(instances, architecture) for architecture in ARCHITECTURES]
    table = Path(test_sass.__file__)
    text = table.read_text()
    for name in instances:
        if not all(name in column for column in columns):
            print(f"    # gone: {name}")
            continue
        line = f'    "{name}": ({", ".join(str(tuple(column[name])) for column in columns)}),'
        text = re.sub(rf'^    "{re.escape(name)}": .*$', line, text, flags=re.MULTILINE)
        print(line)
    if options.write:
        table.write_text(text)


def print_details(kernel: Kernel, architecture: int) -> None:
    for number, loop in enumerate(hot_loops(kernel.symbol, architecture), 1):
        print(f"{kernel.instance} #{number} on sm_{architecture}")
        for name, value in dataclasses.asdict(loop).items():
            print(f"    {name:16}{value}")


if __name__ == "__main__":
    main()
