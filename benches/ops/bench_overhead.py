"""The overhead of mmkernels: a call on tiny tensors, and the import."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from benches.case import HUBERT_BASE, Candidate, Case, OpProblem, Runner
from benches.ops import bench_merge
from benches.ops.bench_layer_mix import in_place_loop, plain_loop, s3prl
from benches.registry import kernel_candidates
from mmkernels.ops.layer_mix import layer_mix
from mmkernels.ops.layer_mix.reference import layer_mix as reference
from mmkernels.ops.merge.reference import merge as merge_reference


class ImportProblem:
    """Seconds of an import in a fresh interpreter; ``candidate.call`` gives the setup and the module."""

    def runner(self, candidate: Candidate) -> Runner:
        before, module = candidate.call()
        program = f"import time\n{before}\nstart = time.perf_counter()\nimport {module}\n"
        command = [sys.executable, "-c", program + "print(time.perf_counter() - start)"]

        def seconds() -> float:
            # Not in the checkout, whose folders would be imported in place of the installed packages.
            done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=sys.prefix)
            return float(done.stdout)

        return Runner(run=lambda _: [], timer=seconds)

    def expected(self) -> list[Tensor]:
        return []


def cases(device: str, tiny: bool = False) -> Iterator[Case]:
    layers, frames, width = HUBERT_BASE.layers, 4, 64
    item, count = 4, frames * width
    yield Case(
        op="overhead",
        shape="tiny layer_mix",
        variant="",
        direction="call",
        dtype=torch.float32,
        device=device,
        sizes={"L": layers, "B": 1, "T": frames, "D": width},
        minimum_bytes=item * count * (layers + 1),
        flops=2 * layers * count,
        output_bytes=item * count,
        candidates=(
            *kernel_candidates(layer_mix, device),
            Candidate("eager (s3prl)", "papers", s3prl),
            Candidate("eager in place", "hand_written", in_place_loop),
            Candidate("torch.compile", "compile", plain_loop),
        ),
        problem=functools.partial(_tiny_problem, (layers, frames, width), device, 10 if tiny else 1000),
        bound="latency",
        headline=True,
    )
    pairs, width = 72, 4
    count = pairs * width * width
    yield Case(
        op="overhead",
        shape="tiny merge",
        variant="",
        direction="call",
        dtype=torch.float32,
        device=device,
        sizes={"pairs": pairs, "D": width, "groups": pairs // bench_merge.MATRICES},
        minimum_bytes=3 * item * count,
        flops=3 * count,
        output_bytes=item * count,
        candidates=bench_merge.candidates("forward", "", device),
        problem=functools.partial(_tiny_merge, pairs, width, device, 2 if tiny else 100),
        bound="latency",
    )
    yield Case(
        op="overhead",
        shape="fresh interpreter",
        variant="",
        direction="import",
        dtype=torch.float32,
        device=device,
        sizes={},
        minimum_bytes=0,
        flops=0,
        output_bytes=0,
        candidates=(
            Candidate("mmkernels beyond torch", "kernel", lambda: ("import torch", "mmkernels")),
            Candidate("torch", "library", lambda: ("", "torch")),
        ),
        problem=ImportProblem,
        bound="latency",
        headline=True,
        max_rounds=5,
    )


def _tiny_problem(sizes: tuple[int, int, int], device: str, calls: int) -> OpProblem:
    layers, frames, width = sizes
    inputs = {
        "layers": [torch.randn(1, frames, width, device=device) for _ in range(layers)],
        "weights": torch.randn(layers, device=device).softmax(0),
    }
    return OpProblem(inputs, reference, "call", torch.float32, calls)


def _tiny_merge(pairs: int, width: int, device: str, calls: int) -> OpProblem:
    groups = [index // bench_merge.MATRICES for index in range(pairs)]
    inputs = {
        "target": [torch.randn(width, width, device=device) for _ in range(pairs)],
        "source": [torch.randn(width, width, device=device) for _ in range(pairs)],
        "lam": torch.rand(groups[-1] + 1, device=device),
        "groups": groups,
    }
    return OpProblem(inputs, merge_reference, "call", torch.float32, calls)
