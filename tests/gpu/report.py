"""The page of `make gpu`: what passed, what failed, and each bench against its least time."""

from __future__ import annotations

import json
import pathlib
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator


def steps(folder: pathlib.Path) -> Iterator[str]:
    yield "| step | result | seconds |\n| --- | --- | ---: |"
    for line in (folder / "steps.tsv").read_text().splitlines():
        name, code, seconds = line.split("\t")
        result = {"0": "passed", "124": "FAILED: out of time", "137": "FAILED: out of time"}.get(code)
        yield f"| {name} | {result or f'FAILED, code {code}'} | {seconds} |"


def failures(folder: pathlib.Path) -> Iterator[str]:
    """The failed cases of the driver and the failed tests, with the first line of their reasons."""
    for log in sorted(folder.glob("driver-*.log")):
        lines = log.read_text(errors="replace").splitlines()
        yield from (f"- {log.stem}: {line}" for line in lines if line.startswith("FAILED"))
        yield f"- {log.stem}: {lines[-1] if lines else 'no output'}"
    if not (folder / "tests.xml").exists():
        return
    suite = ElementTree.parse(folder / "tests.xml").getroot()
    counts = suite.find("testsuite")
    if counts is not None:
        yield "- tests: " + ", ".join(
            f"{counts.get(key)} {key}" for key in ("tests", "failures", "errors", "skipped")
        )
    for case in suite.iter("testcase"):
        for reason in [*case.findall("failure"), *case.findall("error")]:
            first = (reason.get("message") or "").splitlines() or [""]
            yield f"- {case.get('classname')}::{case.get('name')}: {first[0][:200]}"


def benches(folder: pathlib.Path) -> Iterator[str]:
    """Least time: the bytes that must move at a copy's rate, or the operations at a product's."""
    path = folder / "benches.json"
    if not path.exists():
        return
    content = json.loads(path.read_text())
    yield "| case | candidate | least, us | median, us | of the least time | error |"
    yield "| --- | --- | ---: | ---: | ---: | ---: |"
    for row in [item["extra_info"] for item in content["benchmarks"]] + content["failures"]:
        if row["failure"]:
            yield f"| {row['id']} | {row['candidate']} | | {row['failure'][:90]} | | |"
            continue
        work = row["minimum_bytes"] if row["bound"] == "memory" else row["flops"]
        median = row["seconds"]["median"] * 1e6
        least = work / row["ceiling"] * 1e6 if row.get("ceiling") else None
        shown = ["", ""] if least is None else [f"{least:.1f}", f"{least / median:.0%}"]
        error = "" if row["error"] is None else f"{row['error']:.1e}"
        yield f"| {row['id']} | {row['candidate']} | {shown[0]} | {median:.1f} | {shown[1]} | {error} |"


def main() -> None:
    folder = pathlib.Path(sys.argv[1])
    info = folder / "info.txt"
    parts = ["# make gpu", f"```\n{info.read_text() if info.exists() else 'not built'}```"]
    parts += ["\n".join(part(folder)) for part in (steps, failures, benches)]
    page = "\n\n".join(part for part in parts if part) + "\n"
    (folder / "report.md").write_text(page)
    print(page)


if __name__ == "__main__":
    main()
