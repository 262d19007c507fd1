"""mmkernels.distill_loss: the shared tests of every op, and what is particular to it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies
from torch import Tensor

from mmkernels import distill_loss, nn
from mmkernels.ops.distill_loss import reference
from mmkernels.ops.distill_loss.schema import OPS
from op_tests import (
    BatchInvariance,
    Call,
    InferenceTensors,
    NarrowParameters,
    OpSpec,
    OpTests,
    Overwriting,
    Shape,
    assert_close_to_reference,
    backends,
    generator_for,
    op_tests,
    poisoned_memory,
    value_and_gradients,
)
from op_tests.running import devices


def as_vector(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """With a loss of one dimension, which the shared tests slice and expand."""
    return lambda **arguments: function(**arguments).reshape(1)


def make(shape: Shape, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Call:
    """Predictions around their embeddings. Shapes without B are of two dimensions."""
    width, vocabulary = shape["H"], shape["V"]
    rows = (shape["B"], shape["M"]) if "B" in shape else (shape["M"],)
    table = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64)
    ids = torch.randint(0, max(vocabulary, 1), rows, generator=generator)
    pred = torch.randn(*rows, width, generator=generator, dtype=torch.float64)
    if vocabulary > 0:
        pred = 0.5 * pred + table[ids]
    counts = None
    if shape.get("counts", len(rows) == 2):
        counts = torch.randint(0, shape["M"] + 1, rows[:1], generator=generator)
        if vocabulary > 0 and rows[0] > 0:
            counts[0] = shape["M"]
        counts *= vocabulary > 0
    arguments = {
        "pred": pred.to(device, dtype),
        "table": table.to(device, dtype),
        "ids": ids.to(device, shape.get("ids", torch.int64)),
        "counts": None if counts is None else counts.to(device),
        "cosine_weight": shape.get("weight", 5.0),
    }
    return Call(arguments, ("pred",))


def raw(call: Call) -> list[tuple[Any, tuple[Any, ...]]]:
    a = call.arguments
    pred, ids = a["pred"], a["ids"].long()
    if pred.dim() == 2:
        pred, ids = pred[None], ids[None]
    inputs = (pred, a["table"], ids, a["counts"])
    loss, *saved = OPS["native"][0](*inputs, a["cosine_weight"])
    return [
        (OPS["native"][0], (*inputs, a["cosine_weight"])),
        (OPS["native"][1], (loss, *inputs, *saved, a["cosine_weight"])),
    ]


def shapes() -> Any:
    size = strategies.integers
    common = {
        **{"M": size(1, 6), "H": size(1, 150), "V": size(1, 9)},
        "weight": strategies.sampled_from([0.0, 1.0, 5.0]),
        "ids": strategies.sampled_from([torch.int64, torch.int32]),
    }
    three = {**common, "B": size(1, 4), "counts": strategies.booleans()}
    return strategies.one_of(strategies.fixed_dictionaries(common), strategies.fixed_dictionaries(three))


SPEC = OpSpec(
    name="distill_loss",
    function=as_vector(distill_loss),
    reference=as_vector(reference.distill_loss),
    make=make,
    cases={
        "ragged": {"B": 3, "M": 5, "H": 24, "V": 11},
        "flat": {"M": 7, "H": 45, "V": 6, "ids": torch.int32, "weight": 0.5},
    },
    zero_cases={
        "batch": {"B": 0, "M": 4, "H": 3, "V": 2},
        "tokens": {"B": 2, "M": 0, "H": 3, "V": 2},
        "width": {"B": 2, "M": 4, "H": 0, "V": 2},
        "vocabulary": {"B": 2, "M": 4, "H": 3, "V": 0},
        "flat": {"M": 0, "H": 3, "V": 2},
    },
    raw=raw,
    shapes=shapes,
    dynamic=({"M": 5}, {"M": 9}),
    activations=("pred",),
    wide_result=True,
)
#: The loss is of the batch as a whole, and the only input with a gradient is the activations.
WITHOUT: tuple[type[OpTests], ...] = (BatchInvariance, InferenceTensors, NarrowParameters, Overwriting)
TestDistillLoss = op_tests(SPEC, without=WITHOUT)

SERVED = [
    (device, backend) for device in devices() for backend in (*backends(device, torch.float32), "reference")
]
KERNELS = [(device, backend) for device, backend in SERVED if backend != "reference"]
ON_THE_CPU = [backend for device, backend in SERVED if device == "cpu"]
each_backend = pytest.mark.parametrize(("device", "backend"), SERVED)
each_kernel = pytest.mark.parametrize(("device", "backend"), KERNELS)
each_on_the_cpu = pytest.mark.parametrize("backend", ON_THE_CPU)


def token_by_token(
    pred: Tensor, table: Tensor, ids: Tensor, counts: Tensor | None, weight: float
) -> tuple[float, Tensor]:
    """Loss and gradient in float64, by the formulas of one token."""
    d_pred, losses, places = torch.zeros_like(pred, dtype=torch.float64), [], []
    for b, j in itertools.product(range(pred.shape[0]), range(pred.shape[1])):
        if counts is not None and j >= counts[b]:
            continue
        z, h = pred[b, j].double(), table[int(ids[b, j])].double()
        of_z, of_h = z.norm(), h.norm()
        cosine = z @ h / (of_z * of_h)
        losses.append(float((z - h) @ (z - h) + weight * (1 - cosine)))
        d_pred[b, j] = 2 * (z - h) - weight * (h / (of_z * of_h) - cosine * z / of_z**2)
        places.append((b, j))
    count = max(len(places), 1)
    return math.fsum(losses) / count, d_pred / count


@each_backend
def test_hundreds_of_random_batches(device: str, backend: str) -> None:
    generator = generator_for(3)

    def number(most: int) -> int:
        return int(torch.randint(1, most + 1, (), generator=generator))

    for index in range(300):
        batch, tokens, width, vocabulary = number(4), number(7), number(80), number(12)
        scale = 10.0 ** (number(7) - 4)
        table = torch.randn(vocabulary, width, generator=generator) * scale
        ids = torch.randint(vocabulary, (batch, tokens), generator=generator)
        pred = table[ids] * 0.7 + scale * torch.randn(batch, tokens, width, generator=generator)
        counts = torch.randint(tokens + 1, (batch,), generator=generator) if index % 3 else None
        weight = [0.0, 0.3, 5.0][index % 3]
        leaf = pred.to(device).requires_grad_()
        given = None if counts is None else counts.to(device)
        loss = distill_loss(
            leaf, table.to(device), ids.to(device), counts=given, cosine_weight=weight, backend=backend
        )
        (found,) = torch.autograd.grad(loss, leaf)
        exact, gradient = token_by_token(pred, table, ids, counts, weight)
        assert loss.shape == ()
        assert abs(float(loss) - exact) <= 2e-6 * (abs(exact) + weight)
        # Where the cosine is near 1, its gradient is a difference of vectors of the size 1 / |z|.
        inverse = pred.double().norm(dim=-1).min().reciprocal()
        assert (found.cpu() - gradient).abs().max() <= 2e-6 * (gradient.abs().max() + weight * inverse)


@each_backend
def test_it_is_the_published_code(device: str, backend: str) -> None:
    generator = generator_for(4)
    table = torch.randn(20, 33, generator=generator).to(device)
    ids = torch.randint(20, (3, 6), generator=generator).to(device)
    counts = torch.tensor([6, 0, 2], device=device)
    pred = (table[ids] + torch.randn(3, 6, 33, generator=generator).to(device)).requires_grad_()
    mask = torch.arange(6, device=device) < counts[:, None]
    target = F.embedding(ids, table)
    squared = F.mse_loss(pred, target, reduction="none").sum(-1)[mask].mean()
    expected = squared + 5 * (1 - F.cosine_similarity(pred[mask], target[mask], dim=-1)).mean()
    found = distill_loss(pred, table, ids, counts=counts, backend=backend)
    torch.testing.assert_close(found, expected)
    (a,), (b,) = (torch.autograd.grad(loss, pred) for loss in (found, expected))
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@each_backend
def test_what_comes_after_the_counts_is_not_read(device: str, backend: str) -> None:
    generator = generator_for(5)
    table = torch.randn(9, 12, generator=generator)
    ids = torch.randint(9, (2, 5), generator=generator)
    pred = torch.randn(2, 5, 12, generator=generator)
    counts = torch.tensor([5, 2])
    clean = distill_loss(pred, table, ids, counts=counts)
    pred[1, 2:], ids[1, 2:] = math.nan, -100
    ids[1, 4] = 10**12
    leaf = pred.to(device).requires_grad_()
    with poisoned_memory():
        loss = distill_loss(leaf, table.to(device), ids.to(device), counts=counts.to(device), backend=backend)
        (gradient,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(loss.detach().cpu(), clean)
    assert gradient[1, 2:].eq(0).all()
    assert gradient.isfinite().all()
    assert gradient[0].abs().min() > 0


@each_backend
def test_without_a_valid_token(device: str, backend: str) -> None:
    pred = torch.full((2, 3, 8), math.nan, device=device).requires_grad_()
    ids = torch.full((2, 3), -1, device=device)
    counts = torch.zeros(2, dtype=torch.int64, device=device)
    for rows in (0, 4):
        loss = distill_loss(pred, torch.ones(rows, 8, device=device), ids, counts=counts, backend=backend)
        (gradient,) = torch.autograd.grad(loss, pred)
        assert loss == 0
        assert gradient.eq(0).all()


@each_kernel
def test_rows_of_a_batch_do_not_depend_on_padding(device: str, backend: str) -> None:
    """Gradients of a padded batch have the bits of the rows alone, and so has the loss of one row."""
    call = make({"B": 3, "M": 6, "H": 130, "V": 7}, torch.float32, torch.device(device), generator_for(6))
    a = call.arguments
    pred, ids, table = a["pred"], a["ids"], a["table"]
    for row, count in enumerate((6, 2, 4)):
        counts = torch.zeros(3, dtype=torch.int64, device=device)
        counts[row] = count
        leaf, single = pred.clone().requires_grad_(), pred[row, :count].clone().requires_grad_()
        padded = distill_loss(leaf, table, ids, counts=counts, backend=backend)
        alone = distill_loss(single, table, ids[row, :count], backend=backend)
        assert torch.equal(padded, alone)
        (together,), (own,) = torch.autograd.grad(padded, leaf), torch.autograd.grad(alone, single)
        assert torch.equal(together[row, :count], own)


@pytest.mark.parametrize(("device", "backend"), KERNELS)
def test_every_pair_of_dtypes(device: str, backend: str) -> None:
    """The same as both in the type of sums; nothing is cast."""
    every = [torch.float32, torch.float16, torch.bfloat16] + [torch.float64] * (device == "cpu")
    for of_pred, of_table, width in itertools.product(every, every, (40, 37)):
        call = make(
            {"B": 2, "M": 4, "H": width, "V": 6}, torch.float32, torch.device(device), generator_for(7)
        )
        a = call.arguments
        pred, table = a["pred"].to(of_pred), a["table"].to(of_table)
        wide = torch.float64 if of_pred == torch.float64 else torch.float32
        leaf, wide_leaf = pred.clone().requires_grad_(), pred.to(wide).requires_grad_()
        loss = distill_loss(leaf, table, a["ids"], counts=a["counts"], backend=backend)
        expected = distill_loss(wide_leaf, table.to(wide), a["ids"], counts=a["counts"], backend=backend)
        assert loss.dtype == wide
        (found,), (exact,) = torch.autograd.grad(loss, leaf), torch.autograd.grad(expected, wide_leaf)
        assert found.dtype == of_pred
        # Threads take other columns where the narrower type has wider vectors.
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
        torch.testing.assert_close(found, exact.to(of_pred), rtol=torch.finfo(of_pred).eps, atol=1e-6)


@each_backend
def test_vectors_without_direction(device: str, backend: str) -> None:
    """The cosine is 0 and has no gradient: only that of the distance is left."""
    table = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1e-25, 0.0]], device=device)
    pred = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0], [1.0, 0.0]], device=device).requires_grad_()
    ids = torch.tensor([0, 1, 1, 2], device=device)
    loss = distill_loss(pred, table, ids, backend=backend)
    assert float(loss) == pytest.approx((25 + 25 + 0 + 1) / 4 + 5)
    (gradient,) = torch.autograd.grad(loss, pred)
    torch.testing.assert_close(gradient, (pred - table[ids]).detach() / 2)


@each_backend
@pytest.mark.parametrize("size", [1e-17, 1e17])
def test_small_and_large_vectors(device: str, backend: str, size: float) -> None:
    """Their squares are near the ends of float32; the cosine is exact all the same."""
    pred = torch.tensor([[3.0, 4.0]], device=device) * size
    table = torch.tensor([[4.0, 3.0]], device=device) * size
    leaf = pred.clone().requires_grad_()
    loss = distill_loss(leaf, table, torch.zeros(1, dtype=torch.int64, device=device), backend=backend)
    assert float(loss) == pytest.approx(2 * size**2 + 5 * (1 - 24 / 25), rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, leaf)
    exact = 2 * size * torch.tensor([-1.0, 1.0]) - 5 / (5 * size) * torch.tensor([0.8 - 0.576, 0.6 - 0.768])
    torch.testing.assert_close(gradient[0].cpu(), exact, rtol=1e-4, atol=0.0)


@each_backend
def test_a_nan_is_seen_where_it_is(device: str, backend: str) -> None:
    pred = torch.randn(2, 3, 5, generator=generator_for(8)).to(device)
    pred[1, 1, 4] = math.nan
    leaf = pred.requires_grad_()
    loss = distill_loss(
        leaf,
        torch.ones(2, 5, device=device),
        torch.zeros(2, 3, dtype=torch.int64, device=device),
        backend=backend,
    )
    assert loss.isnan()
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert gradient.isnan().all(-1).tolist() == [[False, False, False], [False, True, False]]
    assert gradient.isnan().any(-1).sum() == 1


@pytest.mark.parametrize("backend", backends("cpu", torch.float32))
@pytest.mark.parametrize("width", [8, 5, 1200])
def test_ids_that_only_the_device_sees(backend: str, width: int) -> None:
    """The torch ops: an id outside the table reads nothing, and makes its own token NaN; counts are
    clamped."""
    pred, table = torch.randn(4, 3, width), torch.randn(6, width)
    ids = torch.tensor([[0, 5, 6], [1, -1, 2], [2**62, 3, 4], [-(2**62), 9, 9]])
    counts = torch.tensor([99, 2, 3, -7])
    loss, *saved = OPS[backend][0](pred, table, ids, counts, 5.0)
    assert loss.isnan()
    assert saved[1] == 8
    d_pred = OPS[backend][1](torch.ones(()), pred, table, ids, counts, *saved, 5.0)
    wrong = [[False, False, True], [False, True, False], [True, False, False], [False] * 3]
    assert d_pred.isnan().all(-1).tolist() == wrong
    assert d_pred.isnan().any(-1).tolist() == wrong
    assert d_pred[1, 2].eq(0).all()
    assert d_pred[3].eq(0).all()
    clean = OPS[backend][1](torch.ones(()), pred, table, ids.clamp(0, 5), counts, *saved, 5.0)
    right = ~torch.tensor(wrong)
    assert torch.equal(d_pred[right], clean[right])


def test_ids_in_a_compiled_call_make_nan() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(distill_loss, backend="aot_eager", fullgraph=True)
    assert compiled(torch.ones(2, 3), torch.ones(4, 3), torch.tensor([0, 4])).isnan()


@each_kernel
def test_wide_rows(device: str, backend: str) -> None:
    """Of large models, and at odd places."""
    for width, dtype in ((4096, torch.bfloat16), (16384, torch.float32), (5001, torch.float16)):
        call = make({"B": 2, "M": 2, "H": width, "V": 3}, dtype, torch.device(device), generator_for(10))
        grad = torch.tensor([0.7], device=device)
        loss, (found,) = value_and_gradients(SPEC.function, call.detached(), grad, backend=backend)
        exact, (r,) = value_and_gradients(SPEC.reference, call.detached(torch.float64), grad)
        _, (e,) = value_and_gradients(SPEC.reference, call.detached(), grad)
        torch.testing.assert_close(loss, exact.float(), rtol=1e-6, atol=0.0)
        assert_close_to_reference(found, r, e, dtype)


@each_on_the_cpu
def test_inference_tensors(backend: str) -> None:
    """A table or ids made under inference mode, as a frozen model hands them over."""
    call = make({"B": 2, "M": 4, "H": 9, "V": 6}, torch.float32, torch.device("cpu"), generator_for(9))
    expected = distill_loss(**call.arguments, backend=backend)
    with torch.inference_mode():
        made = call.mapped(lambda name, tensor: tensor if name == "pred" else tensor.clone())
    arguments = made.detached().arguments
    loss = distill_loss(**arguments, backend=backend)
    loss.backward()
    assert torch.equal(loss.detach(), expected)
    assert arguments["pred"].grad.isfinite().all()
    with torch.inference_mode():
        pred = call.arguments["pred"].clone()
        assert torch.equal(distill_loss(**{**call.arguments, "pred": pred}, backend=backend), expected)


@each_kernel
@pytest.mark.parametrize("name", ["pred", "table"])
def test_an_input_overwritten_before_the_backward_pass(device: str, backend: str, name: str) -> None:
    call = make({"B": 2, "M": 4, "H": 9, "V": 6}, torch.float32, torch.device(device), generator_for(9))
    arguments = {**call.arguments, "pred": call.arguments["pred"].clone().requires_grad_()}
    given = arguments["pred"] * 1
    loss = distill_loss(**{**arguments, "pred": given}, backend=backend)
    (given if name == "pred" else arguments["table"]).detach().mul_(2)
    with pytest.raises(RuntimeError, match=r"distill_loss: .* give the op a clone.*inplace operation"):
        loss.backward()


def test_an_embedding_without_gradients() -> None:
    """The layer of a language model: its weight is detached, or gradients are off."""
    embedding = torch.nn.Embedding(5, 6)
    pred, ids = torch.randn(3, 6), torch.tensor([0, 4, 4])
    with torch.no_grad():
        expected = distill_loss(pred, embedding.weight, ids)
    leaf = pred.clone().requires_grad_()
    loss = distill_loss(leaf, embedding.weight.detach(), ids)
    loss.backward()
    assert torch.equal(loss.detach(), expected)
    assert embedding.weight.grad is None


def one(**changes: Any) -> Callable[[], object]:
    arguments = {
        "pred": torch.ones(2, 4, 3),
        "table": torch.ones(5, 3),
        "ids": torch.zeros(2, 4, dtype=torch.int64),
        **changes,
    }
    return lambda: distill_loss(**arguments)


def with_id(value: int) -> Tensor:
    ids = torch.zeros(2, 4, dtype=torch.int64)
    ids[1, 2] = value
    return ids


ERRORS: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "no tensor": (one(pred=[1.0]), TypeError, "pred must be a tensor, got list"),
    "integers": (one(pred=torch.ones(2, 4, 3, dtype=torch.int64)), TypeError, "pred must be float32"),
    "table of integers": (one(table=torch.ones(5, 3, dtype=torch.int8)), TypeError, "table must be float32"),
    "ids of floats": (one(ids=torch.zeros(2, 4)), TypeError, "ids must be int64 or int32, got torch.float32"),
    "ids of another type": (
        one(ids=torch.zeros(2, 4, dtype=torch.int16)),
        TypeError,
        "ids must be int64 or int32, got torch.int16",
    ),
    "one dimension": (one(pred=torch.ones(3)), ValueError, r"pred must be \(B, M, H\) or \(N, H\), got .*3"),
    "four dimensions": (one(pred=torch.ones(1, 2, 4, 3)), ValueError, r"pred must be \(B, M, H\)"),
    "width of the table": (one(table=torch.ones(5, 4)), ValueError, r"table must be \(V, 3\).*\(5, 4\)"),
    "dimensions of the table": (one(table=torch.ones(5)), ValueError, r"table must be \(V, 3\).*\(5,\)"),
    "shape of ids": (
        one(ids=torch.zeros(2, 3, dtype=torch.int64)),
        ValueError,
        r"ids must have shape \(2, 4\), .*\(2, 3\)",
    ),
    "gradient of the table": (
        one(table=torch.ones(5, 3).requires_grad_()),
        ValueError,
        r"table gets no gradient, .* pass table.detach\(\)",
    ),
    "device": (one(table=torch.ones(5, 3, device="meta")), ValueError, "table is on meta, pred is on cpu"),
    "an id past the table": (
        one(ids=with_id(5)),
        ValueError,
        r"ids must lie in \[0, 5\), .* got 5 in row 1 of the batch at token 2",
    ),
    "a negative id": (one(ids=with_id(-100)), ValueError, "got -100 in row 1 of the batch at token 2"),
    "an id before the count": (
        one(ids=with_id(5), counts=torch.tensor([4, 3])),
        ValueError,
        "got 5 in row 1 of the batch at token 2",
    ),
    "an empty table": (one(table=torch.ones(0, 3)), ValueError, r"ids must lie in \[0, 0\)"),
    "counts of two dimensions": (
        one(pred=torch.ones(4, 3), ids=torch.zeros(4, dtype=torch.int64), counts=torch.tensor([2])),
        ValueError,
        r"counts are for pred \(B, M, H\), got pred of shape \(4, 3\)",
    ),
    "shape of counts": (one(counts=torch.tensor([1])), ValueError, r"counts must have shape \(2,\)"),
    "too many": (one(counts=torch.tensor([4, 5])), ValueError, r"counts must lie in \[0, 4\], got 5"),
    "fewer than none": (one(counts=torch.tensor([4, -1])), ValueError, r"counts must lie in \[0, 4\]"),
    "counts of floats": (one(counts=torch.ones(2)), TypeError, "counts must be an integer tensor"),
    "weight": (one(cosine_weight=-1.0), ValueError, "cosine_weight must be finite and not negative, got -1"),
    "infinite weight": (one(cosine_weight=math.inf), ValueError, "cosine_weight must be finite"),
    "weight past the range": (one(cosine_weight=10**400), ValueError, "cosine_weight must be finite"),
    "weight that is no number": (
        one(cosine_weight="5"),
        TypeError,
        "cosine_weight must be a number, got str",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors(case: str) -> None:
    call, kind, message = ERRORS[case]
    with pytest.raises(kind, match=message):
        call()


def test_the_ops_refuse_what_is_unsafe() -> None:
    pred, table, ids = torch.ones(2, 4, 3), torch.ones(5, 3), torch.zeros(2, 4, dtype=torch.int64)
    forward, backward = OPS["native"]
    for arguments in (
        (pred[0], table, ids, None, 5.0),
        (pred, table[:, :2], ids, None, 5.0),
        (pred, table[0], ids, None, 5.0),
        (pred, table.long(), ids, None, 5.0),
        (pred, table, ids[:1], None, 5.0),
        (pred, table, ids.int(), None, 5.0),
        (pred, table, ids, torch.ones(3, dtype=torch.int64), 5.0),
        (pred, table, ids, None, math.nan),
    ):
        with pytest.raises(RuntimeError):
            forward(*arguments)
    loss, dots, count = forward(pred, table, ids, None, 5.0)
    for grad, saved in (
        (loss[None], (dots, count)),
        (loss.double(), (dots, count)),
        (loss, (dots[:1], count)),
        (loss, (dots.double(), count)),
        (loss, (dots, count.float())),
    ):
        with pytest.raises(RuntimeError):
            backward(grad, pred, table, ids, None, *saved, 5.0)


class TestModule:
    def test_it_detaches_the_table(self) -> None:
        embedding = torch.nn.Embedding(5, 6)
        pred, ids = torch.randn(2, 3, 6, requires_grad=True), torch.randint(5, (2, 3))
        counts = torch.tensor([3, 1])
        module = nn.DistillLoss(cosine_weight=2.0)
        loss = module(pred, embedding.weight, ids, counts)
        loss.backward()
        expected = distill_loss(pred, embedding.weight.detach(), ids, counts=counts, cosine_weight=2.0)
        assert torch.equal(loss, expected)
        assert embedding.weight.grad is None
        assert not module.state_dict()

    def test_it_trains(self) -> None:
        torch.manual_seed(0)
        table = torch.randn(7, 8)
        ids = torch.randint(7, (4, 5))
        frames = torch.nn.functional.one_hot(ids, 7).float()
        weight, module = torch.randn(7, 8, requires_grad=True), nn.DistillLoss()
        for _ in range(60):
            loss = module(frames @ weight, table, ids)
            (gradient,) = torch.autograd.grad(loss, weight)
            weight.data -= gradient
        assert loss < 0.01

    def test_options(self) -> None:
        assert "cosine_weight=2.0" in repr(nn.DistillLoss(2.0))
        with pytest.raises(ValueError, match="must not be negative"):
            nn.DistillLoss(-1.0)
