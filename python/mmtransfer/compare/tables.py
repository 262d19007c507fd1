"""A comparison as a terminal table, a JSON file and one self-contained HTML page."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.resources
import json
import math
import numbers
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from mmtransfer.checkpoint import replace_file
from mmtransfer.data import DataError

from . import figures
from .results import Comparison, FailedMethod, MethodResult, in_parts

JSON_NAME, HTML_NAME, MODELS_NAME = "report.json", "report.html", "models"
FORMAT = "mmtransfer-compare"
VERSION = 3
FAILED = "failed"
_NONE = "–"


def check_output(folder: Path, *, force: bool = False) -> None:
    """Make `folder` if need be, and make sure that a report can be written there without loss.

    An earlier report of a comparison may be replaced. Raises DataError if the folder cannot be written, or
    holds other files and `force` is not set.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        entries = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(
            f"{folder} cannot be used for the report ({reason}); choose another with --output"
        ) from error
    if entries and not force and not _is_ours(folder):
        raise DataError(
            f"{folder} holds files that are not from an earlier report ({', '.join(entries[:3])}); "
            "choose another folder with --output, or add to them with --force"
        )


def write_report(folder: Path, comparison: Comparison) -> tuple[Path, Path]:
    """Write the page and the JSON into `folder`, each in one step; returns their paths."""
    page, data = folder / HTML_NAME, folder / JSON_NAME
    record = json.dumps(_plain(to_record(comparison)), indent=2, allow_nan=False) + "\n"
    replace_file(data, lambda path: path.write_text(record, encoding="utf-8"))
    text = to_html(comparison)
    replace_file(page, lambda path: path.write_text(text, encoding="utf-8"))
    return page, data


def to_record(comparison: Comparison) -> dict[str, Any]:
    """The comparison as JSON-ready data: every run, and per method its mean and spread."""
    methods = [
        {
            **dataclasses.asdict(method),
            "score": method.score,
            "spread": method.spread,
            "seconds_per_epoch": method.seconds_per_epoch,
        }
        for method in comparison.methods
    ]
    date = datetime.date.today().isoformat()
    return {
        "format": FORMAT,
        "version": VERSION,
        "date": date,
        **dataclasses.asdict(comparison),
        "methods": methods,
    }


def _plain(value: Any) -> Any:
    """The same as JSON can have it: null for NaN and infinity, text for what a user's method may hold."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value) if math.isfinite(value) else None
    return str(value)


def to_tables(comparison: Comparison) -> list[Table]:
    """The results and the costs for a terminal of 80 columns, a line between frozen and trained encoders."""
    metrics = [title.replace(" ", "\n", 1) for title in _metric_titles(comparison)]
    results = ("Method", *metrics, "Epochs", "Parameters", "s per\nepoch")
    costs = ("Method", "ms", "ms, eager", "ratio", "MiB", "MiB, eager")
    count = len(results)
    rows = [[table_row(comparison, method) for method in part] for part in comparison.rows()]
    timed = [[table_row(comparison, method) for method in part] for part in in_parts(comparison.methods)]
    tables = [
        _terminal_table(headline(comparison), results, [[row[:count] for row in part] for part in rows])
    ]
    if timed:
        steps = [[(row[0], *row[count:]) for row in part] for part in timed]
        tables.append(_terminal_table("One training step, with mmkernels and eager", costs, steps))
        whole = [[whole_row(comparison, method) for method in part] for part in in_parts(comparison.methods)]
        tables.append(
            _terminal_table("One training step with the encoder in the loop", whole_header(comparison), whole)
        )
    return tables


def failures(comparison: Comparison) -> list[str]:
    """A line for each method without a result."""
    return [f"{method.title} failed: {method.reason}" for method in comparison.failed]


def _terminal_table(title: str, header: Sequence[str], parts: Sequence[Sequence[Sequence[str]]]) -> Table:
    table = Table(title=Text(title), title_justify="left", box=SIMPLE_HEAD)
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index == 0 else "right", no_wrap=True)
    for rows in parts:
        for row in rows:
            # As text: a title is no markup.
            table.add_row(*map(Text, row))
        table.add_section()
    return table


def _metric_titles(comparison: Comparison) -> list[str]:
    task = comparison.task
    return [f"{title}, %" for title in (task["metric"]["title"], *task["further"].values())]


def header(comparison: Comparison) -> tuple[str, ...]:
    """The columns of the page's table."""
    results = (
        "Method",
        *_metric_titles(comparison),
        "Epochs × seeds",
        "Trainable parameters",
        "Seconds per epoch",
    )
    return (*results, "mmkernels", "eager", "ratio", "mmkernels", "eager")


def table_row(comparison: Comparison, method: MethodResult | FailedMethod) -> tuple[str, ...]:
    """One method's cells, in the order of `header`."""
    if isinstance(method, FailedMethod):
        return (method.title, FAILED, *[_NONE] * (len(header(comparison)) - 2))
    step = method.step
    score = f"{100 * method.score:.1f}"
    if method.spread is not None:
        score += f" ± {100 * method.spread:.1f}"
    if not step.agrees:
        # No speed for a result that differs.
        times = ("results differ", _NONE, _NONE)
    else:
        times = (
            _number(step.mmkernels.milliseconds, 1),
            _number(step.eager.milliseconds if step.eager else None, 1),
            _number(step.speedup, 2),
        )
    return (
        method.title,
        score,
        *(f"{100 * method.mean(name):.1f}" for name in comparison.task["further"]),
        f"{method.epochs:.3g} × {len(method.runs)}",
        f"{method.trainable_parameters:,}",
        _number(method.seconds_per_epoch, 2 if method.seconds_per_epoch < 10 else 1),
        *times,
        _number(step.mmkernels.memory_mib, 0),
        _number(step.eager.memory_mib if step.eager else None, 0),
    )


def whole_header(comparison: Comparison) -> tuple[str, ...]:
    """The columns of `whole_row`."""
    costs = ("ms per clip", "MiB")
    reference = reference_method(comparison)
    if reference is None:
        return ("Method", *costs)
    return ("Method", *costs, "times faster", "MiB, share")


def whole_row(comparison: Comparison, method: MethodResult) -> tuple[str, ...]:
    """The cost of a step with the encoder in the loop, and its relation to that of the reference."""
    cost = method.whole_step
    clips = comparison.task["whole_step_clips"]
    cells = (method.title, _number(cost.milliseconds / clips, 0), _number(cost.memory_mib, 0))
    reference = reference_method(comparison)
    if reference is None:
        return cells
    whole = reference.whole_step
    return (
        *cells,
        _number(whole.milliseconds / cost.milliseconds, 2),
        _number(cost.memory_mib / whole.memory_mib, 2),
    )


def reference_method(comparison: Comparison) -> MethodResult | None:
    """The method that trains the most parameters through the encoder, which others are compared with."""
    through = [method for method in comparison.methods if method.through_encoder]
    return max(through, key=lambda method: method.trainable_parameters, default=None)


def headline(comparison: Comparison) -> str:
    """Data and model in one line."""
    task = comparison.task
    kind = " [synthetic]" if task["synthetic"] else ""
    name = task["data"][:1].upper() + task["data"][1:]
    what = f"{task['classes']} classes" if task["classes"] else task["metric"]["title"].lower()
    return f"{name}{kind}: {what} on {task['model']}"


def caption(comparison: Comparison) -> str:
    """The meaning of the table's numbers, if there are any."""
    if not comparison.methods:
        return ""
    task = comparison.task
    steps = {
        False: "readout and head with the features of {} clips in memory",
        True: "the whole model with the inputs of {} clips in memory",
    }
    kinds = " or, through the encoder, ".join(
        steps[methods[0].through_encoder].format(methods[0].step_clips)
        for methods in in_parts(comparison.methods)
    )
    reference = reference_method(comparison)
    relation = "" if reference is None else f", in relation to {reference.title}"
    chance = "" if task["chance"] is None else f"; chance {task['chance']:.1%}"
    return (
        f"{task['metric']['title']} on the test clips, mean ± standard deviation over the seeds where "
        f"there are several{chance}. A step is forward, backward and update of {kinds}; peak memory is "
        "the most that torch allocates for it, ratio is eager time / mmkernels time, round by round. "
        "Methods without an eager time compute nothing with mmkernels. The step with the encoder in the loop "
        f"is of the whole model on {task['whole_step_clips']} clips for every method{relation}."
    )


def _part_title(comparison: Comparison, method: MethodResult | FailedMethod) -> str:
    """The training that the methods of one part of the table have in common."""
    settings = comparison.settings
    if method.through_encoder:
        inputs = "cached inputs" if settings["cached_inputs"] else "inputs made in every step"
        return f"Trained through the encoder, on {inputs}"
    if settings["cached_features"]:
        return "Encoder frozen, trained on its cached features"
    return "Encoder frozen, in the loop"


def to_html(comparison: Comparison) -> str:
    """The whole page: no script, no link to another file."""
    template = importlib.resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    methods = comparison.methods
    return environment.from_string(template).render(
        comparison=comparison,
        task=comparison.task,
        metric=comparison.task["metric"]["title"].lower(),
        title=headline(comparison),
        header=header(comparison),
        parts=[
            (_part_title(comparison, part[0]), [table_row(comparison, method) for method in part])
            for part in comparison.rows()
        ],
        whole_header=whole_header(comparison),
        whole_rows=[whole_row(comparison, m) for part in in_parts(methods) for m in part],
        examples=_shown_examples(comparison),
        failures=failures(comparison),
        failed=FAILED,
        caption=caption(comparison),
        figures=figures.draw(comparison),
        best=_sampling_error(comparison) if methods else None,
        losses=[(method.title, statistics.fmean(run.loss for run in method.runs)) for method in methods],
        tuned=any(method.through_encoder for method in methods),
        methods=[
            (method.title, method.about, _options(method)) for part in comparison.rows() for method in part
        ],
        runs=sorted({(m.through_encoder, len(m.runs), f"{m.epochs:.3g}", m.batch_size) for m in methods}),
        date=datetime.date.today().isoformat(),
    )


def _shown_examples(comparison: Comparison) -> list[tuple[str, list[tuple[str, str]]]]:
    """Targets with the predictions of three methods: the first, the best on the frozen encoder, the best."""
    if not comparison.methods or comparison.task["classes"]:
        return []
    choose = max if comparison.task["metric"]["higher_is_better"] else min
    frozen = [method for method in comparison.methods if not method.through_encoder]
    best = [choose(part, key=lambda m: m.score) for part in (frozen, comparison.methods) if part]
    shown = dict.fromkeys((comparison.methods[0].name, *(method.name for method in best)))
    titles = {method.name: method.title for method in comparison.methods}
    return [
        (
            example.target,
            [(titles[name], example.predictions[name]) for name in shown if name in example.predictions],
        )
        for example in comparison.examples
    ]


def _sampling_error(comparison: Comparison) -> tuple[float, float] | None:
    """The best score, and how much another draw of as many test clips would move it (one standard error).

    None where a clip is more than right or wrong.
    """
    if not comparison.task["classes"]:
        return None
    choose = max if comparison.task["metric"]["higher_is_better"] else min
    best = choose(method.score for method in comparison.methods)
    return best, (max(best * (1 - best), 0) / comparison.task["test_clips"]) ** 0.5


def _options(method: MethodResult | FailedMethod) -> str:
    """The rate, and the options of each part but for those left to the method."""
    parts = {
        name: ", ".join(f"{key} {value}" for key, value in options.items() if value is not None)
        for name, options in method.options.items()
    }
    several = len(parts) > 1
    texts = [f"{name}: {text}" if several else text for name, text in parts.items() if text]
    rate = [f"learning rate {method.learning_rate:g}"] if isinstance(method, MethodResult) else []
    return "; ".join([*rate, *texts])


def _number(value: float | None, digits: int) -> str:
    return _NONE if value is None else f"{value:,.{digits}f}"


def _is_ours(folder: Path) -> bool:
    try:
        return json.loads((folder / JSON_NAME).read_text(encoding="utf-8"))["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError):
        return False
