"""``python -m benches``: measure on this machine, print the tables, write ``benches/results/<machine>.json``.

``python -m benches --report FILES``: no measuring; tables, a figure per file and a page from results files.
``python -m benches --predict``: no measuring; predicted times of the CUDA cases on an H100.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import pathlib
import sys

import torch


def main() -> int:
    arguments = parse()
    if arguments.predict:
        return predictions(arguments)
    if arguments.report:
        return report(arguments)
    if importlib.util.find_spec("pytest_benchmark") is None:
        print("the record needs pytest-benchmark: pip install pytest-benchmark", file=sys.stderr)
        return 1
    return run(arguments)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benches", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="only the headline cases")
    parser.add_argument("--ops", default="", help="comma-separated, for instance layer_mix,hff; default: all")
    parser.add_argument("--match", default="", help="only cases whose name contains this")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--seconds", type=float, default=4.0, help="measuring time per case (default: 4)")
    parser.add_argument("--predict", action="store_true", help="only print predicted times, for an H100")
    parser.add_argument("--tiny", action="store_true", help="small sizes, three rounds: to test the benches")
    where = "default: benches/results/<machine>.json; with --report a folder, default: reports"
    parser.add_argument("--output", type=pathlib.Path, help=where)
    group = parser.add_argument_group("reports")
    group.add_argument("--report", nargs="+", type=pathlib.Path, metavar="FILE", help="results files")
    group.add_argument("--markdown", action="store_true", help="print only the summary, as Markdown")
    group.add_argument("--picture", type=pathlib.Path, help="draw only the small picture, as SVG or PNG")
    arguments = parser.parse_args()
    if arguments.tiny and not arguments.output:
        parser.error("--tiny needs --output: its times are no results")
    if (arguments.markdown or arguments.picture) and not arguments.report:
        parser.error("--markdown and --picture need --report")
    if arguments.picture and len(arguments.report) > 1:
        parser.error("--picture draws one results file")
    return arguments


def run(arguments: argparse.Namespace) -> int:
    """Measure case by case. The file is written after each, so that a run cut short leaves its results."""
    from benches.measure import machine, record
    from benches.measure.devices import open_device
    from benches.measure.harness import Effort, measure
    from benches.registry import registry
    from benches.report import predicted, table

    device = open_device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    ops = [name for name in arguments.ops.split(",") if name]
    cases = [
        case
        for case in registry(device.name, tiny=arguments.tiny)
        if (not ops or case.op in ops)
        and arguments.match in case.id
        and (case.headline or not arguments.quick)
    ]
    if not cases:
        print("no case has these names", file=sys.stderr)
        return 1
    effort = Effort(0.0, min_rounds=3) if arguments.tiny else Effort(arguments.seconds)
    results = pathlib.Path(__file__).with_name("results")
    output = arguments.output or results / f"{machine.slug(device.name)}.json"
    header, measured = record.header(device.name), []
    for number, case in enumerate(cases, start=1):
        print(f"{number}/{len(cases)} {case.id}", file=sys.stderr, flush=True)
        measured += [(case, measurement) for measurement in measure(case, device, effort)]
        record.write(output, header, measured)
    table.show(record.load(output))
    predicted.show(record.load(output), ops, arguments.match)
    written = os.path.relpath(output)
    print(f"\nwritten to {written}; figure and page: python -m benches --report {written}")
    return int(any(measurement.failure for _, measurement in measured))


def predictions(arguments: argparse.Namespace) -> int:
    from benches.measure.record import load
    from benches.report import predicted

    measured = pathlib.Path(__file__).with_name("results") / "nvidia-h100-80gb-hbm3.json"
    record = load(measured) if measured.is_file() else None
    predicted.show(record, [name for name in arguments.ops.split(",") if name], arguments.match)
    return 0


def report(arguments: argparse.Namespace) -> int:
    from benches.measure.record import load
    from benches.report import figure, page, table

    if missing := [str(path) for path in arguments.report if not path.is_file()]:
        print(f"no results file {', '.join(missing)}", file=sys.stderr)
        return 1
    records = {path: load(path) for path in arguments.report}
    if arguments.markdown:
        for item in records.values():
            print(table.markdown(item, headline=arguments.quick))
    if arguments.picture:
        figure.picture(next(iter(records.values())), arguments.picture)
        print(f"picture: {arguments.picture}", file=sys.stderr)
    if not (arguments.markdown or arguments.picture):
        for item in records.values():
            table.show(item)
        written = page.write(records, arguments.output or pathlib.Path("reports"))
        print(f"\nfigures and page: {written}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
