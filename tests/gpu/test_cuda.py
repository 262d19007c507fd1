"""Tests that need a GPU (`make gpu`): streams, graphs, no hidden synchronisation, sizes beyond 32 bits."""

from __future__ import annotations

import pathlib
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import mmkernels
from mmkernels import _cuda, _library, backends
from op_tests import backends as kernel_backends

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs a CUDA GPU; run `make gpu` on a machine with one"
    ),
]
BACKENDS = kernel_backends("cuda", torch.float32)


def mix_inputs(dtype: torch.dtype = torch.bfloat16) -> tuple[list[Tensor], Tensor, Tensor]:
    layers = [torch.randn(3, 50, 256, device="cuda", dtype=dtype) for _ in range(5)]
    weights = torch.randn(5, device="cuda", requires_grad=True)
    return layers, weights, torch.tensor([50, 20, 0], device="cuda")


def mix_step(backend: str) -> tuple[Callable[[], Tensor], Tensor]:
    layers, weights, lengths = mix_inputs()

    def step() -> Tensor:
        out = mmkernels.layer_mix(layers, weights, norm=True, lengths=lengths, backend=backend)
        (grad,) = torch.autograd.grad(out.float().square().sum(), weights)
        return grad

    return step, weights


def project_step(backend: str) -> tuple[Callable[[], Tensor], Tensor]:
    x = torch.randn(300, 4, 128, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(4, 64, 128, device="cuda", requires_grad=True)
    gain = torch.ones(4, 128, device="cuda", requires_grad=True)

    def step() -> Tensor:
        out = mmkernels.layer_project(x, weight, norm_weight=gain, activation="gelu", backend=backend)
        (grad, _) = torch.autograd.grad(out.float().square().sum(), (weight, gain))
        return grad

    return step, weight


def adapter_step(backend: str) -> tuple[Callable[[], Tensor], Tensor]:
    x = torch.randn(300, 128, device="cuda", dtype=torch.bfloat16)
    down = torch.randn(32, 128, device="cuda", requires_grad=True)
    up = torch.randn(128, 32, device="cuda", requires_grad=True)
    gain = torch.ones(128, device="cuda", requires_grad=True)

    def step() -> Tensor:
        out = mmkernels.adapter(
            x, down, None, up, None, residual=x, activation="gelu", norm_weight=gain, backend=backend
        )
        (grad, *_) = torch.autograd.grad(out.float().square().sum(), (down, up, gain))
        return grad

    return step, down


def merge_step(backend: str) -> tuple[Callable[[], Tensor], Tensor]:
    """More pairs than one launch takes, and tensors of several chunks and of a few elements."""
    shapes = [(130, 300), (7,), (256, 256)] * 50
    target, source = ([torch.randn(shape, device="cuda") for shape in shapes] for _ in range(2))
    lam = torch.rand(50, device="cuda", requires_grad=True)
    groups = [index // 3 for index in range(150)]

    def step() -> Tensor:
        out = mmkernels.merge(target, source, lam, groups=groups, dtype=torch.bfloat16, backend=backend)
        grads = [merged.detach() for merged in out]
        (grad,) = torch.autograd.grad(out, lam, grads)
        return grad

    return step, lam


def attention_step(backend: str) -> tuple[Callable[[], Tensor], Tensor]:
    """Heads that share keys; short segments, a long one, frames in none."""
    rows = torch.randn(3, 2, 300, 4, 64, device="cuda", dtype=torch.bfloat16).transpose(2, 3)
    q, k, v = rows[0].requires_grad_(), rows[1, :, :2], rows[2, :, :2]
    ends = torch.tensor([[10, 12, 12, 290], [100, 200, 207, 300]], device="cuda")

    def step() -> Tensor:
        out = mmkernels.segment_attention(q, k, v, ends, lookback=2, backend=backend)
        (grad,) = torch.autograd.grad(out.float().square().sum(), q)
        return grad

    return step, q


def pool_inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Segments of a few frames and of several pieces, frames in none, segments past a count."""
    x = torch.randn(3, 300, 256, device="cuda", dtype=torch.bfloat16)
    ends = torch.tensor([[10, 12, 12, 290], [100, 200, 7, 9], [0, 300, 300, 300]], device="cuda")
    scores = torch.randn(3, 300, device="cuda", requires_grad=True)
    return x, ends, torch.tensor([4, 2, 3], device="cuda"), scores


def pool_step(backend: str) -> tuple[Callable[[], Tensor], Tensor]:
    x, ends, counts, scores = pool_inputs()

    def step() -> Tensor:
        out = mmkernels.segment_pool(
            x, ends, reduce="attention", scores=scores, counts=counts, backend=backend
        )
        (grad,) = torch.autograd.grad(out.float().square().sum(), scores)
        return grad

    return step, scores


def ctc_align_step(backend: str) -> tuple[Callable[[], Tensor], Tensor]:
    """A ragged batch; the gradient of the squares of the scores is twice the scores, at the path."""
    log_probs = torch.randn(5, 300, 32, device="cuda").log_softmax(2).requires_grad_()
    targets = torch.randint(1, 32, (5, 90), device="cuda")
    frames = torch.tensor([300, 299, 200, 40, 0], device="cuda")
    tokens = torch.tensor([90, 70, 50, 90, 0], device="cuda")

    def step() -> Tensor:
        found = mmkernels.ctc_align(log_probs, targets, frames, tokens, backend=backend)
        (grad,) = torch.autograd.grad(found.scores.square().sum(), log_probs)
        return grad

    return step, log_probs


def distill_step(backend: str) -> tuple[Callable[[], Tensor], Tensor]:
    """A ragged batch in half precision, and a table in float32."""
    pred = torch.randn(3, 40, 2048, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    table, ids = torch.randn(500, 2048, device="cuda"), torch.randint(500, (3, 40), device="cuda")
    counts = torch.tensor([40, 0, 17], device="cuda")

    def step() -> Tensor:
        loss = mmkernels.distill_loss(pred, table, ids, counts=counts, backend=backend)
        (grad,) = torch.autograd.grad(loss, pred)
        return grad

    return step, pred


STEPS = {
    "layer_mix": mix_step,
    "layer_project": project_step,
    "adapter": adapter_step,
    "merge": merge_step,
    "segment_attention": attention_step,
    "segment_pool": pool_step,
    "ctc_align": ctc_align_step,
    "distill_loss": distill_step,
}
each = pytest.mark.parametrize("op", list(STEPS))
each_backend = pytest.mark.parametrize("backend", BACKENDS)


@pytest.mark.skipif("cuda" in _library.load_errors, reason="no compiled CUDA kernels")
def test_the_compiled_kernels_run_here() -> None:
    """Else "auto", and the tests of all backends, would leave them out without a word."""
    error, driver, built_with = _cuda._probe(0)
    assert error is None
    assert driver > 0
    assert built_with >= 12000
    assert backends.why_not("native", "cuda", torch.float32) is None


FIRST_USE = """
import sys
import torch, test_cuda

step, _ = test_cuda.STEPS[sys.argv[1]](sys.argv[2])
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
try:
    with torch.cuda.graph(graph):
        captured = step()
except Exception as error:
    while error is not None and "run the step once before" not in str(error):
        error = error.__cause__ or error.__context__
    assert error is not None
else:
    graph.replay()
    assert torch.equal(captured, step())
"""


@each
@each_backend
def test_first_use_inside_a_capture(op: str, backend: str) -> None:
    """It works, or the error says what to do. In a process of its own, which has loaded no kernel."""
    folder = str(pathlib.Path(__file__).parent)
    code = f"import sys; sys.path.insert(0, {folder!r})\n{FIRST_USE}"
    done = subprocess.run([sys.executable, "-c", code, op, backend], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@each
@each_backend
def test_side_stream(op: str, backend: str) -> None:
    """Work goes to the current stream: a long kernel before it on that stream must be waited for."""
    step, parameter = STEPS[op](backend)
    expected = step()
    original = parameter.detach().clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        parameter.zero_()
        torch.cuda._sleep(50_000_000)
        parameter.copy_(original)
    with torch.cuda.stream(stream):
        got = step()
    stream.synchronize()
    assert torch.equal(got, expected)


@each
@each_backend
def test_graph_capture(op: str, backend: str) -> None:
    """Forward and backward can be captured, and a replay reads the current contents of memory."""
    step, parameter = STEPS[op](backend)
    for _ in range(2):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        parameter.mul_(0.5)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, step())


@each
@each_backend
def test_no_synchronisation(op: str, backend: str) -> None:
    step, _ = STEPS[op](backend)
    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@each_backend
def test_lengths_are_clamped_on_the_device(backend: str) -> None:
    layers, weights, _ = mix_inputs(torch.float32)
    wild = torch.tensor([-3, 999, 20], device="cuda")
    tame = torch.tensor([0, 50, 20], device="cuda")
    got = mmkernels.layer_mix(layers, weights, lengths=wild, backend=backend)
    assert torch.equal(got, mmkernels.layer_mix(layers, weights, lengths=tame, backend=backend))


@each_backend
@pytest.mark.parametrize("reduce", ["mean", "sum", "max", "last", "attention"])
def test_ends_are_clamped_on_the_device(reduce: str, backend: str) -> None:
    """To the frames and to their running maximum; counts too. Frames in no segment hold NaN."""
    x, _, _, scores = pool_inputs()
    x[1, 20:] = torch.nan
    wild = torch.tensor([[5, 2, 99999, -4], [20, -1, 5, 7], [7, 3, 2**62, -(2**62)]], device="cuda")
    tame = torch.tensor([[5, 5, 300, 300], [20, 20, 20, 20], [7, 7, 300, 300]], device="cuda")
    given = scores if reduce == "attention" else None
    x.requires_grad_()
    found, expected = (
        mmkernels.segment_pool(x, ends, reduce=reduce, scores=given, counts=counts, backend=backend)
        for ends, counts in (
            (wild, torch.tensor([-2, 4, 99], device="cuda")),
            (tame, torch.tensor([0, 4, 4], device="cuda")),
        )
    )
    assert torch.equal(found, expected)
    gradients = [torch.autograd.grad(out.float().sum(), x)[0] for out in (found, expected)]
    assert torch.equal(*gradients)
    assert gradients[0][1, 20:].eq(0).all()


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_clamps_ends_out_of_range(dtype: torch.dtype, backend: str) -> None:
    wild = torch.tensor([[5, 2, 99999, -4], [20, -1, 5, 7], [7, 3, 2**62, -(2**62)]], device="cuda")
    tame = torch.tensor([[5, 5, 300, 300], [20, 20, 20, 20], [7, 7, 300, 300]], device="cuda")
    q, k, v = (torch.randn(3, 2, 300, 64, device="cuda", dtype=dtype).requires_grad_() for _ in range(3))
    found, expected = (mmkernels.segment_attention(q, k, v, ends, backend=backend) for ends in (wild, tame))
    assert torch.equal(found, expected)
    gradients = [torch.autograd.grad(out.float().sum(), (q, k, v)) for out in (found, expected)]
    for mine, other in zip(*gradients, strict=True):
        assert torch.equal(mine, other)
        assert mine[1, :, 20:].eq(0).all()


@each_backend
@pytest.mark.parametrize("reduce", ["mean", "max", "attention"])
def test_pooling_more_elements_than_32_bits_count(reduce: str, backend: str) -> None:
    if torch.cuda.mem_get_info()[0] < 30 * 2**30:
        pytest.skip("needs 30 GiB of free GPU memory")
    frames, width = 2**21 + 8, 1024
    x = torch.empty(1, frames, width, device="cuda", dtype=torch.bfloat16).normal_()
    ends = torch.tensor([[frames - 100, frames]], device="cuda")
    scores = torch.randn(1, frames, device="cuda") if reduce == "attention" else None
    out = mmkernels.segment_pool(x, ends, reduce=reduce, scores=scores, backend=backend)
    tail = None if scores is None else scores[:, -100:]
    expected = mmkernels.segment_pool(
        x[:, -100:], torch.tensor([[100]], device="cuda"), reduce=reduce, scores=tail, backend="reference"
    )
    torch.testing.assert_close(out[:, 1:], expected, rtol=1e-2, atol=1e-2)


@each_backend
def test_merge_into_its_targets(backend: str) -> None:
    """In place, captured in a graph; a replay merges again."""
    start = [torch.randn(300, 100, device="cuda") for _ in range(3)]
    source, lam = [torch.randn_like(t) for t in start], torch.rand(3, device="cuda")
    target = [t.clone() for t in start]
    mmkernels.merge(target, source, lam, out=target, backend=backend)
    expected = mmkernels.merge(start, source, lam, backend=backend)
    assert all(map(torch.equal, target, expected))
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        mmkernels.merge(target, source, lam, out=target, backend=backend)
    graph.replay()
    torch.cuda.synchronize()
    assert all(map(torch.equal, target, mmkernels.merge(expected, source, lam, backend=backend)))


@each_backend
def test_a_weight_that_is_not_finite_is_not_read(backend: str) -> None:
    """Reading it would wait for the device; the results show it."""
    tensors = [torch.ones(5, device="cuda")]
    lam = torch.tensor([float("nan")], device="cuda")
    assert mmkernels.merge(tensors, tensors, lam, backend=backend)[0].isnan().all()


def test_float64_is_refused() -> None:
    layers = [torch.ones(2, 3, device="cuda", dtype=torch.float64)]
    for backend in ("auto", "native", "triton"):
        with pytest.raises(ValueError, match="float64"):
            mmkernels.layer_mix(layers, torch.ones(1, device="cuda"), backend=backend)
        with pytest.raises(ValueError, match="float64"):
            mmkernels.merge(layers, layers, 0.5, backend=backend)


@each_backend
def test_more_elements_than_32_bits_count(backend: str) -> None:
    """A layer of 2^31 + some elements: its last rows must be right."""
    if torch.cuda.mem_get_info()[0] < 30 * 2**30:
        pytest.skip("needs 30 GiB of free GPU memory")
    frames, width = 2**21 + 8, 1024
    layers = [torch.empty(1, frames, width, device="cuda", dtype=torch.bfloat16).normal_() for _ in range(2)]
    weights = torch.tensor([0.5, -2.0], device="cuda")
    out = mmkernels.layer_mix(layers, weights, norm=True, backend=backend)
    tail = [layer[:, -16:] for layer in layers]
    torch.testing.assert_close(
        out[:, -16:], mmkernels.layer_mix(tail, weights, norm=True, backend="reference"), rtol=2e-2, atol=2e-2
    )


@each_backend
def test_merge_of_more_elements_than_32_bits_count(backend: str) -> None:
    if torch.cuda.mem_get_info()[0] < 30 * 2**30:
        pytest.skip("needs 30 GiB of free GPU memory")
    target, source = (torch.empty(2**31 + 9, device="cuda", dtype=torch.bfloat16).normal_() for _ in range(2))
    small = torch.randn(40, device="cuda").bfloat16()
    lam = torch.tensor([0.3, 0.9], device="cuda")
    long, short = mmkernels.merge([target, small], [source, small], lam, backend=backend)
    (tail,) = mmkernels.merge([target[-32:]], [source[-32:]], lam[:1], backend="reference")
    torch.testing.assert_close(long[-32:], tail)
    assert torch.equal(short, small)


@pytest.mark.skipif(len(BACKENDS) < 2, reason="one backend only")
@each
def test_backends_agree(op: str) -> None:
    torch.manual_seed(3)
    first = STEPS[op](BACKENDS[0])[0]()
    torch.manual_seed(3)
    second = STEPS[op](BACKENDS[1])[0]()
    torch.testing.assert_close(first, second, rtol=2e-2, atol=2e-2 * second.abs().max().item())
