"""Builds CUDA kernel files for the host SIMT runtime with g++, and loads them (tests/simt/README.md)."""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from devices import SMALL, Device

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "simt"
RUNTIME = sorted((ROOT / "tests" / "simt").glob("*.cpp"))
HEADERS = ("csrc/cuda", "csrc/include", "csrc/torch", "tests/gpu/driver", "tests/simt")
ORDERS = (0, 1, 2, 3)
"""Thread orders that a test runs: by index, reversed, and two shuffles."""

CXX_FLAGS = [
    *("-std=c++20", "-O1", "-g1", "-fPIC", "-DMMK_SIMT"),
    *("-fno-strict-aliasing", "-fno-gnu-unique", "-ffp-contract=off"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-psabi"),
]
SANITIZE_FLAGS = [
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined",
    "-fno-omit-frame-pointer",
]
# Compiling kernels takes most of the time of such a test: three times as much with -O1 and checks in line.
# Programs that call them have no checks: they would compile for a minute each.
SANITIZED_KERNEL_FLAGS = [
    *("-O0", "--param=asan-instrumentation-with-call-threshold=0"),
    # ASan finds the same at the access.
    "-fno-sanitize=null,object-size,pointer-overflow,vptr",
]
# The runtime's race detector defines the functions that g++ calls for ThreadSanitizer.
RACE_DEFINE = "-DMMK_SIMT_RACES"
RACE_FLAGS = ["-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0"]
# The flags with which CMake compiles the glue.
TORCH = Path(torch.__file__).parent
TORCH_FLAGS = [
    *("-fvisibility=hidden", "-DTORCH_TARGET_VERSION=0x020b000000000000"),
    *("-isystem", str(TORCH / "include")),
]
TORCH_LINK_FLAGS = [f"-L{TORCH / 'lib'}", "-ltorch", "-ltorch_cpu"]
SANITIZE_ENVIRONMENT = {"ASAN_OPTIONS": "exitcode=99", "UBSAN_OPTIONS": "print_stacktrace=1:exitcode=98"}


class SimtFault(RuntimeError):
    """A fault that the runtime found in a kernel."""


@functools.cache
def cuda_include() -> Path | None:
    """The folder of the CUDA headers: nvcc's, or Triton's copy, or None."""
    folders: list[Path] = []
    if nvcc := shutil.which("nvcc"):
        # A dry run names the folder even if nvcc on PATH is a script that calls the real one.
        command = [nvcc, "--dryrun", "-c", "-x", "cu", os.devnull]
        listing = subprocess.run(command, capture_output=True, text=True).stderr.splitlines()
        folders += [Path(line.split("TOP=")[1]).resolve() / "include" for line in listing if "TOP=" in line]
    folders += [Path(os.environ[name]) / "include" for name in ("CUDA_HOME",) if name in os.environ]
    folders += [Path(sysconfig.get_paths()["purelib"]) / "triton" / "backends" / "nvidia" / "include"]
    return next((folder for folder in folders if (folder / "cuda_bf16.h").exists()), None)


def missing_tools() -> str | None:
    """Why nothing can be built here, or None."""
    if shutil.which("g++") is None:
        return "no g++"
    if cuda_include() is None:
        return "no CUDA headers: neither nvcc nor triton is installed"
    return None


@functools.cache
def _headers_digest(folders: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for path in sorted(path for folder in folders for path in (ROOT / folder).rglob("*.*h")):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _digest(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update((part.encode() if isinstance(part, str) else part) + b"\0")
    return digest.hexdigest()[:16]


def _run(command: Sequence[str | Path], target: Path) -> Path:
    """Runs a compiler, unless another process is at the same file: then waits for it. Writes atomically."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{target}.lock", "w") as lock, tempfile.TemporaryDirectory(dir=target.parent) as folder:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():
            return target
        scratch = Path(folder) / target.name
        full_command = [*map(str, command), "-o", str(scratch)]
        done = subprocess.run(full_command, capture_output=True, text=True, cwd=ROOT)
        if done.returncode != 0:
            raise RuntimeError(f"building {target.name} failed:\n{done.stderr[-6000:]}")
        scratch.replace(target)
    return target


def _object(source: Path, flags: Sequence[str]) -> Path:
    include = cuda_include()
    if include is None:
        raise RuntimeError(missing_tools())
    headers = _headers_digest(("tests/simt",) if source in RUNTIME else HEADERS)
    if source in RUNTIME:
        flags = [*flags, "-O2"]  # most of the time of a test is here
    if _is_glue(source):
        flags = [*flags, *TORCH_FLAGS]
    digest = _digest(source.name, *flags, str(include), headers, source.read_bytes())
    target = BUILD / f"{source.stem}-{digest}.o"
    if target.exists():
        return target
    folders = ["-I", "csrc", "-I", "csrc/include", "-I", "tests", "-isystem", str(include)]
    # A relative path, so that faults name the same file on every machine.
    return _run(["g++", *flags, *folders, "-c", "-x", "c++", source.relative_to(ROOT)], target)


def build(
    name: str,
    sources: Sequence[str | Path],
    *,
    races: bool = False,
    sanitize: bool = False,
    defines: Sequence[str] = (),
) -> Path:
    """Compiles `sources` (relative to the repository) with the runtime into one file under build/simt.

    A file is compiled again only after it or a header has changed. The file is a shared library
    for `load`, or with `sanitize` a program for `run_program`, with ASan and UBSan; then one of the sources
    has `main`. With `races`, races between threads are faults. Glue (csrc/torch) is
    compiled and linked with torch. `defines` are preprocessor definitions such as "WIDTH=4".
    """
    flags = [*CXX_FLAGS, *(f"-D{define}" for define in defines)]
    flags += [RACE_DEFINE] if races else []
    paths = [*(ROOT / source for source in sources), *RUNTIME]
    # Watch the accesses of kernels only, not those of glue and runtime.
    watched = {path for path in paths if races and path not in RUNTIME and not _is_glue(path)}

    def flags_of(path: Path) -> list[str]:
        if path in watched:
            return [*flags, *RACE_FLAGS]
        if sanitize and path.suffix == ".cu":
            return [*flags, *SANITIZE_FLAGS, *SANITIZED_KERNEL_FLAGS]
        return [*flags, *SANITIZE_FLAGS] if sanitize and path in RUNTIME else flags

    work = [(path, flags_of(path)) for path in paths]
    with concurrent.futures.ThreadPoolExecutor(max_workers=2) as pool:
        objects = list(pool.map(lambda item: _object(*item), work))
    target = BUILD / f"{name}-{_digest(*(file.name for file in objects))}{'' if sanitize else '.so'}"
    if target.exists():
        return target
    # -Bsymbolic: each library calls its own copy of the runtime.
    link = SANITIZE_FLAGS if sanitize else ["-shared", "-Wl,-Bsymbolic"]
    libraries = TORCH_LINK_FLAGS if any(map(_is_glue, paths)) else []
    return _run(["g++", *link, *objects, *libraries], target)


def _is_glue(source: Path) -> bool:
    return source.parent == ROOT / "csrc" / "torch"


def compile_for_gpus(source: Path) -> Path:
    """Compiles a kernel file with nvcc for sm_80 and sm_90, warnings as errors, once per content."""
    targets = [flag for sm in (80, 90) for flag in ("-gencode", f"arch=compute_{sm},code=sm_{sm}")]
    flags = ["-std=c++20", "-Werror", "all-warnings", "-Xcompiler", "-Wall,-Wextra", *targets]
    digest = _digest(*flags, _headers_digest(("csrc/cuda", "csrc/include")), source.read_bytes())
    target = BUILD / f"{source.stem}-gpus-{digest}.o"
    if target.exists():
        return target
    return _run(["nvcc", *flags, "-I", "csrc", "-I", "csrc/include", "-c", source.relative_to(ROOT)], target)


@dataclass(frozen=True)
class Launch:
    """A recorded launch. kernel: the mangled symbol; sizes in bytes; opted_in: of dynamic shared memory."""

    kernel: str
    blocks: int
    threads: int
    dynamic_shared: int
    opted_in: int


class Library:
    """A loaded simt library; its extern "C" functions are attributes of `functions`."""

    def __init__(self, path: Path) -> None:
        self.functions = ctypes.CDLL(str(path))
        self.functions.mmk_simt_set_order.argtypes = [ctypes.c_uint64]
        self.functions.mmk_simt_record.argtypes = [ctypes.c_int64]
        self.functions.mmk_simt_recorded.restype = ctypes.c_char_p
        self.functions.mmk_simt_last_error.restype = ctypes.c_char_p

    def set_order(self, seed: int) -> None:
        """Thread and block order of launches: 0 by index, 1 reversed, others shuffled with that seed."""
        self.functions.mmk_simt_set_order(seed)

    @contextlib.contextmanager
    def on(self, device: Device) -> Iterator[None]:
        """The device that launchers see and whose limits hold."""
        self._set_device(device)
        try:
            yield
        finally:
            self._set_device(SMALL)

    def _set_device(self, device: Device) -> None:
        attributes = (
            device.multiprocessors,
            device.shared_per_block,
            device.shared_per_multiprocessor,
            device.threads_per_multiprocessor,
            device.capability,
        )
        self.functions.mmk_simt_set_device((ctypes.c_int64 * len(attributes))(*attributes))

    @contextlib.contextmanager
    def recording(self, *, run: bool) -> Iterator[list[Launch]]:
        """Fills the list with the launches at its end. Unless `run`, they are checked, and no thread runs."""
        launches: list[Launch] = []
        self.functions.mmk_simt_record(run)
        try:
            yield launches
        finally:
            recorded: bytes = self.functions.mmk_simt_recorded()
            for line in recorded.decode().splitlines():
                kernel, *numbers = line.split(" ")
                launches.append(Launch(kernel, *map(int, numbers)))

    def last_error(self) -> str:
        """The message of the first fault since it was last cleared, or an empty string."""
        message: bytes = self.functions.mmk_simt_last_error()
        return message.decode()

    def check(self, status: int) -> None:
        """Raises SimtFault if a launch failed, even if the launcher dropped the status."""
        message = self.last_error()
        self.functions.mmk_simt_clear_error()
        if status != 0 or message:
            raise SimtFault(message or f"the launcher returned {status}")

    def call(self, function: str, *arguments: object, order: int = 0) -> None:
        """Calls an extern "C" launcher; arrays go as pointers, ints as int64_t, floats as double."""
        self.set_order(order)
        self.check(getattr(self.functions, function)(*map(_argument, arguments)))


def _argument(value: object) -> object:
    if value is None or isinstance(value, ctypes._SimpleCData | ctypes.Structure):
        return value
    if isinstance(value, np.ndarray):
        return ctypes.c_void_p(value.ctypes.data)
    if isinstance(value, bool | int | np.integer):
        return ctypes.c_int64(int(value))
    if isinstance(value, float):
        return ctypes.c_double(value)
    raise TypeError(f"argument of type {type(value).__name__}: pass an array, int, float or ctypes value")


@functools.cache
def load(path: Path) -> Library:
    """Opens a shared library made by `build`."""
    return Library(path)


def run_program(path: Path, *arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """Runs a program of `build(..., sanitize=True)`; the status is nonzero if a sanitizer finds a fault."""
    command = [str(path), *arguments]
    environment = {**os.environ, **SANITIZE_ENVIRONMENT}
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)


GUARD_BYTES = 256


class Guarded:
    """An array between guard bytes. Its bytes start as 0xFF (NaN), which shows elements left unwritten."""

    def __init__(self, shape: int | tuple[int, ...], dtype: npt.DTypeLike) -> None:
        count = int(np.prod(shape)) * np.dtype(dtype).itemsize
        raw = np.empty(count + 3 * GUARD_BYTES, np.uint8)
        start = GUARD_BYTES + -(raw.ctypes.data + GUARD_BYTES) % GUARD_BYTES
        # 0xFFFE is NaN in every float type when read, and unlike what kernels write (zeros, -1, NaN).
        raw[0::2], raw[1::2] = 0xFE, 0xFF
        self._guards = {"before": raw[:start], "after": raw[start + count :]}
        self._expected = {side: guard.copy() for side, guard in self._guards.items()}
        raw[start : start + count] = 0xFF
        self.array: np.ndarray = raw[start : start + count].view(dtype).reshape(shape)

    @classmethod
    def of(cls, values: np.ndarray) -> Guarded:
        """A guarded copy of an array: reads past its end see NaN."""
        guarded = cls(values.shape, values.dtype)
        guarded.array[...] = values
        return guarded

    def check(self) -> None:
        """Raises SimtFault if a kernel wrote next to the array."""
        for side, guard in self._guards.items():
            if changed := np.count_nonzero(guard != self._expected[side]):
                raise SimtFault(f"a kernel wrote {changed} bytes {side} an array")


def same_in_all_orders(compute: Callable[[int], np.ndarray], orders: Sequence[int] = ORDERS) -> np.ndarray:
    """Returns compute(order), after checking that all orders give the same bytes: races make them differ."""
    results = [compute(order) for order in orders]
    for order, result in zip(orders[1:], results[1:], strict=True):
        if result.tobytes() != results[0].tobytes():
            raise SimtFault(f"thread orders {orders[0]} and {order} differ in results: a barrier is missing")
    return results[0]
