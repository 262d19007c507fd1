"""A comparison as a terminal table, a JSON file and one self-contained HTML page."""

from __future__ import annotations

import dataclasses
import datetime
import html
import importlib.resources
import json
import os
import statistics
import string
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from mmtransfer import figures
from mmtransfer.data import DataError
from mmtransfer.results import Comparison, MethodResult, in_parts

JSON_NAME, HTML_NAME, MODELS_NAME = "report.json", "report.html", "models"
FORMAT = "mmtransfer-compare"
VERSION = 1
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
            "choose another folder with --output, or write beside them with --force"
        )


def write_report(folder: Path, comparison: Comparison) -> tuple[Path, Path]:
    """Write the page and the JSON into `folder`, each in one step; returns their paths."""
    record = to_record(comparison)
    page, data = folder / HTML_NAME, folder / JSON_NAME
    _replace(data, json.dumps(record, indent=2, allow_nan=False) + "\n")
    _replace(page, to_html(comparison))
    return page, data


def to_record(comparison: Comparison) -> dict[str, Any]:
    """The comparison as JSON-ready data: every run, and per method its mean and spread."""
    methods = [
        {
            **dataclasses.asdict(method),
            "accuracy": method.accuracy,
            "spread": method.spread,
            "seconds_per_epoch": method.seconds_per_epoch,
        }
        for method in comparison.methods
    ]
    return {"format": FORMAT, "version": VERSION, **dataclasses.asdict(comparison), "methods": methods}


def to_tables(comparison: Comparison) -> list[Table]:
    """The results and the costs for a terminal of 80 columns, a line between what costs differently."""
    parts = [[table_row(method) for method in methods] for methods in in_parts(comparison.methods)]
    results = ("Method", "Accuracy, %", "Epochs", "Parameters", "s / epoch")
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


HEADER = (
    "Method",
    "Accuracy, %",
    "Epochs × seeds",
    "Trainable parameters",
    "Seconds per epoch",
    "mmkernels",
    "eager",
    "ratio",
    "mmkernels",
    "eager",
)
# What stands over columns of the page's table: (columns, text).
_GROUPS = ((5, ""), (3, "Training step, ms"), (2, "Its peak memory, MiB"))


def table_row(method: MethodResult) -> tuple[str, ...]:
    """One method's cells, in the order of `HEADER`."""
    step = method.step
    accuracy = f"{method.accuracy:.1%}".rstrip("%")
    if method.spread is not None:
        accuracy += f" ± {100 * method.spread:.1f}"
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
        accuracy,
        f"{method.epochs} × {len(method.runs)}",
        f"{method.trainable_parameters:,}",
        _number(method.seconds_per_epoch, 2),
        *times,
        _number(step.mmkernels.memory_mib, 0),
        _number(step.eager.memory_mib if step.eager else None, 0),
    )


def headline(comparison: Comparison) -> str:
    """What was compared on what, in one line."""
    task = comparison.task
    kind = " [synthetic]" if task["synthetic"] else ""
    name = task["data"][:1].upper() + task["data"][1:]
    return f"{name}{kind}: {task['classes']} classes on {task['model']}"


def caption(comparison: Comparison) -> str:
    """What the numbers are."""
    steps = {
        False: "fusion and classifier with the features of {} clips in memory",
        True: "the whole model with the inputs of {} clips in memory",
    }
    kinds = " or, through the encoder, ".join(
        steps[methods[0].through_encoder].format(methods[0].batch_size)
        for methods in in_parts(comparison.methods)
    )
    return (
        "Test accuracy, mean ± standard deviation over the seeds where there are several; chance "
        f"{comparison.task['chance']:.1%}. A step is forward, backward and update of {kinds}; peak memory is "
        "what torch allocates for it, ratio is eager time / mmkernels time, round by round. Where eager is "
        "missing, there is nothing that mmkernels would compute."
    )


def _part_title(comparison: Comparison, method: MethodResult) -> str:
    """What the methods of one part of the table have in common."""
    settings = comparison.settings
    if method.through_encoder:
        inputs = "cached inputs" if settings["cached_inputs"] else "inputs made in every step"
        return f"Trained through the encoder, on {inputs}"
    if settings["cached_features"]:
        return "Encoder frozen, trained on its cached features"
    return "Encoder frozen, in the loop"


def to_html(comparison: Comparison) -> str:
    """The whole page: no script, no link to another file."""
    template = importlib.resources.files("mmtransfer").joinpath("report.html").read_text(encoding="utf-8")
    task = comparison.task
    return string.Template(template).substitute(
        title=html.escape(headline(comparison)),
        banner=_banner(comparison),
        note=html.escape(task["note"]),
        table=_html_table(comparison),
        caption=html.escape(caption(comparison)),
        figures="\n".join(_html_figure(*figure) for figure in figures.draw(comparison)),
        reading="\n".join(f"<li>{html.escape(line)}</li>" for line in _reading(comparison)),
        facts=_html_facts(_facts(comparison)),
        date=datetime.date.today().isoformat(),
    )


def _banner(comparison: Comparison) -> str:
    if not comparison.task["synthetic"]:
        return ""
    text = "Synthetic data and a random encoder: the accuracies say nothing about speech."
    return f'<p class="banner">{text}</p>'


def _reading(comparison: Comparison) -> list[str]:
    """What a reader must know to judge the numbers."""
    task, settings = comparison.task, comparison.settings
    best = max(method.accuracy for method in comparison.methods)
    error = (best * (1 - best) / task["test_clips"]) ** 0.5
    lines = [
        f"One test clip is {100 / task['test_clips']:.2f} points. Another draw of as many test clips would "
        f"move an accuracy of {best:.0%} by about {100 * error:.1f} points (one binomial standard error); "
        "differences below that, or below the seeds' spread, are no evidence.",
        "Epochs, batches, rates and seeds were fixed beforehand; the test clips were used once, at the end.",
    ]
    frozen = [method for method in comparison.methods if not method.through_encoder]
    tuned = [method for method in comparison.methods if method.through_encoder]
    if frozen and settings["cached_features"]:
        lines.append(_cached_note(comparison))
    if tuned:
        lines.append(_tuned_note(tuned, frozen))
    if any(method.step.eager for method in frozen):
        lines.append(
            "Eager is the same fusion with the same weights in plain PyTorch: stack, multiply and sum for "
            "the weighted sums (as s3prl does), one LayerNorm, Linear and concatenation at a time for HFF. "
            "LFF runs no kernel of mmkernels: what it saves is the concatenation."
        )
    if any(method.step.eager for method in comparison.methods):
        lines.append(
            "Both sides were checked against each other (logits and gradients) and then timed in turn, on "
            "the same batch."
        )
    losses = ", ".join(
        f"{method.title} {statistics.fmean(run.loss for run in method.runs):.2f}"
        for method in comparison.methods
    )
    lines.append(
        f"Training loss of the last epoch, mean over seeds: {losses}. A small loss beside a low accuracy is "
        "a method that fits its training clips and does not carry over to the test clips."
    )
    return lines


def _cached_note(comparison: Comparison) -> str:
    assert comparison.feature_seconds is not None
    task = comparison.task
    share = task["train_clips"] / (task["train_clips"] + task["test_clips"])
    return (
        "Where the encoder is frozen, it ran once over all clips, and training read its features: seconds "
        "per epoch hold no encoder time, and no augmentation of the audio was possible. With the encoder in "
        f"the loop an epoch would take about {comparison.feature_seconds * share:.1f} s more."
    )


def _tuned_note(tuned: Sequence[MethodResult], frozen: Sequence[MethodResult]) -> str:
    method = tuned[0]
    text = (
        "What trains through the encoder begins with what was learned on the frozen one, the classifier of "
        "the row Head or the fusion and classifier of HFF-b, and goes on from there: accuracies differ by "
        "what the encoder's part adds or takes. Every step runs the encoder forwards and, from the lowest "
        "trained parameter on, backwards, without dropout and augmentation. Eager are the same adapters (and "
        "the same fusion) as plain PyTorch products, sums and norms; the rest of the encoder is "
        "transformers' on both sides."
    )
    if frozen and (frozen[0].epochs, frozen[0].batch_size) != (method.epochs, method.batch_size):
        text += (
            f" They had {method.epochs} more epochs of batches of {method.batch_size}, the frozen encoder's "
            f"methods {frozen[0].epochs} of {frozen[0].batch_size}."
        )
    return text


def _facts(comparison: Comparison) -> dict[str, str]:
    task, settings, machine = comparison.task, comparison.settings, comparison.machine
    rates = ", ".join(f"{method.title} {method.learning_rate:g}" for method in comparison.methods)
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
        "Taps": ", ".join(settings["taps"]),
        "Width of LFF and HFF": str(settings["width"]),
        "Head": "mean over frames, linear",
        "Optimiser": f"AdamW, weight decay {settings['weight_decay']:g} on matrices; warm-up over a tenth of "
        "the steps, then linear decay",
        "Learning rate": f"{rates}; mixing weights {settings['mixing_learning_rate']:g}",
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
        facts["Whole comparison"] += f", of it {comparison.feature_seconds:.0f} s for the features"
    return facts


def _html_table(comparison: Comparison) -> str:
    groups = "".join(f'<th scope="colgroup" colspan="{count}">{text}</th>' for count, text in _GROUPS)
    cells = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in HEADER)
    lines = [f'<thead><tr class="groups">{groups}</tr><tr>{cells}</tr></thead>']
    for methods in in_parts(comparison.methods):
        title = html.escape(_part_title(comparison, methods[0]))
        lines += [
            "<tbody>",
            f'<tr class="part"><th scope="rowgroup" colspan="{len(HEADER)}">{title}</th></tr>',
        ]
        lines += [_html_row(table_row(method)) for method in methods]
        lines.append("</tbody>")
    return "\n".join(lines)


def _html_row(row: Sequence[str]) -> str:
    first, *others = (html.escape(cell) for cell in row)
    return f'<tr><th scope="row">{first}</th>' + "".join(f"<td>{cell}</td>" for cell in others) + "</tr>"


def _html_figure(svg: str, text: str) -> str:
    return f"<figure>\n{svg}\n<figcaption>{html.escape(text)}</figcaption>\n</figure>"


def _html_facts(facts: dict[str, str]) -> str:
    return "\n".join(
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in facts.items()
    )


def _number(value: float | None, digits: int) -> str:
    return _NONE if value is None else f"{value:,.{digits}f}"


def _is_ours(folder: Path) -> bool:
    try:
        return json.loads((folder / JSON_NAME).read_text(encoding="utf-8"))["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
