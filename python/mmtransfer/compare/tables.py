"""A comparison as a terminal table, a JSON file and one self-contained HTML page."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.resources
import json
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
from .results import Comparison, MethodResult, in_parts

JSON_NAME, HTML_NAME, MODELS_NAME = "report.json", "report.html", "models"
FORMAT = "mmtransfer-compare"
VERSION = 2
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
    record = json.dumps(to_record(comparison), indent=2, allow_nan=False) + "\n"
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
    return {"format": FORMAT, "version": VERSION, **dataclasses.asdict(comparison), "methods": methods}


def to_tables(comparison: Comparison) -> list[Table]:
    """The results and the costs for a terminal of 80 columns, a line between frozen and trained encoders."""
    parts = [[table_row(method) for method in methods] for methods in in_parts(comparison.methods)]
    results = ("Method", _metric_title(comparison), "Epochs", "Parameters", "s / epoch")
    costs = ("Method", "ms", "ms, eager", "ratio", "MiB", "MiB, eager")
    return [
        _terminal_table(headline(comparison), results, [[row[:5] for row in rows] for rows in parts]),
        _terminal_table(
            "One training step, with mmkernels and eager",
            costs,
            [[(row[0], *row[5:]) for row in rows] for rows in parts],
        ),
    ]


def _terminal_table(title: str, header: Sequence[str], parts: Sequence[Sequence[Sequence[str]]]) -> Table:
    table = Table(title=Text(title), title_justify="left", box=SIMPLE_HEAD)
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index == 0 else "right", no_wrap=True)
    for rows in parts:
        for row in rows:
            table.add_row(*row)
        table.add_section()
    return table


def _metric_title(comparison: Comparison) -> str:
    return f"{comparison.task['metric']['title']}, %"


def header(comparison: Comparison) -> tuple[str, ...]:
    """The columns of the page's table."""
    results = (
        "Method",
        _metric_title(comparison),
        "Epochs × seeds",
        "Trainable parameters",
        "Seconds per epoch",
    )
    return (*results, "mmkernels", "eager", "ratio", "mmkernels", "eager")


def table_row(method: MethodResult) -> tuple[str, ...]:
    """One method's cells, in the order of `header`."""
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
        f"{method.epochs} × {len(method.runs)}",
        f"{method.trainable_parameters:,}",
        _number(method.seconds_per_epoch, 2),
        *times,
        _number(step.mmkernels.memory_mib, 0),
        _number(step.eager.memory_mib if step.eager else None, 0),
    )


def headline(comparison: Comparison) -> str:
    """Data and model in one line."""
    task = comparison.task
    kind = " [synthetic]" if task["synthetic"] else ""
    name = task["data"][:1].upper() + task["data"][1:]
    return f"{name}{kind}: {task['classes']} classes on {task['model']}"


def caption(comparison: Comparison) -> str:
    """The meaning of the table's numbers."""
    task = comparison.task
    steps = {
        False: "readout and head with the features of {} clips in memory",
        True: "the whole model with the inputs of {} clips in memory",
    }
    kinds = " or, through the encoder, ".join(
        steps[methods[0].through_encoder].format(methods[0].batch_size)
        for methods in in_parts(comparison.methods)
    )
    chance = "" if task["chance"] is None else f"; chance {task['chance']:.1%}"
    return (
        f"{task['metric']['title']} on the test clips, mean ± standard deviation over the seeds where "
        f"there are several{chance}. A step is forward, backward and update of {kinds}; peak memory is "
        "the most that torch allocates for it, ratio is eager time / mmkernels time, round by round. "
        "Methods without an eager time compute nothing with mmkernels."
    )


def _part_title(comparison: Comparison, method: MethodResult) -> str:
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
    return environment.from_string(template).render(
        title=headline(comparison),
        synthetic=comparison.task["synthetic"],
        note=comparison.task["note"],
        header=header(comparison),
        # Columns under each heading of the upper line.
        groups=((5, ""), (3, "Training step, ms"), (2, "Its peak memory, MiB")),
        parts=[
            (_part_title(comparison, methods[0]), [table_row(method) for method in methods])
            for methods in in_parts(comparison.methods)
        ],
        caption=caption(comparison),
        figures=figures.draw(comparison),
        reading=_reading(comparison),
        methods=[(method.title, method.about, _options(method)) for method in comparison.methods],
        facts=_facts(comparison),
        date=datetime.date.today().isoformat(),
    )


def _reading(comparison: Comparison) -> list[str]:
    """How to judge the numbers."""
    task, settings = comparison.task, comparison.settings
    metric = task["metric"]["title"].lower()
    choose = max if task["metric"]["higher_is_better"] else min
    best = choose(method.score for method in comparison.methods)
    error = (max(best * (1 - best), 0) / task["test_clips"]) ** 0.5
    lines = [
        f"Another draw of {task['test_clips']} test clips would move a clip-wise {metric} of "
        f"{best:.0%} by about {100 * error:.1f} points (one binomial standard error); differences "
        "below that, or below the seeds' spread, are no evidence.",
        "Epochs, batches, rates and seeds were fixed beforehand; the test clips were used once, at the end.",
    ]
    frozen = [method for method in comparison.methods if not method.through_encoder]
    tuned = [method for method in comparison.methods if method.through_encoder]
    if frozen and settings["cached_features"] and comparison.feature_seconds is not None:
        share = task["train_clips"] / (task["train_clips"] + task["test_clips"])
        lines.append(
            "A frozen encoder ran once over all clips, and training read its features: seconds per "
            "epoch hold no encoder time, and no augmentation of the audio was possible. With the "
            f"encoder in the loop an epoch would take about {comparison.feature_seconds * share:.1f} s "
            "more."
        )
    if tuned:
        lines.append(
            "Methods that train through the encoder begin with the readout and head that were trained "
            "on the frozen one, and train on from there. Every step runs the encoder forwards and, "
            "down to the lowest trained parameter, backwards, without dropout and augmentation."
        )
    if any(method.step.eager for method in comparison.methods):
        lines.append(
            "Eager is the method as published, in plain PyTorch, with the same weights; the rest of "
            "the encoder is transformers' on both sides. The two were checked against each other "
            "(logits and gradients) and then timed in turn, on the same batch."
        )
    losses = ", ".join(
        f"{method.title} {statistics.fmean(run.loss for run in method.runs):.2f}"
        for method in comparison.methods
    )
    lines.append(
        f"Training loss of the last epoch, mean over seeds: {losses}. A small loss with a poor "
        f"{metric} means that the method overfits its training clips."
    )
    return lines


def _options(method: MethodResult) -> str:
    """The options that were set or that decide on sizes, part by part."""
    given = {
        name: value for part in method.options.values() for name, value in part.items() if value is not None
    }
    chosen = [f"{name} {value}" for name, value in given.items()]
    return ", ".join([f"learning rate {method.learning_rate:g}", *chosen])


def _facts(comparison: Comparison) -> dict[str, str]:
    task, settings, machine = comparison.task, comparison.settings, comparison.machine
    encoder = f"{task['model_type']}, {task['layers']} layers, width {task['hidden_size']}"
    epochs = dict.fromkeys(
        f"{method.epochs}, {method.batch_size} clips"
        + (" through the encoder" if method.through_encoder else "")
        for method in comparison.methods
    )
    seeds = dict.fromkeys(", ".join(str(run.seed) for run in method.runs) for method in comparison.methods)
    packages = ("mmkernels", "torch", "transformers", "accelerate", "python")
    facts = {
        "Data": f"{task['data']}{' (synthetic)' if task['synthetic'] else ''}; {task['classes']} classes",
        "Training clips": f"{task['train_clips']} ({task['train_seconds']:.0f} s)",
        "Test clips": f"{task['test_clips']} ({task['test_seconds']:.0f} s)",
        "Cropped at": f"{task['max_seconds']:g} s",
        "Encoder": f"{task['model']} ({encoder})",
        "Task": task["name"],
        "Optimiser": f"AdamW, weight decay {settings['weight_decay']:g} on matrices; warm-up over a tenth of "
        "the steps, then linear decay",
        "Epochs, batch": "; ".join(epochs)
        + (f" on each of {machine['processes']} processes" if machine["processes"] > 1 else ""),
        "Precision": "bfloat16 autocast" if settings["bf16"] else "float32",
        "Seeds": "; ".join(seeds),
        "Features, inputs": "cached" if settings["cached_inputs"] else "computed in every step",
        "Device": f"{machine['device']}, {machine['threads']} CPU threads",
        "Versions": ", ".join(f"{name} {machine[name]}" for name in packages),
        "Whole comparison": f"{comparison.total_seconds:.0f} s",
    }
    if comparison.feature_seconds is not None:
        facts["Whole comparison"] += f", {comparison.feature_seconds:.0f} s of these for the features"
    return facts


def _number(value: float | None, digits: int) -> str:
    return _NONE if value is None else f"{value:,.{digits}f}"


def _is_ours(folder: Path) -> bool:
    try:
        return json.loads((folder / JSON_NAME).read_text(encoding="utf-8"))["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError):
        return False
