"""The tables and the figure of the study of alignment, from its record."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

_MATERIALS = {"recorded": "recordings", "synthesised": "synthesised"}
_EDGES = {"start": "starts", "end": "ends"}
_STYLES = {"start": "-", "end": "--"}
#: Milliseconds that the figure shows.
_FURTHEST = 200


def table(record: dict[str, Any]) -> list[str]:
    """Lines of Markdown: errors of every model, then what a joined recording changes and takes."""
    lines = [
        "| speech | times of | model | late by | mean error | median | without lateness | 95 % below "
        "| within 50 ms | within 100 ms |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for material, edge in ((name, edge) for name in _MATERIALS for edge in _EDGES):
        for row, errors in _errors(record, material, edge):
            shares = (f"{100 * errors[f'within_{limit}']:.0f} %" for limit in (50, 100))
            cells = [
                _MATERIALS[material],
                f"{errors['count']:,} {_EDGES[edge]}",
                _title(row),
                f"{errors['bias']:+.0f} ms",
                f"{errors['mean']:.0f} ms",
                f"{errors['median']:.0f} ms",
                f"{errors['steady']:.0f} ms",
                f"{errors['p95']:.0f} ms",
                *shares,
            ]
            lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "| speech | model | character error | median error of starts, alone / in one pass "
        "| frames of a letter | blank frames | model, for an hour | alignment, for an hour |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in (row for row in record["rows"] if row["model"] is not None):
        joined = row["joined"]
        hours = joined["seconds"] / 3600
        cells = [
            _MATERIALS[row["material"]],
            _title(row),
            f"{100 * joined['character_error']:.1f} %",
            f"{row['alone']['start']['median']:.0f} / {joined['start']['median']:.0f} ms",
            f"{joined['frames_per_token']:.1f}",
            f"{100 * joined['blank']:.0f} %",
            f"{joined['emission_seconds'] / hours:.0f} s",
            f"{joined['op_seconds'] / hours:.1f} s",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def draw(record: dict[str, Any], path: Path) -> None:
    """The share of boundaries within each error, by material; dashed lines are ends of words."""
    figure = Figure(figsize=(9.6, 4.8), layout="constrained")
    panels = figure.subplots(1, len(_MATERIALS), sharey=True)
    for axes, (material, title) in zip(panels, _MATERIALS.items(), strict=True):
        _draw_shares(axes, record, material)
        axes.set_title(title, loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("share of boundaries, %")
    handles, labels = panels[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Date": None})


def _draw_shares(axes: Axes, record: dict[str, Any], material: str) -> None:
    for edge, style in _STYLES.items():
        for row, errors in _errors(record, material, edge):
            percentiles = errors["percentiles"]
            shares = [100 * place / (len(percentiles) - 1) for place in range(len(percentiles))]
            colour = "0.6" if row["model"] is None else _colour(record, row)
            label = f"{_title(row).replace('`', '')}: {_EDGES[edge]}"
            axes.plot(percentiles, shares, style, color=colour, label=label, linewidth=1.4)
    axes.set_xlim(0, _FURTHEST)
    axes.set_ylim(0, 100)
    axes.set_xlabel("error below, ms")
    axes.grid(True, color="0.92", linewidth=0.6)


def _colour(record: dict[str, Any], row: dict[str, Any]) -> str:
    titles = [_title(each) for each in record["rows"] if each["model"] is not None]
    return f"C{list(dict.fromkeys(titles)).index(_title(row))}"


def _errors(record: dict[str, Any], material: str, edge: str) -> Iterator[tuple[dict[str, Any], Any]]:
    """The rows of a material, and their errors at an edge of words, in one pass."""
    for row in record["rows"]:
        if row["material"] == material and edge in row["joined"]:
            yield row, row["joined"][edge]


def _title(row: dict[str, Any]) -> str:
    if row["model"] is None:
        return "none: spread evenly in a known sentence"
    return f"`{row['model']}`" + (", synthesised" if row["trained_on"] == "synthesised" else "")
