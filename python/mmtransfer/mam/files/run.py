"""Carry out a plan: tensors go from file to file in pieces, on as many threads as there are cores."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path

import torch

from mmtransfer.data.errors import DataError

from .output import RECIPE, check_output, new_folder
from .pieces import Piece, cut, write_piece
from .plan import Entry, Plan
from .settings import write_settings
from .shards import Shard, create, lay_out, write_index
from .streams import Reader

#: More gain nothing: they wait for the memory that files are cached in.
_THREADS = 8


def carry_out(
    plan: Plan,
    recipe: str,
    path: Path,
    *,
    max_shard_size: int,
    overwrite: bool = False,
    on_bytes: Callable[[int], object] = lambda count: None,
    note: Callable[[str], object] = lambda sentence: None,
) -> list[str]:
    """Write the result of a plan into a folder, whole or not at all; the names of its weight files.

    Args:
        recipe: the text of the recipe, which the result keeps.
        path: the folder.
        max_shard_size: bytes of tensors in a file, at most.
        overwrite: replace an earlier result there, in one step at the end.
        on_bytes: called with the number of bytes that were written, again and again, from any thread.
        note: called with sentences for the user.

    Raises:
        DataError: the folder holds other files or an input, or the disk has no room.
        OSError: a file cannot be read or written.
    """
    path = Path(os.path.abspath(path))
    check_output(path, [each.folder for each in plan.inputs], overwrite=overwrite)
    shards = lay_out(plan.entries, max_shard_size)
    _check_room(path, sum(shard.size for shard in shards))
    with new_folder(path, overwrite=overwrite, note=note) as folder:
        _write_shards(folder, shards, plan.entries, on_bytes)
        write_index(folder, shards, plan.entries)
        write_settings(folder, plan)
        (folder / RECIPE).write_text(recipe, encoding="utf-8")
    return [shard.name for shard in shards]


def _check_room(path: Path, needed: int) -> None:
    place = next(each for each in path.parents if each.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise DataError(f"{place} has {free / 1e9:.1f} GB free, and the result takes {needed / 1e9:.1f} GB")


def _write_shards(
    folder: Path, shards: Sequence[Shard], entries: Sequence[Entry], on_bytes: Callable[[int], object]
) -> None:
    by_name = {entry.name: entry for entry in entries}
    stop = threading.Event()
    threads = min(len(os.sched_getaffinity(0)), _THREADS)

    def run(piece: Piece) -> None:
        if not stop.is_set():
            on_bytes(write_piece(piece, reader, stop))

    with Reader() as reader, _one_thread_each(), ThreadPoolExecutor(threads) as pool:
        for shard in shards:
            file = create(folder, shard)
            tasks: list[Future[None]] = []
            try:
                for name, start in shard.starts.items():
                    tasks += [pool.submit(run, piece) for piece in cut(by_name[name], file, start)]
                _await(tasks)
            except BaseException:
                stop.set()
                raise
            finally:
                # A descriptor that is closed may be another file's next: no thread may still write to it.
                for task in tasks:
                    task.cancel()
                wait(tasks)
                os.close(file)


def _await(tasks: Sequence[Future[None]]) -> None:
    """Wait for all; raise the first error."""
    done, _ = wait(tasks, return_when=FIRST_EXCEPTION)
    for task in done:
        task.result()


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """torch's own threads would compete with those that read and write."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(before)
