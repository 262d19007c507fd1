"""One training step of a method: forward, loss, backward and AdamW, on one batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benches.case import Candidate, Runner, in_double
from mmtransfer.training.memory import allocations


class StepProblem:
    """A step of the model that ``candidate.call()`` makes; all start from the reference's parameters.

    The first step's logits and gradients are compared. A candidate of the role "different" trains other
    parameters; it is compared in those that it shares with the reference.

    Args:
        reference: makes the model as published, which gives the parameters and, in float64, the results.
        inputs: keyword arguments of the models.
        labels: class of each item.
        parameters: dtype of the parameters.
        activations: dtype of the forward pass, under autocast if it is not that of the parameters.
        compiler: compiles the model of the candidate "compile" in place.
    """

    def __init__(
        self,
        reference: Callable[[], nn.Module],
        inputs: dict[str, Any],
        labels: Tensor,
        *,
        parameters: torch.dtype,
        activations: torch.dtype,
        compiler: Callable[[nn.Module], None] = lambda model: model.compile(dynamic=False),
    ) -> None:
        self.reference, self.inputs, self.labels, self.compiler = reference, inputs, labels, compiler
        self.parameters, self.activations = parameters, activations
        self.state = reference().state_dict()
        self.gradients: dict[str, Tensor] = {}

    def runner(self, candidate: Candidate) -> Runner:
        """The first call, off the clock, also records the bytes held for the backward pass."""
        model = candidate.call()
        model.load_state_dict(self.state, strict=candidate.role != "different")
        model.to(self.labels.device, self.parameters)
        if candidate.role == "compile":
            self.compiler(model)
        inputs = self.inputs if candidate.lay_out is None else candidate.lay_out(self.inputs)
        # The fused AdamW for all: a model of many small parameters has no disadvantage.
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
        facts: dict[str, int] = {}

        def step(_: None) -> list[Tensor]:
            optimizer.zero_grad()
            if facts:
                logits, loss = self._forward(model, inputs)
            else:
                (logits, loss), changes = allocations(lambda: self._forward(model, inputs))
                facts["held_bytes"] = sum(changes)
            loss.backward()
            optimizer.step()
            return [logits]

        def collect(results: list[Tensor]) -> list[Tensor]:
            found = gradients(model)
            if candidate.role == "different":
                found = self.gradients | found
            return [*results, *(found[name] for name in self.gradients)]

        return Runner(step, collect=collect, warm=True, facts=facts)

    def expected(self) -> list[Tensor]:
        model = self.reference()
        model.load_state_dict(self.state)
        model.to(self.labels.device, torch.float64)
        inputs = {name: in_double(value) for name, value in self.inputs.items()}
        logits, loss = self._forward(model, inputs)
        loss.backward()
        self.gradients = gradients(model)
        return [logits.detach(), *self.gradients.values()]

    def _forward(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        dtype = next(model.parameters()).dtype
        autocast = dtype == self.parameters != self.activations
        with torch.autocast(self.labels.device.type, self.activations, enabled=autocast):
            out = model(**inputs)
        logits = out if isinstance(out, Tensor) else out.logits
        logits = logits if dtype == torch.float64 else logits.float()
        return logits, functional.cross_entropy(logits, self.labels)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradients under the names of the state dict, which may stack the parameters of several modules."""
    values = {parameter: parameter.data for parameter in model.parameters()}
    frozen = {value.data_ptr() for parameter, value in values.items() if not parameter.requires_grad}
    for parameter in values:
        if parameter.requires_grad:
            assert parameter.grad is not None
            parameter.data = parameter.grad
    found = {name: tensor for name, tensor in model.state_dict().items() if tensor.data_ptr() not in frozen}
    for parameter, value in values.items():
        parameter.data = value
    return found
