"""Every Triton kernel, compiled without a GPU: types, layouts, shared memory, spills."""

from __future__ import annotations

import pathlib
import re
import subprocess
from collections.abc import Collection
from itertools import product
from typing import Any

import pytest
import torch
from devices import DEVICES, LEAST_SHARED

from mmkernels.backends import TRITON_INTERPRETED
from mmkernels.ops._common import ACTIVATION_CODES

triton = pytest.importorskip("triton")
if TRITON_INTERPRETED:
    pytest.skip("compiling needs a process without TRITON_INTERPRET", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from mmkernels.ops import _norm_product as norm_product  # noqa: E402
from mmkernels.ops import _triton as shared  # noqa: E402
from mmkernels.ops.adapter import triton as adapter  # noqa: E402
from mmkernels.ops.cif import triton as cif  # noqa: E402
from mmkernels.ops.ctc_align import triton as ctc  # noqa: E402
from mmkernels.ops.distill_loss import triton as distill  # noqa: E402
from mmkernels.ops.layer_mix import triton as mix  # noqa: E402
from mmkernels.ops.merge import triton as merge  # noqa: E402
from mmkernels.ops.monotonic_align import triton as monotonic  # noqa: E402
from mmkernels.ops.segment_attention import triton as attention  # noqa: E402
from mmkernels.ops.segment_pool import triton as pool  # noqa: E402
from mmkernels.ops.segment_pool.schema import REDUCTIONS  # noqa: E402

ELEMENTS = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
#: Bytes of shared memory that one block may have.
SHARED_MEMORY = {device.capability: device.shared_per_block for device in DEVICES}
#: Kernels without a product use what every GPU has: two architectures show them, held to the least limit.
CAPABILITIES = (80, 90)
#: The others compile each tile of a product once. sm_86 has the instructions and the limit of sm_89.
GRAPHICS_CAPABILITIES = (89, 120)
#: A few words that the compiler keeps on the stack cost nothing; a spilled tile is hundreds of bytes.
STACK_BYTES = 32

OF_ELEMENT_TYPE = {
    *("x", "y", "out", "preactivation", "folded_weight"),
    *("grad", "value", "scaled_grad", "addend", "dx"),
    *("left", "right", "up_weight", "hidden", "activated"),
    *("log_probs", "features", "pred", "embeddings", "d_pred"),
    *("q", "k", "v", "dq", "dk", "dv"),
}
PARAMETERS = {
    *("weight", "bias", "norm_weight", "norm_bias", "up_bias"),
    *("d_weight", "d_norm_weight", "d_norm_bias"),
}
INTEGERS = {"rows", "columns", "frames", "tiles", "width", "inner", "taps", "inputs", "outputs"}
INTEGERS |= {"chunks", "first_chunk", "segments", "tokens", "classes", "blank", "vocabulary", "lookback"}
INT64_POINTERS = {"table", "lengths", "ends", "counts", "stops"}
INT64_POINTERS |= {"targets", "input_lengths", "target_lengths", "paths"}
INT64_POINTERS |= {"frame_lengths", "token_lengths", "durations", "ids", "count"}
INT32_POINTERS = {"partial_group", "index", "partial_index", "words", "token", "extents"}


def type_of(name: str, element: str, parameter: str) -> str:
    if name in INTEGERS or name.endswith("_stride"):
        return "i32"
    if name in INT64_POINTERS:
        return "*i64"
    if name in INT32_POINTERS:
        return "*i32"
    if name in ("sums", "facts"):
        return "*fp64"
    if name == "codes":
        return "*i8"
    if name == "scale":
        return "fp32"
    if name in PARAMETERS:
        return f"*{parameter}"
    return f"*{element}" if name in OF_ELEMENT_TYPE else "*fp32"


def compile_kernel(
    kernel: Any,
    capability: int,
    element: str,
    constants: dict[str, Any],
    absent: Collection[str] = (),
    num_warps: int = 4,
    num_stages: int = 3,
    size: int = 16,
    parameter: str = "fp32",
) -> Any:
    """As a launch compiles it for addresses that are multiples of 16, and sizes and strides like ``size``.
    ``parameter`` is the type of the parameters and of their gradients."""
    signature, fixed, attributes = {}, {}, {}
    for position, name in enumerate(kernel.arg_names):
        kind = type_of(name, element, parameter)
        varies = kernel.params[position].do_not_specialize
        if name in constants or name in absent:
            signature[name] = "constexpr"
            fixed[(position,)] = constants.get(name)
        elif kind == "i32" and size == 1 and not varies:
            # Launches turn integers that are 1 into constants.
            signature[name] = "constexpr"
            fixed[(position,)] = 1
        else:
            signature[name] = kind
            if kind.startswith("*") or (kind == "i32" and size % 16 == 0 and not varies):
                attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=fixed, attrs=attributes)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def check_resources(compiled: Any, shared_memory: int, folder: pathlib.Path) -> None:
    assert compiled.metadata.shared <= shared_memory
    binary = folder / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    command = [tool, "-res-usage", str(binary)]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    stack, local = (int(re.search(rf"{kind}:(\d+)", usage)[1]) for kind in ("STACK", "LOCAL"))
    assert stack <= STACK_BYTES, usage
    assert local == 0, usage
    check_buffers(compiled)


def check_buffers(compiled: Any) -> None:
    """Both factors of a product that runs on while the next tiles arrive have as many buffers.

    Triton 3.6 gives a tile that has another use in the loop one less: the copy of a later tile then
    overwrites the one that wgmma still reads.
    """
    code = compiled.asm["ttgir"]
    views = dict(re.findall(r"(%\w+) = ttg\.memdesc_trans (%\w+)", code))
    slots = dict(re.findall(r"(%\w+) = ttg\.memdesc_index .*? : !ttg\.memdesc<(\d+)x", code))
    waits = re.findall(r"warp_group_dot_wait %\w+, (%\w+), (%\w+) \{pendings = [1-9]", code)
    for factors in waits:
        left, right = (slots[views.get(name, name)] for name in factors)
        assert left == right, f"{left} and {right} buffers of the factors {factors}"


MIX_FORWARD = {"EPS": 1e-5, "LAYERS": 3, "STATS_GIVEN": False, "ALIGNMENT": 2, "BLOCK_ROWS": 4, "BLOCK_D": 32}
MIX_BACKWARD = {
    "LAYERS": 3,
    "WRITES_LAYERS": True,
    "ALIGNMENT": 2,
    "ONE_TILE": False,
    "BLOCK_ROWS": 4,
    "BLOCK_D": 32,
}
PRODUCT = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16, "GROUP": 8}
FUSED = {
    **{"WIDTH": 1, "BOTTLENECK": 1, "ACTIVATION": ACTIVATION_CODES["gelu_tanh"]},
    **{"BLOCK_M": 16, "BLOCK_H": 16, "BLOCK_D": 16},
}
FUSED_BACKWARD = {**FUSED, "ADD_GRAD": True}
POOL = {"PIECE": 16, "BLOCK_SEGMENTS": 64, "BLOCK_ROWS": 4, "BLOCK_D": 32}
ATTENTION_DOTS = {"HEADS": 2, "SIZE": 8, "ALIGNMENT": 1, "BLOCK_ROWS": 16, "BLOCK_D": 16}
ATTENTION = {**ATTENTION_DOTS, "SHARING": 1, "SCALE": 0.5}
SMALL_LAUNCHES = [
    (mix.layer_mix_fwd_kernel, {**MIX_FORWARD, "NORM": True}),
    (mix.layer_mix_fwd_kernel, {**MIX_FORWARD, "NORM": False}),
    (mix.layer_mix_bwd_kernel, {**MIX_BACKWARD, "NORM": True}),
    (mix.layer_mix_bwd_kernel, {**MIX_BACKWARD, "NORM": False}),
    (mix.row_dots_kernel, {"LAYERS": 3, "WIDTH": 1, "BLOCK_D": 1}),
    (shared.row_stats_kernel, {"WIDTH": 1, "EPS": 0.0, "BLOCK_D": 1}),
    (norm_product.norm_product_fold_kernel, {"WIDTH": 1, "BLOCK_C": 1}),
    (norm_product.norm_product_fwd_kernel, {**PRODUCT, "WIDTH": 1, "ACTIVATION": 2}),
    (norm_product.norm_product_dx_kernel, {**PRODUCT, "OUTPUTS": 1}),
    (
        norm_product.norm_product_gradient_kernel,
        {"OUTPUTS": 1, "ACTIVATION": 1, "BLOCK_ROWS": 64, "BLOCK_O": 64},
    ),
    (norm_product.norm_product_unfold_kernel, {"OUTPUTS": 1, "BLOCK_O": 16, "BLOCK_C": 64}),
    (adapter.adapter_fwd_kernel, FUSED),
    (adapter.adapter_bwd_kernel, FUSED_BACKWARD),
    (adapter.adapter_product_kernel, {**PRODUCT, "INNER": 1}),
    (merge.merge_sum_kernel, {"SUMS": 64}),
    (pool.segment_pool_stops_kernel, {"BLOCK_SEGMENTS": 64}),
    (pool.segment_pool_fwd_kernel, {**POOL, "REDUCE": 0, "ALIGNMENT": 1}),
    (pool.segment_pool_combine_kernel, {**POOL, "REDUCE": 0}),
    (pool.segment_pool_spread_kernel, {**POOL, "REDUCE": 0, "ACCUMULATE": pool.tl.float32}),
    (pool.segment_pool_dots_kernel, {**POOL, "WIDTH": 1, "ALIGNMENT": 1}),
    (pool.segment_pool_scores_kernel, {"PIECE": 16, "BLOCK_SEGMENTS": 64}),
    (attention.attention_extents_kernel, {"WINDOW": 16, "BLOCK_SEGMENTS": 16}),
    (attention.segment_attention_fwd_kernel, {**ATTENTION, "BLOCK_STEP": 16}),
    (attention.segment_attention_dots_kernel, ATTENTION_DOTS),
    (attention.segment_attention_dq_kernel, {**ATTENTION, "BLOCK_STEP": 16, "OWN_DOTS": True}),
    (attention.segment_attention_dkv_kernel, {**ATTENTION, "BLOCK_STEP": 16}),
    (ctc.ctc_align_fwd_kernel, {"RESCALE_FRAMES": 32, "BLOCK": 256}),
]


@pytest.mark.parametrize("size", [1, 7])
@pytest.mark.parametrize(
    ("kernel", "constants"), SMALL_LAUNCHES, ids=[kernel.__name__ for kernel, _ in SMALL_LAUNCHES]
)
def test_sizes_that_launches_specialise(kernel: Any, constants: dict[str, Any], size: int) -> None:
    """Sizes of 1 become constants of the kernel, odd ones tell nothing of alignment: both must compile."""
    if kernel is mix.layer_mix_fwd_kernel and not constants["NORM"]:
        absent = ["stats", "norm_weight"]
    else:
        absent = []
    compile_kernel(kernel, 90, "bf16", constants, absent, size=size)


each_capability = pytest.mark.parametrize("capability", CAPABILITIES)
each_element = pytest.mark.parametrize("element", ELEMENTS.values(), ids=ELEMENTS)

MIX_CASES = [
    # kind, element, layers, width
    ("plain", "fp32", 13, 768),
    ("plain", "bf16", 25, 1024),
    ("norm", "fp32", 5, 384),
    ("norm", "fp16", 13, 768),
    ("norm", "bf16", 64, 1024),
    ("norm", "bf16", 13, 8192),
    ("affine", "fp32", 13, 1024),
    ("affine", "bf16", 5, 384),
    ("affine", "bf16", 13, 768),
    ("affine", "fp16", 13, 8192),
    ("wide", "bf16", 13, 10000),
]


@each_capability
@pytest.mark.parametrize(("kind", "element", "layers", "width"), MIX_CASES)
def test_mix_forward(
    kind: str, element: str, layers: int, width: int, capability: int, tmp_path: pathlib.Path
) -> None:
    norm = kind != "plain"
    tile = mix.tile_for(width, whole_rows=norm)
    constants = {
        "EPS": 1e-5,
        "LAYERS": layers,
        "NORM": norm,
        "STATS_GIVEN": kind == "wide",
        "ALIGNMENT": 16,
        "BLOCK_ROWS": tile.rows,
        "BLOCK_D": tile.columns,
    }
    affine_arguments = ["norm_weight", "mixed_bias"]
    absent = {"plain": [*affine_arguments, "stats"], "norm": affine_arguments}.get(kind, [])
    compiled = compile_kernel(mix.layer_mix_fwd_kernel, capability, element, constants, absent, tile.warps)
    check_resources(compiled, LEAST_SHARED, tmp_path)
    # The point of ALIGNMENT: layers are loaded 16 bytes at a time, although their addresses come from memory.
    assert re.search(r"ld\.global\S*\.v4\.b32|ld\.global\S*\.v2\.b64", compiled.asm["ptx"])


@each_capability
@pytest.mark.parametrize(("kind", "element", "layers", "width"), MIX_CASES)
def test_mix_backward(
    kind: str, element: str, layers: int, width: int, capability: int, tmp_path: pathlib.Path
) -> None:
    norm, affine = kind != "plain", kind in ("affine", "wide")
    tile = mix.tile_for(width, whole_rows=norm, least_warps=mix.AFFINE_WARPS if affine else 1)
    constants = {
        "LAYERS": layers,
        "NORM": norm,
        "WRITES_LAYERS": True,
        "ALIGNMENT": 16,
        "ONE_TILE": not affine,
        "BLOCK_ROWS": tile.rows,
        "BLOCK_D": tile.columns,
    }
    absent = {"plain": ["stats"], "wide": ["partial_dot"]}.get(kind, [])
    if not affine:
        absent = [*absent, "norm_weight", "norm_bias", "partial_scale", "partial_shift"]
    if kind != "wide":
        absent = [*absent, "row_dots"]
    compiled = compile_kernel(mix.layer_mix_bwd_kernel, capability, element, constants, absent, tile.warps)
    check_resources(compiled, LEAST_SHARED, tmp_path)


@each_capability
@each_element
def test_row_kernels(element: str, capability: int, tmp_path: pathlib.Path) -> None:
    for width in (768, 10000):
        block, warps = shared.row_block(width)
        sizes = {"WIDTH": width, "BLOCK_D": block}
        compiled = compile_kernel(
            shared.row_stats_kernel, capability, element, {**sizes, "EPS": 1e-5}, num_warps=warps
        )
        check_resources(compiled, LEAST_SHARED, tmp_path)
        compiled = compile_kernel(
            mix.row_dots_kernel, capability, element, {**sizes, "LAYERS": 13}, num_warps=warps
        )
        check_resources(compiled, LEAST_SHARED, tmp_path)
        for parameter, absent in product({"fp32", element}, ([], ["norm_weight", "folded_weight"])):
            compiled = compile_kernel(
                norm_product.norm_product_fold_kernel,
                capability,
                element,
                {"WIDTH": width, "BLOCK_C": block},
                absent,
                num_warps=warps,
                parameter=parameter,
            )
            check_resources(compiled, LEAST_SHARED, tmp_path)


@each_capability
def test_table_of_the_most_layers(capability: int, tmp_path: pathlib.Path) -> None:
    count = 4 * 64
    source = ASTSource(
        fn=shared.write_table_kernel,
        signature={"values": ("i64",) * count, "table": "*i64", "COUNT": "constexpr"},
        constexprs={(2,): count},
    )
    assert all(value % 2 == 1 and value >= 2**31 for value in map(shared.encode_for_table, (-1, 0, 1, 2**56)))
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 1})
    check_resources(compiled, LEAST_SHARED, tmp_path)


MERGE_CASES = [
    # target, source, result
    ("float32", "float32", "float32"),
    ("bfloat16", "bfloat16", "bfloat16"),
    ("float16", "float32", "float16"),
    ("float32", "bfloat16", "float32"),
    ("float32", "float32", "bfloat16"),
]


@each_capability
@pytest.mark.parametrize("dtypes", MERGE_CASES)
@pytest.mark.parametrize("alignment", [16, 1])
def test_merge(dtypes: tuple[str, str, str], alignment: int, capability: int, tmp_path: pathlib.Path) -> None:
    types = (merge.ELEMENTS[getattr(torch, dtype)] for dtype in dtypes)
    sizes = {"PAIRS": merge.PAIRS, "CHUNK": merge.CHUNK, "BLOCK": merge.BLOCK, "ALIGNMENT": alignment}
    constants = dict(zip(("TARGET", "SOURCE", "RESULT"), types, strict=True)) | sizes
    # All gradients; that of lam alone, which stores no tensor; those of the targets alone.
    needs = [(True, True, True), (True, False, False), (False, True, False)]
    launches = [(merge.merge_fwd_kernel, constants, ("ld", "st"))]
    for need_lam, need_target, need_source in needs:
        given = {"NEED_LAM": need_lam, "NEED_TARGET": need_target, "NEED_SOURCE": need_source}
        accesses = ("ld", "st") if need_target or need_source else ("ld",)
        launches.append((merge.merge_bwd_kernel, constants | given, accesses))
    for kernel, given, accesses in launches:
        compiled = compile_kernel(kernel, capability, "fp32", given, num_warps=merge.WARPS)
        check_resources(compiled, LEAST_SHARED, tmp_path)
        # Whole chunks move 16 bytes at a time, although addresses and sizes come from memory.
        for access in accesses:
            vectors = re.findall(rf"{access}\.global\S*\.(?:v4\.b32|v2\.b64)", compiled.asm["ptx"])
            assert (len(vectors) > 0) == (alignment == 16)


@each_capability
def test_merge_sums(capability: int, tmp_path: pathlib.Path) -> None:
    compiled = compile_kernel(
        merge.merge_sum_kernel, capability, "fp32", {"SUMS": merge.SUMS}, num_warps=merge.WARPS
    )
    check_resources(compiled, LEAST_SHARED, tmp_path)


POOL_ABSENT = {
    "max": ["scores", "stats", "partial_stats"],
    "attention": ["index", "partial_index"],
}


@each_capability
@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize(("element", "width"), [("fp32", 768), ("bf16", 1024), ("fp16", 33)])
def test_pool(element: str, width: int, reduce: str, capability: int, tmp_path: pathlib.Path) -> None:
    code = REDUCTIONS.index(reduce)
    block = min(triton.next_power_of_2(width), pool.WIDEST_BLOCK)
    tile = {"BLOCK_ROWS": pool.BLOCK_ROWS, "BLOCK_D": block}
    constants = {"PIECE": pool.PIECE, "BLOCK_SEGMENTS": pool.BLOCK_SEGMENTS, **tile}
    none = ["scores", "stats", "partial_stats", "index", "partial_index"]
    absent = POOL_ABSENT.get(reduce, none)
    alignment = 16 if width % 16 == 0 else 1
    launches = [
        (pool.segment_pool_fwd_kernel, {"REDUCE": code, "ALIGNMENT": alignment}),
        (pool.segment_pool_spread_kernel, {"REDUCE": code, "ACCUMULATE": pool.tl.float32}),
    ]
    if reduce != "last":
        launches.append((pool.segment_pool_combine_kernel, {"REDUCE": code}))
    if reduce == "attention":
        launches.append((pool.segment_pool_dots_kernel, {"WIDTH": width, "ALIGNMENT": alignment}))
    for kernel, own in launches:
        missing = [name for name in absent if name in kernel.arg_names]
        warps = max(1, pool.BLOCK_ROWS * block // 1024)
        compiled = compile_kernel(
            kernel, capability, element, {**constants, **own}, missing, warps, size=alignment
        )
        check_resources(compiled, LEAST_SHARED, tmp_path)
        if kernel is pool.segment_pool_fwd_kernel and alignment == 16:
            assert re.search(r"ld\.global\S*\.v4\.b32|ld\.global\S*\.v2\.b64", compiled.asm["ptx"])


ATTENTION_CASES = [
    *product([("float16", 64), ("bfloat16", 128), ("float32", 64), ("float32", 128)], CAPABILITIES),
    *product([("bfloat16", 64), ("bfloat16", 128), ("bfloat16", 264)], GRAPHICS_CAPABILITIES),
]


@pytest.mark.parametrize(("case", "capability"), ATTENTION_CASES)
def test_segment_attention(case: tuple[str, int], capability: int, tmp_path: pathlib.Path) -> None:
    name, size = case
    dtype = getattr(torch, name)
    own_dots = {"OWN_DOTS": dtype == torch.float32}
    for kernel, options in (
        (attention.segment_attention_fwd_kernel, attention.options(size, dtype)),
        (attention.segment_attention_dq_kernel, attention.options(size, dtype, "queries") | own_dots),
        (attention.segment_attention_dkv_kernel, attention.options(size, dtype, "keys")),
    ):
        heads = {"HEADS": 8, "SHARING": 4, "SCALE": 0.1, "ALIGNMENT": 16}
        compiled = compile_kernel(
            kernel,
            capability,
            ELEMENTS[name],
            {**constants_of(options), **heads},
            num_warps=options["num_warps"],
            num_stages=options["num_stages"],
        )
        check_resources(compiled, SHARED_MEMORY[capability], tmp_path)
        assert uses_tensor_cores(compiled) == (dtype.itemsize == 2)


@each_capability
def test_segment_attention_before_the_products(capability: int, tmp_path: pathlib.Path) -> None:
    windows = {"WINDOW": attention.WINDOW, "BLOCK_SEGMENTS": attention.BLOCK_SEGMENTS}
    rows = {"HEADS": 8, "SIZE": 64, "ALIGNMENT": 16, "BLOCK_ROWS": attention.BLOCK_ROWS, "BLOCK_D": 64}
    for kernel, constants in (
        (attention.attention_extents_kernel, windows),
        (attention.segment_attention_dots_kernel, rows),
    ):
        check_resources(compile_kernel(kernel, capability, "bf16", constants), LEAST_SHARED, tmp_path)


@pytest.mark.parametrize("absent", ["dk", "dv", "lse"])
def test_segment_attention_without_a_result(absent: str) -> None:
    kernel = attention.segment_attention_dkv_kernel
    if absent == "lse":
        kernel = attention.segment_attention_fwd_kernel
    compile_kernel(kernel, 90, "bf16", {**ATTENTION, "BLOCK_STEP": 16}, [absent])


@each_capability
def test_pool_stops_and_scores(capability: int, tmp_path: pathlib.Path) -> None:
    segments = {"BLOCK_SEGMENTS": pool.BLOCK_SEGMENTS}
    for kernel, constants in (
        (pool.segment_pool_stops_kernel, segments),
        (pool.segment_pool_scores_kernel, {**segments, "PIECE": pool.PIECE}),
    ):
        compiled = compile_kernel(kernel, capability, "fp32", constants, num_warps=1)
        check_resources(compiled, LEAST_SHARED, tmp_path)


@each_capability
@pytest.mark.parametrize("lengths", [False, True])
@pytest.mark.parametrize(
    ("element", "tokens"), [("fp32", 200), ("bf16", 200), ("fp16", 1500), ("fp32", ctc.MOST_TRITON_TOKENS)]
)
def test_ctc_align(element: str, tokens: int, lengths: bool, capability: int, tmp_path: pathlib.Path) -> None:
    """The scores of all states stay in registers, up to the most tokens that the op takes."""
    block = ctc.block_for(tokens)
    constants = {"RESCALE_FRAMES": ctc.RESCALE, "BLOCK": block}
    absent = [] if lengths else ["input_lengths", "target_lengths"]
    compiled = compile_kernel(
        ctc.ctc_align_fwd_kernel, capability, element, constants, absent, num_warps=ctc.warps_for(block)
    )
    check_resources(compiled, LEAST_SHARED, tmp_path)


CIF = {"BETA": 1.0, "THRESHOLD": 0.5, "WIDTH": 768, "SCALED": True}
CIF |= {"BLOCK_T": cif.BLOCK_T, "BLOCK_FRAMES": cif.BLOCK_FRAMES, "BLOCK_D": cif.BLOCK_D}
CIF_LAUNCHES = [
    (cif.cif_plan_kernel, {}, ("target_lengths",)),
    (cif.cif_plan_kernel, {}, ("lengths",)),
    (cif.cif_tokens_kernel, {}, ()),
    (cif.cif_frames_kernel, {"BLOCK_D": 1024}, ()),
    (cif.cif_frames_kernel, {"BLOCK_D": 1024}, ("dx", "lengths")),
    (cif.cif_frames_kernel, {"BLOCK_D": 1024}, ("dots",)),
    (cif.cif_alpha_kernel, {}, ()),
    (cif.cif_alpha_kernel, {"SCALED": False}, ("lengths",)),
]


@each_capability
@each_element
@pytest.mark.parametrize("launch", CIF_LAUNCHES, ids=lambda launch: launch[0].__name__)
def test_cif(
    launch: tuple[Any, dict[str, Any], tuple[str, ...]], element: str, capability: int, tmp_path: pathlib.Path
) -> None:
    kernel, own, absent = launch
    constants = {name: value for name, value in {**CIF, **own}.items() if name in kernel.arg_names}
    compiled = compile_kernel(kernel, capability, element, constants, absent, num_warps=cif.WARPS)
    check_resources(compiled, LEAST_SHARED, tmp_path)


@each_capability
@each_element
@pytest.mark.parametrize("absent", [(), ("frame_lengths", "token_lengths")])
def test_monotonic_align(
    element: str, absent: tuple[str, ...], capability: int, tmp_path: pathlib.Path
) -> None:
    constants = {"PANEL": monotonic.PANEL, "BITS": monotonic.BITS}
    kernel = monotonic.monotonic_align_fwd_kernel
    compiled = compile_kernel(kernel, capability, element, constants, absent, num_warps=monotonic.WARPS)
    check_resources(compiled, LEAST_SHARED, tmp_path)


DISTILL = {"COSINE_WEIGHT": 5.0, "LEAST": 2.0**-126, "WIDTH": 4096}


@each_capability
@each_element
@pytest.mark.parametrize("absent", [(), ("counts",)])
def test_distill_loss(element: str, absent: tuple[str, ...], capability: int, tmp_path: pathlib.Path) -> None:
    block, warps = distill.token_block(4096)
    for kernel in (distill.distill_loss_tokens_kernel, distill.distill_loss_gradient_kernel):
        constants = {**DISTILL, "BLOCK_D": block}
        compiled = compile_kernel(kernel, capability, element, constants, absent, num_warps=warps)
        check_resources(compiled, LEAST_SHARED, tmp_path)
    mean = distill.distill_loss_mean_kernel
    compiled = compile_kernel(mean, capability, element, {"BLOCK_TOKENS": distill.BLOCK_TOKENS}, absent)
    check_resources(compiled, LEAST_SHARED, tmp_path)


def uses_tensor_cores(compiled: Any) -> bool:
    return re.search(r"\b(wgmma\.mma_async|mma\.sync)", compiled.asm["ptx"]) is not None


def constants_of(options: dict[str, int]) -> dict[str, int]:
    return {name: value for name, value in options.items() if name.isupper()}


PRODUCT_CASES = [
    *product(
        [("float16", "gelu"), ("bfloat16", "relu"), ("float32", "silu"), ("float32", "gelu_tanh")],
        CAPABILITIES,
    ),
    *product([("bfloat16", "relu")], GRAPHICS_CAPABILITIES),
]


@pytest.mark.parametrize(("case", "capability"), PRODUCT_CASES)
def test_products(case: tuple[str, str], capability: int, tmp_path: pathlib.Path) -> None:
    dtype, activation = case
    by_library = shared.library_multiplies(getattr(torch, dtype))
    norm_absent = ["x", "folded_weight"] if by_library else []
    for kernel, own, absent in (
        (
            norm_product.norm_product_fwd_kernel,
            {"WIDTH": 768, "ACTIVATION": ACTIVATION_CODES[activation]},
            norm_absent,
        ),
        (norm_product.norm_product_dx_kernel, {"OUTPUTS": 248}, norm_absent[1:]),
        (adapter.adapter_product_kernel, {"INNER": 384, "inner_stride": 1}, ["right"] if by_library else []),
        (adapter.adapter_product_kernel, {"INNER": 768, "column_stride": 1}, ["right"] if by_library else []),
    ):
        compiled = compile_kernel(
            kernel,
            capability,
            ELEMENTS[dtype],
            {**constants_of(shared.product_options()), **own},
            absent,
            num_warps=shared.PRODUCT_TILE.warps,
            num_stages=shared.PRODUCT_TILE.stages,
        )
        check_resources(compiled, SHARED_MEMORY[capability], tmp_path)
        assert uses_tensor_cores(compiled) != by_library
        if kernel is norm_product.norm_product_fwd_kernel and capability == 90 and not by_library:
            # The reason why "auto" takes this kernel there (mmkernels.backends.PREFERENCES).
            assert "wgmma.mma_async" in compiled.asm["ptx"]


@each_capability
@each_element
def test_project_gradients(element: str, capability: int, tmp_path: pathlib.Path) -> None:
    constants = {
        "OUTPUTS": 250,
        "ACTIVATION": ACTIVATION_CODES["gelu"],
        "BLOCK_ROWS": norm_product.GRADIENT_ROWS,
        "BLOCK_O": norm_product.GRADIENT_COLUMNS,
    }
    compiled = compile_kernel(norm_product.norm_product_gradient_kernel, capability, element, constants)
    check_resources(compiled, LEAST_SHARED, tmp_path)


@each_capability
@each_element
def test_project_unfold(element: str, capability: int, tmp_path: pathlib.Path) -> None:
    constants = {"OUTPUTS": 250, "BLOCK_O": norm_product.UNFOLD_ROWS, "BLOCK_C": norm_product.UNFOLD_COLUMNS}
    compiled = compile_kernel(
        norm_product.norm_product_unfold_kernel, capability, element, constants, parameter=element
    )
    check_resources(compiled, LEAST_SHARED, tmp_path)


ADAPTER_TILES = [("fp16", 64, True), ("bf16", 128, True), ("fp16", 256, True)]
ADAPTER_CASES = [
    *product([*ADAPTER_TILES, ("bf16", 8, False), ("bf16", 192, False)], CAPABILITIES),
    *product(ADAPTER_TILES, GRAPHICS_CAPABILITIES),
]


@pytest.mark.parametrize("kernel", [adapter.adapter_fwd_kernel, adapter.adapter_bwd_kernel])
@pytest.mark.parametrize(("case", "capability"), ADAPTER_CASES)
def test_adapter(case: tuple[str, int, bool], kernel: Any, capability: int, tmp_path: pathlib.Path) -> None:
    element, bottleneck, norm = case
    forward = kernel is adapter.adapter_fwd_kernel
    table = adapter.forward_tiles(SHARED_MEMORY[capability]) if forward else adapter.BACKWARD_TILES
    tile = adapter.fused_tile(table, torch.float16, bottleneck)
    constants = {
        **constants_of(adapter.fused_options(tile, 768, bottleneck)),
        **{"ACTIVATION": ACTIVATION_CODES["gelu"]},
        **({} if forward else {"ADD_GRAD": True}),
    }
    compiled = compile_kernel(
        kernel, capability, element, constants, [] if norm else ["stats"], tile.warps, tile.stages
    )
    check_resources(compiled, SHARED_MEMORY[capability], tmp_path)
    assert uses_tensor_cores(compiled)
    assert re.search(r"cp\.async\.cg\.shared\.global \[[^]]*\], \[[^]]*\], 0x10", compiled.asm["ptx"])


ROW_GRADIENTS = {
    "dx": ["dx"],
    "down": ["scaled_grad", "partial_down_bias"],
    "up": ["activated"],
}


@pytest.mark.parametrize("asked", ROW_GRADIENTS)
@pytest.mark.parametrize("norm", [False, True])
def test_adapter_gradients_alone(asked: str, norm: bool) -> None:
    absent = {name for kind, names in ROW_GRADIENTS.items() if kind != asked for name in names}
    absent |= set() if asked == "dx" else {"folded_weight", "folded_bias"}
    absent |= set() if norm else {"stats"}
    compile_kernel(adapter.adapter_bwd_kernel, 90, "bf16", FUSED_BACKWARD, absent)


@pytest.mark.parametrize("element", ["fp16", "bf16"])
def test_adapter_bias_of_half_precision(element: str, tmp_path: pathlib.Path) -> None:
    tile = adapter.fused_tile(adapter.FORWARD_TILES, torch.float16, 64)
    options = constants_of(adapter.fused_options(tile, 768, 64)), ["stats"], tile.warps, tile.stages
    constants = {**options[0], "ACTIVATION": ACTIVATION_CODES["gelu"]}
    compiled = compile_kernel(
        adapter.adapter_fwd_kernel, 90, element, constants, *options[1:], parameter=element
    )
    check_resources(compiled, SHARED_MEMORY[90], tmp_path)


@pytest.mark.parametrize("norm", [False, True])
def test_adapter_without_gradients(norm: bool) -> None:
    absent = {"up_bias", "addend", "hidden", *([] if norm else ["stats"])}
    compile_kernel(adapter.adapter_fwd_kernel, 90, "bf16", FUSED, absent)


@pytest.mark.parametrize(
    ("start", "width", "dtype", "expected"),
    [
        (0, 16, torch.float32, 16),
        (1, 16, torch.float32, 4),
        (0, 19, torch.float32, 4),
        (0, 12, torch.bfloat16, 8),
        (0, 9, torch.float16, 2),
    ],
)
def test_mix_alignment_holds_for_every_row(start: int, width: int, dtype: torch.dtype, expected: int) -> None:
    """What the forward kernel is told about addresses, which only hardware would find wrong."""
    layer = torch.empty(2 * 3 * width + start, dtype=dtype)[start:].view(2, 3, width)
    inputs = mix.Inputs.checked(
        [torch.empty(2, 3, width, dtype=dtype), layer], torch.ones(2), None, None, None
    )
    assert inputs.alignment() == expected
    assert all(row.data_ptr() % expected == 0 for row in layer.flatten(0, 1))
