"""`mmtransfer finetune`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from mmtransfer.training.finetune_settings import FinetuneSettings

from .given import SetOptions, parse_options
from .imports import import_files
from .info import Imports
from .messages import fail
from .progress import show_progress
from .scores import describe_scores

if TYPE_CHECKING:
    from mmtransfer.training.run import FinetuneResult


@dataclass(frozen=True, kw_only=True)
class Source:
    """The method, the model and the data.

    Attributes:
        method: its name, or names joined by "+"; `mmtransfer methods` lists them.
        model: folder or hub name of a speech model.
        data: folder of class folders, or of recordings with text files next to them; a manifest, CSV or JSON
            lines, with the columns path, label or text and, if wanted, split and speaker; or a data set of
            Hugging Face, its folder or name.
        test_fraction: of --data, where it has no split.
        dtype: of the model's weights, whatever they were stored in. float16 is for frozen encoders; it is
            never trained.
    """

    method: Annotated[str, tyro.conf.arg(metavar="NAME")]
    model: Annotated[str, tyro.conf.arg(metavar="NAME")]
    data: Annotated[str, tyro.conf.arg(metavar="PATH")]
    test_fraction: float = 0.2
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    def __post_init__(self) -> None:
        if not 0 < self.test_fraction < 1:
            raise ValueError(f"--test-fraction must be between 0 and 1, got {self.test_fraction}")


@dataclass(frozen=True, kw_only=True)
class Target:
    """The trained model.

    Attributes:
        output: folder for it, and for the states of training until that has ended.
        resume: go on with the run in --output, if there is one.
        force: begin though --output holds other files or another run.
    """

    output: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    resume: bool = False
    force: bool = False


def finetune(
    source: Source,
    settings: FinetuneSettings,
    target: Target,
    import_: Imports = (),
    recipe: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None,
    set_: SetOptions = (),
) -> None:
    """Train one method on your recordings, for class labels or transcripts, and save the model.

    The model is scored on a validation part while it trains, the best weights are kept, and the test part is
    scored once at the end. A run that was interrupted goes on with --resume. Runs on several GPUs under
    torchrun or accelerate launch. `mmtransfer evaluate` and `mmtransfer predict` use the result.

    Args:
        import_: Python file that registers methods or tasks of yours.
        recipe: YAML file of options, or PAPER/NAME for one of the package; options given here win.
        set_: options of the method, such as bottleneck=64, or of the task, under its name.
    """
    # `recipes.expand` has replaced it by its options.
    assert recipe is None
    options = parse_options(text for texts in set_ for text in texts)
    import_files(import_)
    from mmtransfer.data import DataError
    from mmtransfer.training.finetune import finetune as run
    from mmtransfer.training.finite import NotFiniteError
    from mmtransfer.training.machine import is_main_process

    settings = dataclasses.replace(settings, options=options)
    try:
        with show_progress(quiet=not is_main_process()) as progress:
            result = run(
                source.model,
                source.method,
                source.data,
                target.output,
                settings,
                dtype=source.dtype,
                test_fraction=source.test_fraction,
                resume=target.resume,
                force=target.force,
                progress=progress,
            )
    except (DataError, NotFiniteError, OSError, ValueError) as error:
        fail(" ".join(str(error).split()))
    except KeyboardInterrupt:
        fail(f"interrupted; the same command with --resume goes on with the run in {target.output}", 130)
    if is_main_process():
        _show(result)


def _show(result: FinetuneResult) -> None:
    """The scores and the folder, a line each."""
    if result.earlier:
        print(f"The run in {result.output} has ended already; nothing was done.")
    ended = "stopped early after" if result.stopped else "trained in"
    print(f"Training: {ended} {result.steps} steps, {result.seconds:.0f} s")
    if result.validation is not None:
        best = next(point.steps for point in result.curve if point.scores == result.validation)
        print(f"Validation: {describe_scores(result.validation)}, the best, after {best} steps")
    print(f"Test: {describe_scores(result.test)}")
    print(f"Model: {result.output}")
