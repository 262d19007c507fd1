"""`mmtransfer align`: the times of the words of a text in a recording."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Sequence
from functools import partial
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
    from .pairs import Pair

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
    figures: bool = False,
    figure_start: float = 0.0,
    window: float = 20.0,
    context: float = 2.0,
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
        wildcards: where the recording may hold words that the text lacks: start, end, between words.
        figures: also draw 20 s of each recording with its words and the path through the probabilities.
        figure_start: seconds at which the figure begins.
        window: seconds of audio that the model sees at a time, at most as many as it takes.
        context: seconds on each side of a window that are computed for the sake of the others.
        batch_size: windows at a time.
        cpu: use no GPU.
        strict: stop at the first file that fails.
        import_: Python file that registers methods or tasks of yours.
    """
    if figures and output is None:
        fail("--figures needs --output, the folder for them", 2)
    if not figure_start >= 0:
        fail(f"--figure-start must be at least 0, got {figure_start}", 2)
    import_files(import_)
    from mmtransfer.data import DataError

    from .pairs import find_pairs

    options: dict[str, Any] = {"wildcards": wildcards, "window": window, "context": context}
    try:
        pairs = find_pairs(audio.expanduser(), None if text is None else text.expanduser())
        if output is None and len(pairs) > 1:
            fail(f"give --output, the folder for the results of {len(pairs)} recordings", 2)
        aligner = _load(model, encoder, cpu=cpu, rules=_read_rules(rules), batch_size=batch_size, **options)
        write = _print if output is None else _Writer(output.expanduser(), formats, figures, figure_start)
        wrong = _align_all(aligner, pairs, write, strict=strict)
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
        content = values.parse(path.expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        fail(f"the rules {path} cannot be read as YAML ({error})")
    if not isinstance(content, dict) or not content:
        fail(f"the rules {path} must be lines of pattern: replacement")
    # 7: seven is a number for YAML.
    return [(str(pattern), "" if to is None else str(to)) for pattern, to in content.items()]


def _load(model: str, encoder: str | None, *, cpu: bool, **options: Any) -> Aligner:
    # Imported here: help needs no torch.
    from mmtransfer.training.loop import main_device

    from .aligner import Aligner
    from .models import load_ctc

    return Aligner(load_ctc(model, encoder).to(main_device(cpu)), **options)


def _align_all(
    aligner: Aligner,
    pairs: Sequence[Pair],
    write: Callable[[Pair, AlignedText, Aligner], None],
    *,
    strict: bool,
) -> int:
    """Align all pairs; how many failed."""
    from mmtransfer.data import DataError
    from mmtransfer.training.finite import NotFiniteError

    wrong = 0
    with show_progress(quiet=False) as progress:
        task = progress.add_task("Recordings", total=len(pairs), detail="")
        for pair in pairs:
            try:
                if isinstance(pair.text, DataError):
                    raise pair.text
                found = _align(aligner, pair, progress)
                write(pair, found, aligner)
            except (DataError, NotFiniteError, OSError) as error:
                if strict:
                    raise
                wrong += 1
                print(f"mmtransfer: {' '.join(str(error).split())}", file=sys.stderr)
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


def _print(pair: Pair, found: AlignedText, aligner: Aligner) -> None:
    from .formats import FORMATS

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")
    print(FORMATS["csv"].write(found, str(pair.audio)), end="", flush=True)


class _Writer:
    """Writes results into a folder, and a line about each."""

    def __init__(self, folder: Path, formats: Sequence[str], figures: bool, start: float) -> None:
        self.folder, self.formats, self.figures, self.start = folder, dict.fromkeys(formats), figures, start

    def __call__(self, pair: Pair, found: AlignedText, aligner: Aligner) -> None:
        from mmtransfer.checkpoint import replace_file

        from .formats import FORMATS

        base = self.folder / pair.name
        base.parent.mkdir(parents=True, exist_ok=True)
        for name in self.formats:
            kind = FORMATS[name]
            content = kind.write(found, pair.name).encode("utf-8", "surrogateescape")
            replace_file(base.with_name(base.name + kind.suffix), partial(Path.write_bytes, data=content))
        if self.figures:
            self._draw(pair, found, aligner, base.with_name(f"{base.name}.png"))
        spelled = sum(word.exact for word in found.words)
        marked = f", {len(found.words) - spelled} marked" if spelled < len(found.words) else ""
        print(
            f"{pair.audio}\t{len(found.words)} words{marked}, {found.seconds:.1f} s, "
            f"mean score {found.score:.2f}",
            flush=True,
        )

    def _draw(self, pair: Pair, found: AlignedText, aligner: Aligner, path: Path) -> None:
        from mmtransfer.data.audio import read_audio
        from mmtransfer.data.errors import DataError

        from .figure import LONGEST, draw

        if self.start >= found.seconds:
            end = f"the end of {pair.audio}, {found.seconds:.1f} s"
            raise DataError(f"--figure-start {self.start:g} lies behind {end}")
        rate = aligner.sampling_rate
        samples = read_audio(pair.audio, rate, self.start + LONGEST)[round(self.start * rate) :]
        draw(found, samples, rate, path, start=self.start, title=pair.name)
