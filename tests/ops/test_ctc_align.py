"""ctc_align: the shared tests of all ops, on its scores; optimality, ties, ragged batches, memory."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import pytest
import torch
from ctc_cases import KINDS, Problem, all_paths, check_row, path_with_little_slack, random_problem
from hypothesis import strategies
from torch import Tensor
from torch.func import grad, jvp, vmap

from mmkernels import ctc_align
from mmkernels.nn import CTCAligner
from mmkernels.ops.ctc_align import Alignment, TokenSpan, with_wildcard
from mmkernels.ops.ctc_align import reference as definition
from mmkernels.ops.ctc_align.schema import OPS
from op_tests import Call, OpSpec, Shape, backends, op_tests
from op_tests.derivatives import DERIVATIVES, Derivatives
from op_tests.inference import InferenceTensors
from op_tests.running import of_leaves
from op_tests.torch_features import Overwriting

each_backend = pytest.mark.parametrize("backend", [*backends("cpu", torch.float32), "reference"])


def scores(**arguments: Any) -> Tensor:
    """The differentiable result, in the dtype of the input: exact, as it is a part of the input."""
    return ctc_align(**arguments).scores.to(arguments["log_probs"].dtype)


def reference(**arguments: Any) -> Tensor:
    return scores(**arguments, backend="reference")


def make(shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Call:
    batch, frames, tokens, classes = (shape[name] for name in ("B", "T", "U", "C"))
    log_probs = torch.randn(batch, frames, classes, generator=generator).log_softmax(2)
    targets = torch.randint(1, classes, (batch, tokens), generator=generator)
    arguments: dict[str, Any] = {"log_probs": log_probs.to(device, dtype), "targets": targets.to(device)}
    if shape.get("ragged"):
        arguments["input_lengths"] = (frames - torch.arange(batch) * 3 % max(frames // 2, 1)).to(device)
        arguments["target_lengths"] = (tokens - torch.arange(batch) * 2 % (tokens + 1)).to(device)
    return Call(arguments, ("log_probs",)).detached()


def raw(call: Call) -> list[tuple[Any, tuple[Any, ...]]]:
    given = call.detached(requires_grad=False).arguments
    tensors = (given.get(name) for name in ("log_probs", "targets", "input_lengths", "target_lengths"))
    return [(OPS["native"][0], (*tensors, 0))]


def alone(call: Call, index: int) -> tuple[Call, Any]:
    """Without the padding that it has in the batch."""
    given = call.arguments
    frames, tokens = given["log_probs"].shape[1], given["targets"].shape[1]
    if "input_lengths" in given:
        frames, tokens = int(given["input_lengths"][index]), int(given["target_lengths"][index])
    row = slice(index, index + 1)
    single = {"log_probs": given["log_probs"][row, :frames], "targets": given["targets"][row, :tokens]}
    return Call(single, call.differentiable), lambda out: out[row, :frames]


def shapes() -> Any:
    sizes = strategies.integers
    return strategies.fixed_dictionaries(
        {
            "B": sizes(1, 4),
            "T": sizes(1, 40),
            "U": sizes(0, 9),
            "C": sizes(2, 9),
            "ragged": strategies.booleans(),
        }
    )


SPEC = OpSpec(
    name="ctc_align",
    function=scores,
    reference=reference,
    make=make,
    cases={
        "plain": {"B": 3, "T": 21, "U": 7, "C": 6},
        "ragged": {"B": 5, "T": 70, "U": 12, "C": 9, "ragged": True},
        "many_classes": {"B": 3, "T": 12, "U": 5, "C": 301},
    },
    zero_cases={
        "no_utterances": {"B": 0, "T": 5, "U": 2, "C": 3},
        "no_frames": {"B": 2, "T": 0, "U": 2, "C": 3},
        "no_tokens": {"B": 2, "T": 5, "U": 0, "C": 3},
        "nothing": {"B": 2, "T": 0, "U": 0, "C": 2},
    },
    raw=raw,
    shapes=shapes,
    alone=alone,
    dynamic=({"T": 21, "U": 7}, {"T": 33, "U": 5}),
    activations=("log_probs",),
    casts_parameters=True,  # the scores of the path, to float32
)
#: Derivatives of any order are those of a gather and need no refusal; the inputs are not kept; the tests of
#: inference tensors need a parameter.
LEFT_OUT = (Derivatives, Overwriting, InferenceTensors)
TestCtcAlign = op_tests(SPEC, without=LEFT_OUT)


def same(found: Alignment, problem: Problem) -> None:
    """The same bits as the reference, but for the order in which a total is added."""
    paths, ends, total = problem.expected()
    assert torch.equal(found.paths, paths)
    assert torch.equal(found.ends, ends)
    assert torch.equal(found.feasible, total > -torch.inf)
    torch.testing.assert_close(found.total, total, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
def test_the_reference_is_the_best_of_all_paths(seed: int, kind: str) -> None:
    problem = random_problem(seed, kind, torch.float64, frames=6, tokens=3, classes=3)
    found = ctc_align(**problem.arguments(), backend="reference")
    for row in range(problem.targets.shape[0]):
        frames, tokens = int(problem.input_lengths[row]), int(problem.target_lengths[row])
        paths = all_paths(frames, problem.targets[row, :tokens].tolist(), problem.blank)
        totals = [float(problem.log_probs[row][range(frames), path].sum()) for path in map(list, paths)]
        best = max(totals, default=-torch.inf)
        assert float(found.total[row]) == pytest.approx(best)
        assert bool(found.feasible[row]) == (best > -torch.inf)
        if found.feasible[row]:
            check_row(problem, row, found.paths[row], found.ends[row], best)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_backend_gives_the_same_path(kind: str, dtype: torch.dtype, backend: str) -> None:
    """Thousands of utterances, with ties in most of them, short and longer than the rescaling period."""
    for seed in range(12):
        small = random_problem(seed, kind, dtype, batch=64)
        large = random_problem(seed, kind, dtype, batch=6, frames=101, tokens=30, classes=5 + 9 * (seed % 3))
        for problem in (small, large):
            found = ctc_align(**problem.arguments(), backend=backend)
            same(found, problem)
            for row in found.feasible.nonzero()[:, 0].tolist():
                check_row(problem, row, found.paths[row], found.ends[row], float(found.total[row]))


@each_backend
def test_ties_take_the_nearest_state(backend: str) -> None:
    """With equal scores everywhere each token comes as early as it can, and stays as long."""
    found = ctc_align(torch.zeros(1, 6, 3).log_softmax(2), torch.tensor([[1, 2]]), backend=backend)
    assert found.paths.tolist() == [[1, 2, 2, 2, 2, 2]]
    repeated = ctc_align(torch.zeros(1, 6, 3).log_softmax(2), torch.tensor([[1, 1]]), backend=backend)
    assert repeated.paths.tolist() == [[1, 0, 1, 1, 1, 1]]


@each_backend
def test_a_tie_of_one_and_two_steps_is_not_lost(backend: str) -> None:
    """torchaudio's CUDA kernel stays where it is then, and misses the best path."""
    never = -torch.inf
    log_probs = torch.tensor([[[-1.0, -1.0, never], [-1.0, -1.0, -5.0], [-9.0, -9.0, -1.0]]])
    found = ctc_align(log_probs, torch.tensor([[1, 2]]), backend=backend)
    assert float(found.total[0]) == -3.0
    assert found.paths[0, 2] == 2


@each_backend
def test_infeasible_utterances_spoil_no_other(backend: str) -> None:
    log_probs = torch.randn(4, 5, 4).log_softmax(2)
    log_probs[2] = -torch.inf
    targets = torch.tensor([[1, 2, 3], [1, 1, 1], [1, 2, 3], [3, 2, 1]])
    lengths = torch.tensor([5, 4, 5, 2])
    problem = Problem(log_probs, targets, lengths, torch.tensor([3, 3, 3, 3]), 0)
    leaf = log_probs.clone().requires_grad_()
    found = ctc_align(leaf, targets, lengths, backend=backend)
    assert found.feasible.tolist() == [True, False, False, False]
    assert (found.paths[1:] == -1).all()
    assert (found.ends[1:] == 0).all()
    assert (found.total[1:] == -torch.inf).all()
    same(found, problem)
    found.scores.sum().backward()
    assert leaf.grad is not None
    assert torch.equal(leaf.grad[0], torch.nn.functional.one_hot(found.paths[0], 4).float())
    assert (leaf.grad[1:] == 0).all()


@each_backend
def test_values_that_are_no_log_probabilities(backend: str) -> None:
    """NaN and +inf are as impossible as -inf, and those of padding are not read."""
    problem = random_problem(3, "continuous", batch=8, frames=40, tokens=9)
    spoiled, clean = problem.log_probs.clone(), problem.log_probs.clone()
    chosen = torch.rand(spoiled.shape) < 0.05
    spoiled[chosen], clean[chosen] = torch.nan, -torch.inf
    spoiled[:4][chosen[:4]] = torch.inf
    for row, frames in enumerate(problem.input_lengths.tolist()):
        spoiled[row, frames:] = torch.nan
    arguments = {**problem.arguments(), "log_probs": spoiled}
    same(ctc_align(**arguments, backend=backend), dataclasses.replace(problem, log_probs=clean))


@each_backend
@pytest.mark.parametrize("frames", [0, 5])
def test_empty_targets(frames: int, backend: str) -> None:
    log_probs = torch.randn(2, 5, 3).log_softmax(2)
    lengths, target_lengths = torch.tensor([frames, 5]), torch.tensor([0, 2])
    found = ctc_align(log_probs, torch.tensor([[9, 0], [1, 2]]), lengths, target_lengths, backend=backend)
    assert found.paths[0].tolist() == [0] * frames + [-1] * (5 - frames)
    assert found.feasible[0]
    assert found.ends[0].tolist() == [frames, frames]
    torch.testing.assert_close(found.total[0], log_probs[0, :frames, 0].sum())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_long_audio_in_half_precision(dtype: torch.dtype) -> None:
    """A running sum in half precision would be -inf, or lose every digit."""
    log_probs = torch.randn(1, 20_000, 8).log_softmax(2).to(dtype)
    targets = torch.randint(1, 8, (1, 3000))
    exact = ctc_align(log_probs.double(), targets)
    found = ctc_align(log_probs, targets)
    assert exact.total < -20_000
    assert (exact.total - found.scores.double().sum()).abs() < 0.05
    torch.testing.assert_close(found.total.double(), exact.total, rtol=1e-6, atol=0)


def test_long_audio_has_the_path_of_the_definition() -> None:
    """So long that checkpoints are farther apart than rescalings; the order of roundings decides the path."""
    frames, tokens = 17_000, 16_900
    log_probs = (torch.randn(1, frames, 9) * 0.01 - 700).float()
    targets = (torch.arange(tokens) * 5 % 8 + 1)[None]
    found = ctc_align(log_probs, targets)
    assert found.paths[0].tolist() == path_with_little_slack(log_probs[0].numpy(), targets[0].numpy(), 0)


def test_int32_targets_and_lengths() -> None:
    problem = random_problem(5)
    narrow = {
        name: value.int() if isinstance(value, Tensor) and not value.is_floating_point() else value
        for name, value in problem.arguments().items()
    }
    same(ctc_align(**narrow), problem)


def test_batch_first_and_time_first_are_both_read_in_place() -> None:
    problem = random_problem(6, frames=50, tokens=9)
    time_first = problem.log_probs.transpose(0, 1).contiguous().transpose(0, 1)
    same(ctc_align(**{**problem.arguments(), "log_probs": time_first}), problem)


def test_spans_are_the_tokens_own_frames() -> None:
    log_probs = torch.full((2, 8, 3), -9.0)
    path = torch.tensor([0, 1, 1, 0, 0, 2, 2, 0])
    log_probs[0, torch.arange(8), path] = -0.5
    log_probs[1, :, 0] = -0.1
    found = ctc_align(log_probs, torch.tensor([[1, 2], [1, 1]]), target_lengths=torch.tensor([2, 0]))
    assert found.paths[0].tolist() == path.tolist()
    assert found.ends.tolist() == [[5, 8], [8, 8]]
    assert found.spans(0) == [TokenSpan(1, 1, 3, -0.5), TokenSpan(2, 5, 7, -0.5)]
    assert found.token_spans() == [found.spans(0), []]


@pytest.mark.parametrize("derivative", DERIVATIVES)
def test_derivatives_of_every_kind(derivative: str) -> None:
    call = SPEC.make(
        SPEC.cases["ragged"], torch.float64, torch.device("cpu"), torch.Generator().manual_seed(1)
    )
    at, along = call.leaves(), [torch.randn_like(leaf) * 1e-3 for leaf in call.leaves()]
    found, expected = (
        DERIVATIVES[derivative](of_leaves(function, call), at, along) for function in (scores, reference)
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("backend", backends("cpu", torch.float32))
def test_a_kernel_asked_for_by_name_is_refused_in_transforms(backend: str) -> None:
    log_probs, targets = torch.randn(2, 6, 4).log_softmax(2), torch.tensor([[1, 2], [3, 3]])

    def total(x: Tensor) -> Tensor:
        return ctc_align(x, targets, backend=backend).scores.sum()

    for run in (
        lambda: grad(total)(log_probs),
        lambda: vmap(total)(log_probs[None]),
        lambda: jvp(total, (log_probs,), (log_probs,)),
    ):
        with pytest.raises(ValueError, match=f"ctc_align: backend='{backend}' has first derivatives"):
            run()


def test_inference_tensors() -> None:
    problem = random_problem(8)
    with torch.inference_mode():
        made = problem.log_probs.clone()
    same(ctc_align(**{**problem.arguments(), "log_probs": made}), problem)


def test_every_result_of_a_compiled_call() -> None:
    problem = random_problem(9, frames=33)
    torch._dynamo.reset()
    compiled = torch.compile(ctc_align, backend="aot_eager", fullgraph=True)
    found, eager = compiled(**problem.arguments()), ctc_align(**problem.arguments())
    for name in ("paths", "scores", "ends", "total", "feasible"):
        assert torch.equal(getattr(found, name), getattr(eager, name)), name
    assert found.blank == problem.blank


def test_the_op_stays_in_bounds_for_any_values() -> None:
    """The public function refuses them on the CPU; on CUDA no one reads them."""
    log_probs = torch.randn(4, 6, 5).log_softmax(2)
    targets = torch.tensor([[1, 7], [-3, 2], [1, 2], [0, 1]])
    wild = torch.tensor([99, 4, -5, 6]), torch.tensor([2, 2, 7, 2])
    for run in (definition.ctc_align, *(OPS[name][0] for name in backends("cpu", torch.float32))):
        paths, ends, total = run(log_probs, targets, *wild, 0)
        assert (total == -torch.inf).all()
        assert (paths == -1).all()
        assert (ends == 0).all()


def test_a_wildcard_takes_what_the_text_leaves_out() -> None:
    spoken = torch.tensor([0, 1, 1, 0, 2, 3, 0, 2, 3, 0, 1, 0])
    log_probs = torch.full((1, 12, 4), -8.0)
    log_probs[0, torch.arange(12), spoken] = -0.1
    star = log_probs.shape[2]
    found = ctc_align(with_wildcard(log_probs), torch.tensor([[1, star, 1]]))
    assert float(found.total[0]) == pytest.approx(-1.2 - 5 * 0.1)
    assert found.paths[0].tolist() == [0, 1, 1, 0, *[star] * 5, 0, 1, 0]
    assert float(ctc_align(log_probs, torch.tensor([[1, 1]])).total[0]) < -30
    with pytest.raises(ValueError, match=r"with_wildcard: log_probs must be \(B, T, C\)"):
        with_wildcard(log_probs[0])


LONG = """
import re, torch, mmkernels
def peak():
    return int(re.findall(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[0]) / 1024
log_probs, targets = torch.randn(1, 40_000, 8).log_softmax(2), torch.randint(1, 8, (1, 10_000))
mmkernels.ctc_align(log_probs[:, :99], targets[:, :9])
before = peak()
assert mmkernels.ctc_align(log_probs, targets).feasible.all()
print(peak() - before)
"""


def test_long_audio_takes_little_memory() -> None:
    """A pointer of 2 bits for each frame and state would be 200 MB, one of a byte 800 MB."""
    done = subprocess.run([sys.executable, "-c", LONG], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 110


def test_the_module() -> None:
    problem = random_problem(10)
    module = CTCAligner(blank=problem.blank)
    same(module(problem.log_probs, problem.targets, problem.input_lengths, problem.target_lengths), problem)
    assert repr(module) == f"CTCAligner(blank={problem.blank})"
