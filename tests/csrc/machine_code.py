"""The machine code of the kernels: where it is, and its instructions.

The cubins are those of the build, or where a source is newer, of nvcc. nvdisasm names the instructions. The
control bits, which it does not print, come from the high word of each: bits 41-44 are the clocks until the
next instruction may issue, 46-48 the scoreboard that is released with the result, 49-51 the one that is
released when the operands have been read, 52-57 the scoreboards to wait for.
"""

from __future__ import annotations

import ctypes
import functools
import json
import re
import shutil
import struct
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import simt_build
from test_ptxas import SOURCES, file_of_the_build

CUBINS = simt_build.ROOT / "build" / "ptxas"
NO_SCOREBOARD = 7
BYTES_PER_INSTRUCTION = 16
#: Part of an opcode -> bytes of the access a lane; 4 without one
WIDTHS = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
CONTROL_FLOW = {
    *("BRA", "BRX", "BRXU", "CALL", "RET", "EXIT", "BSSY", "BSYNC", "BREAK"),
    *("WARPSYNC", "ENDCOLLECTIVE", "ACQBULK", "PREEXIT"),
}
SHT_SYMTAB, STT_FUNC = 2, 2
JUMP_TABLES = ".nv.constant2."


@dataclass(frozen=True)
class Instruction:
    """One instruction; a scoreboard of 7 is none, `waits` has a bit for each, `targets` are indices."""

    opcode: str
    operands: str
    predicate: str
    targets: tuple[int, ...]
    stall: int
    write_scoreboard: int
    read_scoreboard: int
    waits: int

    @functools.cached_property
    def name(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.split(".")[0]

    @property
    def only_diverged(self) -> bool:
        """Whether only a warp whose lanes have diverged takes the branch."""
        return self.opcode.startswith("BRA.DIV")

    @functools.cached_property
    def width(self) -> int:
        """Bytes of a memory access per lane."""
        parts = self.opcode.split(".")
        if self.name == "LDSM":
            return 4 * int(parts[-1]) if parts[-1].isdigit() else 4
        return next((WIDTHS[part] for part in parts[1:] if part in WIDTHS), 4)


@functools.cache
def tool(name: str) -> str | None:
    """nvdisasm or cuobjdump: of the CUDA toolkit, or else of Triton."""
    folders = [Path(sysconfig.get_paths()["purelib"]) / "triton" / "backends" / "nvidia" / "bin"]
    if headers := simt_build.cuda_include():
        folders.insert(0, headers.parent / "bin")
    copies = [shutil.which(name), *(str(folder / name) for folder in folders)]
    return next((path for path in copies if path is not None and Path(path).exists()), None)


def missing_tools() -> str | None:
    """Why machine code cannot be had here, or None."""
    if tool("nvdisasm") is None:
        return "no nvdisasm: neither a CUDA toolkit nor Triton has it"
    from_the_build = tool("cuobjdump") is not None and all(file_of_the_build(path, "") for path in SOURCES)
    if shutil.which("nvcc") is None and not from_the_build:
        return "no nvcc, and no build that is newer than the sources"
    return None


def cubin(source: Path, architecture: int) -> Path:
    """The machine code of a file of kernels."""
    built = file_of_the_build(source, "")
    if built is not None and (extractor := tool("cuobjdump")) is not None:
        target = CUBINS / f"{source.stem}.sm_{architecture}.cubin"
        if target.exists() and target.stat().st_mtime > built.stat().st_mtime:
            return target
        if extract(extractor, built, architecture, target):
            return target
    return compile_cubin(source, architecture)


def extract(extractor: str, built: Path, architecture: int, target: Path) -> bool:
    """Takes the cubin out of an object file; False where it was built without this architecture."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        command = [extractor, "-xelf", f"sm_{architecture}", str(built)]
        subprocess.run(command, capture_output=True, cwd=folder, check=True)
        found = list(Path(folder).glob(f"*sm_{architecture}.cubin"))
        if len(found) != 1:
            return False
        found[0].replace(target)
    return True


def compile_cubin(source: Path, architecture: int) -> Path:
    """Runs nvcc, unless build/ptxas has the result for the same sources."""
    headers = simt_build._headers_digest(("csrc/cuda", "csrc/include"))
    digest = simt_build._digest(headers, source.read_bytes(), str(architecture))
    # The flags of the build.
    flags = f"-std=c++20 -O3 -Icsrc -Icsrc/include -arch=sm_{architecture} -cubin"
    target = CUBINS / f"{source.stem}-{digest}.cubin"
    return target if target.exists() else simt_build._run(["nvcc", *flags.split(), source], target)


@functools.cache
def elf(path: Path) -> ELF:
    return ELF(path.read_bytes())


class ELF:
    """The functions of a cubin, and their bytes."""

    def __init__(self, data: bytes) -> None:
        (offset,) = struct.unpack_from("<Q", data, 40)
        size, count, section_names = struct.unpack_from("<HHH", data, 58)
        # name, type, flags, address, offset, size, link, info, alignment, size of an entry
        sections = [struct.unpack_from("<IIQQQQIIQQ", data, offset + k * size) for k in range(count)]
        table = next(section for section in sections if section[1] == SHT_SYMTAB)
        names = sections[table[6]][4]
        self.data = data
        #: Mangled name of a function -> its index in the table of symbols, and where its instructions begin
        self.functions: dict[str, tuple[int, int]] = {}
        for index in range(table[5] // table[9]):
            entry = table[4] + index * table[9]
            name, info, _, section, value = struct.unpack_from("<IBBHQ", data, entry)
            if info & 15 == STT_FUNC:
                self.functions[self.text(names + name)] = (index, sections[section][4] + value)
        #: Mangled name of a function -> its tables of jumps
        self.constants: dict[str, bytes] = {}
        for name, _, _, _, begin, length, *_ in sections:
            text = self.text(sections[section_names][4] + name)
            if text.startswith(JUMP_TABLES):
                self.constants[text.removeprefix(JUMP_TABLES)] = data[begin : begin + length]

    def text(self, begin: int) -> str:
        return self.data[begin : self.data.index(b"\0", begin)].decode()


@functools.cache
def demangler() -> ctypes.CDLL:
    library = ctypes.CDLL("libstdc++.so.6")
    library.__cxa_demangle.restype = ctypes.c_void_p
    return library


@functools.cache
def demangle(symbol: str) -> str:
    """The name and the template arguments of a function, without those of namespaces and parameters."""
    status = ctypes.c_int()
    # The C library frees what it allocated; a few hundred names a process may stay.
    pointer = getattr(demangler(), "__cxa_demangle")(symbol.encode(), None, None, ctypes.byref(status))
    if not pointer:
        return symbol
    text = (ctypes.string_at(pointer) or b"").decode()
    text = text.replace("(anonymous namespace)::", "").replace("mmk::cuda::", "").replace("mmk::", "")
    text = re.sub(r"\((?:unsigned )?\w+\)(?=-?\d)", "", text)
    text = text.replace("(bool)1", "true").replace("(bool)0", "false").replace("__nv_bfloat16", "bfloat16")
    depth = 0
    for position, letter in enumerate(text):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            text = text[:position]
            break
    return text.removeprefix("void ").replace("> >", ">>").replace("> >", ">>")


def decode(encoding: bytes, line: Mapping[str, str], targets: tuple[int, ...]) -> Instruction:
    """An instruction from its 128 bits and what nvdisasm says of it."""
    high = int.from_bytes(encoding[8:], "little")
    return Instruction(
        line["opcode"],
        line.get("operands", ""),
        line.get("predicate", ""),
        targets,
        stall=high >> 41 & 15,
        write_scoreboard=high >> 46 & 7,
        read_scoreboard=high >> 49 & 7,
        waits=high >> 52 & 63,
    )


def disassemble(path: Path, symbols: Iterable[str]) -> dict[str, list[Instruction]]:
    """The instructions of functions of a cubin, by their mangled names."""
    file = elf(path)
    wanted = {name: file.functions[name] for name in symbols}
    indices = ",".join(str(index) for index, _ in wanted.values())
    command = [tool("nvdisasm") or "nvdisasm", "-json", "-fun", indices, str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"nvdisasm failed on {path.name}:\n{done.stderr[-2000:]}")
    found = {}
    for function in json.loads(done.stdout)[1]:
        if (name := function["function-name"]) not in wanted:
            continue
        lines = function["sass-instructions"]
        flow = {
            line["opcode"].split(".")[0]
            for line in lines
            if "control-flow" in line.get("other-attributes", ())
        }
        if not flow <= CONTROL_FLOW:
            raise ValueError(f"instructions that the walk does not know: {flow - CONTROL_FLOW}")
        tables = jump_tables(lines, file.constants.get(name, b""))
        start = wanted[name][1]
        found[name] = [
            decode(
                file.data[start + k * BYTES_PER_INSTRUCTION : start + (k + 1) * BYTES_PER_INSTRUCTION],
                line,
                tables.get(k) or jump_target(line),
            )
            for k, line in enumerate(lines)
        ]
    return found


def jump_target(line: Mapping[str, str]) -> tuple[int, ...]:
    """The index of the instruction that a jump or BSSY names. A CALL of an address is a far jump."""
    if line["opcode"].split(".")[0] not in ("BRA", "CALL", "BSSY"):
        return ()
    found = re.search(r"(?:^|,)0x([0-9a-f]+)$", line.get("operands", ""))
    return (int(found[1], 16) // BYTES_PER_INSTRUCTION,) if found else ()


def jump_tables(lines: Sequence[Mapping[str, str]], constants: bytes) -> dict[int, tuple[int, ...]]:
    """The targets of each BRX: a table of 32-bit offsets that begins where the load before it reads."""
    begins: dict[int, int] = {}
    for k, line in enumerate(lines):
        if line["opcode"].split(".")[0] not in ("BRX", "BRXU"):
            continue
        register = line["operands"].split(",")[0]
        for earlier in reversed(lines[:k]):
            pattern = rf"{register},c\[0x2\]\[U?R\d+(?:\+0x([0-9a-f]+))?\]"
            if found := re.fullmatch(pattern, earlier.get("operands", "")):
                begins[k] = int(found[1] or "0", 16)
                break
        else:
            raise ValueError(f"no table for {line['opcode']} {line['operands']}")
    ends = sorted({*begins.values(), len(constants)})
    tables = {}
    for k, begin in begins.items():
        end = next(end for end in ends if end > begin)
        offsets = struct.unpack(f"<{(end - begin) // 4}I", constants[begin:end])
        tables[k] = tuple(offset // BYTES_PER_INSTRUCTION for offset in offsets)
    return tables
