"""Figures of a comparison as inline SVG that takes its colours and fonts from the page."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from mmtransfer.results import Comparison, MethodResult, in_parts

# Drawn in these, replaced by the page's own colours: the figures follow its light or dark scheme.
_INK, _FAINT, _OURS, _OTHER = "#010101", "#020202", "#030303", "#040404"
_PAGE_COLOURS = {_INK: "var(--ink)", _FAINT: "var(--faint)", _OURS: "var(--accent)", _OTHER: "var(--second)"}
_STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _FAINT,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
_WIDTH = 7.2


def draw(comparison: Comparison) -> list[tuple[str, str]]:
    """The figures with their captions: accuracy, costs, tap weights where a method has them, step time."""
    with matplotlib.rc_context(_STYLE):
        return _draw(comparison)


def _draw(comparison: Comparison) -> list[tuple[str, str]]:
    text = (
        "Test accuracy, and what each method costs. Dots are seeds, bars their means, the dashed line "
        "chance; blue on a frozen encoder, orange through the encoder. Costs are on logarithmic scales; an "
        "epoch and a step on cached features run no encoder."
    )
    drawn = [(_overview(comparison), text)]
    kinds = {method.tap_weights_kind for method in comparison.methods}
    if "softmax" in kinds:
        text = "Learned weight of each layer in the weighted sums, mean over seeds; dots are seeds."
        drawn.append((_tap_weights(comparison, "softmax", "weight after softmax"), text))
    if "norm" in kinds:
        text = "Norm of each layer's part of LFF's matrix, mean over seeds; dots are seeds."
        drawn.append((_tap_weights(comparison, "norm", "Frobenius norm"), text))
    for methods in in_parts(comparison.methods):
        timed = [method for method in methods if method.step.eager and method.step.agrees]
        if timed:
            drawn.append((_step_time(timed), _STEP_TEXTS[methods[0].through_encoder]))
    return drawn


_STEP_TEXTS = {
    False: "One training step of fusion and classifier on features in memory, with mmkernels and eager; the "
    "factor is eager time / mmkernels time.",
    True: "One training step through the encoder, with mmkernels and eager; the factor is eager time / "
    "mmkernels time.",
}


def _overview(comparison: Comparison) -> str:
    """Accuracy and three costs of each method, side by side."""
    methods = [method for part in in_parts(comparison.methods) for method in part]
    figure = Figure(figsize=(_WIDTH, 0.75 + 0.36 * len(methods)), layout="constrained")
    figure.patch.set_alpha(0)
    panels = figure.subplots(1, 4, sharey=True, width_ratios=(1.5, 1, 1, 1))
    _accuracy(panels[0], methods, comparison.task["chance"])
    memory = [method.step.mmkernels.memory_mib for method in methods]
    _cost(panels[1], "parameters", [method.trainable_parameters for method in methods])
    _cost(panels[2], "s per epoch", [method.seconds_per_epoch for method in methods])
    _cost(panels[3], "MiB per step", memory)
    for axes in panels:
        axes.patch.set_alpha(0)
        axes.tick_params(length=0)
        axes.spines["left"].set_visible(False)
    panels[0].set_yticks(range(len(methods)), [method.title for method in methods])
    panels[0].invert_yaxis()
    return _svg(figure, "overview")


def _accuracy(axes: Axes, methods: list[MethodResult], chance: float) -> None:
    for row, method in enumerate(methods):
        mean = 100 * method.accuracy
        axes.barh(row, mean, height=0.56, color=_colour(method), alpha=0.35)
        axes.plot(
            [100 * run.accuracy for run in method.runs],
            [row] * len(method.runs),
            "o",
            color=_colour(method),
            ms=4,
        )
        right = max(mean, *(100 * run.accuracy for run in method.runs))
        axes.annotate(f"{mean:.1f}", (right, row), xytext=(6, 0), textcoords="offset points", va="center")
    axes.axvline(100 * chance, color=_FAINT, linestyle="--", linewidth=1)
    axes.set_xlim(0, 118)
    axes.set_xticks([0, 50, 100])
    axes.set_xlabel("accuracy, %")


def _cost(axes: Axes, label: str, costs: Sequence[float | None]) -> None:
    """Bars on a logarithmic scale, which start a little below the smallest; None has no bar."""
    known = [cost for cost in costs if cost]
    for row, cost in enumerate(costs):
        if cost:
            axes.barh(row, cost, height=0.56, color=_FAINT)
            axes.annotate(
                _short(cost), (cost, row), xytext=(3, 0), textcoords="offset points", va="center", size=8
            )
    axes.set_xscale("log")
    if known:
        # Room for the numbers on the right.
        axes.set_xlim(min(known) / 3, max(known) * (max(known) / min(known) * 3) ** 0.7)
    axes.xaxis.set_major_locator(NullLocator())
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(label)


def _short(value: float) -> str:
    """Two or three digits and a unit: 0.13, 4.2, 85, 179 k, 7.9 M."""
    for unit, scale in ((" M", 1e6), (" k", 1e3)):
        if value >= scale:
            return f"{value / scale:.3g}{unit}"
    return f"{value:.2g}" if value < 10 else f"{value:.0f}"


def _colour(method: MethodResult) -> str:
    return _OTHER if method.through_encoder else _OURS


def _tap_weights(comparison: Comparison, kind: str, label: str) -> str:
    methods = [method for method in comparison.methods if method.tap_weights_kind == kind]
    figure, axes = _axes(2.8)
    names = methods[0].tap_names
    width = 0.8 / len(methods)
    for index, (method, colour) in enumerate(zip(methods, (_OURS, _OTHER), strict=False)):
        runs = [run.tap_weights for run in method.runs if run.tap_weights is not None]
        centres = [tap + (index - (len(methods) - 1) / 2) * width for tap in range(len(names))]
        means = [sum(values) / len(runs) for values in zip(*runs, strict=True)]
        axes.bar(centres, means, 0.9 * width, color=colour, alpha=0.45, label=method.title)
        for run in runs:
            axes.plot(centres, run, "o", color=colour, ms=3.5)
    axes.set_xticks(range(len(names)), [_tap_label(name) for name in names])
    axes.set_ylabel(label)
    axes.set_ylim(bottom=0)
    if len(methods) > 1:
        _legend(figure, axes)
    return _svg(figure, kind)


def _step_time(methods: list[MethodResult]) -> str:
    figure, axes = _axes(0.95 + 0.62 * len(methods))
    for row, method in enumerate(methods):
        assert method.step.eager is not None
        ours, eager = method.step.mmkernels.milliseconds, method.step.eager.milliseconds
        axes.barh(row - 0.19, ours, 0.34, color=_OURS, alpha=0.8, label=None if row else "mmkernels")
        axes.barh(row + 0.19, eager, 0.34, color=_OTHER, alpha=0.6, label=None if row else "eager")
        text = f"× {method.step.speedup:.2f}"
        axes.annotate(text, (max(ours, eager), row), xytext=(7, 0), textcoords="offset points", va="center")
    axes.margins(x=0.12)
    _name_rows(axes, methods)
    axes.set_xlabel("milliseconds per step")
    _legend(figure, axes)
    return _svg(figure, "step-encoder" if methods[0].through_encoder else "step")


def _axes(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.add_subplot()
    axes.patch.set_alpha(0)
    axes.tick_params(length=0)
    return figure, axes


def _name_rows(axes: Axes, methods: list[MethodResult]) -> None:
    axes.set_yticks(range(len(methods)), [method.title for method in methods])
    axes.invert_yaxis()
    axes.spines["left"].set_visible(False)


def _legend(figure: Figure, axes: Axes) -> None:
    """Above the axes, where no bar is."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=len(labels), frameon=False)


def _tap_label(name: str) -> str:
    return "embeddings" if name == "embeddings" else f"layer {name}"


def _svg(figure: Figure, name: str) -> str:
    """The figure as an SVG element; `name` keeps its ids apart from the other figures'."""
    stream = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid=")(?=[a-z])', rf"\1{name}-", text)
    text = re.sub(r'(href="#|url\(#)', rf"\1{name}-", text)
    # CSS variables work in style attributes; the width is the page's.
    for drawn, used in _PAGE_COLOURS.items():
        text = text.replace(drawn, used)
    return re.sub(r'<svg ([^>]*?)width="[^"]*" ([^>]*?)height="[^"]*"', r"<svg \1\2", text, count=1)
