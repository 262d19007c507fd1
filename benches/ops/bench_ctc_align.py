"""ctc_align: half a minute of speech at 20 ms a frame, aligned with its characters; one clip, and a batch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benches.case import Candidate, Case, Direction, OpProblem
from benches.registry import kernel_candidates
from mmkernels.ops.ctc_align import ctc_align

#: The characters of wav2vec2-base-960h, the blank among them.
CLASSES = 32
#: How much more likely the model finds the token of a frame than any other: CTC models are sure.
SURE = 6.0


def scores(log_probs: Tensor, targets: Tensor, **options: Any) -> Tensor:
    return ctc_align(log_probs, targets, **options).scores


def reference(log_probs: Tensor, targets: Tensor) -> Tensor:
    return scores(log_probs, targets, backend="reference")


def frame_step(best: Tensor, emission: Tensor, skips: Tensor) -> tuple[Tensor, Tensor]:
    """Scores of all states after a frame, and how far each has come: 0, 1 or 2 states."""
    never = best.new_full((best.shape[0], 2), -torch.inf)
    one, two = torch.cat([never[:, :1], best], 1)[:, :-1], torch.cat([never, best], 1)[:, :-2]
    largest, moved = torch.stack([best, one, torch.where(skips, two, -torch.inf)]).max(0)
    return largest + emission, moved


def best_paths(log_probs: Tensor, targets: Tensor, step: Callable[..., Any]) -> Tensor:
    """The Viterbi path ``(B, T)`` as torch code has it: a few calls for each frame."""
    labels = torch.zeros(targets.shape[0], 2 * targets.shape[1] + 1, dtype=torch.int64, device=targets.device)
    labels[:, 1::2] = targets
    skips = torch.zeros_like(labels, dtype=torch.bool)
    skips[:, 3::2] = targets[:, 1:] != targets[:, :-1]
    frames = log_probs.shape[1]
    emissions = log_probs.gather(2, labels[:, None].expand(-1, frames, -1))
    best = torch.full_like(emissions[:, 0], -torch.inf)
    best[:, :2] = emissions[:, 0, :2]
    moves = [torch.zeros_like(labels)]
    for t in range(1, frames):
        best, moved = step(best, emissions[:, t], skips)
        moves.append(moved)
    last = best.shape[1] - 1
    state = torch.where(best[:, last] > best[:, last - 1], last, last - 1)[:, None]
    states = [state]
    for moved in moves[:0:-1]:
        state = state - moved.gather(1, state)
        states.append(state)
    return labels.gather(1, torch.cat(states[::-1], 1))


def along(log_probs: Tensor, paths: Tensor) -> Tensor:
    return log_probs.gather(2, paths[..., None])[..., 0]


def one_by_one(log_probs: Tensor, targets: Tensor) -> Tensor:
    """As aligners have it: a loop over utterances around a loop over frames."""
    with torch.no_grad():
        pairs = zip(log_probs.split(1), targets.split(1), strict=True)
        paths = torch.cat([best_paths(x, target, frame_step) for x, target in pairs])
    return along(log_probs, paths)


def batched(log_probs: Tensor, targets: Tensor) -> Tensor:
    with torch.no_grad():
        paths = best_paths(log_probs, targets, frame_step)
    return along(log_probs, paths)


@functools.cache
def compiled_step() -> Callable[..., Any]:
    return torch.compile(frame_step, fullgraph=True, dynamic=False)


@torch.library.custom_op("mmkernels_benches::best_paths", mutates_args=())
def best_paths_by_compiled_steps(log_probs: Tensor, targets: Tensor, compiled: bool) -> Tensor:
    """One graph of all frames would take hours to compile: the step is compiled, the loop is Python's."""
    return best_paths(log_probs, targets, compiled_step() if compiled else frame_step)


@best_paths_by_compiled_steps.register_fake
def _(log_probs: Tensor, targets: Tensor, compiled: bool) -> Tensor:
    return targets.new_empty(log_probs.shape[:2])


def by_compiled_steps(log_probs: Tensor, targets: Tensor) -> Tensor:
    compiling = torch.compiler.is_compiling()
    return along(log_probs, best_paths_by_compiled_steps(log_probs.detach(), targets, compiling))


def _case(clips: int, direction: Direction, device: str, tiny: bool, **options: Any) -> Case:
    batch, frames, tokens, classes = (min(clips, 2), 12, 3, 6) if tiny else (clips, 1500, 200, CLASSES)
    values = batch * frames * classes
    written = batch * (frames + tokens) * torch.int64.itemsize
    passes = {"forward": 1, "forward_backward": 2}[direction]
    return Case(
        op="ctc_align",
        shape="wav2vec2-base-960h",
        variant=f"{clips} clips" if clips > 1 else "1 clip",
        direction=direction,
        dtype=torch.float32,
        device=device,
        sizes={"B": batch, "T": frames, "U": tokens, "C": classes},
        minimum_bytes=passes * values * torch.float32.itemsize + written,
        flops=4 * batch * frames * (2 * tokens + 1),
        output_bytes=batch * frames * torch.float32.itemsize,
        candidates=(
            *kernel_candidates(scores, device),
            Candidate("eager, one by one", "papers", one_by_one),
            Candidate("eager, batched", "hand_written", batched),
            Candidate("torch.compile of a frame", "compile", by_compiled_steps),
        ),
        problem=functools.partial(_problem, (batch, frames, tokens, classes), direction, device),
        bound="latency",
        max_rounds=12,
        **options,
    )


def _problem(sizes: tuple[int, int, int, int], direction: Direction, device: str) -> OpProblem:
    batch, frames, tokens, classes = sizes
    targets = torch.randint(1, classes, (batch, tokens))
    # Each token for two frames, in even steps; blanks elsewhere.
    path = torch.zeros(batch, frames, dtype=torch.int64)
    begins = torch.arange(tokens) * frames // tokens
    for offset in range(2):
        path[:, begins + offset] = targets
    logits = torch.randn(batch, frames, classes) + SURE * torch.nn.functional.one_hot(path, classes)
    inputs = {
        "log_probs": logits.log_softmax(2).to(device).requires_grad_(direction != "forward"),
        "targets": targets.to(device),
    }
    return OpProblem(inputs, reference, direction, torch.float32)


def cases(device: str, tiny: bool = False) -> Iterator[Case]:
    for clips in (1, 32):
        for direction in ("forward", "forward_backward"):
            yield _case(clips, direction, device, tiny, headline=direction == "forward")
