"""The folder of a result: complete under its name, or not there.

It is made next to its place under a hidden name, and renamed at the end.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from mmtransfer.data.errors import DataError, shortened

#: The recipe in the result, which also tells that a folder is one.
RECIPE = "merge_recipe.yaml"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def check_output(path: Path, inputs: Iterable[Path], *, overwrite: bool) -> None:
    """DataError unless a result may be written to `path`: nothing is there, an empty folder, or an earlier
    result that may be replaced, and it holds none of the inputs."""
    own = path.resolve()
    for folder in inputs:
        if own == folder.resolve() or own in folder.resolve().parents:
            raise DataError(f"{path} holds the input {folder}; write to another folder")
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise DataError(f"{path} exists and is no folder; write to another place")
    present = sorted(each.name for each in path.iterdir()) if path.exists() else []
    if not present:
        return
    if not (path / RECIPE).is_file():
        raise DataError(f"{path} holds other files ({shortened(present, 2)}); write to another folder")
    if not overwrite:
        raise DataError(f"{path} holds an earlier merge; --overwrite replaces it")


@contextlib.contextmanager
def new_folder(
    path: Path, *, overwrite: bool = False, note: Callable[[str], object] = lambda sentence: None
) -> Iterator[Path]:
    """A folder to fill, which takes the place of `path` in one step when the block ends without an error.

    Leftovers of killed runs are removed, and named through `note`. The folder is locked while it is filled:
    that of a process that has ended is not.

    Raises:
        DataError: another run fills a folder for the same place, or something came there meanwhile that
            `check_output` would refuse.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(path, note)
    folder = Path(tempfile.mkdtemp(prefix=_prefix(path), dir=path.parent))
    lock = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder
        # mkdtemp makes folders private; the result gets the rights that a plain mkdir would have given.
        umask = os.umask(0)
        os.umask(umask)
        folder.chmod(0o777 & ~umask)
        check_output(path, [], overwrite=overwrite)
        _put(folder, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _prefix(path: Path) -> str:
    return f".{path.name}.merging-"


def _remove_leftovers(path: Path, note: Callable[[str], object]) -> None:
    for folder in sorted(path.parent.glob(f"{_escape(_prefix(path))}*")):
        try:
            lock = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
            note(f"removed {folder}, which an interrupted merge had left")
        except BlockingIOError:
            raise DataError(
                f"another merge is writing {path}; wait for it, or write to another folder"
            ) from None
        finally:
            os.close(lock)


def _escape(name: str) -> str:
    """A name as a pattern of `glob` that matches it alone."""
    return "".join(f"[{each}]" if each in "*?[" else each for each in name)


def _put(folder: Path, path: Path) -> None:
    """Rename over nothing or an empty folder, or exchange with an earlier result, which goes then."""
    try:
        os.rename(folder, path)
        return
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    if _exchange(folder, path):
        return
    # File systems without an exchange: the earlier result is away for a moment.
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.earlier-", dir=path.parent))
    os.rename(path, aside)
    try:
        os.rename(folder, path)
    except BaseException:
        os.rename(aside, path)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two folders in one step; False where the system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    names = os.fsencode(first), os.fsencode(second)
    return rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0
