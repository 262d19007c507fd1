"""Adapters and adapter layers built like those of the ``adapters`` library, typed anew in the smallest form.

The library pins another release of transformers than the tests use. Names, attributes and calls are its
(1.3.0); what compositions do is reduced to what they read of a layer's state.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

WIDTH, BOTTLENECK = 16, 6


class Activation_Function_Class(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.f = nn.functional.leaky_relu if name == "leakyrelu" else ACT2FN[name]

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x)


class PHMLayer(nn.Linear):
    """Stands for Compacter's hypercomplex projections: a projection that is no plain Linear."""


class SampleDrop(nn.Module):
    """Stands for torchvision's StochasticDepth."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 0.5 if self.training else x


class Adapter(nn.Module):
    def __init__(
        self,
        non_linearity: str = "relu",
        scaling: float | str = 1.0,
        ln_before: bool = False,
        ln_after: bool = False,
        adapter_residual_before_ln: bool = True,
        residual_before_ln: bool = True,
        original_ln_before: bool = False,
        use_gating: bool = False,
        dropout: float = 0.0,
        stochastic_depth: float = 0.0,
        phm_layer: bool = False,
    ) -> None:
        super().__init__()
        linear = PHMLayer if phm_layer else nn.Linear
        layers: list[nn.Module] = []
        if ln_before:
            self.adapter_norm_before = nn.LayerNorm(WIDTH)
            layers.append(self.adapter_norm_before)
        self.non_linearity = Activation_Function_Class(non_linearity)
        self.adapter_down = nn.Sequential(*layers, linear(WIDTH, BOTTLENECK), self.non_linearity)
        self.adapter_up = linear(BOTTLENECK, WIDTH)
        size = {"learned": 1, "channel": WIDTH}
        self.scaling = nn.Parameter(torch.ones(size[scaling])) if isinstance(scaling, str) else scaling
        self.add_layer_norm_after, self.use_gating = ln_after, use_gating
        self.adapter_residual_before_ln = adapter_residual_before_ln
        self.residual_before_ln, self.original_ln_before = residual_before_ln, original_ln_before
        if ln_after:
            self.adapter_norm_after = nn.LayerNorm(WIDTH)
        if use_gating:
            self.gate = nn.Linear(WIDTH, 1)
        self.dropout = nn.Dropout(dropout)
        if stochastic_depth:
            self.DropPath = SampleDrop()

    def pre_forward(self, hidden: Tensor, block_input: Tensor, layer_norm: Any) -> tuple[Tensor, Tensor]:
        before = hidden
        if self.original_ln_before:
            hidden = layer_norm(hidden + block_input)
        return hidden, before if self.residual_before_ln else hidden

    def forward(self, x: Tensor, residual_input: Tensor, output_gating: bool = False) -> tuple[Tensor, ...]:
        """The statements of the library, which ``accelerate`` compares."""
        down = self.adapter_down(x)
        up = self.adapter_up(down)
        if hasattr(self, "DropPath"):
            up = self.DropPath(up)
        up = up * self.scaling
        output = self.dropout(up)
        if self.use_gating:
            gate = torch.sigmoid(self.gate(x))
            gate = torch.mean(gate, dim=1).unsqueeze(-1)
            output = output * gate
        if self.adapter_residual_before_ln:
            output = output + residual_input
        if self.add_layer_norm_after:
            output = self.adapter_norm_after(output)
        if not self.adapter_residual_before_ln:
            output = output + residual_input
        if self.use_gating and output_gating:
            return output, down, up, gate
        return output, down, up


class ParallelAdapter(Adapter):
    def pre_forward(self, hidden: Tensor, block_input: Tensor, layer_norm: Any) -> tuple[Tensor, Tensor]:
        return block_input, block_input

    def forward(self, x: Tensor, residual_input: Tensor, output_gating: bool = False) -> tuple[Tensor, ...]:
        down = self.adapter_down(x)
        up = self.adapter_up(down)
        up = up * self.scaling
        output = self.dropout(up)
        if self.use_gating:
            gate = torch.sigmoid(self.gate(x))
            gate = torch.mean(gate, dim=1).unsqueeze(-1)
            output = output * gate
        if self.add_layer_norm_after:
            output = self.adapter_norm_after(output)
        if self.use_gating and output_gating:
            return output, down, up, gate
        return output, down, up


class Stack(tuple):  # type: ignore[type-arg]
    """Adapters one after the other."""


class Parallel(tuple):  # type: ignore[type-arg]
    """Each adapter on a copy of the batch."""


class Fuse(tuple):  # type: ignore[type-arg]
    """The mean of up-projections, in place of AdapterFusion's attention over them."""


class BottleneckState(NamedTuple):
    hidden_states: Tensor
    input_tensor: Tensor
    adapter_residual: Tensor
    layer_norm: Any
    bottleneck_up: Tensor | None = None
    last: str | None = None


class ComposableAdapterLayerBase:
    def compose(self: Any, setup: Any, state: BottleneckState) -> BottleneckState:
        return getattr(self, f"compose_{type(setup).__name__.lower()}")(setup, state)

    def compose_stack(self: Any, setup: Stack, state: BottleneckState) -> BottleneckState:
        for child in setup:
            if isinstance(child, str):
                state = self.compose_single(child, self.pre_block(child, state))
            else:
                state = self.compose(child, state)
        return state

    def compose_parallel(self: Any, setup: Parallel, state: BottleneckState) -> BottleneckState:
        state = self.pre_block(setup[0], state)
        states = [self.compose_single(child, state) for child in setup]
        return BottleneckState(
            *(torch.cat([s[i] for s in states]) for i in range(3)),
            states[0].layer_norm,
            torch.cat([s.bottleneck_up for s in states]),
            states[-1].last,
        )

    def compose_fuse(self: Any, setup: Fuse, state: BottleneckState) -> BottleneckState:
        state = self.pre_block(setup[-1], state)
        ups = [self.compose_single(child, state).bottleneck_up for child in setup]
        return state._replace(
            hidden_states=torch.stack(ups).mean(dim=0) + state.adapter_residual, last=setup[-1]
        )


class BottleneckLayer(ComposableAdapterLayerBase, nn.Module):
    """Called with the output of a transformer block's part, the block's input and the block's LayerNorm."""

    output_adapter_gating_scores = False

    def __init__(self, **adapters: nn.Module) -> None:
        super().__init__()
        self.adapters = nn.ModuleDict(adapters)
        self.active_setup: Any = Stack(adapters)
        self.gating_scores: dict[str, Tensor] = {}

    def get_active_setup(self) -> Any:
        return self.active_setup

    def _store_gating_score(self, name: str, score: Tensor) -> None:
        self.gating_scores[name] = score

    def pre_block(self, name: str, state: BottleneckState) -> BottleneckState:
        hidden, residual = self.adapters[name].pre_forward(
            state.hidden_states, state.input_tensor, state.layer_norm
        )
        return state._replace(hidden_states=hidden, adapter_residual=residual)

    def compose_single(self, adapter_setup: str, state: BottleneckState, lvl: int = 0) -> BottleneckState:
        layer = self.adapters[adapter_setup]
        gating = self.output_adapter_gating_scores
        result = layer(
            state.hidden_states,
            residual_input=state.adapter_residual,
            output_gating=gating,
        )
        hidden, up = result[0], result[2]
        if gating:
            self._store_gating_score(adapter_setup, result[-1])

        return state._replace(hidden_states=hidden, bottleneck_up=up, last=adapter_setup)

    def bottleneck_layer_forward(self, hidden: Tensor, block_input: Tensor, layer_norm: Any) -> Tensor:
        setup = self.get_active_setup()
        state = self.compose(setup, BottleneckState(hidden, block_input, block_input, layer_norm))
        if isinstance(self.adapters[state.last], ParallelAdapter):
            return state.hidden_states + hidden
        return state.hidden_states

    def forward(self, hidden: Tensor, block_input: Tensor, layer_norm: Any) -> Tensor:
        return self.bottleneck_layer_forward(hidden, block_input, layer_norm)
