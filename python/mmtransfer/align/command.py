"""`mmtransfer align`: the times of the words of a text in a recording."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from mmtransfer.cli import values
from mmtransfer.cli.imports import import_files
from mmtransfer.cli.info import Imports
from mmtransfer.cli.messages import fail
from mmtransfer.cli.progress import show_progress
from mmtransfer.cli.trained import ModelName

if TYPE_CHECKING:
    from rich.progress import Progress

    from .aligner import AlignedText, Aligner
    from .pairs import Pair, Pairs
    from .results import Results

FormatName = Literal["textgrid", "ctm", "csv", "json", "srt"]
Wildcard = Literal["start", "end", "between"]


def align(
    audio: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="AUDIO")],
    text: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="[TEXT]")] = None,
    *,
    model: Annotated[str, tyro.conf.arg(metavar="NAME")],
    encoder: ModelName = None,
    output: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None,
    formats: tuple[FormatName, ...] = ("textgrid", "json"),
    rules: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None,
    wildcards: tuple[Wildcard, ...] = (),
    overwrite: bool = False,
    figures: bool = False,
    figure_start: float = 0.0,
    window: float = 20.0,
    context: float | None = None,
    batch_size: int = 4,
    cpu: bool = False,
    strict: bool = False,
    import_: Imports = (),
) -> None:
    """Find when each word of a text is spoken in a recording of it, by a CTC model.

    Recordings may last hours: the model runs in windows that overlap, and one alignment goes over all of
    them. Words keep their punctuation; those that the model cannot write, such as numbers, get the time that
    their neighbours leave, and are marked. A file that fails is named on standard error, the others go on,
    and the exit status is 1.

    Args:
        audio: a recording; a folder of recordings; or a manifest, CSV or JSON lines, with the columns path
            and text.
        text: text file of the recording, or - for standard input; for a folder of recordings, a folder of
            text files with the same names. Without it, the text files next to the recordings.
        model: folder that `mmtransfer finetune` wrote with the task ctc, or folder or hub name of a CTC model
            of transformers.
        encoder: folder or hub name of the pretrained model that was finetuned, where it is not where it was.
        output: folder for the results. Without it, one recording's words are printed as CSV.
        formats: of the results: textgrid (Praat), ctm (NIST), csv, json, srt (subtitles).
        rules: YAML file of spellings for what the model cannot write: pattern: replacement, as regular
            expressions, applied to each word in their order.
        wildcards: where the recording may hold words that the text lacks: start, end, between words. Each
            takes a frame at least.
        overwrite: replace results that are in DIR already.
        figures: also draw 20 s of each recording with its words and the path through the probabilities.
        figure_start: seconds at which the figure begins.
        window: seconds of audio that the model sees at a time, at most as many as it takes.
        context: seconds on each side of a window that are computed for the sake of the others; by default a
            tenth of it.
        batch_size: windows at a time.
        cpu: use no GPU.
        strict: stop at the first file that fails.
        import_: Python file that registers methods or tasks of yours.
    """
    if figures and output is None:
        fail("--figures needs --output, the folder for them", 2)
    if not (formats or figures):
        fail("--formats needs at least one", 2)
    if not figure_start >= 0:
        fail(f"--figure-start must be at least 0, got {figure_start}", 2)
    import_files(import_)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Names that are not UTF-8.
        sys.stdout.reconfigure(errors="surrogateescape")
    from mmtransfer.data import DataError

    from .pairs import find_pairs

    options: dict[str, Any] = {"wildcards": wildcards, "window": window, "context": context}
    try:
        found = find_pairs(audio.expanduser(), None if text is None else text.expanduser())
        if output is None and len(found.pairs) > 1:
            fail(f"give --output, the folder for the results of {len(found.pairs)} recordings", 2)
        results = None
        if output is not None:
            from .results import Results

            results = Results(
                output.expanduser(), formats, figures=figures, start=figure_start, overwrite=overwrite
            )
            results.check(found)
        aligner = _load(model, encoder, cpu=cpu, rules=_read_rules(rules), batch_size=batch_size, **options)
        wrong = _align_all(aligner, found, results, strict=strict)
    except (DataError, OSError, ValueError) as error:
        fail(" ".join(str(error).split()))
    if wrong:
        sys.exit(1)


#: The commands of this folder.
COMMANDS = (align,)


def _read_rules(path: Path | None) -> list[tuple[str, str]]:
    if path is None:
        return []
    try:
        content = values.parse_texts(path.expanduser().read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        fail(f"the rules {path} cannot be read as YAML ({error})")
    if (
        not isinstance(content, dict)
        or not content
        or not all(isinstance(to, str) for to in content.values())
    ):
        fail(f"the rules {path} must be lines of pattern: replacement")
    return list(content.items())


def _load(model: str, encoder: str | None, *, cpu: bool, **options: Any) -> Aligner:
    # Imported here: help needs no torch.
    from mmtransfer.training.loop import main_device

    from .aligner import Aligner
    from .models import load_ctc

    return Aligner(load_ctc(model, encoder).to(main_device(cpu)), **options)


def _align_all(aligner: Aligner, found: Pairs, results: Results | None, *, strict: bool) -> int:
    """Align all pairs; how many failed."""
    from mmtransfer.data import DataError
    from mmtransfer.training.finite import NotFiniteError

    from .results import describe, left_out, sentence

    if note := left_out(found.left_out):
        print(f"mmtransfer: {note}", file=sys.stderr)
    wrong = 0
    with show_progress(quiet=False) as progress:
        task = progress.add_task("Recordings", total=len(found.pairs), detail="")
        for pair in found.pairs:
            try:
                if isinstance(pair.text, DataError):
                    raise pair.text
                aligned = _align(aligner, pair, progress)
                if results is None:
                    _print(pair, aligned)
                else:
                    results.write(pair, aligned, aligner)
                    print(describe(pair, aligned), flush=True)
            except BrokenPipeError:
                raise
            # One file must not cost the others: of memory, too.
            except (DataError, NotFiniteError, OSError, ValueError, RuntimeError, MemoryError) as error:
                if strict:
                    raise DataError(sentence(pair, error)) from error
                wrong += 1
                print(f"mmtransfer: {sentence(pair, error)}", file=sys.stderr)
            progress.advance(task)
    return wrong


def _align(aligner: Aligner, pair: Pair, progress: Progress) -> AlignedText:
    from mmtransfer.data.audio import duration

    seconds = duration(pair.audio)
    task = progress.add_task(pair.audio.name[-20:], total=round(seconds), detail="s")
    try:
        assert isinstance(pair.text, str)
        return aligner.align(pair.audio, pair.text, on_window=lambda done: progress.advance(task, done))
    finally:
        progress.remove_task(task)


def _print(pair: Pair, found: AlignedText) -> None:
    from .formats import FORMATS

    print(FORMATS["csv"].write(found, str(pair.audio)), end="", flush=True)
