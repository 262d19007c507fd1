"""The torch-free check of all CUDA kernels (tests/gpu/driver), run on the CPU under ASan and UBSan."""

from __future__ import annotations

import pytest
import simt_build

from mmkernels._info import op_names

SOURCES = sorted(
    path.relative_to(simt_build.ROOT)
    for pattern in ("csrc/cuda/*.cu", "tests/gpu/driver/*.cpp")
    for path in simt_build.ROOT.glob(pattern)
)


@pytest.mark.slow
@pytest.mark.parametrize("op", op_names())
@pytest.mark.skipif(simt_build.missing_tools() is not None, reason=str(simt_build.missing_tools()))
def test_kernels_are_right_and_stay_inside_their_memory(op: str) -> None:
    program = simt_build.build("gpu_check", SOURCES, sanitize=True)
    done = simt_build.run_program(program, op, timeout=900)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert " 0 failures" in done.stdout
