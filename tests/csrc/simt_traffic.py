"""Memory traffic of kernels that the host SIMT runtime counts (tests/simt/README.md)."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from simt_build import Library


@dataclass(frozen=True)
class Place:
    """The requests of one place in the code. passes: wavefronts of shared memory, or sectors of global
    memory; ideal: the fewest that the bytes of each request can take. Lanes share bytes that they access.
    """

    library: Library
    address: int
    space: str
    operation: str
    requests: int
    bytes: int
    passes: int
    ideal: int

    @property
    def source(self) -> str:
        """File and line, and those of the calls that they were inlined into."""
        find = self.library.functions.mmk_simt_source_place
        find.argtypes, find.restype = [ctypes.c_uint64], ctypes.c_char_p
        place: bytes = find(self.address)
        return place.decode()


@dataclass(frozen=True)
class Traffic:
    """A launch and the requests of its warps. kernel: the mangled symbol; sizes in bytes; copies_of_thread
    and copies_of_block: the most bytes that cp.async has outstanding. The counts of `places` are sums over
    the grid: they grow with the problem as the real traffic does.
    """

    kernel: str
    blocks: int
    threads: int
    static_shared: int
    dynamic_shared: int
    copies_of_thread: int
    copies_of_block: int
    places: tuple[Place, ...]

    def _sum(self, space: str, field: str) -> int:
        return sum(getattr(place, field) for place in self.places if place.space == space)

    @property
    def wavefronts(self) -> int:
        return self._sum("shared", "passes")

    @property
    def ideal_wavefronts(self) -> int:
        return self._sum("shared", "ideal")

    @property
    def sectors(self) -> int:
        return self._sum("global", "passes")

    @property
    def ideal_sectors(self) -> int:
        return self._sum("global", "ideal")

    @property
    def requests(self) -> int:
        """To global memory."""
        return self._sum("global", "requests")

    @property
    def bytes(self) -> int:
        """Of global memory; those that several requests ask for count for each."""
        return self._sum("global", "bytes")

    @property
    def conflicts(self) -> float:
        """Wavefronts of shared memory per ideal wavefront."""
        return self.wavefronts / self.ideal_wavefronts if self.ideal_wavefronts else 1.0

    @property
    def sector_ratio(self) -> float:
        """Sectors of global memory per ideal sector."""
        return self.sectors / self.ideal_sectors if self.ideal_sectors else 1.0


@contextmanager
def counting(library: Library) -> Iterator[list[Traffic]]:
    """Fills the list with the traffic of the launches at its end. The library is built with ``races``."""
    found: list[Traffic] = []
    library.functions.mmk_simt_count()
    try:
        yield found
    finally:
        library.functions.mmk_simt_counted.restype = ctypes.c_char_p
        counted: bytes = library.functions.mmk_simt_counted()
        for launch in counted.decode().split("launch ")[1:]:
            first, *rest = launch.splitlines()
            kernel, *sizes = first.split(" ")
            places = []
            for line in rest:
                address, space, operation, *numbers = line.split(" ")
                places.append(Place(library, int(address), space, operation, *map(int, numbers)))
            found.append(Traffic(kernel, *map(int, sizes), places=tuple(places)))
