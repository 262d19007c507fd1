"""The attention adapters of transformers' speech models: ``Wav2Vec2AttnAdapterLayer`` (MMS) and its twins.

An encoder layer adds its adapter: ``hidden_states = hidden_states + self.adapter_layer(hidden_states)``.
This statement is replaced, so that one op reads the hidden states once for the LayerNorm, both products and
the sum. The adapter itself stays as it is, for other callers. An adapter that has hooks, or whose layer adds
it in another way, has its own forward replaced, and its caller adds the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from mmkernels.patch.bottleneck import Bottleneck, check_intact, find_bottleneck, takes_residual
from mmkernels.patch.recogniser import Recogniser, Unsupported
from mmkernels.patch.rewrite import Body, KnownFunctions, Rewrite
from mmkernels.patch.subclass import original_class

_PARTS = ("norm", "linear_1", "act_fn", "linear_2")


class AttnAdapterInLayer(Recogniser):
    """An encoder layer whose ``adapter_layer`` is an adapter of the library, computed as there."""

    what = "hidden_states + adapter_layer(hidden_states) -> adapter"
    method = "forward"

    def claims(self, module: nn.Module) -> bool:
        # Not getattr: wrappers give the attributes of the module inside.
        adapter = module._modules.get("adapter_layer")
        if adapter is None or not _is_attn_adapter(adapter):
            return False
        try:
            AttnAdapter().check(adapter)
            _known_bottleneck(adapter)
        except Unsupported:
            return False  # The adapter, which is claimed itself, gives the reason.
        return True

    def check(self, module: nn.Module) -> None:
        if "forward" in vars(module):
            raise Unsupported("forward is overridden on the instance, by a hook or a wrapper")
        _check_call(module.adapter_layer)

    def covers(self, module: nn.Module) -> Iterable[nn.Module]:
        adapter = module._modules.get("adapter_layer")
        return () if adapter is None else (adapter,)

    def override(self, cls: type[Any]) -> Callable[..., Any]:
        return SUM.apply(cls.forward)


class AttnAdapter(Recogniser):
    """An adapter alone, without the sum."""

    what = "norm, linear_1, act_fn, linear_2 -> adapter, to which the caller adds the residual"
    method = "forward"

    def claims(self, module: nn.Module) -> bool:
        return _is_attn_adapter(module)

    def check(self, module: nn.Module) -> None:
        if "forward" in vars(module):
            raise Unsupported("forward is overridden on the instance, by a hook or a wrapper")
        _bottleneck(module)

    def override(self, cls: type[Any]) -> Callable[..., Any]:
        return LAYERS.apply(cls.forward)


def _serves_sum(adapter: Any, x: object) -> bool:
    """Whether the op serves ``x + adapter(x)``. If not, the layer's statement runs."""
    try:
        bottleneck = _known_bottleneck(adapter)
        _check_call(adapter)
    except Unsupported:
        return False
    return bottleneck.serves(x) and isinstance(x, Tensor) and takes_residual(x, x)


def _sum(adapter: Any, x: Tensor) -> Tensor:
    return _bottleneck(adapter)(x, residual=x)


def _serves(adapter: Any, x: object) -> bool:
    try:
        return _bottleneck(adapter).serves(x)
    except Unsupported:
        return False


def _run(adapter: Any, x: Tensor) -> Tensor:
    return _bottleneck(adapter)(x)


SUM = Rewrite(
    pattern="HIDDEN = HIDDEN + self.adapter_layer(HIDDEN)",
    meanings={},
    condition="_mmkernels_serves(self.adapter_layer, HIDDEN)",
    replacement="HIDDEN = _mmkernels_sum(self.adapter_layer, HIDDEN)",
    helpers={"_mmkernels_serves": _serves_sum, "_mmkernels_sum": _sum},
)

_STATEMENTS = """
            HIDDEN = self.norm(HIDDEN)
            HIDDEN = self.linear_1(HIDDEN)
            HIDDEN = self.act_fn(HIDDEN)
            HIDDEN = self.linear_2(HIDDEN)"""
LAYERS = Rewrite(
    pattern=_STATEMENTS,
    meanings={},
    condition="_mmkernels_serves(self, HIDDEN)",
    replacement="HIDDEN = _mmkernels_run(self, HIDDEN)",
    helpers={"_mmkernels_serves": _serves, "_mmkernels_run": _run},
)
_FORWARDS = KnownFunctions(
    ("adapter", Body(f"def forward(self, hidden_states):{_STATEMENTS}\n            return HIDDEN"))
)


def _is_attn_adapter(module: nn.Module) -> bool:
    return any(base.__name__.endswith("AttnAdapterLayer") for base in type(module).__mro__)


def _bottleneck(adapter: Any) -> Bottleneck:
    """The parts of an adapter. Looked up on each call: they may change after ``accelerate``."""
    parts = [(name, part) for name in _PARTS if (part := adapter._modules.get(name)) is not None]
    if len(parts) != len(_PARTS):
        raise Unsupported(f"unknown layout: it does not have the layers {', '.join(_PARTS)}")
    bottleneck = find_bottleneck(part for _, part in parts)
    check_intact(parts)
    return bottleneck


def _known_bottleneck(adapter: Any) -> Bottleneck:
    """The parts of an adapter whose whole forward is the library's, before or after its own replacement."""
    bottleneck = _bottleneck(adapter)
    cls = type(adapter)
    if _FORWARDS.name((original_class(cls) or cls).forward) is None:
        raise Unsupported("unknown layout: its forward is another computation")
    return bottleneck


def _check_call(adapter: Any) -> None:
    """Raise ``Unsupported`` if a call of the adapter does more than its forward."""
    check_intact([("adapter_layer", adapter)])
    if type(adapter).__call__ is not nn.Module.__call__:
        raise Unsupported("adapter_layer overrides __call__")
