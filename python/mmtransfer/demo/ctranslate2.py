"""Reader of CTranslate2's `model.bin`: a little-endian header, named variables, aliases."""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmtransfer.data.errors import DataError

VERSIONS = (4, 5, 6)  # 4 brought the dtype byte; nothing in the layout has changed since.
_DTYPES = {0: "<f4", 1: "|i1", 2: "<i2", 3: "<i4", 4: "<f2"}
_MAX_RANK = 8
_MIN_VARIABLE_BYTES = 2 + 1 + 1 + 1 + 4  # name length, NUL, rank, dtype, byte count


@dataclass(frozen=True, eq=False)
class CTranslate2File:
    """Contents of one file; `variables`, aliases included, are read-only views of the memory-mapped file."""

    path: Path
    version: int
    spec: str
    revision: int
    variables: dict[str, np.ndarray]
    aliases: dict[str, str]


def read_ctranslate2(path: str | Path) -> CTranslate2File:
    """Map `path` and read its table of variables; no weight is copied.

    dtypes: float32, float16, int8, int16, int32. DataError, naming the file and the place, if it is
    truncated, has bytes left over, or holds a size, name or dtype that cannot be true.
    """
    path = Path(path)
    try:
        with path.open("rb") as stream:
            buffer = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise DataError(f"{path} cannot be read as a CTranslate2 model ({error}); fetch it again") from error
    cursor = _Cursor(path, buffer)
    version = cursor.unpack("I", "version")
    if version not in VERSIONS:
        raise cursor.error(f"has version {version}, and {VERSIONS[0]} to {VERSIONS[-1]} are supported")
    spec = cursor.string("spec name")
    revision = cursor.unpack("I", "revision")
    variables = _read_variables(cursor)
    aliases = _read_aliases(cursor, variables)
    if cursor.remaining:
        raise cursor.error(f"has {cursor.remaining} bytes after its last entry")
    for alias, name in aliases.items():
        variables[alias] = variables[name]
    return CTranslate2File(path, version, spec, revision, variables, aliases)


def _read_variables(cursor: _Cursor) -> dict[str, np.ndarray]:
    count = cursor.count("variables", _MIN_VARIABLE_BYTES)
    variables: dict[str, np.ndarray] = {}
    for _ in range(count):
        name = cursor.string("variable name")
        if name in variables:
            raise cursor.error(f"holds the variable {name} twice")
        variables[name] = cursor.array(name)
    return variables


def _read_aliases(cursor: _Cursor, variables: dict[str, np.ndarray]) -> dict[str, str]:
    count = cursor.count("aliases", 2 * 3)
    aliases = {}
    for _ in range(count):
        alias, name = cursor.string("alias"), cursor.string("alias target")
        if alias in variables or alias in aliases or name not in variables:
            raise cursor.error(f"has the alias {alias} of {name}, which clashes with its variables")
        aliases[alias] = name
    return aliases


class _Cursor:
    """A position in the mapped file; every read is checked against its end."""

    def __init__(self, path: Path, buffer: mmap.mmap) -> None:
        self.path = path
        self.buffer = buffer
        self.offset = 0

    @property
    def remaining(self) -> int:
        return len(self.buffer) - self.offset

    def error(self, problem: str) -> DataError:
        return DataError(
            f"{self.path} {problem} (byte {self.offset}); it is corrupt or another format, fetch it again"
        )

    def take(self, size: int, what: str) -> int:
        """Offset of the next `size` bytes, and move past them."""
        if size > self.remaining:
            raise self.error(f"ends inside {what}: {size} bytes needed, {self.remaining} left")
        start = self.offset
        self.offset += size
        return start

    def unpack(self, code: str, what: str) -> int:
        start = self.take(struct.calcsize("<" + code), what)
        return int(struct.unpack_from("<" + code, self.buffer, start)[0])

    def count(self, what: str, entry_bytes: int) -> int:
        count = self.unpack("I", f"the number of {what}")
        if count * entry_bytes > self.remaining:
            raise self.error(f"claims {count} {what}, more than its size allows")
        return count

    def string(self, what: str) -> str:
        size = self.unpack("H", what)
        start = self.take(size, what)
        raw = self.buffer[start : start + size]
        if not raw.endswith(b"\0"):
            raise self.error(f"has a {what} without its end mark")
        try:
            return raw[:-1].decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"has a {what} that is not UTF-8") from error

    def array(self, name: str) -> np.ndarray:
        rank = self.unpack("B", f"the rank of {name}")
        if rank > _MAX_RANK:
            raise self.error(f"claims rank {rank} for {name}, and {_MAX_RANK} is allowed")
        shape = tuple(self.unpack("I", f"the shape of {name}") for _ in range(rank))
        code = self.unpack("B", f"the dtype of {name}")
        if code not in _DTYPES:
            raise self.error(f"has dtype code {code} for {name}, and {sorted(_DTYPES)} are supported")
        dtype = np.dtype(_DTYPES[code])
        size = self.unpack("I", f"the byte count of {name}")
        if size != math.prod(shape) * dtype.itemsize:
            raise self.error(f"stores {size} bytes for {name} of shape {shape} and dtype {dtype}")
        start = self.take(size, name)
        return np.frombuffer(self.buffer, dtype, math.prod(shape), start).reshape(shape)
