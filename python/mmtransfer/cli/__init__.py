"""The command line: `mmtransfer finetune`, `evaluate`, `predict`, `compare`, `methods`, `info`, `bench`, and
the commands that the papers' folders bring.

User errors print one sentence to standard error and exit with status 1; wrong options exit with 2.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tyro

from mmtransfer import versions

from .compare import compare
from .evaluate import evaluate
from .finetune import finetune
from .info import info, methods
from .messages import fail
from .predict import predict
from .recipes import expand


def bench() -> None:
    """Measure the kernels; the options are those of `python -m benches` in a source checkout."""


# Only what parsing needs is imported here and in the commands: torch and transformers take seconds.
COMMANDS: dict[str, Callable[..., Any]] = {
    command.__name__: command for command in (finetune, evaluate, predict, compare, methods, info, bench)
}
_PACKAGE = Path(__file__).resolve().parents[1]
NEEDS_NO_TRANSFORMERS = ("info", "bench")


def commands() -> dict[str, Callable[..., Any]]:
    """Every command by its name: those here, and COMMANDS of the papers' folders that have a `command.py`."""
    # Found by their files: only the registry names papers, and it imports their methods, with torch.
    folders = sorted(path.parent.name for path in _PACKAGE.glob("*/command.py"))
    modules = [importlib.import_module(f"mmtransfer.{folder}.command") for folder in folders]
    return COMMANDS | {command.__name__: command for module in modules for command in module.COMMANDS}


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `mmtransfer` command."""
    try:
        _run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of a pipe has ended (`mmtransfer methods | head`); nothing more can be written to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        fail("interrupted", 130)


def _run(arguments: Sequence[str] | None) -> None:
    given = _command_first(list(sys.argv[1:] if arguments is None else arguments)) or ["--help"]
    if given[0] in ("-h", "--help"):
        print(_usage())
        sys.exit(0)
    known = commands()
    if given[0] not in known:
        fail(f"no command {given[0]!r}; {_usage()}", 2)
    if given[0] not in NEEDS_NO_TRANSFORMERS and (problem := versions.find_problem()):
        print(problem, file=sys.stderr)
        sys.exit(1)
    if given[0] == "bench":
        sys.exit(_bench(given[1:]))
    expanded = expand(given)
    _refuse_empty(expanded)
    tyro.cli(
        known[given[0]],
        prog=f"mmtransfer {given[0]}",
        args=expanded[1:],
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
    )


def _command_first(given: list[str]) -> list[str]:
    """`--import FILE` may stand in front of the command."""
    options: list[str] = []
    while given and given[0].partition("=")[0] == "--import":
        count = 1 if "=" in given[0] else 2
        options, given = [*options, *given[:count]], given[count:]
    return [*given[:1], *options, *given[1:]]


def _refuse_empty(given: Sequence[str]) -> None:
    """Exit for an option with an empty value: a folder "" would be the current one."""
    for before, argument in itertools.pairwise(given):
        if argument == "":
            fail(f"{before} has an empty value", 2)
        if argument.startswith("--") and argument.endswith("="):
            fail(f"{argument[:-1]} has an empty value", 2)


def _usage() -> str:
    lines = [f"  {name:10}{inspect.getdoc(call)}".split("\n")[0] for name, call in commands().items()]
    return "\n".join(
        ["usage: mmtransfer COMMAND [OPTIONS]; mmtransfer COMMAND --help lists them", "", *lines]
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
