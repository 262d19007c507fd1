"""The command line: `mmtransfer compare`, `info` and `bench`.

What a user can mend ends in one sentence on standard error and exit status 1; wrong options in 2.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

# Only what parsing needs is imported here: torch and transformers take seconds.
if TYPE_CHECKING:
    from rich.progress import Progress

    from mmtransfer.compare import CompareSettings
    from mmtransfer.results import Comparison
    from mmtransfer.tasks import Task

app = typer.Typer(
    help="Adapt speech transformers with the kernels of mmkernels.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_INPUT, _METHOD, _TRAINING, _RESULT = "What to compare on", "What to compare", "Training", "Result"


def main() -> None:
    """Entry point of the `mmtransfer` command."""
    app()


@app.command()
def compare(
    demo: Annotated[
        bool,
        typer.Option(
            "--demo",
            help="Whisper tiny.en on Italian prompts, a man's voice to a woman's (downloads 110 MB once).",
            rich_help_panel=_INPUT,
        ),
    ] = False,
    synthetic: Annotated[
        bool,
        typer.Option(
            "--synthetic", help="Generated sounds and a small random encoder.", rich_help_panel=_INPUT
        ),
    ] = False,
    model: Annotated[
        str | None, typer.Option(help="Folder or hub name of a speech model.", rich_help_panel=_INPUT)
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder of class folders, or a CSV with the columns path, label and, if wanted, split.",
            rich_help_panel=_INPUT,
        ),
    ] = None,
    test_fraction: Annotated[
        float,
        typer.Option(
            min=0.01, max=0.99, help="Of --data, where it has no split of its own.", rich_help_panel=_INPUT
        ),
    ] = 0.2,
    max_seconds: Annotated[
        float,
        typer.Option(min=0.1, max=30.0, help="Clips of --data are cropped to this.", rich_help_panel=_INPUT),
    ] = 10.0,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated. On a frozen encoder: last (or head), weighted-sum, weighted-sum-norm, "
            "lff, hff-b; hff-ub. Through the encoder: hff-b-adapters, aat-m, aat-ms, full; aat-s, houlsby, "
            "partial, prompt, bitfit, lora. Default: those before the semicolons.",
            show_default=False,
            rich_help_panel=_METHOD,
        ),
    ] = None,
    taps: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated layers, counted from 0 or from the end (-1), and 'embeddings'. Default: "
            "all; of more than 12 layers every second.",
            show_default=False,
            rich_help_panel=_METHOD,
        ),
    ] = None,
    width: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Output width of LFF and HFF. Default: 5/8 of the encoder's.",
            show_default=False,
            rich_help_panel=_METHOD,
        ),
    ] = None,
    epochs: Annotated[
        int, typer.Option(min=1, help="On the frozen encoder.", rich_help_panel=_TRAINING)
    ] = 30,
    seeds: Annotated[
        int,
        typer.Option(
            min=1,
            help="Runs per method on the frozen encoder, with seeds 0, 1, ...",
            rich_help_panel=_TRAINING,
        ),
    ] = 3,
    batch_size: Annotated[
        int,
        typer.Option(min=1, help="Clips per step and device, frozen encoder.", rich_help_panel=_TRAINING),
    ] = 32,
    tuning_epochs: Annotated[
        int, typer.Option(min=1, help="Through the encoder.", rich_help_panel=_TRAINING)
    ] = 5,
    tuning_seeds: Annotated[
        int, typer.Option(min=1, help="Runs per method through the encoder.", rich_help_panel=_TRAINING)
    ] = 1,
    tuning_batch_size: Annotated[
        int, typer.Option(min=1, help="Through the encoder.", rich_help_panel=_TRAINING)
    ] = 16,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="For all methods. Default: one for each, shown in the report.",
            show_default=False,
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    cache: Annotated[
        bool,
        typer.Option(
            "--cache/--no-cache",
            help="Store the features of the frozen encoder and the inputs of a trained one, or make them in "
            "every step.",
            rich_help_panel=_TRAINING,
        ),
    ] = True,
    bf16: Annotated[
        bool, typer.Option("--bf16", help="Train under bfloat16 autocast.", rich_help_panel=_TRAINING)
    ] = False,
    cpu: Annotated[bool, typer.Option("--cpu", help="Use no GPU.", rich_help_panel=_TRAINING)] = False,
    output: Annotated[
        Path,
        typer.Option(
            help="Folder for report.html and report.json; an earlier report there is replaced.",
            rich_help_panel=_RESULT,
        ),
    ] = Path("reports/compare"),
    save: Annotated[
        bool,
        typer.Option("--save", help="Keep the trained parts in <output>/models.", rich_help_panel=_RESULT),
    ] = False,
    force: Annotated[
        bool,
        typer.Option("--force", help="Write even if the folder holds other files.", rich_help_panel=_RESULT),
    ] = False,
) -> None:
    """Train and measure ways to adapt a speech encoder: fusions of its layers, adapters, fine-tuning.

    Prints a table of test accuracy, parameters, time and memory, and writes it with figures as one HTML page
    and as JSON. Runs on several GPUs under torchrun or accelerate launch.
    """
    _check_input(demo, synthetic, model, data)
    from mmtransfer.compare import CompareSettings
    from mmtransfer.data import DataError
    from mmtransfer.methods import DEFAULT_METHODS
    from mmtransfer.report import MODELS_NAME, check_output
    from mmtransfer.tasks import parse_taps
    from mmtransfer.train import TrainSettings

    try:
        check_output(output, force=force)
        settings = CompareSettings(
            methods=_split(methods) if methods is not None else DEFAULT_METHODS,
            seeds=tuple(range(seeds)),
            taps=None if taps is None else tuple(parse_taps(taps)),
            width=width,
            cache=cache,
            training=TrainSettings(epochs=epochs, batch_size=batch_size, bf16=bf16, cpu=cpu),
            tuning=TrainSettings(epochs=tuning_epochs, batch_size=tuning_batch_size, bf16=bf16, cpu=cpu),
            tuning_seeds=tuple(range(tuning_seeds)),
            learning_rate=learning_rate,
            save=output / MODELS_NAME if save else None,
        )
        task = _load_task(demo, synthetic, model, data, test_fraction, max_seconds)
        comparison = _run(task, settings)
        _show(comparison, output)
    except (DataError, OSError) as error:
        _fail(str(error))


@app.command()
def info() -> None:
    """Print versions, devices, and which backend serves each kernel here."""
    from mmkernels._info import collect, render

    print(render(collect()))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(context: typer.Context) -> None:
    """Measure the kernels; options are those of `python -m benches` in a source checkout."""
    import mmkernels

    root = Path(mmkernels.__file__).resolve().parents[1]
    if not (root / "benches" / "__main__.py").is_file():
        _fail(
            "the benchmarks are not installed with the package; run this from a source checkout of mmkernels"
        )
    raise typer.Exit(subprocess.call([sys.executable, "-m", "benches", *context.args], cwd=root))


def _check_input(demo: bool, synthetic: bool, model: str | None, data: Path | None) -> None:
    own = model is not None or data is not None
    if demo + synthetic + own != 1:
        raise typer.BadParameter("give one of --demo, --synthetic, or --model with --data")
    if own and (model is None or data is None):
        raise typer.BadParameter("--model and --data go together")


def _split(text: str) -> tuple[str, ...]:
    from mmtransfer.methods import ALIASES

    names = (part.strip() for part in text.split(","))
    return tuple(dict.fromkeys(ALIASES.get(name, name) for name in names))


def _load_task(
    demo: bool,
    synthetic: bool,
    model: str | None,
    data: Path | None,
    test_fraction: float,
    max_seconds: float,
) -> Task:
    from mmtransfer import tasks

    if demo:
        return tasks.demo_task()
    if synthetic:
        return tasks.synthetic_task()
    assert model is not None
    assert data is not None
    return tasks.user_task(model, data, test_fraction=test_fraction, max_seconds=max_seconds)


def _run(task: Task, settings: CompareSettings) -> Comparison:
    from mmtransfer.compare import compare, is_main_process

    with _progress(quiet=not is_main_process()) as progress:
        progress.console.print(task.recordings.describe(), markup=False, highlight=False, soft_wrap=True)
        return compare(task, settings, progress=progress)


def _show(comparison: Comparison, output: Path) -> None:
    """Print the table and write the report; from the main process only."""
    from rich.console import Console

    from mmtransfer import report
    from mmtransfer.compare import is_main_process

    if not is_main_process():
        return
    page, _ = report.write_report(output, comparison)
    Console().print(*report.to_tables(comparison), report.caption(comparison), sep="\n")
    print(f"Report: {page}")
    wrong = [method for method in comparison.methods if not method.step.agrees]
    if wrong:
        _fail(
            f"mmkernels and eager PyTorch differ by {wrong[0].step.difference:.1e} in {wrong[0].title}; "
            "the report shows no time for it, please report this with the output of mmtransfer info"
        )


def _progress(quiet: bool) -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True, quiet=quiet)
    return Progress(
        TextColumn("{task.description:20}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[detail]}"),
        console=console,
        disable=not console.is_terminal,
    )


def _fail(message: str) -> NoReturn:
    print(f"mmtransfer: {message}", file=sys.stderr)
    raise typer.Exit(1)


if __name__ == "__main__":
    main()
