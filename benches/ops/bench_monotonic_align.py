"""monotonic_align: the alignment of speech and text in the training of a VITS, and in UnitY2's aligner."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benches.case import Candidate, Case, OpProblem
from benches.registry import kernel_candidates
from mmkernels.ops.monotonic_align import monotonic_align
from mmkernels.ops.monotonic_align.reference import monotonic_align as reference


def python_loops(log_probs: Tensor, frame_lengths: Tensor, token_lengths: Tensor) -> Tensor:
    """As UnitY2's aligner has it: NumPy arrays, a double loop in Python, one utterance after the other."""
    durations = torch.zeros(log_probs.shape[0], log_probs.shape[2], dtype=torch.int64)
    for row, x in enumerate(log_probs.cpu().numpy()):
        durations[row] = torch.from_numpy(_search(x, int(frame_lengths[row]), int(token_lengths[row])))
    return durations.to(log_probs.device)


def _search(x: np.ndarray, frames: int, tokens: int) -> np.ndarray:
    q = np.full((frames, tokens), -np.inf, x.dtype)
    q[:, 0] = np.cumsum(x[:frames, 0])
    for t in range(1, frames):
        for u in range(1, min(t + 1, tokens)):
            q[t, u] = max(q[t - 1, u - 1], q[t - 1, u]) + x[t, u]
    return _trace(q, frames, tokens, x.shape[1])


def _trace(q: np.ndarray, frames: int, tokens: int, width: int) -> np.ndarray:
    durations = np.zeros(width, np.int64)
    u = tokens - 1
    for t in reversed(range(frames)):
        durations[u] += 1
        if t > 0 and u > 0 and q[t - 1, u - 1] >= q[t - 1, u]:
            u -= 1
    return durations


def numpy_batch(log_probs: Tensor, frame_lengths: Tensor, token_lengths: Tensor) -> Tensor:
    """The best form without a kernel: NumPy over batch and tokens, a loop over frames."""
    x = log_probs.cpu().numpy()
    batch, frames, tokens = x.shape
    comes = np.empty((frames, batch, tokens), bool)
    score = np.full((batch, tokens + 1), -np.inf, x.dtype)
    score[:, 0] = 0
    for t in range(frames):
        np.greater_equal(score[:, :-1], score[:, 1:], out=comes[t])
        score[:, 1:] = x[:, t] + np.maximum(score[:, :-1], score[:, 1:])
        score[:, 0] = -np.inf
    durations = np.zeros((batch, tokens), np.int64)
    rows, lengths = np.arange(batch), frame_lengths.cpu().numpy()
    current = token_lengths.cpu().numpy() - 1
    for t in reversed(range(frames)):
        inside = t < lengths
        durations[rows, current] += inside
        current = current - (inside & (current > 0) & (comes[t, rows, current] | (current == t)))
    return torch.from_numpy(durations).to(log_probs.device)


def library() -> tuple[Candidate, ...]:
    """Glow-TTS's Cython, as the package monotonic-alignment-search has it, where it is installed."""
    if importlib.util.find_spec("monotonic_alignment_search") is None:
        return ()
    from monotonic_alignment_search import maximum_path_cython

    def call(value: Tensor, mask: Tensor) -> Tensor:
        path: Tensor = maximum_path_cython(value, mask)
        return path

    name = f"Cython (monotonic-alignment-search {importlib.metadata.version('monotonic-alignment-search')})"
    return (Candidate(name, "library", call, tokens_by_frames, frames_of_tokens),)


def tokens_by_frames(inputs: dict[str, Any]) -> dict[str, Any]:
    """The layout of the library, and its mask."""
    value = inputs["log_probs"].transpose(1, 2).contiguous()
    tokens = torch.arange(value.shape[1]) < inputs["token_lengths"][:, None].cpu()
    frames = torch.arange(value.shape[2]) < inputs["frame_lengths"][:, None].cpu()
    return {"value": value, "mask": (tokens[:, :, None] & frames[:, None]).to(value)}


def frames_of_tokens(paths: list[Tensor]) -> list[Tensor]:
    return [path.sum(2) for path in paths]


def as_float(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Results are compared as floating-point numbers."""
    return lambda **inputs: function(**inputs).to(torch.float32)


def candidates(device: str) -> tuple[Candidate, ...]:
    """No torch.compile: it would unroll the loop over frames, for many minutes."""
    rows = (
        *kernel_candidates(monotonic_align, device),
        Candidate("Python loops (UnitY2)", "papers", python_loops),
        Candidate("NumPy over the batch", "hand_written", numpy_batch),
    )
    return (*(Candidate(row.name, row.role, as_float(row.call)) for row in rows), *library())


def _case(
    name: str, batch: int, frames: int, tokens: int, device: str, tiny: bool, headline: bool = False
) -> Case:
    if tiny:
        frames, tokens = 30, 10
    return Case(
        op="monotonic_align",
        shape=name,
        variant="",
        direction="forward",
        dtype=torch.float32,
        device=device,
        sizes={"B": batch, "T": frames, "U": tokens},
        minimum_bytes=batch * (4 * frames * tokens + 8 * tokens),
        flops=2 * batch * frames * tokens,
        output_bytes=4 * batch * tokens,
        candidates=candidates(device),
        problem=functools.partial(_problem, batch, frames, tokens, device),
        headline=headline,
        max_rounds=20,
    )


def _problem(batch: int, frames: int, tokens: int, device: str) -> OpProblem:
    """Utterances of three quarters of the longest to all of it, as in batches of similar lengths."""
    share = torch.linspace(1, 0.75, batch)
    inputs: dict[str, Any] = {
        "log_probs": torch.randn(batch, frames, tokens, device=device).log_softmax(-1),
        "frame_lengths": (share * frames).long().to(device),
        "token_lengths": (share * tokens).long().to(device),
    }
    return OpProblem(inputs, _reference, "forward", torch.float32)


def _reference(log_probs: Tensor, **lengths: Tensor) -> Tensor:
    """Sums in the precision of the kernels, which decides between paths that are almost equally good."""
    return reference(log_probs.float(), **lengths).double()


def cases(device: str, tiny: bool = False) -> Iterator[Case]:
    yield _case("vits", 16, 800, 200, device, tiny, headline=True)
    yield _case("unity2", 8, 1500, 300, device, tiny)
