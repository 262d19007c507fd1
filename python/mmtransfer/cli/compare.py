"""`mmtransfer compare`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from mmtransfer.compare.settings import CompareSettings

from .given import SetOptions, parse_options
from .imports import import_files
from .info import Imports
from .messages import fail
from .progress import show_progress

if TYPE_CHECKING:
    from mmtransfer.compare.experiment import Experiment
    from mmtransfer.compare.results import Comparison


@dataclass(frozen=True, kw_only=True)
class Input:
    """The data and the model: one of --demo, --demo-prompts, --synthetic, or --model with --data.

    Attributes:
        demo: recognition of Czech dialogues by Whisper tiny.en's encoder (downloads 180 MB once), by the
            recipe demo/speech.
        demo_prompts: which of 465 Italian prompts is it, a man's voice to a woman's (110 MB once), by the
            recipe demo/prompts.
        synthetic: generated sounds and a small random encoder; no network.
        model: folder or hub name of a speech model.
        data: folder of class folders, CSV or JSON lines with path and label, or Hugging Face data set; with
            --task ctc transcripts instead of labels.
        test_fraction: of --data, where it has no split.
        max_seconds: clips of --data are cropped to this, 10 if it is not given; where they have transcripts,
            longer ones are left out, 30 if it is not given.
        dtype: of the model's weights, whatever they were stored in. float16 is for frozen encoders; it is
            never trained.
    """

    demo: bool = False
    demo_prompts: bool = False
    synthetic: bool = False
    model: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    data: Annotated[str | None, tyro.conf.arg(metavar="PATH")] = None
    test_fraction: float = 0.2
    max_seconds: Annotated[float | None, tyro.conf.arg(metavar="FLOAT")] = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    def __post_init__(self) -> None:
        own = self.model is not None or self.data is not None
        if self.demo + self.demo_prompts + self.synthetic + own != 1:
            raise ValueError("give one of --demo, --demo-prompts, --synthetic, or --model with --data")
        if own and (self.model is None or self.data is None):
            raise ValueError("--model and --data go together")
        if not 0 < self.test_fraction < 1:
            raise ValueError(f"--test-fraction must be between 0 and 1, got {self.test_fraction}")
        if self.max_seconds is not None and not 0 < self.max_seconds <= 30:
            raise ValueError(f"--max-seconds must be above 0 and at most 30, got {self.max_seconds}")
        for name in ("test_fraction", "max_seconds"):
            if not own and getattr(self, name) != getattr(type(self), name):
                raise ValueError(f"--{name.replace('_', '-')} is for --data alone")
        if self.max_seconds is not None:
            check_max_seconds(self.max_seconds)


def check_max_seconds(seconds: float) -> None:
    """ValueError for a crop that would leave no clip long enough."""
    # Imported here: help needs no numpy.
    from mmtransfer.data.audio import MIN_SECONDS

    if seconds < MIN_SECONDS:
        raise ValueError(
            f"--max-seconds must be at least {MIN_SECONDS}, the shortest clip that is read, got {seconds}"
        )


@dataclass(frozen=True, kw_only=True)
class Result:
    """The report.

    Attributes:
        output: folder for report.html and report.json; an earlier report there is replaced.
        save_models: keep the trained parts in <output>/models.
        force: write even if the folder holds other files.
    """

    output: Path = Path("reports/compare")
    save_models: bool = False
    force: bool = False


def compare(
    source: Input,
    settings: CompareSettings,
    result: Result,
    import_: Imports = (),
    recipe: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None,
    set_: SetOptions = (),
) -> None:
    """Train and measure ways to adapt a speech encoder: fusions of its layers, adapters, fine-tuning.

    Prints a table of test scores, parameters, time and memory, and writes it with figures as one HTML page
    and as JSON. Runs on several GPUs under torchrun or accelerate launch. `mmtransfer methods` lists the
    methods and their options.

    Args:
        import_: Python file that registers methods or tasks of yours.
        recipe: YAML file of options, or PAPER/NAME for one of the package; options given here win.
        set_: options of the methods, such as bottleneck=64; METHOD.bottleneck=64 is for one method alone.
    """
    # `recipes.expand` has replaced it by its options.
    assert recipe is None
    options = parse_options(text for texts in set_ for text in texts)
    import_files(import_)
    from mmtransfer.compare.session import find_methods
    from mmtransfer.compare.tables import MODELS_NAME, check_output
    from mmtransfer.data import DataError
    from mmtransfer.tasks import find_task

    settings = dataclasses.replace(
        settings,
        options=options,
        save=result.output / MODELS_NAME if result.save_models else None,
    )
    try:
        # Before anything is fetched.
        find_methods(settings)
        if settings.task is not None:
            find_task(settings.task)
    except ValueError as error:
        fail(str(error))
    try:
        check_output(result.output, force=result.force)
        _show(_run(_load(source, settings.task), settings), result.output)
    except (DataError, OSError) as error:
        fail(str(error))


def _load(source: Input, task: str | None) -> Experiment:
    if source.demo or source.demo_prompts or source.synthetic:
        from mmtransfer.demo import experiments
        from mmtransfer.encoders.precision import find_dtype

        if source.synthetic:
            experiment = experiments.synthetic_experiment(transcribed=task == "ctc")
        elif source.demo:
            experiment = experiments.speech_experiment()
        else:
            experiment = experiments.prompts_experiment()
        experiment.model.to(find_dtype(source.dtype))
        return experiment
    from mmtransfer.compare.experiment import user_experiment
    from mmtransfer.tasks import find_task

    assert source.model is not None
    assert source.data is not None
    return user_experiment(
        source.model,
        source.data,
        kind="label" if task is None else find_task(task).kind,
        test_fraction=source.test_fraction,
        max_seconds=source.max_seconds,
        dtype=source.dtype,
    )


def _run(experiment: Experiment, settings: CompareSettings) -> Comparison:
    from mmtransfer.compare.session import compare, is_main_process

    with show_progress(quiet=not is_main_process()) as progress:
        progress.console.print(
            experiment.recordings.describe(), markup=False, highlight=False, soft_wrap=True
        )
        return compare(experiment, settings, progress=progress)


def _show(comparison: Comparison, output: Path) -> None:
    """Print the table and write the report; from the main process only."""
    from rich.console import Console

    from mmtransfer.compare import tables
    from mmtransfer.compare.session import is_main_process

    if not is_main_process():
        return
    notes = [*tables.failures(comparison), tables.caption(comparison)]
    # Printed first: a disk that is full does not take the table away.
    console = Console()
    console.print(*tables.to_tables(comparison), sep="\n")
    console.print(*filter(None, notes), sep="\n", markup=False, highlight=False)
    page, _ = tables.write_report(output, comparison)
    print(f"Report: {page}")
    if comparison.failed:
        first, count = comparison.failed[0], len(comparison.failed)
        others = f"; {count - 1} more failed, see the report" if count > 1 else ""
        fail(f"{first.title} failed: {first.reason}{others}")
    wrong = [method for method in comparison.methods if not method.step.agrees]
    if wrong:
        fail(
            f"mmkernels and eager PyTorch differ by {wrong[0].step.difference:.1e} in {wrong[0].title}; "
            "the report shows no time for it, please report this with the output of mmtransfer info"
        )
