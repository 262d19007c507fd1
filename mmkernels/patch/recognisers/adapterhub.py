"""Bottleneck adapters of the ``adapters`` library (AdapterHub).

Its ``Adapter.forward`` returns the output, the hidden activation and the up-projected bottleneck; the op
returns the first or the last. So the adapters stay as they are, for hooks and other callers, and their only
caller in the library is replaced: the lines of ``BottleneckLayer.compose_single`` that call an adapter and
store the results in the layer's state. The hidden activation is not used there, and only compositions read
the up-projection. If a ``Stack`` of names is active, as for a single adapter, one op computes the output with
its residual, and the state holds no up-projection; else (``Fuse``, ``Parallel``, ``Split``, ...) the op
computes the up-projection, and the residual is added to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mmkernels.patch.bottleneck import (
    Bottleneck,
    check_intact,
    find_bottleneck,
    takes_residual,
)
from mmkernels.patch.recogniser import Recogniser, Unsupported
from mmkernels.patch.rewrite import Body, KnownFunctions, Rewrite

_LAYER_CLASSES = ("BottleneckLayer", "ComposableAdapterLayerBase")
# The methods that run between compose_single and the end of a layer with a stack of adapters.
_LAYER_METHODS = ("bottleneck_layer_forward", "compose", "compose_stack", "pre_block")


class AdapterHubLayer(Recogniser):
    """A ``BottleneckLayer`` of ``adapters``, or a module that inherits from it, with at least one adapter."""

    what = "bottleneck adapters of BottleneckLayer.compose_single -> adapter"
    method = "compose_single"

    def claims(self, module: nn.Module) -> bool:
        return (
            any(base.__name__ == "BottleneckLayer" for base in type(module).__mro__)
            and isinstance(adapters := getattr(module, "adapters", None), nn.ModuleDict)
            and len(adapters) > 0
        )

    def check(self, module: nn.Module) -> None:
        for method in ("compose_single", "get_active_setup"):
            if method in vars(module) or not hasattr(type(module), method):
                raise Unsupported(f"unknown layout: {method} is missing or set on the instance")
        reasons = dict(self.exceptions(module))
        if len(reasons) == len(_adapters(module)):
            raise Unsupported("; ".join(f"{name}: {reason}" for name, reason in reasons.items()))

    def exceptions(self, module: nn.Module) -> Iterable[tuple[str, str]]:
        for name, adapter in _adapters(module).items():
            try:
                _bottleneck(adapter)
            except Unsupported as reason:
                yield f"adapters.{name}", str(reason)

    def override(self, cls: type[Any]) -> Callable[..., Any]:
        for method in _LAYER_METHODS:
            owner = _owner(cls, method)
            if owner not in _LAYER_CLASSES:
                raise Unsupported(f"unknown layout: {method} is missing or overridden in {owner}")
            # A stack's state holds no up-projection.
            if "bottleneck_up" in getattr(cls, method).__code__.co_names:
                raise Unsupported(f"unknown layout: {method} reads the up-projection")
        return CALL_OF_ADAPTER.apply(cls.compose_single)


def _serves(adapter: Any, state: Any, output_gating: bool) -> bool:
    """Whether the op serves this call. If not, the layer's statements run."""
    if output_gating:
        return False
    try:
        bottleneck = _bottleneck(adapter)
    except Unsupported:
        return False
    drops = adapter.dropout.training and adapter.dropout.p > 0
    return not drops and bottleneck.serves(state.hidden_states)


def _next_state(layer: Any, name: str, adapter: Any, state: Any) -> Any:
    hidden_states, up = _run(
        adapter, state.hidden_states, state.adapter_residual, keep_up=not _stack_of_names(layer)
    )
    return state._replace(hidden_states=hidden_states, bottleneck_up=up, last=name)


CALL_OF_ADAPTER = Rewrite(
    pattern="""
        OUTPUT = ADAPTER(STATE.hidden_states, residual_input=STATE.adapter_residual, output_gating=GATING)
        HIDDEN, UP = OUTPUT[0], OUTPUT[2]
        if GATING:
            self._store_gating_score(NAME, OUTPUT[-1])
        return STATE._replace(hidden_states=HIDDEN, bottleneck_up=UP, last=NAME)
    """,
    meanings={},
    condition="_mmkernels_serves(ADAPTER, STATE, GATING)",
    replacement="return _mmkernels_next_state(self, NAME, ADAPTER, STATE)",
    helpers={"_mmkernels_serves": _serves, "_mmkernels_next_state": _next_state},
)


def _run(adapter: Any, x: Tensor, residual: Any, keep_up: bool) -> tuple[Tensor, Tensor | None]:
    """Output and scaled up-projection of an adapter; None for the latter if it would cost a pass."""
    bottleneck = find_bottleneck([*adapter.adapter_down, adapter.adapter_up])
    scaling = adapter.scaling
    learned = isinstance(scaling, Tensor)
    sequential = _kind(type(adapter)) == "sequential"
    if sequential and not learned and not keep_up and takes_residual(residual, x):
        return bottleneck(x, residual, float(scaling)), None
    up = bottleneck(x) * scaling if learned else bottleneck(x, scale=float(scaling))
    return (up + residual if sequential else up), up


def _stack_of_names(layer: Any) -> bool:
    setup = layer.get_active_setup()
    return type(setup).__name__ == "Stack" and all(isinstance(child, str) for child in setup)


def _bottleneck(adapter: Any) -> Bottleneck:
    """The parts of a supported adapter. Looked up on each call: it may change after ``accelerate``."""
    owner = _owner(type(adapter), "forward")
    if owner not in ("Adapter", "ParallelAdapter"):
        raise Unsupported(f"its forward is overridden in {owner}")
    down, dropout = getattr(adapter, "adapter_down", None), getattr(adapter, "dropout", None)
    if type(down) is not nn.Sequential or not hasattr(adapter, "adapter_up"):
        raise Unsupported("unknown layout: it has no adapter_down and adapter_up")
    bottleneck = find_bottleneck([*down, adapter.adapter_up])
    for attribute, reason in (
        ("use_gating", "its output is gated (use_gating)"),
        ("add_layer_norm_after", "it has a LayerNorm after the up-projection (ln_after)"),
        ("DropPath", "it drops whole samples (stochastic_depth)"),
    ):
        if getattr(adapter, attribute, False):
            raise Unsupported(reason)
    scaling = getattr(adapter, "scaling", None)
    if type(dropout) is not nn.Dropout or not isinstance(scaling, (int, float, Tensor)):
        raise Unsupported("unknown layout: its dropout or scaling is of another type")
    check_intact((name or "it", module) for name, module in adapter.named_modules())
    if _kind(type(adapter)) is None:
        raise Unsupported("unknown layout: its forward is another computation")
    return bottleneck


def _owner(cls: type[Any], method: str) -> str | None:
    """Name of the class that a method is inherited from."""
    return next((base.__name__ for base in cls.__mro__ if method in vars(base)), None)


def _adapters(module: Any) -> nn.ModuleDict:
    adapters = module.adapters
    assert isinstance(adapters, nn.ModuleDict)
    return adapters


def _kind(cls: type[Any]) -> str | None:
    """The library's adapter with the forward of this class: "sequential", "parallel" or None."""
    return _FORWARDS.name(cls.forward)


def _forward_of_adapter(drop: str, residual: bool) -> Body:
    """The forward that all versions have but for the two differences; ``_run`` computes the same."""
    before, after = ("", "")
    if residual:
        before = """
            if self.adapter_residual_before_ln:
                OUTPUT = OUTPUT + residual_input"""
        after = """
            if not self.adapter_residual_before_ln:
                OUTPUT = OUTPUT + residual_input"""
    return Body(
        f"""
        def forward(self, x, residual_input, output_gating):
            DOWN = self.adapter_down(x)
            UP = self.adapter_up(DOWN){drop}
            UP = UP * self.scaling
            OUTPUT = self.dropout(UP)
            if self.use_gating:
                GATE = torch.sigmoid(self.gate(x))
                GATE = torch.mean(GATE, dim=1).unsqueeze(-1)
                OUTPUT = OUTPUT * GATE{before}
            if self.add_layer_norm_after:
                OUTPUT = self.adapter_norm_after(OUTPUT){after}
            if self.use_gating and output_gating:
                return OUTPUT, DOWN, UP, GATE
            return OUTPUT, DOWN, UP
        """,
        meanings={"torch": torch},
    )


_DROP = """
            if hasattr(self, "DropPath"):
                UP = self.DropPath(UP)"""
_FORWARDS = KnownFunctions(
    ("sequential", _forward_of_adapter(_DROP, residual=True)),
    ("sequential", _forward_of_adapter("", residual=True)),  # before 1.1
    ("parallel", _forward_of_adapter("", residual=False)),
)
