"""Figures of a comparison as inline SVG on a white card."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from .results import Comparison, FailedMethod, MethodResult, in_parts
from .store import CURVE_CLIPS

_INK, _FAINT, _OURS, _OTHER, _FAILED = "#1d1f21", "#b9bdc2", "#1f6f8b", "#b8642f", "#a3232a"
_COLOURS = (_OURS, _OTHER, "#5b8c3a", "#7a5aa6", "#a08020")
_STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    # A title of a user's method may hold a dollar sign.
    "text.parse_math": False,
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
    """The figures with their captions: score and costs, insights of the methods, step time."""
    with matplotlib.rc_context(_STYLE):
        return [*_draw(comparison)]


def _draw(comparison: Comparison) -> Iterator[tuple[str, str]]:
    metric = comparison.task["metric"]["title"]
    chance = "" if comparison.task["chance"] is None else ", the dashed line chance"
    yield (
        _overview(comparison),
        f"{metric} on the test clips, and the cost of each method. Dots are seeds, bars their means"
        f"{chance}; blue on a frozen encoder, orange through the encoder. Costs are dots "
        "on logarithmic scales; an epoch and a step on cached features run no encoder.",
    )
    if any(len(run.curve) > 1 for method in comparison.methods for run in method.runs):
        yield (
            _curves(comparison),
            f"{metric} against the time of training, mean over seeds, on at most {CURVE_CLIPS} of the test "
            "clips. The time is that of the steps, from the training of the method that it starts from on; "
            f"evaluations are left out{_feature_time(comparison)}. Dashed: through the encoder.",
        )
    for number, name in enumerate(_insight_names(comparison)):
        yield _insight(comparison, name, number), f"{name}, mean over seeds; dots are seeds."
    for methods in in_parts(comparison.methods):
        timed = [method for method in methods if method.step.eager and method.step.agrees]
        if timed:
            yield _step_time(timed), _STEP_TEXTS[methods[0].through_encoder]


def _insight_names(comparison: Comparison) -> list[str]:
    return list(dict.fromkeys(name for m in comparison.methods for run in m.runs for name in run.insights))


_STEP_TEXTS = {
    False: "One training step of readout and head on features in memory, with mmkernels and eager; "
    "the factor is eager time / mmkernels time.",
    True: "One training step through the encoder, with mmkernels and eager; the factor is eager time / "
    "mmkernels time.",
}


def _overview(comparison: Comparison) -> str:
    """Score and three costs of each method, side by side."""
    methods = [method for part in comparison.rows() for method in part]
    figure = Figure(figsize=(_WIDTH, 0.75 + 0.36 * len(methods)), layout="constrained")
    panels = figure.subplots(1, 4, sharey=True, width_ratios=(1.5, 1, 1, 1))
    _score(panels[0], methods, comparison.task)
    costs = [
        (None, None, None)
        if isinstance(method, FailedMethod)
        else (method.trainable_parameters, method.seconds_per_epoch, method.step.mmkernels.memory_mib)
        for method in methods
    ]
    labels = ("parameters", "s per epoch", "MiB per step")
    for axes, label, each in zip(panels[1:], labels, zip(*costs, strict=True), strict=True):
        _cost(axes, label, each)
    for axes in panels:
        axes.tick_params(length=0)
        axes.spines["left"].set_visible(False)
    panels[0].set_yticks(range(len(methods)), [method.title for method in methods])
    panels[0].set_ylim(len(methods) - 0.5, -0.5)  # the first on top, and room for rows without a bar
    return _svg(figure, "overview")


def _score(axes: Axes, methods: list[MethodResult | FailedMethod], task: dict[str, Any]) -> None:
    for row, method in enumerate(methods):
        if isinstance(method, FailedMethod):
            axes.annotate(
                "failed", (0, row), xytext=(6, 0), textcoords="offset points", va="center", color=_FAILED
            )
            continue
        mean = 100 * method.score
        axes.barh(row, mean, height=0.56, color=_colour(method), alpha=0.35)
        axes.plot(
            [100 * run.score for run in method.runs],
            [row] * len(method.runs),
            "o",
            color=_colour(method),
            ms=4,
        )
        right = max(mean, *(100 * run.score for run in method.runs))
        axes.annotate(f"{mean:.1f}", (right, row), xytext=(6, 0), textcoords="offset points", va="center")
    if task["chance"] is not None:
        axes.axvline(100 * task["chance"], color=_FAINT, linestyle="--", linewidth=1)
    most = max((run.score for m in methods if isinstance(m, MethodResult) for run in m.runs), default=1.0)
    if task["metric"]["higher_is_better"] or most > 0.6:
        axes.set_xlim(0, 118)
        axes.set_xticks([0, 50, 100])
    else:
        # Error rates are small; 0 stays in the picture.
        axes.set_xlim(0, 118 * most)
    axes.set_xlabel(f"{task['metric']['title'].lower()}, %")


def _cost(axes: Axes, label: str, costs: Sequence[float | None]) -> None:
    """Dots on a logarithmic scale, which starts a little below the smallest; None has no dot."""
    known = [cost for cost in costs if cost]
    for row, cost in enumerate(costs):
        if cost:
            axes.plot([cost], [row], "o", color=_INK, ms=4)
            axes.annotate(
                _short(cost), (cost, row), xytext=(6, 0), textcoords="offset points", va="center", size=8
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


def _insight(comparison: Comparison, name: str, number: int) -> str:
    """Bars of all methods that tell this, side by side for each of its keys."""
    methods = [method for method in comparison.methods if any(name in run.insights for run in method.runs)]
    figure, axes = _axes(2.8)
    keys = list(dict.fromkeys(key for m in methods for run in m.runs for key in run.insights.get(name, {})))
    width = 0.8 / len(methods)
    for index, method in enumerate(methods):
        colour = _COLOURS[index % len(_COLOURS)]
        runs = [run.insights[name] for run in method.runs if name in run.insights]
        own = [key for key in keys if all(key in run for run in runs)]
        centres = [keys.index(key) + (index - (len(methods) - 1) / 2) * width for key in own]
        means = [sum(run[key] for run in runs) / len(runs) for key in own]
        axes.bar(centres, means, 0.9 * width, color=colour, alpha=0.45, label=method.title)
        for run in runs:
            axes.plot(centres, [run[key] for key in own], "o", color=colour, ms=3.5)
    axes.set_xticks(range(len(keys)), keys)
    axes.set_ylabel(name)
    axes.axhline(0, color=_FAINT, linewidth=0.8)
    if len(methods) > 1:
        _legend(figure, axes)
    return _svg(figure, f"insight-{number}")


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


def _curves(comparison: Comparison) -> str:
    """A line for each method: its score on the way, against seconds of training."""
    figure, axes = _axes(3.6)
    name = comparison.task["metric"]["name"]
    colours = matplotlib.colormaps["tab10"].colors  # type: ignore[attr-defined]
    for index, method in enumerate(comparison.methods):
        points = list(zip(*(run.curve for run in method.runs), strict=False))
        seconds = [sum(point.seconds for point in each) / len(each) for each in points]
        scores = [100 * sum(point.scores[name] for point in each) / len(each) for each in points]
        axes.plot(
            seconds,
            scores,
            "o--" if method.through_encoder else "o-",
            color=colours[index % len(colours)],
            ms=3.5,
            linewidth=1.4,
            label=method.title,
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(color=_FAINT, linewidth=0.4)
    axes.set_xlabel("seconds of training")
    axes.set_ylabel(f"{comparison.task['metric']['title'].lower()}, %")
    figure.legend(loc="outside right center", frameon=False)
    return _svg(figure, "curves")


def _feature_time(comparison: Comparison) -> str:
    seconds = comparison.feature_seconds
    return "" if seconds is None else f", and so are the {seconds:.0f} s in which the features were made"


def _axes(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    axes = figure.add_subplot()
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


def _svg(figure: Figure, name: str) -> str:
    """The figure as an SVG element; `name` keeps its ids apart from the other figures'."""
    stream = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid=")(?=[a-z])', rf"\1{name}-", text)
    text = re.sub(r'(href="#|url\(#)', rf"\1{name}-", text)
    # The width is the page's.
    return re.sub(r'<svg ([^>]*?)width="[^"]*" ([^>]*?)height="[^"]*"', r"<svg \1\2", text, count=1)
