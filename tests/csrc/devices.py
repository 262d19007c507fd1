"""Real GPUs, for the proofs that need none: the attributes that kernels, plans and launches depend on."""

from __future__ import annotations

from dataclasses import dataclass, replace

KIB = 1024
REGISTERS = 64 * KIB
"""Of a multiprocessor, and the most of a block."""
RESERVED_SHARED = KIB
"""Shared memory that the driver takes from a multiprocessor for each block."""
SHARED_WITHOUT_OPT_IN = 48 * KIB


@dataclass(frozen=True)
class Device:
    """Attributes of ``cudaDeviceGetAttribute``: shared memory in bytes, capability 10 * major + minor."""

    name: str
    capability: int
    multiprocessors: int
    shared_per_block: int
    shared_per_multiprocessor: int
    threads_per_multiprocessor: int
    blocks_per_multiprocessor: int

    @property
    def cubin(self) -> int:
        """The newest architecture of the wheel that runs here; from its PTX where the major differs."""
        return 80 if self.capability < 90 else 90


def registers_of_block(threads: int, registers: int) -> int:
    """They are allocated to warps, in units of 256."""
    return -(-threads // 32) * -(-registers * 32 // 256) * 256


def resident_blocks(device: Device, threads: int, registers: int, shared: int) -> int:
    """Blocks that a multiprocessor runs at a time. registers: of a thread; shared: bytes, of all kinds."""
    return min(
        device.blocks_per_multiprocessor,
        device.threads_per_multiprocessor // (-(-threads // 32) * 32),
        device.shared_per_multiprocessor // (shared + RESERVED_SHARED),
        REGISTERS // registers_of_block(threads, registers),
    )


def _of_graphics(name: str, capability: int, multiprocessors: int, blocks: int) -> Device:
    return Device(name, capability, multiprocessors, 99 * KIB, 100 * KIB, 1536, blocks)


A100 = Device("A100", 80, 108, 163 * KIB, 164 * KIB, 2048, 32)
H100 = Device("H100", 90, 132, 227 * KIB, 228 * KIB, 2048, 32)
A10 = _of_graphics("A10", 86, 72, 16)
L4 = _of_graphics("L4", 89, 58, 24)
DEVICES = (
    A100,
    H100,
    A10,
    L4,
    _of_graphics("RTX 3090", 86, 82, 16),
    _of_graphics("RTX 4090", 89, 128, 24),
    _of_graphics("RTX 5090", 120, 170, 24),
)
#: The default of the host SIMT runtime: few multiprocessors, so that persistent kernels loop.
SMALL = replace(H100, name="small", multiprocessors=3)
#: The least shared memory of a block among them.
LEAST_SHARED = min(device.shared_per_block for device in DEVICES)
