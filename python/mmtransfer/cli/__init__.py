"""The command line: `mmtransfer compare`, `methods`, `info` and `bench`.

User errors print one sentence to standard error and exit with status 1; wrong options exit with 2.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import tyro
from tyro.extras import SubcommandApp

from .compare import compare
from .info import info, methods
from .recipes import expand

# Only what parsing needs is imported here and in the commands: torch and transformers take seconds.
app = SubcommandApp()
for command in (compare, methods, info):
    app.command(command)


@app.command
def bench() -> None:
    """Measure the kernels; the options are those of `python -m benches` in a source checkout."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `mmtransfer` command."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["bench"]:
        sys.exit(_bench(given[1:]))
    app.cli(
        prog="mmtransfer",
        description="Adapt speech transformers with the kernels of mmkernels.",
        args=expand(given) or ["--help"],
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
    )


def _bench(options: list[str]) -> int:
    import mmkernels

    root = Path(mmkernels.__file__).resolve().parents[1]
    if not (root / "benches" / "__main__.py").is_file():
        print(
            "mmtransfer: the benchmarks are not installed with the package; run this from a source checkout "
            "of mmkernels",
            file=sys.stderr,
        )
        return 1
    return subprocess.call([sys.executable, "-m", "benches", *options], cwd=root)
