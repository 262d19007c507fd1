"""Package clients as subprocesses, and what the terminal shows meanwhile."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

_REFRESH_SECONDS = 0.1


@dataclass(frozen=True)
class Download:
    """The file that a client fetches: how to call it on the terminal, and its bytes."""

    title: str
    size: int


def run_client(
    command: Sequence[str], folder: Path, download: Download | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a package client in `folder`, its messages in English and captured.

    With `download`, a bar on standard error shows how much of it lies in `folder`; nothing where that is no
    terminal. An interruption ends the client too.
    """
    # In TMPDIR pip writes the file that it downloads. It tries again from there by itself, from release 25.1.
    environment = {**os.environ, "LC_ALL": "C", "TMPDIR": str(folder), "PIP_RESUME_RETRIES": "5"}
    process = subprocess.Popen(
        command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    with _bar(download) as bar, process as client:
        try:
            while True:
                try:
                    output, errors = client.communicate(timeout=_REFRESH_SECONDS)
                except subprocess.TimeoutExpired:
                    _advance(bar, folder)
                else:
                    return subprocess.CompletedProcess(command, client.returncode, output, errors)
        except BaseException:
            client.terminate()
            raise


@contextlib.contextmanager
def progress(message: str) -> Iterator[None]:
    """A spinner on standard error while the block runs; nothing where that is no terminal."""
    with Console(stderr=True).status(message + " ..."):
        yield


@contextlib.contextmanager
def _bar(download: Download | None) -> Iterator[Progress | None]:
    console = Console(stderr=True)
    if download is None or not console.is_terminal:
        yield None
        return
    columns = (
        TextColumn("Downloading {task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        bar.add_task(download.title, total=download.size)
        yield bar


def _advance(bar: Progress | None, folder: Path) -> None:
    """Show the size of the largest file in `folder`, which is the one under way."""
    if bar is not None:
        task = bar.tasks[0]
        bar.update(task.id, completed=min(_largest(folder), task.total or 0))


def _largest(folder: Path) -> int:
    sizes = [0]
    for file in folder.rglob("*"):
        with contextlib.suppress(OSError):  # the client has removed it
            sizes.append(file.stat().st_size)
    return max(sizes)
