"""The tables and figures of the study of SSR's connector, from its record.

A record is JSON: what the study adds (date, machine, `language_model`) and three lists, whose entries are the
fields of a class here: `rows` of `Row`, `tunings` of `Tuning`, `steps` of `Step`. Shares and cosines are
fractions. A value that was not measured is null: it is shown as a dash, and takes no part in a mean.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import PercentFormatter


@dataclass(frozen=True, kw_only=True)
class Row:
    """One training of a connector, and of stage 2 on it, judged on held-out rooms.

    Attributes:
        variant: aligner or baseline, such as "ctc characters"; rows of one variant differ in `seed`.
        cosine, squared_error: of the vectors of stage 1 with the embeddings of the transcript's tokens, the
            mean of tokens; the error is a sum over the channels.
        cosine_by_frequency: by how often training transcripts have the token
            (`small_language_model.frequency`).
        frames_per_token: frames of the encoder for each vector.
        stage1_wer: word error of stage 1's nearest tokens.
        token_error, word_error: of the texts that the language model writes after stage 2.
        seconds: of both trainings.
    """

    variant: str
    seed: int
    cosine: float | None = None
    squared_error: float | None = None
    cosine_by_frequency: dict[str, float | None] = field(default_factory=dict)
    frames_per_token: float | None = None
    stage1_wer: float | None = None
    token_error: float | None = None
    word_error: float | None = None
    seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """One training of stage 2 by a way to tune the language model.

    Attributes:
        tuning: "vanilla", "lora" or "multitask"; entries of one tuning differ in `seed`.
        perplexity_before, perplexity_after: of a token of held-out text alone, without speech.
        token_error, word_error: of speech.
        parameters: that the tuning trains.
        seconds: of the training.
    """

    tuning: str
    seed: int
    perplexity_before: float | None = None
    perplexity_after: float | None = None
    token_error: float | None = None
    word_error: float | None = None
    parameters: int | None = None
    seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class Step:
    """One way to compute a training step.

    Attributes:
        case: batch and sizes; entries of one case are compared.
        path: how it is computed.
        step_ms: median of interleaved steps.
        memory_mb: peak above the memory before the step.
        baseline: whether the others of the case are divided by this one.
    """

    case: str
    path: str
    step_ms: float | None = None
    memory_mb: float | None = None
    baseline: bool = False


Entry = TypeVar("Entry", Row, Tuning)
Cell = Callable[[Sequence[Any]], str]


def table(record: dict[str, Any]) -> str:
    """Markdown: variants, tunings of stage 2, and steps; a list that is empty or missing has no table."""
    rows = [Row(**each) for each in record.get("rows", [])]
    tunings = [Tuning(**each) for each in record.get("tunings", [])]
    steps = [Step(**each) for each in record.get("steps", [])]
    tables = [_variants(rows), _tunings(tunings), _steps(steps)]
    return "\n\n".join("\n".join(lines) for lines in tables if lines)


def _variants(rows: list[Row]) -> list[str]:
    classes = _classes(rows)
    columns: dict[str, Cell] = {
        "cosine": _column("cosine", "{:.3f}"),
        "squared error": _column("squared_error", "{:.3f}"),
        **{f"cosine, seen {name}": _class_column(name) for name in classes},
        "frames of a token": _column("frames_per_token", "{:.1f}"),
        "word error, stage 1": _percent("stage1_wer"),
        "token error, stage 2": _percent("token_error"),
        "word error, stage 2": _percent("word_error"),
        "training": _column("seconds", "{:.0f}", unit=" s"),
    }
    return _markdown("connector", _by(rows, "variant"), columns)


def _tunings(tunings: list[Tuning]) -> list[str]:
    columns: dict[str, Cell] = {
        "trained weights": _column("parameters", "{:,.0f}"),
        "perplexity of text, before": _column("perplexity_before", "{:.1f}"),
        "after": _column("perplexity_after", "{:.1f}"),
        "token error": _percent("token_error"),
        "word error": _percent("word_error"),
        "training": _column("seconds", "{:.0f}", unit=" s"),
    }
    return _markdown("stage 2", _by(tunings, "tuning"), columns)


def _steps(steps: list[Step]) -> list[str]:
    if not steps:
        return []
    lines = [
        "| case | path | step | of the baseline | memory | of the baseline |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for step in steps:
        bases = [each for each in steps if each.case == step.case and each.baseline]
        base = bases[0] if bases else Step(case=step.case, path="")
        cells = [
            step.case,
            step.path,
            _number(step.step_ms, "{:.0f} ms"),
            _ratio(step.step_ms, base.step_ms),
            _number(step.memory_mb, "{:.0f} MB"),
            _ratio(step.memory_mb, base.memory_mb),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _by(entries: Iterable[Entry], name: str) -> dict[str, list[Entry]]:
    """Entries of each name, in the order in which these come."""
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(getattr(entry, name), []).append(entry)
    return groups


def _classes(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row.cosine_by_frequency))


def _markdown(first: str, groups: dict[str, list[Any]], columns: dict[str, Cell]) -> list[str]:
    """A row for each group; columns in which no group has a value are left out."""
    cells = {name: [cell(entries) for entries in groups.values()] for name, cell in columns.items()}
    cells = {name: each for name, each in cells.items() if set(each) - {"–"}}
    if not groups:
        return []
    lines = [
        f"| {' | '.join([first, 'seeds', *cells])} |",
        f"| --- | {' | '.join(['---:'] * (1 + len(cells)))} |",
    ]
    for index, (name, entries) in enumerate(groups.items()):
        found = [name, str(len(entries)), *(each[index] for each in cells.values())]
        lines.append(f"| {' | '.join(found)} |")
    return lines


def _column(name: str, form: str, *, factor: float = 1.0, unit: str = "") -> Cell:
    def cell(entries: Sequence[Any]) -> str:
        return _spread([getattr(entry, name) for entry in entries], form, factor, unit)

    return cell


def _percent(name: str) -> Cell:
    return _column(name, "{:.1f}", factor=100.0, unit=" %")


def _class_column(name: str) -> Cell:
    def cell(entries: Sequence[Any]) -> str:
        return _spread([row.cosine_by_frequency.get(name) for row in entries], "{:.3f}", 1.0, "")

    return cell


def _spread(values: Sequence[float | None], form: str, factor: float, unit: str) -> str:
    """Mean ± standard deviation of the seeds that have a value, and how many these are if not all."""
    found = [factor * each for each in values if _measured(each)]
    if not found:
        return "–"
    text = form.format(statistics.fmean(found))
    if len(found) > 1 and (deviation := statistics.stdev(found)) > 0:
        text += f" ± {form.format(deviation)}"
    return text + unit + (f" ({len(found)} of {len(values)})" if len(found) < len(values) else "")


def _measured(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


def _number(value: float | None, form: str) -> str:
    return form.format(value) if _measured(value) else "–"


def _ratio(value: float | None, base: float | None) -> str:
    return f"{value / base:.2f}" if _measured(value) and _measured(base) and base > 0 else "–"


def draw(record: dict[str, Any], path: Path) -> None:
    """Cosine, cosine by frequency and word error of each variant: a dot for each seed, a bar at the mean."""
    groups = _by((Row(**each) for each in record["rows"]), "variant")
    classes = _classes(row for rows in groups.values() for row in rows)
    errors = [row.word_error for rows in groups.values() for row in rows if _measured(row.word_error)]
    titles = ["cosine with the token's embedding"]
    titles += ["the same, by how often training has the token"] * bool(classes)
    titles += ["word error after stage 2"] * bool(errors)
    size = (3.5 * len(titles) + 1.4, 1.3 + 0.36 * len(groups))
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(wspace=0.06))
    panels = dict(zip(titles, figure.subplots(1, len(titles), sharey=True, squeeze=False)[0], strict=True))
    for title, axes in panels.items():
        axes.set_title(title, loc="left", fontsize=9)
        axes.grid(True, color="0.92", linewidth=0.6)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        if title == titles[0]:
            _draw_values(axes, [[row.cosine for row in rows] for rows in groups.values()], "C0")
        elif "by how often" in title:
            _draw_classes(axes, groups, classes)
        else:
            _draw_values(axes, [[row.word_error for row in rows] for rows in groups.values()], "C3")
            axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0, symbol=" %"))
    first = panels[titles[0]]
    first.set_yticks(range(len(groups)), list(groups), parse_math=False)
    first.set_ylim(len(groups) - 0.5, -0.5)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def _draw_values(axes: Axes, values: Sequence[Sequence[float | None]], colour: str) -> None:
    """A row of dots for each variant."""
    for place, seeds in enumerate(values):
        found = [each for each in seeds if _measured(each)]
        if not found:
            continue
        axes.plot(found, [place] * len(found), "o", color=colour, markersize=4, alpha=0.55)
        mean = statistics.fmean(found)
        axes.plot([mean, mean], [place - 0.16, place + 0.16], color=colour, linewidth=1.8)


def _draw_classes(axes: Axes, groups: dict[str, list[Row]], classes: list[str]) -> None:
    """Means of each class of frequency; in the row of a variant, the first class is highest and lightest."""
    shades = [colormaps["Blues"](0.3 + 0.65 * (place + 1) / len(classes)) for place in range(len(classes))]
    for place, (name, shade) in enumerate(zip(classes, shades, strict=True)):
        shift = 0.5 * ((place + 0.5) / len(classes) - 0.5)
        means = []
        for rows in groups.values():
            found = [each for row in rows if _measured(each := row.cosine_by_frequency.get(name))]
            means.append(statistics.fmean(found) if found else math.nan)
        heights = [index + shift for index in range(len(groups))]
        axes.plot(means, heights, "o", color=shade, markersize=4.5, label=name)
    axes.legend(
        loc="upper left",
        bbox_to_anchor=(0.0, -0.12),
        ncols=len(classes),
        fontsize=8,
        frameon=False,
        handletextpad=0.1,
        columnspacing=1.0,
    )


#: Inches: of a second of speech, of the parts of a picture from the top, and around them.
_SECOND, _SPECTRUM, _LABEL, _BARS = 2.4, 1.5, 0.15, 0.8
_LEFT, _RIGHT, _TOP, _BOTTOM = 0.65, 0.2, 0.12, 0.45


def draw_segments(
    path: Path,
    spectrogram: np.ndarray,
    frame_seconds: float,
    ends: Sequence[int],
    tokens: Sequence[str],
    cosines: Sequence[float],
    title: str = "",
    *,
    column_seconds: float | None = None,
) -> None:
    """A sentence: its spectrogram cut into segments, the token of each, and how near its vector came.

    Args:
        path: of the picture; its suffix gives the format.
        spectrogram: `(bands, columns)`, the lowest band first, such as the encoder's log-mel features.
        frame_seconds: of a frame of the encoder, in which `ends` count.
        ends: frame behind the last of each segment; the first segment begins at 0.
        tokens: text of each segment; a space is shown as ␣.
        cosines: of each segment's vector with the embedding of its token.
        title: above.
        column_seconds: of a column of the spectrogram, where these are shorter than frames.

    Raises:
        ValueError: `ends`, `tokens` and `cosines` differ in number.
    """
    if not len(ends) == len(tokens) == len(cosines):
        raise ValueError(
            f"ends, tokens and cosines must be as many, got {len(ends)}, {len(tokens)} and {len(cosines)}"
        )
    seconds = spectrogram.shape[1] * (frame_seconds if column_seconds is None else column_seconds)
    edges = [0.0, *(end * frame_seconds for end in ends)]
    width = max(4.0, _SECOND * seconds)
    names = [_shown(token) for token in tokens]
    middles = [width * (a + b) / 2 / seconds for a, b in itertools.pairwise(edges)]
    levels = _levels(middles, [_text_width(name) for name in names])
    label_height = _LABEL * (1 + max(levels, default=0)) + 0.08
    top = _TOP + (0.22 if title else 0.0)
    heights = (_SPECTRUM, label_height, _BARS)
    total = top + sum(heights) + _BOTTOM
    figure = Figure(figsize=(_LEFT + width + _RIGHT, total))
    places, bottom = [], total - top
    for height in heights:
        bottom -= height
        places.append(
            (_LEFT / figure.get_figwidth(), bottom / total, width / figure.get_figwidth(), height / total)
        )
    spectrum, labels, bars = (figure.add_axes(place) for place in places)
    shades = [colormaps["viridis"](max(each, 0.0)) if _measured(each) else "0.8" for each in cosines]
    _draw_spectrum(spectrum, spectrogram, seconds, edges)
    _draw_labels(labels, names, edges, levels, seconds, label_height)
    _draw_bars(bars, edges, cosines, shades, seconds)
    if title:
        figure.text(
            _LEFT / figure.get_figwidth(), 1 - 0.08 / total, title, fontsize=9, va="top", parse_math=False
        )
    figure.savefig(path, dpi=150, metadata={"Date": None} if Path(path).suffix == ".svg" else None)


def _shown(token: str) -> str:
    return token.replace(" ", "␣")


def _text_width(name: str) -> float:
    """Inches, with a little space on both sides."""
    figure = Figure(dpi=100)
    canvas = FigureCanvasAgg(figure)
    text = figure.text(0, 0, name or " ", fontsize=7, parse_math=False)
    return text.get_window_extent(canvas.get_renderer()).width / 100 + 0.06


def _levels(middles: Sequence[float], widths: Sequence[float]) -> list[int]:
    """The highest level on which each text overlaps none before it."""
    rights: list[float] = []
    levels = []
    for middle, width in zip(middles, widths, strict=True):
        left = middle - width / 2
        level = next((index for index, right in enumerate(rights) if right <= left), len(rights))
        rights[level : level + 1] = [middle + width / 2]
        levels.append(level)
    return levels


def _draw_spectrum(axes: Axes, spectrogram: np.ndarray, seconds: float, edges: Sequence[float]) -> None:
    extent = (0.0, seconds, 0.0, float(spectrogram.shape[0]))
    axes.imshow(spectrogram, origin="lower", aspect="auto", extent=extent, cmap="Greys")
    for edge in edges[1:]:
        axes.axvline(edge, color="C3", linewidth=0.9)
    # An edge behind the last column would widen the axes, away from those below.
    axes.set_xlim(0, seconds)
    axes.set_ylabel("mel band", fontsize=8)
    axes.tick_params(labelsize=7, labelbottom=False, bottom=False)


def _draw_labels(
    axes: Axes,
    names: Sequence[str],
    edges: Sequence[float],
    levels: Sequence[int],
    seconds: float,
    height: float,
) -> None:
    """Tokens below the middle of their segments, on as many levels as they need."""
    axes.set_xlim(0, seconds)
    axes.set_ylim(height, 0)
    axes.set_axis_off()
    for place, (name, level) in enumerate(zip(names, levels, strict=True)):
        middle = (edges[place] + edges[place + 1]) / 2
        depth = 0.04 + _LABEL * level
        if level:
            axes.plot([middle, middle], [0, depth], color="0.75", linewidth=0.5, zorder=1)
        axes.text(
            middle,
            depth,
            name,
            fontsize=7,
            ha="center",
            va="top",
            parse_math=False,
            clip_on=False,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.4},
        )


def _draw_bars(
    axes: Axes, edges: Sequence[float], cosines: Sequence[float], shades: Sequence[Any], seconds: float
) -> None:
    for place, (cosine, shade) in enumerate(zip(cosines, shades, strict=True)):
        left, width = edges[place], edges[place + 1] - edges[place]
        axes.bar(
            left,
            cosine if _measured(cosine) else 0.0,
            width,
            align="edge",
            color=shade,
            edgecolor="white",
            linewidth=0.6,
        )
    axes.axhline(0, color="0.4", linewidth=0.6)
    axes.set_xlim(0, seconds)
    axes.set_ylim(min(each for each in (0.0, *cosines) if _measured(each)), 1.0)
    axes.set_ylabel("cosine", fontsize=8)
    axes.set_xlabel("seconds", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.grid(True, axis="y", color="0.9", linewidth=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
