"""A case: one line of the summary, its candidates, and the problem that they solve."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

#: "different" computes less or more than the case asks for; it has no rate and no share of the ceiling.
Role = Literal["kernel", "papers", "hand_written", "compile", "library", "different"]
Direction = Literal["forward", "backward", "forward_backward", "training step", "call", "import"]
#: The resource that limits a case; "latency": neither, the time itself is the result.
Bound = Literal["memory", "compute", "latency"]
#: "system": glibc's default allocator, which returns large blocks to the operating system, so that the next
#: ones come with fresh pages. "reused": freed memory stays in the process, for all candidates alike.
Memory = Literal["system", "reused"]


@dataclass(frozen=True)
class Encoder:
    """Hidden states of a real speech encoder: their number (layers and the embedding) and their width."""

    name: str
    layers: int
    width: int


WHISPER_TINY = Encoder("whisper-tiny", 5, 384)
HUBERT_BASE = Encoder("hubert-base", 13, 768)
WAV2VEC2_LARGE = Encoder("wav2vec2-large", 25, 1024)


@dataclass(frozen=True)
class Candidate:
    """One way to compute a case.

    Attributes:
        call: a function of the inputs for ``OpProblem``; makes the model for ``StepProblem``.
        lay_out: converts the inputs to the layout of this candidate, off the clock.
        collect: converts its results to the layout of the reference, off the clock.
    """

    name: str
    role: Role
    call: Callable[..., Any]
    lay_out: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    collect: Callable[[list[Tensor]], list[Tensor]] | None = None


@dataclass(frozen=True)
class Case:
    """An op or a method at one size, in one direction, with everything that can compute it.

    Attributes:
        shape: name of the real model.
        variant: options of the op, such as ``"norm+affine"``.
        minimum_bytes: bytes that any implementation reads and writes, every tensor once.
        flops: floating-point operations of the definition.
        output_bytes: size of the results.
        problem: makes the inputs; called when the case is measured.
        tolerance: largest relative error of a correct result, where the harness's table does not fit.
        max_rounds: upper limit, for cases that take long and vary little.
    """

    op: str
    shape: str
    variant: str
    direction: Direction
    dtype: torch.dtype
    device: str
    sizes: dict[str, int]
    minimum_bytes: int
    flops: int
    output_bytes: int
    candidates: tuple[Candidate, ...]
    problem: Callable[[], Problem] = field(repr=False)
    bound: Bound = "memory"
    memory: Memory = "system"
    headline: bool = False
    tolerance: float | None = None
    max_rounds: int = 60

    @property
    def id(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        parts = [self.op, self.shape, self.variant, self.direction, dtype, self.memory]
        return "/".join(part for part in parts if part)


@dataclass(frozen=True)
class Runner:
    """The timed call, ``run(prepare())``, of which ``prepare`` is off the clock.

    Attributes:
        run: returns tensors, which are freed off the clock.
        collect: converts them to the tensors that are compared with the expected results.
        calls: how many calls ``run`` makes, where one is too short for the clock.
        timer: gives the seconds of one sample, for a candidate that measures itself in another process.
        warm: the check has warmed it up; for calls that take seconds.
        queued: on a GPU, the host queues the call while the device waits, so that the time of the host does
            not count; the direction "call" measures that.
        facts: more facts for the record, which ``run`` may add.
    """

    run: Callable[[Any], list[Tensor]]
    prepare: Callable[[], Any] = lambda: None
    collect: Callable[[list[Tensor]], Sequence[Tensor]] = list
    calls: int = 1
    timer: Callable[[], float] | None = None
    warm: bool = False
    queued: bool = False
    facts: dict[str, Any] = field(default_factory=dict)


class Problem(Protocol):
    def runner(self, candidate: Candidate) -> Runner: ...

    def expected(self) -> list[Tensor]:
        """The results in float64; empty where there is nothing to compare. Called before any runner runs."""
        ...


@dataclass(frozen=True)
class OpProblem:
    """A function of tensors, forward or backward, whose result is a tensor or a list of tensors.

    Attributes:
        inputs: keyword arguments: tensors, lists of tensors, plain values. Gradients are taken for tensors
            that require them.
        reference: the definition of the op, for any dtype.
        direction: "forward" and "call" run without gradients.
        dtype: of the incoming gradient, which is the same for every candidate.
        calls: calls per sample; more than one only for the direction "call".
        gradient_mask: where the incoming gradient is not zero; everywhere if None.
    """

    inputs: dict[str, Any]
    reference: Callable[..., Tensor | list[Tensor]]
    direction: str
    dtype: torch.dtype
    calls: int = 1
    gradient_mask: Tensor | None = None
    _gradients: dict[torch.dtype, list[Tensor]] = field(default_factory=dict, init=False)

    def runner(self, candidate: Candidate) -> Runner:
        call = candidate.call
        if candidate.role == "compile":
            call = torch.compile(call, fullgraph=True, dynamic=False)
        inputs = self.inputs if candidate.lay_out is None else candidate.lay_out(self.inputs)
        runner = self._runner(call, inputs)
        return runner if candidate.collect is None else replace(runner, collect=candidate.collect)

    def expected(self) -> list[Tensor]:
        inputs = {name: in_double(value) for name, value in self.inputs.items()}
        runner = self._runner(self.reference, inputs)
        return [tensor.detach() for tensor in runner.run(runner.prepare())]

    def _runner(self, call: Callable[..., Tensor | list[Tensor]], inputs: dict[str, Any]) -> Runner:
        leaves = [tensor for tensor in _tensors(inputs) if tensor.requires_grad]

        def results() -> list[Tensor]:
            out = call(**inputs)
            return [out] if isinstance(out, Tensor) else list(out)

        @torch.no_grad()
        def forward(_: None) -> list[Tensor]:
            return results()

        @torch.no_grad()
        def repeated(_: None) -> list[Tensor]:
            for _ in range(self.calls - 1):
                call(**inputs)
            return results()

        def forward_backward(_: None) -> list[Tensor]:
            out = results()
            return [*out, *torch.autograd.grad(out, leaves, self._gradients_for(out))]

        def backward(out: list[Tensor]) -> list[Tensor]:
            return list(torch.autograd.grad(out, leaves, self._gradients_for(out)))

        if self.direction == "backward":
            return Runner(backward, prepare=results, queued=True)
        if self.direction == "call":
            return Runner(repeated, calls=self.calls)
        run = forward_backward if self.direction == "forward_backward" else forward
        return Runner(run, queued=True)

    def _gradients_for(self, out: list[Tensor]) -> list[Tensor]:
        dtype = out[0].dtype
        if dtype not in self._gradients:
            generator = torch.Generator().manual_seed(7)
            self._gradients[dtype] = [self._gradient(tensor, generator) for tensor in out]
        return self._gradients[dtype]

    def _gradient(self, out: Tensor, generator: torch.Generator) -> Tensor:
        gradient = torch.randn(out.shape, generator=generator).to(out.device, self.dtype)
        if self.gradient_mask is not None:
            gradient *= self.gradient_mask
        return gradient.to(out.dtype)


def _tensors(inputs: dict[str, Any]) -> Iterator[Tensor]:
    for value in inputs.values():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, Tensor):
                yield item


def in_double(value: Any) -> Any:
    """Floating-point tensors, also in lists, as float64; everything else as it is."""
    if isinstance(value, list):
        return [in_double(item) for item in value]
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().double().requires_grad_(value.requires_grad)
    return value
