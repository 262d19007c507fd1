"""Prints the memory traffic of every kernel, for the tables in test_memory_traffic.py.

`python tests/csrc/print_memory_traffic.py [op ...]`: entries of BOUNDS, bytes in flight on an H100, and the
places that take more wavefronts or sectors than their bytes need.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
SHOWN = 3


def main(ops: list[str]) -> None:
    sys.path[:0] = [str(TESTS), *(str(TESTS / folder) for folder in ("csrc", "ops", "project"))]
    import test_memory_traffic as table

    for op in ops or table.OPS:
        print(f'    "{op}": {{')
        for kernel, launches in table.traffic_of(op).items():
            print(f'        "{kernel}": {entry(table.measured(launches))},')
            flight = table.IN_FLIGHT.get(kernel, "not in the table")
            if isinstance(flight, str):
                print(f"            # in flight: {flight}")
            elif shutil.which("nvcc") is not None:
                print(f"            # in flight: {table.in_flight(launches):.1f} KiB")
            wasted = {
                (place.passes / place.ideal, place.space, place.operation, place.source)
                for launch in launches
                for place in launch.places
                if place.passes > max(place.ideal, 0.02 * launch_passes(launch, place.space))
            }
            for ratio, space, operation, source in sorted(wasted, reverse=True)[:SHOWN]:
                print(f"            # {ratio:.2f} {space} {operation}: {source}")
        print("    },")


def entry(bound: object) -> str:
    """Without the values that are 1."""
    shown = ", ".join(f"{name}={value}" for name, value in vars(bound).items() if value != 1)
    return f"Bound({shown})"


def launch_passes(launch: object, space: str) -> int:
    return getattr(launch, "wavefronts" if space == "shared" else "sectors")


if __name__ == "__main__":
    main(sys.argv[1:])
