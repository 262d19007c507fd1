"""What was asked of the kernels, as data. The report prints it beside what was measured; it is no test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """A wanted value of one figure of the kernel's rows.

    Attributes:
        rows: what a row must have to count; of several the worst counts.
        figure: "share" of the ceiling; "speedup" over the rows of the same case with the role or the name
            ``baseline``; "seconds"; "memory", extra memory as a multiple of the output.
        wanted: at least this, for "seconds" and "memory" at most.
        tolerance: relative, by which a measured value may miss and still counts as met.
    """

    text: str
    rows: dict[str, Any]
    figure: str
    wanted: float
    baseline: str | None = None
    tolerance: float = 0.0

    @property
    def at_most(self) -> bool:
        return self.figure in ("seconds", "memory")

    def measured(self, rows: Sequence[Row]) -> float | None:
        """The worst value among the rows that count, None if none was measured."""
        values = [self._value(row, rows) for row in rows if row["role"] == "kernel" and self._counts(row)]
        found = [value for value in values if value is not None]
        if not found:
            return None
        return max(found) if self.at_most else min(found)

    def met(self, value: float) -> bool:
        slack = self.wanted * self.tolerance
        return value <= self.wanted + slack if self.at_most else value >= self.wanted - slack

    def _counts(self, row: Row) -> bool:
        return row["failure"] is None and all(row[name] == value for name, value in self.rows.items())

    def _value(self, row: Row, rows: Sequence[Row]) -> float | None:
        if self.figure == "share":
            return row["share_of_ceiling"]["median"] if "share_of_ceiling" in row else None
        if self.figure == "seconds":
            return row["seconds"]["median"]
        if self.figure == "memory":
            return row["peak_memory"] / row["output_bytes"]
        ratios = [
            other["times_kernel"]["median"] / row["times_kernel"]["median"]
            for other in rows
            if other["id"] == row["id"]
            and self.baseline in (other["role"], other["candidate"])
            and other["failure"] is None
        ]
        return min(ratios, default=None)


def _rows(op: str, shape: str, variant: str, direction: str, **more: Any) -> dict[str, Any]:
    return {"op": op, "shape": shape, "variant": variant, "direction": direction, **more}


_MIX = ("layer_mix", "hubert-base")
_CPU = {"dtype": "float32", "device": "cpu", "memory": "system"}
_ADAPTER = ("adapter", "hubert-base, d=64")
_AST = ("adapter", "ast-base, 32 clips, d=64")
_LARGE = ("layer_mix", "wav2vec2-large")
_CUDA = {"dtype": "bfloat16", "device": "cuda"}

TARGETS = (
    Target("layer_mix forward, share of copy", _rows(*_MIX, "", "forward", **_CPU), "share", 0.85),
    Target("layer_mix forward / s3prl", _rows(*_MIX, "", "forward", **_CPU), "speedup", 10, "papers"),
    Target(
        "layer_mix norm forward / compile", _rows(*_MIX, "norm", "forward", **_CPU), "speedup", 2.5, "compile"
    ),
    Target(
        "layer_mix norm forward / s3prl", _rows(*_MIX, "norm", "forward", **_CPU), "speedup", 15, "papers"
    ),
    Target(
        "layer_mix norm forward + d_weights / compile",
        _rows(*_MIX, "norm", "forward_backward", **_CPU),
        "speedup",
        1.9,
        "compile",
    ),
    Target("layer_mix, every row / compile", {"op": "layer_mix"}, "speedup", 0.95, "compile"),
    Target(
        "layer_mix forward, extra memory / output",
        {"op": "layer_mix", "direction": "forward"},
        "memory",
        1.0,
        # The weights' cast, where they come in half precision.
        tolerance=0.001,
    ),
    Target(
        "layer_project forward + backward / eager list",
        _rows("layer_project", "wav2vec2-large, 12 taps", "norm+relu", "forward_backward", **_CPU),
        "speedup",
        1.4,
        "papers",
    ),
    Target(
        "HFF-b training step / eager",
        {"op": "hff", "direction": "training step", "headline": True, "device": "cpu"},
        "speedup",
        1.3,
        "papers",
    ),
    Target("adapter forward / eager", _rows(*_ADAPTER, "relu", "forward", **_CPU), "speedup", 1.6, "papers"),
    Target(
        "adapter forward + backward / eager",
        _rows(*_ADAPTER, "relu", "forward_backward", **_CPU),
        "speedup",
        1.4,
        "papers",
    ),
    Target(
        "adapter norm forward / eager",
        _rows(*_ADAPTER, "norm+relu", "forward", **_CPU),
        "speedup",
        1.8,
        "papers",
    ),
    Target(
        "adapter norm forward + backward / eager",
        _rows(*_ADAPTER, "norm+relu", "forward_backward", **_CPU),
        "speedup",
        1.6,
        "papers",
    ),
    Target(
        "adapter at bottleneck 64, every row / compile",
        {"op": "adapter", "device": "cpu", "headline": True},
        "speedup",
        1.2,
        "compile",
    ),
    *(
        Target(text, {"op": "aat", "device": "cpu", "candidate": candidate}, "speedup", wanted, baseline)
        for candidate in ("mmkernels native", "mmkernels native, rewritten")
        for text, wanted, baseline in (
            (f"AAT^MS training step ({candidate}) / eager", 1.2, "papers"),
            # Asked is at most 0.70 of its step.
            (f"AAT^MS training step ({candidate}) / full fine-tuning", 1 / 0.7, "full fine-tuning"),
        )
    ),
    Target("eager call of a tiny layer_mix", {"op": "overhead", "direction": "call"}, "seconds", 15e-6),
    Target("import mmkernels beyond torch", {"op": "overhead", "direction": "import"}, "seconds", 0.3),
    Target("layer_mix forward, share of copy", _rows(*_LARGE, "", "forward", **_CUDA), "share", 0.88),
    Target(
        "layer_mix norm forward, share of copy", _rows(*_LARGE, "norm", "forward", **_CUDA), "share", 0.85
    ),
    Target(
        "layer_mix norm d_weights, share of copy", _rows(*_LARGE, "norm", "backward", **_CUDA), "share", 0.75
    ),
    Target("adapter forward, share of copy", _rows(*_AST, "relu", "forward", **_CUDA), "share", 0.75),
    # Asked is half of the copy bandwidth on the 5 R D elements that pass in practice; a row counts 3 R D.
    Target("adapter backward, share of copy", _rows(*_AST, "relu", "backward", **_CUDA), "share", 0.3),
)
