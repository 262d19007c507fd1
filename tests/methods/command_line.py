"""Running the command line in a test's process."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path

from mmtransfer import cli

QUICK = (
    "--epochs",
    "1",
    "--seeds",
    "1",
    "--batch-size",
    "8",
    "--tuning-epochs",
    "1",
    "--cpu",
    "--workers",
    "0",
)


@dataclass
class Result:
    """The output of a run, and its exit status."""

    code: int
    stdout: str
    stderr: str


def run(*arguments: str | Path) -> Result:
    """Exceptions other than SystemExit are faults of the command line and are not caught."""
    code: object = 0
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main([str(argument) for argument in arguments])
        except SystemExit as left:
            code = left.code
    return Result(int(code or 0), out.getvalue(), err.getvalue())  # type: ignore[call-overload]


def record(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def fails(result: Result, *parts: str, code: int = 1) -> None:
    """One sentence on standard error and nothing on standard output."""
    assert result.code == code, result
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith("mmtransfer: ")
    for part in parts:
        assert part in line
    assert result.stdout == ""
