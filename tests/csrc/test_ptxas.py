"""ptxas reports for every kernel: no local memory on any architecture that is built, and few registers."""

from __future__ import annotations

import concurrent.futures
import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import simt_build

ROOT = simt_build.ROOT
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
CMAKE = (ROOT / "CMakeLists.txt").read_text()
ARCHITECTURES = sorted({int(number) for number in re.findall(r"\bsm_(\d+)", CMAKE)})

#: Where the bounds below hold. On Blackwell small kernels take up to 23 registers more; no row of the benches
#: was measured there, which could say whether that costs time.
BOUNDED = (80, 90)
#: The most registers of any instance of a kernel. More would cost resident warps and thus bytes in flight:
#: 168 allow 3 blocks of 128 threads per multiprocessor, 128 allow 4, or 2 of 256.
MOST_REGISTERS = {
    "adapt": 255,  # its shared memory allows one block of 256 threads per multiprocessor
    "adapt_backward": 255,
    "activate_hidden": 32,
    "finish_rows": 32,
    "column_sums": 40,
    # Of ctc_align and monotonic_align: a block of up to 512 threads an utterance, one to a multiprocessor.
    "align": 152,
    "align_wide": 64,  # of 1,024 threads
    "mix_plain": 80,
    "mix_bias": 40,
    "mix_norm": 168,
    "mix_norm_wide": 72,
    "sum_rows": 168,  # of rows at odd addresses, 3 blocks; the launch bounds of the others are 4 blocks
    "add_partials": 40,
    "reduce_affine": 40,
    "gradients_plain": 40,
    "gradients_norm": 224,  # for rows of 1,280 columns, which would spill with 168
    "gradients_norm_wide": 72,
    "fold": 48,
    "row_moments": 72,
    "row_moments_wide": 40,
    "activate_rows": 48,
    "project": 128,
    "gradient": 96,  # 5 blocks of 128 threads with four rows in flight: 80 KB, where 80 had 8 KB a block
    "finish_input_gradient": 40,
    "unfold_rows": 40,
    "unfold_columns": 80,  # 3 blocks of 256 threads with four rows in flight: 96 KB, where 40 had 12 KB
    "interpolate": 64,  # 4 blocks of 256 threads per multiprocessor
    "interpolate_gradients": 80,  # 3 blocks
    "reduce_lam": 40,
    "segment_stops": 40,
    "pool_pieces": 128,  # 4 blocks of 128 threads with eight rows in flight: 64 KB per multiprocessor
    "take_last": 32,
    "combine_pieces": 48,
    "spread_pieces": 64,
    "score_gradients": 96,
    "finish_scores": 32,
    "attention_extents": 40,
    "attention_dots": 48,
    "attend": 224,  # 2 blocks of 128 threads, as the two below, which hold sums of 128 columns
    "query_gradients": 255,
    "key_gradients": 255,
    "plan": 48,
    "sum_tokens": 80,  # 3 blocks of 256 threads: 96 KB in flight
    "frame_gradients": 96,
    "alpha_gradients": 48,
    "measure_tokens": 64,  # 4 blocks of 256 threads: 64 KB in flight
    "mean_loss": 40,
    "token_gradients": 64,
}

#: Bytes of local memory. Four instances of mix_norm (long float32 rows with a gain, and long rows at odd
#: addresses) lack a few registers on sm_120; more would allow two blocks per multiprocessor instead of three.
MOST_LOCAL_BYTES = {(120, "mix_norm"): 156}

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")


@dataclass(frozen=True)
class Usage:
    """One instance of a kernel; shared: bytes of static shared memory."""

    kernel: str
    symbol: str
    registers: int
    shared: int
    stack: int
    spilled: int


def kernel_name(mangled: str) -> str:
    """The function of an Itanium-mangled entry: the last name before template arguments or parameters."""
    position, name = mangled.index("N") + 1, ""
    while match := re.match(r"(\d+)", mangled[position:]):
        start = position + len(match[1])
        name, position = mangled[start : start + int(match[1])], start + int(match[1])
    return name


def host_symbol(mangled: str) -> str:
    """The symbol with which g++ compiles the kernel: nvcc names anonymous namespaces after the file."""
    while match := re.search(r"(\d+)_GLOBAL__N__", mangled):
        start, length = match.end(1), int(match[1])
        mangled = f"{mangled[: match.start()]}12_GLOBAL__N_1{mangled[start + length :]}"
    return mangled


def parse(report: str, architecture: int) -> list[Usage]:
    found = []
    for entry in re.split(r"Compiling entry function ", report)[1:]:
        start = re.match(r"'([^']+)' for 'sm_(\d+)", entry)
        stack = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill", entry)
        registers = re.search(r"Used (\d+) registers", entry)
        if start is None or stack is None or registers is None:
            raise ValueError(f"ptxas reports in an unknown form: {entry}")
        if int(start[2]) != architecture:
            continue
        shared = re.search(r"(\d+) bytes smem", entry)
        found.append(
            Usage(
                kernel_name(start[1]),
                host_symbol(start[1]),
                registers=int(registers[1]),
                shared=0 if shared is None else int(shared[1]),
                stack=int(stack[1]),
                spilled=int(stack[2]) + int(stack[3]),
            )
        )
    return found


@cache
def newest_header() -> float:
    files = [path for folder in ("csrc/cuda", "csrc/include") for path in (ROOT / folder).rglob("*.*h")]
    return max(path.stat().st_mtime for path in [*files, ROOT / "CMakeLists.txt"])


def file_of_the_build(source: Path, suffix: str) -> Path | None:
    """The object file of a source, or the file next to it, from the build that installed mmkernels.

    None if the source or a header has changed since.
    """
    folder = "CMakeFiles/mmkernels_cuda_kernels.dir/csrc/cuda"
    newest = max(newest_header(), source.stat().st_mtime)
    files = (ROOT / "build").glob(f"cp*/{folder}/{source.name}.o{suffix}")
    return next((path for path in files if path.stat().st_mtime > newest), None)


def report_of_the_build(source: Path, architecture: int) -> str | None:
    """What ptxas said in the build."""
    if path := file_of_the_build(source, ".ptxas"):
        report = path.read_text()
        return report if f"for 'sm_{architecture}'" in report else None
    return None


def ptxas_report(source: Path, architecture: int) -> str:
    """The report of the build, or else of a compiler run, kept in build/ptxas by the content of sources."""
    if report := report_of_the_build(source, architecture):
        return report
    headers = simt_build._headers_digest(("csrc/cuda", "csrc/include"))
    digest = simt_build._digest(headers, source.read_bytes(), str(architecture))
    target = ROOT / "build" / "ptxas" / f"{source.stem}-{digest}.txt"
    if target.exists():
        return target.read_text()
    flags = f"-std=c++20 -O3 -Icsrc -Icsrc/include -arch=sm_{architecture} -Xptxas -v -cubin -o /dev/null"
    command = ["nvcc", *flags.split(), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(done.stderr)
    return done.stderr


@cache
def usages(architecture: int) -> list[Usage]:
    with concurrent.futures.ThreadPoolExecutor(max_workers=2) as pool:
        reports = pool.map(lambda source: ptxas_report(source, architecture), SOURCES)
        return [usage for report in reports for usage in parse(report, architecture)]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_compile_without_local_memory(architecture: int) -> None:
    found = usages(architecture)
    assert {usage.kernel for usage in found} == set(MOST_REGISTERS), "keep the table in step with the kernels"
    local = {usage: MOST_LOCAL_BYTES.get((architecture, usage.kernel), 0) for usage in found}
    assert [usage for usage, most in local.items() if max(usage.stack, usage.spilled) > most] == []
    if architecture in BOUNDED:
        assert [usage for usage in found if usage.registers > MOST_REGISTERS[usage.kernel]] == []
