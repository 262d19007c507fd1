"""The parts of torch that an op must work with: opcheck, compile, autocast, meta tensors,
checkpointing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .base import OpTests
from .running import backends, value_and_gradients


class Opcheck(OpTests):
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
    def test_opcheck(self, case: str, dtype: torch.dtype) -> None:
        for op, arguments in self.spec.raw(self.build(self.spec.cases[case], dtype, "cpu")):
            torch.library.opcheck(op, arguments)


class Compile(OpTests):
    def test_compile(self, compiled_case: str, device: str, backend: str) -> None:
        """One graph forward and backward, the same numbers, and no new graph for other sizes."""
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(self.spec.function, backend=counter, fullgraph=True, dynamic=True)
        graphs = None
        for shape in self.spec.dynamic or (self.spec.cases[compiled_case],):
            call = self.build({**self.spec.cases[compiled_case], **shape}, torch.float32, device)
            grad = self.some_grad(call)
            out, gradients = value_and_gradients(compiled, call.detached(), grad, backend=backend)
            eager, expected = value_and_gradients(self.spec.function, call.detached(), grad, backend=backend)
            torch.testing.assert_close(out, eager)
            for g, e in zip(gradients, expected, strict=True):
                torch.testing.assert_close(g, e)
            graphs = graphs or counter.frame_count
            assert counter.frame_count == graphs, "another size needed another graph"


class Autocast(OpTests):
    def test_autocast(self, case: str, device: str, backend: str) -> None:
        call = self.build(self.spec.cases[case], torch.float32, device)
        plain, grad = self.spec.reference(**call.arguments), self.some_grad(call)
        with torch.autocast(device, dtype=torch.bfloat16):
            out, gradients = value_and_gradients(self.spec.function, call.detached(), grad, backend=backend)
        assert out.dtype in (torch.bfloat16, torch.float32)
        assert all(g.dtype == torch.float32 and torch.isfinite(g).all() for g in gradients)
        torch.testing.assert_close(out.float(), plain, atol=0.1, rtol=0.05)

    def test_the_reference_is_not_rounded_by_autocast(self, case: str) -> None:
        """Its dtypes are those of its definition, also where it serves derivatives under autocast."""
        call = self.build(self.spec.cases[case], torch.float32, "cpu")
        call = call.mapped(lambda name, t: t.bfloat16() if name in self.spec.activations else t)
        grad = self.some_grad(call)

        def within_autocast(**arguments: Any) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return self.spec.reference(**arguments)

        out, gradients = value_and_gradients(within_autocast, call.detached(), grad)
        plain, expected = value_and_gradients(self.spec.reference, call.detached(), grad)
        for found, other in zip((out, *gradients), (plain, *expected), strict=True):
            assert torch.equal(found, other)


class MetaTensors(OpTests):
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
    @pytest.mark.parametrize("autocast", [False, True])
    def test_meta_tensors(self, case: str, dtype: torch.dtype, autocast: bool) -> None:
        """Shapes and dtypes without values; the meta device has no autocast."""
        call = self.build(self.spec.cases[case], dtype, "cpu")
        expected = self.spec.function(**call.arguments)
        meta = call.mapped(lambda _, tensor: tensor.to("meta")).detached()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = self.spec.function(**meta.arguments)
        assert (out.device.type, out.shape, out.dtype) == ("meta", expected.shape, expected.dtype)
        gradients = torch.autograd.grad(out.sum(), meta.leaves())
        assert [g.shape for g in gradients] == [leaf.shape for leaf in meta.leaves()]


class Checkpointing(OpTests):
    def test_checkpointing(self, case: str, device: str, backend: str) -> None:
        def recomputed(**arguments: Any) -> Tensor:
            return checkpoint(self.spec.function, use_reentrant=False, **arguments)

        call = self.build(self.spec.cases[case], torch.float32, device)
        grad = self.some_grad(call)
        out, gradients = value_and_gradients(recomputed, call.detached(), grad, backend=backend)
        eager, expected = value_and_gradients(self.spec.function, call.detached(), grad, backend=backend)
        assert torch.equal(out, eager)
        for g, e in zip(gradients, expected, strict=True):
            assert torch.equal(g, e)


class Overwriting(OpTests):
    def test_an_input_overwritten_before_the_backward_pass(
        self, case: str, device: str, backend: str
    ) -> None:
        """The op keeps its inputs and no copies of them; the error says which op, and the way out."""
        call = self.build(self.spec.cases[case], torch.float32, device).detached()
        frozen = call.mapped(lambda name, t: t.detach() if name in self.spec.activations else t)
        out = self.spec.function(**frozen.arguments, backend=backend)
        frozen.tensors(self.spec.activations[0])[-1].mul_(2)
        with pytest.raises(
            RuntimeError, match=rf"{self.spec.name}: .* give the op a clone.*inplace operation"
        ):
            out.sum().backward()


class BackendNames(OpTests):
    def test_backend_names(self) -> None:
        """A backend asked for by name is used, or refused with the reason."""
        call = self.build(next(iter(self.spec.cases.values())), torch.float32, "cpu")
        with pytest.raises(ValueError, match="backend must be one of auto, native, triton, reference"):
            self.spec.function(**call.arguments, backend="fastest")
        for name in {"native", "triton"} - set(backends("cpu", torch.float32)):
            with pytest.raises(ValueError, match=f"backend='{name}' cannot be used"):
                self.spec.function(**call.arguments, backend=name)
