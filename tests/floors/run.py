"""Run tests with the oldest versions that pyproject.toml allows, and with the libraries that the package
stands in for; record the results in last_run.json.

    python tests/floors/run.py [floors] [peers]

Each list becomes an environment under build/floors, made with the Python that runs this, with the package
built from this checkout (no CUDA).
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
import venv
import xml.etree.ElementTree as ElementTree
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build/floors"
RECORD = HERE / "last_run.json"
#: The tests run in each environment. Those of the methods need a newer transformers than the peers allow.
TESTS = {
    "floors": ("tests/patch", "tests/nn", "tests/methods"),
    "peers": ("tests/patch", "tests/nn"),
}
TOOLS = (
    *("pytest>=8", "pytest-benchmark>=4", "pytest-xdist>=3.2", "expecttest", "hypothesis>=6.100"),
    "triton==3.6.0",
    *("jiwer", "datasets"),
    # Of datasets; later ones refuse numpy 1.
    "pyarrow<22",
)
#: Their requirements would bring another torch; two files of s3prl are imported.
WITHOUT_REQUIREMENTS = ("s3prl",)


def main(names: list[str]) -> int:
    wheel = build_wheel()
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    for name in names or list(TESTS):
        print(f"{name}: installing", flush=True)
        environment = make_environment(name, wheel)
        print(f"{name}: running {' '.join(TESTS[name])}", flush=True)
        record[name] = run_tests(name, environment)
        RECORD.write_text(json.dumps(record, indent=2) + "\n")
        print(f"{name}: {record[name]['passed']} passed, {len(record[name]['failed'])} failed", flush=True)
    return int(any(record[name]["failed"] for name in names or TESTS))


def build_wheel() -> Path:
    for old in BUILD.glob("*.whl"):
        old.unlink()
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"),
            *("-w", str(BUILD), "-C", f"build-dir={BUILD / 'cmake'}", str(ROOT)),
        ],
        check=True,
        env={**os.environ, "MMKERNELS_CUDA": "OFF"},
    )
    return next(BUILD.glob("*.whl"))


def read_list(name: str) -> dict[str, str]:
    lines = (HERE / f"{name}.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def make_environment(name: str, wheel: Path) -> Path:
    folder = BUILD / name
    venv.create(folder, clear=True, with_pip=True)
    pinned = {package: f"{package}=={version}" for package, version in read_list(name).items()}
    alone = [pinned.pop(package) for package in WITHOUT_REQUIREMENTS if package in pinned]
    tools = [tool for tool in TOOLS if tool.split(">=")[0] not in pinned]
    pip = [str(folder / "bin/python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, *pinned.values(), *tools], check=True)
    subprocess.run([*pip, "--no-deps", *alone, str(wheel)], check=True)
    return folder


def run_tests(name: str, environment: Path) -> dict[str, object]:
    report = BUILD / f"{name}.xml"
    report.unlink(missing_ok=True)
    # Not `python -m pytest`, which would import the packages of the checkout in place of the installed ones.
    parallel = ["-n", "logical", "--maxprocesses", "4", "--dist", "worksteal"]
    command = [environment / "bin/pytest", "-q", *parallel, "-p", "no:cacheprovider", f"--junitxml={report}"]
    subprocess.run([*map(str, command), *TESTS[name]], cwd=ROOT, check=False)
    cases = list(ElementTree.parse(report).iter("testcase"))
    outcomes = {f"{case.get('classname')}::{case.get('name')}": {each.tag for each in case} for case in cases}
    failed = sorted(case for case, tags in outcomes.items() if tags & {"failure", "error"})
    skipped = sum("skipped" in tags for tags in outcomes.values())
    return {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "versions": read_list(name),
        "tests": list(TESTS[name]),
        "passed": len(outcomes) - len(failed) - skipped,
        "skipped": skipped,
        "failed": failed,
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
