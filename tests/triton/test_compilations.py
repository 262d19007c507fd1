"""How often Triton compiles while the lengths of batches vary, as in training: counted without a GPU, by the
keys that a launch on sm_90 would look up."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch

from mmkernels.backends import TRITON_INTERPRETED

triton = pytest.importorskip("triton")
if TRITON_INTERPRETED:
    pytest.skip("compiling needs a process without TRITON_INTERPRET", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import make_backend  # noqa: E402
from triton.runtime.jit import JITFunction, compute_cache_key, create_function_from_signature  # noqa: E402

from mmkernels.ops._common import ACTIVATION_CODES  # noqa: E402
from mmkernels.ops.adapter import triton as adapter  # noqa: E402
from mmkernels.ops.cif import triton as cif  # noqa: E402
from mmkernels.ops.ctc_align import triton as ctc  # noqa: E402
from mmkernels.ops.distill_loss import triton as distill  # noqa: E402
from mmkernels.ops.layer_mix import triton as mix  # noqa: E402
from mmkernels.ops.layer_project import triton as project  # noqa: E402
from mmkernels.ops.merge import triton as merge  # noqa: E402
from mmkernels.ops.monotonic_align import triton as monotonic  # noqa: E402
from mmkernels.ops.segment_attention import triton as attention  # noqa: E402
from mmkernels.ops.segment_pool import triton as pool  # noqa: E402
from mmkernels.ops.segment_pool.schema import REDUCTIONS  # noqa: E402

BACKEND = make_backend(GPUTarget("cuda", 90, 32))
BATCH = 3
GELU = ACTIVATION_CODES["gelu"]


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """For each kernel the compilations that its launches ask for; nothing is compiled or run."""
    found: dict[str, set[str]] = defaultdict(set)

    def launch(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        bind = create_function_from_signature(kernel.signature, kernel.params, BACKEND)
        _, specialization, rest = bind(*args, **options, debug=False)
        found[kernel.__name__].add(compute_cache_key({}, specialization, rest))

    monkeypatch.setattr(JITFunction, "run", launch)
    monkeypatch.setattr(adapter, "shared_memory_limit", lambda device: 227 * 1024)
    return found


def mix_step(frames: int, dtype: torch.dtype, width: int) -> None:
    layers = [torch.zeros(BATCH, frames, width, dtype=dtype) for _ in range(4)]
    affine = torch.ones(4, width), torch.zeros(4, width)
    lengths = torch.full((BATCH,), frames)
    for norm_weight, norm_bias, norm in ((None, None, False), (None, None, True), (*affine, True)):
        arguments = (layers, torch.ones(4), norm_weight, norm_bias, lengths)
        out, stats = mix.layer_mix_fwd(*arguments, norm, 1e-5, True)
        need_affine = norm_weight is not None
        mix.layer_mix_bwd(out, *arguments, stats, norm, True, need_affine, [0, 3])


def project_step(rows: int, dtype: torch.dtype, width: int, of: torch.dtype = torch.float32) -> None:
    x = torch.zeros(rows, 2, width, dtype=dtype)
    parameters = torch.zeros(2, 48, width), torch.zeros(2, 48), torch.ones(2, width), torch.zeros(2, width)
    arguments = (x, *(parameter.to(of) for parameter in parameters))
    y, value, stats = project.layer_project_fwd(*arguments, 1e-5, GELU, True)
    project.layer_project_bwd(y, *arguments, value, stats, GELU, True, True, True)


def adapter_step(rows: int, dtype: torch.dtype, width: int, of: torch.dtype = torch.float32) -> None:
    x, residual = torch.zeros(2, rows, width, dtype=dtype).unbind()
    zeros = functools.partial(torch.zeros, dtype=of)
    down, up = (zeros(32, width), zeros(32)), (zeros(width, 32), zeros(width))
    norm = torch.ones(width, dtype=of), zeros(width)
    out, hidden, stats = adapter.adapter_fwd(x, *down, *up, residual, *norm, 1.0, 1e-5, GELU, False, True)
    adapter.adapter_bwd(out, x, *down, up[0], *norm, hidden, stats, 1.0, GELU, False, True, True, True, True)


def merge_step(size: int, dtype: torch.dtype, count: int) -> None:
    """Also of other numbers of pairs: an odd number of small ones, and one long tensor."""
    target = [torch.zeros(size + index, 2, dtype=dtype) for index in range(size % 40 + 1)]
    target.append(torch.zeros(count * size, dtype=dtype))
    lam, groups = torch.ones(3), [index % 3 for index in range(len(target))]
    out = merge.merge_fwd(target, target, lam, groups, dtype)
    merge.merge_bwd(out, target, target, lam, groups, True, [0], list(range(len(target))))


def pool_step(frames: int, dtype: torch.dtype, width: int) -> None:
    """Also of other numbers of segments. Rows of at most a piece need one kernel less."""
    x = torch.zeros(BATCH, frames, width, dtype=dtype)
    ends = torch.zeros(BATCH, frames // 4 + 1, dtype=torch.int64)
    for code, reduce in enumerate(REDUCTIONS):
        scores = torch.zeros(BATCH, frames) if reduce == "attention" else None
        out, stats, index = pool.segment_pool_fwd(x, ends, scores, None, code, True)
        for need_scores in {False, scores is not None}:
            saved = (out, x, ends, scores, None, stats, index, frames, code)
            pool.segment_pool_bwd(*saved, True, need_scores)


def attention_step(frames: int, dtype: torch.dtype, size: int) -> None:
    """Heads as a projection leaves them, and dense ones; also of other numbers of segments."""
    ends = torch.zeros(BATCH, frames // 4 + 1, dtype=torch.int64)
    rows = torch.zeros(3, BATCH, frames, 4, size, dtype=dtype)
    for q, k, v in (rows.transpose(2, 3), rows.transpose(2, 3).contiguous()):
        out, lse, extents = attention.segment_attention_fwd(q, k[:, :2], v[:, :2], ends, frames, None, True)
        saved = (q, k[:, :2], v[:, :2], out, lse, extents, None)
        attention.segment_attention_bwd(out, *saved, True, True, True)


def cif_step(frames: int, dtype: torch.dtype, width: int) -> None:
    """Also of other numbers of tokens, with target lengths and without."""
    x, alpha = torch.zeros(BATCH, frames, width, dtype=dtype), torch.ones(BATCH, frames)
    lengths = torch.full((BATCH,), frames)
    for targets, tokens in ((None, frames), (lengths, frames), (None, 1), (None, 7)):
        out, counts, _, *plan = cif.cif_fwd(x, alpha, lengths, targets, 1.0, 0.5, tokens)
        scaled = targets is not None
        cif.cif_bwd(out, x, alpha, lengths, counts, *plan, 1.0, scaled, True, True)


def monotonic_step(frames: int, dtype: torch.dtype, tokens: int) -> None:
    """With lengths and without, and of other numbers of tokens."""
    for count in {1, tokens, frames}:
        x = torch.zeros(BATCH, frames, count, dtype=dtype)
        lengths = torch.full((BATCH,), frames)
        monotonic.monotonic_align_fwd(x, None, None)
        monotonic.monotonic_align_fwd(x, lengths, lengths)
        monotonic.monotonic_align_fwd(x.mT.contiguous().mT, lengths, None)


def distill_step(tokens: int, dtype: torch.dtype, width: int) -> None:
    """With counts and without, and of one row."""
    table = torch.zeros(50, width)
    for batch in (1, BATCH):
        pred = torch.zeros(batch, tokens, width, dtype=dtype)
        ids = torch.zeros(batch, tokens, dtype=torch.int64)
        for counts in (None, torch.full((batch,), tokens)):
            loss, *saved = distill.distill_loss_fwd(pred, table, ids, counts, 5.0)
            distill.distill_loss_bwd(loss, pred, table, ids, counts, *saved, 5.0)


def narrow_step(step: Callable[..., None], rows: int, dtype: torch.dtype, width: int) -> None:
    step(rows, dtype, width, dtype)


#: Step, width, frames: 1, multiples of 16, powers of two, and others.
CASES: dict[str, tuple[Callable[[int, torch.dtype, int], None], int, tuple[int, ...]]] = {
    "layer_mix": (mix_step, 64, (1, 2, 15, 16, 31, 48, 64, 333, 1024)),
    "layer_mix of wide rows": (mix_step, mix.WIDEST_HELD_ROW + 16, (1, 2, 15, 16, 31, 48)),
    "layer_project": (project_step, 64, (1, 2, 15, 16, 31, 48, 64, 333, 1024)),
    "adapter": (adapter_step, 64, (1, 2, 15, 16, 31, 48, 64, 333, 1024)),
    "merge": (merge_step, 5000, (1, 2, 15, 16, 31, 48, 64, 333)),
    "segment_pool": (pool_step, 64, (1, 2, 15, 16, 31, 48, 64, 65, 333)),
    "segment_pool of odd rows": (pool_step, 33, (1, 2, 15, 16, 31, 48, 64, 65, 333)),
    "segment_attention": (attention_step, 64, (1, 2, 15, 16, 31, 48, 64, 65, 333)),
    "cif": (cif_step, 64, (1, 2, 15, 16, 31, 48, 64, 333)),
    "distill_loss": (distill_step, 64, (1, 2, 15, 16, 31, 48, 64, 333)),
    "monotonic_align": (monotonic_step, 64, (1, 2, 15, 16, 31, 48, 64, 333)),
    "layer_project of a half-precision model": (
        functools.partial(narrow_step, project_step),
        *(64, (1, 2, 15, 16, 31, 48)),
    ),
    "adapter of a half-precision model": (functools.partial(narrow_step, adapter_step), 64, (1, 2, 15, 16)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def test_lengths_compile_nothing_again(
    case: str, dtype: torch.dtype, keys: dict[str, set[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a short and a long batch: chunks of several tiles are another kernel than those of one."""
    monkeypatch.setattr(mix, "MOST_AFFINE_CHUNKS", 4)
    step, width, lengths = CASES[case]
    step(lengths[0], dtype, width)
    step(lengths[-1], dtype, width)
    before = {kernel: len(found) for kernel, found in keys.items()}
    assert sum(before.values()) >= 3
    for frames in lengths:
        step(frames, dtype, width)
    assert {kernel: len(found) for kernel, found in keys.items()} == before


def test_sizes_of_a_batch_compile_ctc_align_once(keys: dict[str, set[str]]) -> None:
    """But for tokens, which need another kernel past each power of two from 256 on."""
    for frames in (1, 2, 15, 16, 48, 333):
        for tokens in (0, 1, 16, 100, 255):
            targets = torch.ones(BATCH, tokens, dtype=torch.int64)
            lengths = torch.full((BATCH,), frames)
            ctc.ctc_align_fwd(torch.zeros(BATCH, frames, 32), targets, lengths, lengths, 0)
    assert {kernel: len(found) for kernel, found in keys.items()} == {"ctc_align_fwd_kernel": 1}
