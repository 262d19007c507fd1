"""The torch-free check of all CUDA kernels (csrc/tools), run on the CPU under AddressSanitizer and UBSan."""

from __future__ import annotations

import pytest
import simt_build

SOURCES = sorted(
    path.relative_to(simt_build.ROOT)
    for folder, pattern in (("cuda", "*.cu"), ("tools", "gpu_check*.cpp"))
    for path in (simt_build.ROOT / "csrc" / folder).glob(pattern)
)


@pytest.mark.slow
@pytest.mark.skipif(simt_build.missing_tools() is not None, reason=str(simt_build.missing_tools()))
def test_kernels_are_right_and_stay_inside_their_memory() -> None:
    done = simt_build.run_program(simt_build.build("gpu_check", SOURCES, sanitize=True), timeout=900)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert " 0 failures" in done.stdout
