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
    "mix_norm": ("mix_norm<RowShape<bfloat16, 32, 4, true, true>, false>", 128, 24_576),
    "mix_norm affine": ("mix_norm<RowShape<bfloat16, 32, 4, true, true>, true>", 128, 24_576),
    "sum_rows": ("sum_rows<bfloat16, true, false>", 128, 38_016),
    "sum_rows norm": ("sum_rows<bfloat16, true, true>", 128, 38_016),
    "gradients_plain": ("gradients_plain<bfloat16, true>", 256, 0),
    "gradients_norm": ("gradients_norm<RowShape<bfloat16, 32, 4, true, true>, false>", 128, 24_576),
    "row_moments": ("row_moments<RowShape<bfloat16, 32, 4, true, false>>", 128, 0),
    "project": ("project<bfloat16, 128, 128>", 256, 81_920),
    "gradient": ("gradient<bfloat16, true, 1>", 128, 0),
    "finish_input_gradient": ("finish_input_gradient<bfloat16, true>", 256, 0),
    "unfold_columns": ("unfold_columns<bfloat16, true, true>", 256, 0),
    "adapt first": ("adapt<AdapterTile<bfloat16, 128, 64>, false, false> #2", 256, 230_400),
    "adapt first, norm": ("adapt<AdapterTile<bfloat16, 128, 64>, true, false> #2", 256, 230_400),
    "adapt second": ("adapt<AdapterTile<bfloat16, 128, 64>, true, false>", 256, 230_400),
    "adapt_backward first": ("adapt_backward<AdapterTile<bfloat16, 128, 64>, true> #2", 256, 230_400),
    "adapt_backward second": ("adapt_backward<AdapterTile<bfloat16, 128, 64>, false>", 256, 230_400),
    "adapt_backward second, norm": ("adapt_backward<AdapterTile<bfloat16, 128, 64>, true>", 256, 230_400),
    "interpolate": ("interpolate<float, float, float>", 256, 0),
    "interpolate_gradients": ("interpolate_gradients<true, float, float, float>", 256, 0),
    "pool_pieces mean": ("pool_pieces<bfloat16, 0, true>", 128, 0),
    "pool_pieces max": ("pool_pieces<bfloat16, 2, true>", 128, 0),
    "pool_pieces attention": ("pool_pieces<bfloat16, 4, true>", 128, 0),
    "score_gradients": ("score_gradients<bfloat16, true, true>", 128, 0),
    "sum_tokens": ("sum_tokens<float, true>", 256, 0),
    "frame_gradients": ("frame_gradients<float, true, true, true>", 256, 0),
    "attend": ("attend<TensorTiles<bfloat16, 128, 64, 1>>", 128, 81_920),
    "attention_dots": ("attention_dots<true, bfloat16>", 128, 0),
    "query_gradients": ("query_gradients<TensorTiles<bfloat16, 128, 32, 2>>", 128, 65_536),
    "key_gradients": ("key_gradients<TensorTiles<bfloat16, 128, 16, 2>>", 128, 49_152),
    "align ctc": ("align<float, 4, 4>", 128, 0),
    "align monotonic": ("align<float, true, false>", 64, 0),
    "measure_tokens": ("measure_tokens<Shape<float, float, 256, true>>", 256, 0),
    "token_gradients": ("token_gradients<Shape<float, float, 256, true>>", 256, 0),
}


def facts_of(instance: str, threads: int, dynamic_shared: int, usage: dict[str, Usage]) -> KernelFacts:
    name, number = sass.split(instance)
    kernel = next(each for each in sass.kernels(H100.capability).values() if each.instance == name)
    loop = sass.hot_loops(kernel.symbol, H100.capability, full=True)[number - 1]
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
