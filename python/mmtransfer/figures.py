"""Figures of a comparison as inline SVG that takes its colours and fonts from the page."""

from __future__ import annotations

import io
import re
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mmtransfer.compare import Comparison, MethodResult

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
    """The figures with their captions: accuracy, tap weights where a method has them, step time."""
    with matplotlib.rc_context(_STYLE):
        return _draw(comparison)


def _draw(comparison: Comparison) -> list[tuple[str, str]]:
    text = "Test accuracy. Dots are seeds, the bar is their mean, the dashed line chance."
    drawn = [(_accuracy(comparison), text)]
    kinds = {method.tap_weights_kind for method in comparison.methods}
    if "softmax" in kinds:
        text = "Learned weight of each layer in the weighted sums, mean over seeds; dots are seeds."
        drawn.append((_tap_weights(comparison, "softmax", "weight after softmax"), text))
    if "norm" in kinds:
        text = "Norm of each layer's part of LFF's matrix, mean over seeds; dots are seeds."
        drawn.append((_tap_weights(comparison, "norm", "Frobenius norm"), text))
    if any(method.step.eager and method.step.agrees for method in comparison.methods):
        text = (
            "One training step of fusion and classifier on features in memory, with mmkernels and eager; "
            "the factor is eager time / mmkernels time."
        )
        drawn.append((_step_time(comparison), text))
    return drawn


def _accuracy(comparison: Comparison) -> str:
    methods = comparison.methods
    figure, axes = _axes(0.55 + 0.42 * len(methods))
    for row, method in enumerate(methods):
        mean = 100 * method.accuracy
        axes.barh(row, mean, height=0.56, color=_OURS, alpha=0.35)
        axes.plot(
            [100 * run.accuracy for run in method.runs], [row] * len(method.runs), "o", color=_OURS, ms=4.5
        )
        right = max(mean, *(100 * run.accuracy for run in method.runs))
        axes.annotate(f"{mean:.1f}", (right, row), xytext=(7, 0), textcoords="offset points", va="center")
    axes.axvline(100 * comparison.task["chance"], color=_FAINT, linestyle="--", linewidth=1)
    axes.set_xlim(0, 105 if methods else 1)
    _name_rows(axes, methods)
    axes.set_xlabel("accuracy, %")
    return _svg(figure, "accuracy")


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


def _step_time(comparison: Comparison) -> str:
    methods = [method for method in comparison.methods if method.step.eager and method.step.agrees]
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
    return _svg(figure, "step")


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
