"""``python -m benches``: measure all on this machine, print the table, write it to ``benches/results``."""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import torch

from benches.measure import machine
from benches.report import __main__ as report
from benches.report import table

FOLDER = pathlib.Path(__file__).parent


def main() -> int:
    arguments = parse()
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    output = arguments.output or FOLDER / "results" / f"{machine.slug(device)}.json"
    with tempfile.TemporaryDirectory() as folder:
        raw = pathlib.Path(folder) / "benchmark.json"
        status = subprocess.call(pytest_command(arguments, device, raw), cwd=FOLDER.parent)
        if not raw.exists() or not raw.read_text():
            print("nothing was measured", file=sys.stderr)
            return status or 1
        content = json.loads(raw.read_text())
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(one_row_per_line(content))
    report.print_record(table.load(output))
    written = os.path.relpath(output)
    print(f"\nwritten to {written}; figure and page: python -m benches.report {written}")
    return status


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benches", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="only the headline cases")
    parser.add_argument("--ops", default="", help="comma-separated, for instance layer_mix,hff; default: all")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--seconds", type=float, default=4.0, help="measuring time per case (default: 4)")
    parser.add_argument("--output", type=pathlib.Path, help="default: benches/results/<machine>.json")
    return parser.parse_args()


def pytest_command(arguments: argparse.Namespace, device: str, record: pathlib.Path) -> list[str]:
    command = [sys.executable, "-m", "pytest", str(FOLDER), "-q", "-p", "no:cacheprovider"]
    command += ["--benchmark-quiet", "--show-capture=no", "--disable-warnings"]
    command += [f"--benchmark-json={record}", f"--device={device}", f"--seconds={arguments.seconds}"]
    if arguments.ops:
        command.append(f"--ops={arguments.ops}")
    return command + ["--headline"] * arguments.quick


def one_row_per_line(content: dict[str, Any]) -> str:
    """JSON that is small, and whose changes are readable as a diff."""
    parts = []
    for key, value in content.items():
        if isinstance(value, list):
            rows = ",\n  ".join(json.dumps(item, separators=(",", ":")) for item in value)
            parts.append(f"{json.dumps(key)}: [\n  {rows}\n ]" if rows else f"{json.dumps(key)}: []")
        else:
            parts.append(f"{json.dumps(key)}: {json.dumps(value)}")
    return "{\n " + ",\n ".join(parts) + "\n}\n"


if __name__ == "__main__":
    sys.exit(main())
