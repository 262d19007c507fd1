"""The facts of the kernels that benches/predict needs, from the machine code of sm_90.

    python tests/csrc/kernel_facts.py         prints them
    python tests/csrc/kernel_facts.py --write puts them into benches/predict/kernels.json
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[place]) for place in (0, 2)]

import sass  # noqa: E402
from devices import H100, resident_blocks  # noqa: E402
from test_ptxas import Usage, usages  # noqa: E402

from benches.predict.model import FACTS, KernelFacts  # noqa: E402

WARP = 32
#: FLOPs of one HMMA of 16 x 8 x 16.
TENSOR_FLOPS = 2 * 16 * 8 * 16
SHARED = ("LDS", "STS", "LDSM", "LDGSTS")

#: Name in benches/predict/launches.py -> instance and loop as in test_sass.py, threads of a block, dynamic
#: shared memory of a block in bytes.
INSTANCES: dict[str, tuple[str, int, int]] = {
    "mix_plain": ("mix_plain<bfloat16, true>", 256, 0),
}


def facts_of(instance: str, threads: int, dynamic_shared: int, usage: dict[str, Usage]) -> KernelFacts:
    name, number = sass.split(instance)
    kernel = next(each for each in sass.kernels(H100.capability).values() if each.instance == name)
    loop = sass.hot_loops(kernel.symbol, H100.capability)[number - 1]
    use = usage[kernel.symbol]
    blocks = resident_blocks(H100, threads, use.registers, use.shared + dynamic_shared)
    loads = [item for name in sass.GLOBAL_LOADS for item in loop.widths.get(name, {}).items()]
    # Narrow loads are of parameters and statistics, unless there are no others.
    wide = [item for item in loads if item[0] == 16] or loads
    shared = [item for name in SHARED for item in loop.widths.get(name, {}).items()]
    return KernelFacts(
        instance=instance,
        instructions=loop.instructions,
        critical_path=round(loop.critical_path),
        load_bytes=WARP * sum(width * count for width, count in wide),
        tensor_flops=TENSOR_FLOPS * loop.opcodes.get("HMMA", 0),
        wavefronts=sum(max(width * WARP // 128, 1) * count for width, count in shared),
        resident_warps=blocks * threads // WARP,
    )


def facts() -> dict[str, Any]:
    usage = {each.symbol: each for each in usages(H100.capability)}
    found = {name: asdict(facts_of(*given, usage)) for name, given in INSTANCES.items()}
    return {"architecture": H100.capability, "kernels": found}


def main() -> None:
    lines = ",\n".join(f'  "{name}": {json.dumps(each)}' for name, each in facts()["kernels"].items())
    text = f'{{\n "architecture": {H100.capability},\n "kernels": {{\n{lines}\n }}\n}}\n'
    if "--write" in sys.argv[1:]:
        FACTS.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
