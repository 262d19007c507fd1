"""The benches: every case builds, every candidate is right, reports can be drawn. Nothing is timed here."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import subprocess
import sys
from typing import Any

import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # benches are not installed

pytest.importorskip("pytest_benchmark")

from benches.case import (  # noqa: E402
    Candidate,
    Case,
    OpProblem,
)
from benches.measure.devices import Cpu  # noqa: E402
from benches.measure.harness import TOLERANCE, Effort, measure, relative_error, spread  # noqa: E402
from benches.measure.record import ReplayTimer  # noqa: E402
from benches.registry import registry  # noqa: E402
from benches.report import __main__ as report  # noqa: E402
from benches.report import page, table  # noqa: E402
from benches.report.targets import TARGETS  # noqa: E402

TINY = list(registry("cpu", tiny=True))
FULL = list(registry("cpu"))
OPS = sorted(path.name for path in (ROOT / "mmkernels/ops").iterdir() if (path / "api.py").exists())


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_cases_and_a_headline(op: str) -> None:
    cases = [case for case in FULL if case.op == op]
    assert {"forward", "forward_backward"} <= {case.direction for case in cases}
    assert any(case.headline for case in cases)


def test_ids_are_unique_and_the_same_when_tiny() -> None:
    ids = [case.id for case in FULL]
    assert len(ids) == len(set(ids))
    assert ids == [case.id for case in TINY]


@pytest.mark.parametrize("case", FULL, ids=lambda case: case.id)
def test_costs_are_positive_and_baselines_are_there(case: Case) -> None:
    roles = [candidate.role for candidate in case.candidates]
    if case.direction == "import":
        return
    assert min(case.minimum_bytes, case.flops, case.output_bytes) > 0
    assert {"papers", "compile"} <= set(roles)
    assert roles[0] == "kernel", "without the compiled kernels there is nothing to measure"


def test_bytes_of_the_headline_are_those_of_the_definition() -> None:
    case = next(case for case in FULL if case.id == "layer_mix/hubert-base/forward/float32/system")
    assert case.minimum_bytes == 14 * 8 * 400 * 768 * 4
    assert case.flops == 2 * 13 * 8 * 400 * 768


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.id)
def test_candidates_agree_with_the_reference(case: Case) -> None:
    torch.manual_seed(0)
    problem = case.problem()
    expected = problem.expected()
    for candidate in case.candidates if expected else ():
        # What torch.compile would compile must be right; compiling it takes seconds and is for the benches.
        uncompiled = (
            dataclasses.replace(candidate, role="papers") if candidate.role == "compile" else candidate
        )
        runner = problem.runner(uncompiled)
        results = runner.collect(runner.run(runner.prepare()))
        assert relative_error(results, expected) <= (case.tolerance or TOLERANCE[case.dtype]), candidate.name


def _doubling(*candidates: Candidate) -> Case:
    def problem() -> OpProblem:
        return OpProblem({"x": torch.ones(3, 4)}, lambda x: 2 * x, "forward", torch.float32)

    template = next(case for case in TINY if case.direction == "call")
    return dataclasses.replace(template, candidates=candidates, problem=problem, bound="latency")


def test_a_wrong_or_raising_candidate_gets_no_time() -> None:
    def broken(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such kernel")

    case = _doubling(
        Candidate("right", "kernel", lambda x: x + x),
        Candidate("wrong", "papers", lambda x: 3 * x),
        Candidate("not a number", "papers", lambda x: x * float("nan")),
        Candidate("broken", "library", broken),
    )
    results = measure(case, Cpu(), Effort(seconds=0.0, min_rounds=3))
    assert len(results["right"].samples) == 3
    assert results["right"].facts["times_kernel"]["median"] == 1
    assert results["right"].facts["peak_memory"] == 3 * 4 * 4
    for name, reason in (("wrong", "wrong result"), ("not a number", "wrong result"), ("broken", "no such")):
        assert results[name].samples == []
        assert reason in (results[name].failure or "")


def test_spread_and_replay() -> None:
    assert spread([5.0, 1.0, 2.0, 4.0, 3.0]) == {
        "median": 3.0,
        "p20": pytest.approx(1.8),
        "p80": pytest.approx(4.2),
    }
    assert spread([2.0]) == {"median": 2.0, "p20": 2.0, "p80": 2.0}
    timer = ReplayTimer([0.5, 0.25])
    assert [-timer() + timer() for _ in range(2)] == [0.5, 0.25]


def _row(
    case: Case, candidate: Candidate, seconds: float, kernel_seconds: float, **more: Any
) -> dict[str, Any]:
    fields = {name: getattr(case, name) for name in ("op", "shape", "variant", "direction", "sizes", "bound")}
    fields |= {
        name: getattr(case, name) for name in ("minimum_bytes", "flops", "output_bytes", "memory", "id")
    }
    fields |= {"headline": case.headline, "device": "cpu", "dtype": "float32", "failure": None, "error": 1e-7}
    fields |= {"candidate": candidate.name, "role": candidate.role, "peak_memory": case.output_bytes}
    fields["seconds"] = spread([seconds, 1.1 * seconds])
    fields["times_kernel"] = spread([seconds / kernel_seconds])
    if case.bound != "latency" and candidate.role != "different":
        fields |= {"ceiling": 2e10, "share_of_ceiling": spread([0.01 / seconds])}
    return fields | more


@pytest.fixture
def results_file(tmp_path: pathlib.Path) -> pathlib.Path:
    """A record of the headline cases in which each candidate takes as long as its place in the list says."""
    rows = [
        _row(case, candidate, 0.0125 * place, 0.0125)
        for case in FULL
        if case.headline
        for place, candidate in enumerate(case.candidates, start=1)
    ]
    wrong = dict(rows[1], failure="wrong result: <relative> error 1", candidate="a <wrong> one")
    machine = {
        "device": "cpu",
        "name": "A CPU",
        "threads": 2,
        "timing": "in turns",
        "memory": "system",
        "busy": True,
    }
    content = {
        "machine_info": machine | {"torch": "2.13.0", "load_average": 3.0},
        "commit_info": {"id": "0123456789abcdef", "dirty": False},
        "datetime": "2026-01-02T03:04:05",
        "benchmarks": [{"extra_info": row} for row in rows],
        "failures": [
            {name: value for name, value in wrong.items() if name not in ("seconds", "times_kernel")}
        ],
    }
    path = tmp_path / "a-cpu.json"
    path.write_text(json.dumps(content))
    return path


def test_report_prints_draws_and_writes_a_page(
    results_file: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    html = report.write([results_file], tmp_path / "out").read_text()
    printed = capsys.readouterr().out
    assert (tmp_path / "out/a-cpu.png").read_bytes().startswith(b"\x89PNG")
    for text in (printed, html):
        assert "80%" in text
        assert "missed" in text
        assert "busy" in text
    assert "wrong result: <relative> error 1" in printed
    assert "a &lt;wrong&gt; one" in html
    assert "<wrong>" not in html
    assert html.count("data:image/png;base64,") == 1


def test_targets_find_their_rows(results_file: pathlib.Path) -> None:
    record = table.load(results_file)
    measured = {target.text: value for target, value in table.target_lines(record)}
    assert all(value is not None for value in measured.values()), measured
    assert measured["layer_mix forward, share of copy"] == pytest.approx(0.8)
    assert measured["layer_mix forward / s3prl"] == pytest.approx(2)
    assert measured["layer_mix norm forward / compile"] == pytest.approx(4)
    assert measured["layer_mix forward, extra memory / output"] == 1


def test_cuda_targets_name_existing_cases() -> None:
    cases = list(registry("cuda"))
    for target in TARGETS:
        if target.rows.get("device") == "cuda":
            wanted = {**target.rows, "dtype": getattr(torch, target.rows["dtype"])}
            assert any(all(getattr(c, n) == v for n, v in wanted.items()) for c in cases), target.text


def test_page_without_a_figure(results_file: pathlib.Path) -> None:
    assert "<img" not in page.render([(table.load(results_file), None)])


@pytest.mark.slow
def test_pytest_benchmark_records_what_was_measured(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "record.json"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "benches",
        "--tiny",
        "--device=cpu",
        "-q",
        "--ops=layer_project",
    ]
    command += ["-k", "whisper and not backward", "--benchmark-quiet", f"--benchmark-json={path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    record = table.load(path)
    assert [row["role"] for row in record.rows] == ["kernel", "papers", "hand_written", "compile"]
    content = json.loads(path.read_text())
    for benchmark in content["benchmarks"]:
        assert benchmark["stats"]["rounds"] == 3
        assert benchmark["stats"]["median"] == pytest.approx(
            benchmark["extra_info"]["seconds"]["median"], rel=1e-3
        )
        assert "data" not in benchmark["stats"]
