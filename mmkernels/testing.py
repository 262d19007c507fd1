"""Tests that every op gets from one declaration of its cases.

An op's test file describes how to build its inputs (:class:`OpSpec`) and calls :func:`op_tests`, which
returns a test class: values and gradients against a float64 reference on every backend that can serve,
gradcheck, opcheck, strides, gradients of any layout, zero sizes, repeatability, batch invariance,
``torch.compile``, autocast, checkpointing, non-finite values, and fuzzing.

:func:`assert_close_to_reference` is the one tolerance rule of the project. Needs pytest and hypothesis.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mmkernels.backends import why_not

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
Shape = Mapping[str, Any]


@dataclass(frozen=True)
class Call:
    """One call of a public function: keyword arguments, and the names of those that gradients are asked
    for."""

    arguments: dict[str, Any]
    differentiable: tuple[str, ...]

    def with_arguments(self, **changes: Any) -> Call:
        return replace(self, arguments={**self.arguments, **changes})

    def mapped(self, change: Callable[[str, Tensor], Tensor]) -> Call:
        """The call with every tensor (also those in lists) replaced by ``change(argument name, tensor)``."""

        def apply(name: str, value: Any) -> Any:
            if isinstance(value, Tensor):
                return change(name, value)
            if isinstance(value, (list, tuple)) and value and isinstance(value[0], Tensor):
                return [change(name, item) for item in value]
            return value

        return replace(self, arguments={name: apply(name, value) for name, value in self.arguments.items()})

    def leaves(self) -> list[Tensor]:
        """The tensors that gradients are asked for, in order, lists flattened."""
        found: list[Tensor] = []
        for name in self.differentiable:
            value = self.arguments.get(name)
            if isinstance(value, Tensor):
                found.append(value)
            elif value is not None:
                found.extend(value)
        return found

    def detached(self, dtype: torch.dtype | None = None, requires_grad: bool = True) -> Call:
        """A copy with tensors of its own (strides kept), floating ones cast to ``dtype`` if given."""

        def change(name: str, tensor: Tensor) -> Tensor:
            if not tensor.is_floating_point():
                return tensor
            copy = tensor.detach() if dtype is None else tensor.detach().to(dtype)
            return copy.requires_grad_(requires_grad and name in self.differentiable)

        return self.mapped(change)


@dataclass(frozen=True)
class OpSpec:
    """What :func:`op_tests` needs to know about an op."""

    name: str
    function: Callable[..., Tensor]
    #: The definition; takes the same keyword arguments but ``backend``.
    reference: Callable[..., Tensor]
    #: ``make(shape, dtype, device, generator)`` builds a call.
    make: Callable[[Shape, torch.dtype, torch.device, torch.Generator], Call]
    cases: Mapping[str, Shape]
    zero_cases: Mapping[str, Shape]
    #: Torch ops that one call runs: ``raw(call) -> [(op, positional arguments), ...]``.
    raw: Callable[[Call], list[tuple[Any, tuple[Any, ...]]]]
    #: Hypothesis strategy of shapes.
    shapes: Callable[[], Any]
    #: ``alone(call, index) -> (call for batch entry index alone, function from full output to its output)``;
    #: None if not batched.
    alone: Callable[[Call, int], tuple[Call, Callable[[Tensor], Tensor]]] | None = None
    #: What a user would write in the activations' dtype; the error of a kernel is measured against its error.
    eager: Callable[..., Tensor] | None = None
    #: Sizes that torch.compile is to treat as dynamic: two shapes of one case that differ in them.
    dynamic: tuple[Shape, Shape] | None = None
    #: (device, backend) whose float32 products are the BLAS's: its rounding may depend on the number of
    #: threads and of rows.
    library_products: Sequence[tuple[str, str]] = ()
    #: Argument whose dtype is that of the result; the others may be of a wider one, as under autocast.
    activations: Sequence[str] = field(default=())


def backends(device: str, dtype: torch.dtype) -> list[str]:
    """The kernels that can serve this device and dtype here; the reference is what they are compared with."""
    return [name for name in ("native", "triton") if why_not(name, device, dtype) is None]


def assert_close_to_reference(
    kernel: Tensor, reference: Tensor, eager: Tensor, dtype: torch.dtype, name: str = "result"
) -> None:
    """The tolerance rule: with R the float64 reference, E the same-dtype eager result, K the kernel's,

    ``max|K - R| <= 2 max|E - R| + 4 eps max|R|`` and ``rms(K - R) <= 1.5 rms(E - R) + eps rms(R)``, eps that
    of ``dtype``.
    """
    assert kernel.shape == reference.shape, (
        f"{name}: shape {tuple(kernel.shape)}, expected {tuple(reference.shape)}"
    )
    if reference.numel() == 0:
        return
    k, r, e = (t.detach().double().cpu() for t in (kernel, reference, eager))
    assert torch.isfinite(k).all(), f"{name}: the kernel's result is not finite"
    if dtype == torch.float64:
        # Nothing wider is at hand: kernel and reference differ by the order of their sums only.
        assert (k - r).abs().max() <= 1e-11 * (1 + r.abs().max()), f"{name}: float64 results differ"
        return
    eps = torch.finfo(dtype).eps
    worst, allowed = (k - r).abs().max(), 2 * (e - r).abs().max() + 4 * eps * r.abs().max()
    assert worst <= allowed, f"{name}: largest error {worst:.3e}, allowed {allowed:.3e}"
    rms, allowed = _rms(k - r), 1.5 * _rms(e - r) + eps * _rms(r)
    assert rms <= allowed, f"{name}: rms error {rms:.3e}, allowed {allowed:.3e}"


def _rms(x: Tensor) -> Tensor:
    return x.square().mean().sqrt()


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside, memory that torch allocates uninitialised (in C++ too) holds NaN, so that reading it shows."""
    settings: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        settings.fill_uninitialized_memory = before[1]


def devices() -> list[str]:
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def away_from_zero(draw: Callable[[], Call], reference: Callable[..., Tensor]) -> Call:
    """A drawn call in which rounding changes the sign of no input of relu, if a hundred draws have one.

    With the sign a whole term of a gradient comes or goes, and no error bound holds.
    """
    for _ in range(100):
        call = draw()
        if call.arguments["activation"] != "relu":
            break
        if not (reference(**{**call.arguments, "activation": "none"}).abs() < 0.02).any():
            break
    return call


def generator_for(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def value_and_gradients(
    function: Callable[..., Tensor], call: Call, grad: Tensor, **options: Any
) -> tuple[Tensor, list[Tensor]]:
    """Result, and gradients of ``call.leaves()`` for an incoming gradient."""
    out = function(**call.arguments, **options)
    leaves = [leaf for leaf in call.leaves() if leaf.requires_grad]
    found = torch.autograd.grad(out, leaves, grad.to(out.dtype), allow_unused=True)
    zeros = (torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves, strict=True))
    return out.detach(), list(zeros)


#: The errors of fewer numbers are luck: such results and gradients are judged over several calls together.
#: With 8 numbers, the ratio of kernel's and eager's is between 0.5 and 2.4 where over many it is 1.0.
FEWEST_NUMBERS = 32


def check_against_reference(spec: OpSpec, make: Callable[[int], Call], backend: str, seed: int = 0) -> None:
    """Values and all gradients on one backend, by the tolerance rule.

    ``make(seed)`` builds a call; calls with further seeds are made where its tensors are small.
    """
    # For each result or gradient: what the kernel, the reference and eager give, one entry for each call.
    found: list[list[tuple[Tensor, Tensor, Tensor]]] = []
    while not found or len(found) * min(r.numel() or FEWEST_NUMBERS for _, r, _ in found[0]) < FEWEST_NUMBERS:
        call = make(seed + 1000 * len(found))
        target = spec.reference(**call.detached(requires_grad=False).arguments)
        grad = torch.randn(target.shape, generator=generator_for(seed + 1 + len(found))).to(target)
        with poisoned_memory():
            out, gradients = value_and_gradients(spec.function, call.detached(), grad, backend=backend)
        wide = call.detached(torch.float64)
        exact, exact_gradients = value_and_gradients(spec.reference, wide, grad.double())
        eager, eager_gradients = value_and_gradients(spec.eager or spec.reference, call.detached(), grad)
        dtype = _result_dtype(spec, call)
        assert out.dtype == dtype
        kernel = (out, *gradients)
        found.append(list(zip(kernel, (exact, *exact_gradients), (eager, *eager_gradients), strict=True)))
    for index, several in enumerate(zip(*found, strict=True)):
        name = f"gradient {index - 1} of {call.differentiable}" if index else "result"
        k, r, e = (torch.stack(tensors) for tensors in zip(*several, strict=True))
        assert_close_to_reference(k, r, e, dtype, name)


def _result_dtype(spec: OpSpec, call: Call) -> torch.dtype:
    value = call.arguments[spec.activations[0]]
    return (value if isinstance(value, Tensor) else value[0]).dtype


def _layouts(tensor: Tensor) -> dict[str, Tensor]:
    """The same values in other layouts: a slice of a larger tensor, a dense permuted one, and one with a last
    stride of two."""
    found = {}
    if tensor.dim() == 0:
        return {"same": tensor}
    padded = tensor.new_zeros([size + 2 for size in tensor.shape])
    inner = padded[tuple(slice(1, size + 1) for size in tensor.shape)]
    found["sliced"] = inner.copy_(tensor)
    found["permuted"] = tensor.mT.contiguous().mT if tensor.dim() > 1 else tensor
    spread = tensor.new_zeros((*tensor.shape, 2))
    found["strided"] = spread[..., 0].copy_(tensor)
    return found


def op_tests(spec: OpSpec, dtypes: Sequence[torch.dtype] = DTYPES) -> type:
    """A pytest class that tests the op in every way that does not depend on which op it is."""
    import hypothesis
    import pytest
    from hypothesis import strategies

    served = [
        pytest.param(device, backend, dtype, id=f"{device}-{backend}-{str(dtype).removeprefix('torch.')}")
        for device in devices()
        for dtype in dtypes
        for backend in backends(device, dtype)
    ]
    kernels = sorted({(p.values[0], p.values[1]) for p in served})
    each_case = pytest.mark.parametrize("case", list(spec.cases))
    each_kernel = pytest.mark.parametrize(("device", "backend"), kernels)

    def build(shape: Shape, dtype: torch.dtype, device: str, seed: int = 0) -> Call:
        return spec.make(shape, dtype, torch.device(device), generator_for(seed))

    def some_grad(call: Call, seed: int = 5) -> Tensor:
        out = spec.reference(**call.detached(requires_grad=False).arguments)
        return torch.randn(out.shape, generator=generator_for(seed)).to(out)

    class Tests:
        @each_case
        @pytest.mark.parametrize(("device", "backend", "dtype"), served)
        def test_values_and_gradients(self, case: str, device: str, backend: str, dtype: torch.dtype) -> None:
            check_against_reference(spec, lambda seed: build(spec.cases[case], dtype, device, seed), backend)

        @each_case
        def test_gradcheck(self, case: str) -> None:
            call = build(spec.cases[case], torch.float64, "cpu").detached()
            leaves = call.leaves()

            def run(*values: Tensor) -> Tensor:
                order = iter(values)
                swapped = call.mapped(lambda name, t: next(order) if name in call.differentiable else t)
                return spec.function(**swapped.arguments)

            # mapped() walks arguments in their order, gradcheck gets them in that order too.
            in_order = [
                t for name in call.arguments if name in call.differentiable for t in _tensors(call, name)
            ]
            assert len(in_order) == len(leaves)
            assert torch.autograd.gradcheck(run, in_order, fast_mode=True)

        @each_case
        @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
        def test_opcheck(self, case: str, dtype: torch.dtype) -> None:
            for op, arguments in spec.raw(build(spec.cases[case], dtype, "cpu")):
                torch.library.opcheck(op, arguments)

        @each_case
        @each_kernel
        @pytest.mark.parametrize("layout", ["sliced", "permuted", "strided"])
        def test_input_layouts(self, case: str, device: str, backend: str, layout: str) -> None:
            def laid_out(seed: int) -> Call:
                call = build(spec.cases[case], torch.float32, device, seed)
                return call.mapped(lambda _, t: _layouts(t)[layout])

            check_against_reference(spec, laid_out, backend)

        @each_case
        @each_kernel
        @pytest.mark.parametrize("layout", ["sum", "sliced", "permuted", "strided", "expanded"])
        def test_gradient_layouts(self, case: str, device: str, backend: str, layout: str) -> None:
            call = build(spec.cases[case], torch.float32, device)
            grad = some_grad(call)
            if layout == "sum":
                grad = grad.new_ones(()).expand(grad.shape)
            elif layout == "expanded":
                grad = grad[:1].expand(grad.shape)
            else:
                grad = _layouts(grad)[layout]
            _, found = value_and_gradients(spec.function, call.detached(), grad, backend=backend)
            _, dense = value_and_gradients(spec.function, call.detached(), grad.clone(), backend=backend)
            for a, b in zip(found, dense, strict=True):
                assert torch.equal(a, b)

        @pytest.mark.parametrize("case", list(spec.zero_cases))
        @each_kernel
        def test_zero_sizes(self, case: str, device: str, backend: str) -> None:
            call = build(spec.zero_cases[case], torch.float32, device)
            out, gradients = value_and_gradients(
                spec.function, call.detached(), some_grad(call), backend=backend
            )
            exact, expected = value_and_gradients(spec.reference, call.detached(), some_grad(call))
            torch.testing.assert_close(out, exact)
            for g, e in zip(gradients, expected, strict=True):
                torch.testing.assert_close(g, e)

        @each_case
        @pytest.mark.parametrize(("device", "backend", "dtype"), served)
        def test_repeatable(self, case: str, device: str, backend: str, dtype: torch.dtype) -> None:
            call = build(spec.cases[case], dtype, device)
            grad = some_grad(call)
            first, first_gradients = value_and_gradients(
                spec.function, call.detached(), grad, backend=backend
            )
            threads = torch.get_num_threads()
            try:
                by_library = (device, backend) in spec.library_products
                for count in (threads,) if by_library else (threads, 1, 2):
                    torch.set_num_threads(count)
                    again, gradients = value_and_gradients(
                        spec.function, call.detached(), grad, backend=backend
                    )
                    assert torch.equal(first, again)
                    for a, b in zip(first_gradients, gradients, strict=True):
                        assert torch.equal(a, b)
            finally:
                torch.set_num_threads(threads)

        @each_case
        @each_kernel
        def test_batch_invariance(self, case: str, device: str, backend: str) -> None:
            if spec.alone is None:
                pytest.skip("the op has no batch dimension")
            if (device, backend) in spec.library_products:
                pytest.skip("the rounding of the BLAS's products depends on the number of rows")
            call = build(spec.cases[case], torch.float32, device)
            out = spec.function(**call.arguments, backend=backend)
            for index in range(3):
                single, part_of = spec.alone(call, index)
                alone = spec.function(**single.arguments, backend=backend)
                # torch.equal, not a tolerance: neighbours must not change even the rounding.
                assert torch.equal(part_of(out), alone)

        @each_case
        @each_kernel
        def test_only_what_is_asked_for(self, case: str, device: str, backend: str) -> None:
            """Gradients of a subset of the inputs equal those computed with all of them; none are made for
            the rest."""
            call = build(spec.cases[case], torch.float32, device)
            grad = some_grad(call)
            _, together = value_and_gradients(spec.function, call.detached(), grad, backend=backend)
            leaves = call.detached().leaves()
            for index in range(len(leaves)):
                single = call.detached()
                for position, leaf in enumerate(single.leaves()):
                    leaf.requires_grad_(position == index)
                _, found = value_and_gradients(spec.function, single, grad, backend=backend)
                torch.testing.assert_close(found[0], together[index])

        @each_case
        @each_kernel
        def test_no_gradient_recorded_when_frozen(self, case: str, device: str, backend: str) -> None:
            call = build(spec.cases[case], torch.float32, device)
            frozen = spec.function(**call.detached(requires_grad=False).arguments, backend=backend)
            assert not frozen.requires_grad
            with torch.no_grad():
                out = spec.function(**call.detached().arguments, backend=backend)
            assert out.grad_fn is None
            assert torch.equal(out, frozen)

        @each_kernel
        @pytest.mark.parametrize("case", list(spec.cases)[:2])
        def test_compile(self, case: str, device: str, backend: str) -> None:
            """One graph forward and backward, the same numbers, and no new graph for other sizes."""
            import torch._dynamo.testing

            torch._dynamo.reset()
            counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
            compiled = torch.compile(spec.function, backend=counter, fullgraph=True, dynamic=True)
            graphs = None
            for shape in spec.dynamic or (spec.cases[case],):
                call = build({**spec.cases[case], **shape}, torch.float32, device)
                grad = some_grad(call)
                out, gradients = value_and_gradients(compiled, call.detached(), grad, backend=backend)
                eager, expected = value_and_gradients(spec.function, call.detached(), grad, backend=backend)
                torch.testing.assert_close(out, eager)
                for g, e in zip(gradients, expected, strict=True):
                    torch.testing.assert_close(g, e)
                graphs = graphs or counter.frame_count
                assert counter.frame_count == graphs, "another size needed another graph"

        @each_case
        @each_kernel
        @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
        def test_wide_parameters(self, case: str, device: str, backend: str, dtype: torch.dtype) -> None:
            """float32 parameters beside half-precision activations, as autocast and master weights produce
            them."""

            def mix(seed: int) -> Call:
                call = build(spec.cases[case], torch.float32, device, seed)
                return call.mapped(lambda name, t: t.to(dtype) if name in spec.activations else t)

            check_against_reference(spec, mix, backend)
            mixed = mix(0)
            for leaf, gradient in zip(
                mixed.detached().leaves(),
                value_and_gradients(spec.function, mixed.detached(), some_grad(mixed), backend=backend)[1],
                strict=True,
            ):
                assert gradient.dtype == leaf.dtype

        @each_case
        @each_kernel
        def test_autocast(self, case: str, device: str, backend: str) -> None:
            call = build(spec.cases[case], torch.float32, device)
            plain = spec.reference(**call.arguments)
            with torch.autocast(device, dtype=torch.bfloat16):
                out, gradients = value_and_gradients(
                    spec.function, call.detached(), some_grad(call), backend=backend
                )
            assert out.dtype in (torch.bfloat16, torch.float32)
            assert all(g.dtype == torch.float32 and torch.isfinite(g).all() for g in gradients)
            torch.testing.assert_close(out.float(), plain, atol=0.1, rtol=0.05)

        @each_case
        @each_kernel
        def test_checkpointing(self, case: str, device: str, backend: str) -> None:
            from torch.utils.checkpoint import checkpoint

            call = build(spec.cases[case], torch.float32, device)
            grad = some_grad(call)

            def recomputed(**arguments: Any) -> Tensor:
                return checkpoint(spec.function, use_reentrant=False, **arguments)

            out, gradients = value_and_gradients(recomputed, call.detached(), grad, backend=backend)
            eager, expected = value_and_gradients(spec.function, call.detached(), grad, backend=backend)
            assert torch.equal(out, eager)
            for g, e in zip(gradients, expected, strict=True):
                assert torch.equal(g, e)

        @each_case
        @each_kernel
        @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
        def test_non_finite_values(self, case: str, device: str, backend: str, value: float) -> None:
            """They come out where the reference has them, and nowhere else."""
            call = build(spec.cases[case], torch.float32, device).detached(requires_grad=False)
            for name in spec.activations:
                if call.arguments[name] is None:
                    continue
                tensor = _tensors(call, name)[0]
                tensor.view(-1)[tensor.numel() // 2] = value
            out = spec.function(**call.arguments, backend=backend)
            exact = spec.reference(**call.arguments)
            assert torch.equal(out.isfinite(), exact.isfinite())
            torch.testing.assert_close(out[exact.isfinite()], exact[exact.isfinite()], rtol=1e-4, atol=1e-5)

        @each_kernel
        def test_fuzz(self, device: str, backend: str) -> None:
            allowed = [dtype for dtype in dtypes if backend in backends(device, dtype)]

            @hypothesis.settings(max_examples=40, deadline=None, derandomize=True, database=None)
            @hypothesis.given(spec.shapes(), strategies.sampled_from(allowed), strategies.integers(0, 2**16))
            def run(shape: Shape, dtype: torch.dtype, seed: int) -> None:
                check_against_reference(spec, lambda seed: build(shape, dtype, device, seed), backend, seed)

            run()

        def test_backend_names(self) -> None:
            call = build(next(iter(spec.cases.values())), torch.float32, "cpu")
            with pytest.raises(ValueError, match="backend must be one of auto, native, triton, reference"):
                spec.function(**call.arguments, backend="fastest")
            for name in ("native", "triton"):
                if name in backends("cpu", torch.float32):
                    continue
                with pytest.raises(ValueError, match=f"backend='{name}' cannot be used"):
                    spec.function(**call.arguments, backend=name)

    Tests.__name__ = Tests.__qualname__ = f"Test_{spec.name}"
    return Tests


def _tensors(call: Call, name: str) -> list[Tensor]:
    value = call.arguments.get(name)
    if value is None:
        return []
    return [value] if isinstance(value, Tensor) else list(value)
