"""`mmtransfer predict`."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import tyro

from .imports import import_files
from .info import Imports
from .messages import fail
from .trained import ModelName, load_trained


def predict(
    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")],
    audio: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="AUDIO [AUDIO ...]")],
    model: ModelName = None,
    language_model: ModelName = None,
    json_: Annotated[bool, tyro.conf.arg(name="json")] = False,
    batch_size: int = 16,
    cpu: bool = False,
    strict: bool = False,
    import_: Imports = (),
) -> None:
    """Print the label or the text of audio files, by a model that was trained here.

    A line for each file: its path, a tab, and the prediction. A file that cannot be read is named on standard
    error, the others go on, and the exit status is 1.

    Args:
        folder: of the trained model, as `mmtransfer finetune --output` says.
        audio: files, folders, or @FILE for a file with a path a line.
        model: folder or hub name of the pretrained model, where it is not where it was.
        language_model: the same of a language model that reads the speech.
        json_: JSON lines: {"path": ..., "text": ...}.
        batch_size: files at a time.
        cpu: use no GPU.
        strict: stop at the first file that cannot be read.
        import_: Python file that registers methods or tasks of yours.
    """
    if not audio:
        fail("give audio files, folders, or @FILE for a list of them", 2)
    import_files(import_)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Names that are not UTF-8: as JSON escapes them, or as they are.
        sys.stdout.reconfigure(errors="backslashreplace" if json_ else "surrogateescape")
    from mmtransfer.data import DataError
    from mmtransfer.recognition import recognize_each
    from mmtransfer.training.finite import NotFiniteError

    wrong = 0
    try:
        files = list(_find_files(audio))
        loaded = load_trained(folder, model, language_model=language_model, cpu=cpu)
        assert loaded.task is not None
        for file, prediction in zip(files, recognize_each(loaded, files, batch_size=batch_size), strict=True):
            if isinstance(prediction, Exception):
                if strict:
                    raise prediction
                wrong += 1
                print(f"mmtransfer: {prediction}", file=sys.stderr)
            elif json_:
                record = {"path": str(file), loaded.task.kind: prediction}
                print(json.dumps(record, ensure_ascii=False), flush=True)
            else:
                print(f"{file}\t{prediction}", flush=True)
    except BrokenPipeError:
        raise
    except (DataError, NotFiniteError, OSError, ValueError) as error:
        fail(" ".join(str(error).split()))
    if wrong:
        sys.exit(1)


def _find_files(given: Sequence[str]) -> Iterator[Path]:
    """The files that are meant; DataError for a folder without audio, or a list that cannot be read."""
    from mmtransfer.data import DataError
    from mmtransfer.data.tree import read_tree

    for name in given:
        path = Path(name).expanduser()
        if name.startswith("@") and not path.exists():
            yield from _read_list(Path(name[1:]).expanduser())
        elif path.is_dir():
            found = [path.joinpath(*place.parts) for place in read_tree(path).audio]
            if not found:
                raise DataError(f"{path} holds no audio files")
            yield from found
        else:
            yield path


def _read_list(path: Path) -> Iterator[Path]:
    """The paths in a file, a line each, relative to its folder."""
    from mmtransfer.data import DataError

    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the list {path} cannot be read ({error})") from error
    for line in lines:
        if line.strip():
            yield path.parent / Path(line.strip()).expanduser()
