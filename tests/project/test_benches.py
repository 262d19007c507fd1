"""The benches: every case builds, every candidate is correct, reports can be drawn. Nothing is timed here."""

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

from benches.case import Candidate, Case, OpProblem  # noqa: E402
from benches.measure.devices import Cpu  # noqa: E402
from benches.measure.harness import (  # noqa: E402
    TOLERANCE,
    Effort,
    Measurement,
    judge,
    measure,
    relative_error,
    spread,
)
from benches.measure.record import load  # noqa: E402
from benches.registry import registry  # noqa: E402
from benches.report import figure, page, table  # noqa: E402

TINY = list(registry("cpu", tiny=True))
FULL = list(registry("cpu"))
HEADLINE = "layer_mix/hubert-base/forward/float32/system"
#: Ops whose results are integers.
WITHOUT_GRADIENTS = {"monotonic_align"}
#: Ops whose definition is a loop over hundreds of frames, which torch.compile would unroll.
LOOPS = {"monotonic_align"}
OPS = sorted(path.name for path in (ROOT / "mmkernels/ops").iterdir() if (path / "api.py").exists())


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_cases_and_a_headline(op: str) -> None:
    cases = [case for case in FULL if case.op == op]
    directions = {"forward"} if op in WITHOUT_GRADIENTS else {"forward", "forward_backward"}
    assert directions <= {case.direction for case in cases}
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
    assert "papers" in roles
    assert ("compile" in roles) != (case.op in LOOPS)
    assert roles[0] == "kernel", "without the compiled kernels there is nothing to measure"


def test_bytes_of_the_headline_are_those_of_the_definition() -> None:
    case = next(case for case in FULL if case.id == HEADLINE)
    assert case.minimum_bytes == 14 * 8 * 400 * 768 * 4
    assert case.flops == 2 * 13 * 8 * 400 * 768


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.id)
def test_candidates_agree_with_the_reference(case: Case) -> None:
    torch.manual_seed(0)
    problem = case.problem()
    expected = problem.expected()
    for candidate in case.candidates if expected else ():
        # The function must be correct before it is compiled; compiling takes seconds and is for the benches.
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
    results = {
        result.candidate.name: result for result in measure(case, Cpu(), Effort(seconds=0.0, min_rounds=3))
    }
    assert len(results["right"].samples) == 3
    assert results["right"].facts["times_kernel"]["median"] == 1
    assert results["right"].facts["peak_memory"] == 3 * 4 * 4
    for name, reason in (("wrong", "wrong result"), ("not a number", "wrong result"), ("broken", "no such")):
        assert results[name].samples == []
        assert reason in (results[name].failure or "")


def test_inputs_that_cannot_be_made_cost_their_case_only() -> None:
    def problem() -> OpProblem:
        raise MemoryError

    case = dataclasses.replace(_doubling(Candidate("a", "kernel", abs)), problem=problem)
    (result,) = measure(case, Cpu(), Effort(seconds=0.0, min_rounds=3))
    assert result.failure == "MemoryError: no message"


def test_spread() -> None:
    assert spread([5.0, 1.0, 2.0, 4.0, 3.0]) == {
        "median": 3.0,
        "p20": pytest.approx(1.8),
        "p80": pytest.approx(4.2),
    }
    assert spread([2.0]) == {"median": 2.0, "p20": 2.0, "p80": 2.0}


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
    pytest.importorskip("rich")
    record = load(results_file)
    table.show(record)
    printed = capsys.readouterr().out
    html = page.write({results_file: record}, tmp_path / "out").read_text()
    assert (tmp_path / "out/a-cpu.png").read_bytes().startswith(b"\x89PNG")
    for text in (printed, html):
        assert "80%" in text
        assert "busy" in text
    assert "wrong result: <relative> error 1" in printed
    assert "a &lt;wrong&gt; one" in html
    assert "<wrong>" not in html
    assert html.count("data:image/png;base64,") == 1


def test_tables_need_no_rich(
    results_file: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    record = load(results_file)
    table.show(record)
    in_colour = capsys.readouterr().out
    monkeypatch.setattr(table.importlib.util, "find_spec", lambda name: None)
    table.show(record)
    assert capsys.readouterr().out == in_colour


def test_summary_has_ratios_memory_and_losing_rows(results_file: pathlib.Path) -> None:
    """The file's candidates take 1, 2, 3 and 4 times as long as the kernel."""
    record = load(results_file)
    (row,) = (row for row in record.rows if row["id"] == HEADLINE and row["role"] == "compile")
    row["times_kernel"]["median"] = 0.5
    lines = [dict(zip(table.SUMMARY, texts, strict=True)) for _, texts in table.summary(record)]
    line = next(line for line in lines if (line["op"], line["case"]) == ("layer_mix", "hubert-base, forward"))
    assert line["replaces"] == "eager (s3prl)"
    assert (line["x eager"], line["x best eager"], line["x compile"]) == ("2.00x", "3.00x", "0.50x slower")
    assert (line["of ceiling"], line["peak memory"], line["of eager"]) == ("80%", "9.8 MB", "9.8 MB")
    assert len(lines) == len({row["id"] for row in record.rows}) - 1  # the import has no published baseline


def test_a_kernel_is_judged_by_the_error_of_the_published_form() -> None:
    """In bfloat16 the tolerance of baselines is wide: a kernel ten times less exact than eager is wrong."""

    def found(published: float, kernel: float) -> list[bool]:
        candidates = [Candidate("eager", "papers", print), Candidate("kernel", "kernel", print)]
        results = [Measurement(c, error=e) for c, e in zip(candidates, (published, kernel), strict=True)]
        judge(results, tolerance=3e-2, eps=2**-7)
        return [result.failure is None for result in results]

    assert found(2.6e-3, 2.6e-3) == [True, True]
    assert found(2.6e-3, 2.6e-2) == [True, False]
    results = [Measurement(Candidate("eager", "papers", print), error=7e-7)]
    results.append(Measurement(Candidate("kernel", "kernel", print), error=5e-4))
    judge(results, tolerance=3e-3, eps=None)  # a training step
    assert [result.failure for result in results] == [None, None]
    # A wrong published form excuses nothing.
    assert found(1.0, 0.5) == [False, False]
    assert found(1.0, 2.6e-3) == [False, True]


def test_a_wrong_kernel_has_no_ratio(results_file: pathlib.Path) -> None:
    record = load(results_file)
    (kernel,) = (row for row in record.rows if row["id"] == HEADLINE and row["role"] == "kernel")
    kernel["failure"] = "wrong result"
    style, texts = next(line for line in table.summary(record) if line[1][1] == "hubert-base, forward")
    assert style == "red"
    assert texts[3:7] == ("failed", "", "", "")


def test_markdown_is_a_table_of_the_summary(results_file: pathlib.Path) -> None:
    record = load(results_file)
    machine, _, *lines = table.markdown(record).splitlines()
    assert machine.startswith("A CPU, 2 threads")
    assert len(lines) == 2 + len(table.summary(record))
    assert {line.count("|") for line in lines} == {len(table.SUMMARY) + 1}


def test_page_without_a_figure(results_file: pathlib.Path, tmp_path: pathlib.Path) -> None:
    pytest.importorskip("rich")
    record = load(results_file)
    rows = [row for row in record.rows if row["op"] == "overhead"]
    written = page.write({results_file: dataclasses.replace(record, rows=rows)}, tmp_path)
    assert "<img" not in written.read_text()


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_picture_is_small_and_repeatable(
    results_file: pathlib.Path, tmp_path: pathlib.Path, suffix: str
) -> None:
    pytest.importorskip("matplotlib")
    first, second = (tmp_path / f"{name}.{suffix}" for name in "ab")
    for path in (first, second):
        figure.picture(load(results_file), path)
    assert first.read_bytes() == second.read_bytes()
    if suffix == "png":
        assert int.from_bytes(first.read_bytes()[16:20], "big") <= 1000


@pytest.mark.parametrize(
    "path", sorted((ROOT / "benches/results").glob("*.json")), ids=lambda path: path.stem
)
def test_committed_results_can_be_reported(path: pathlib.Path) -> None:
    record = load(path)
    ops = {row["op"] for row in record.rows}
    assert ops
    assert {cells[0] for _, cells in table.summary(record)} == ops
    assert {cells[0] for _, cells in table.summary(record, headline=True)} <= ops
    assert all(f"| {op} |" in table.markdown(record) for op in ops)


@pytest.mark.slow
def test_a_run_records_its_measurements(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "record.json"
    command = [sys.executable, "-m", "benches", "--tiny", "--device=cpu", "--ops=layer_project"]
    command += ["--match=4 taps/norm+relu/forward/", f"--output={path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [row["role"] for row in load(path).rows] == ["kernel", "papers", "hand_written", "compile"]
    for benchmark in json.loads(path.read_text())["benchmarks"]:
        assert benchmark["stats"]["rounds"] == 3
        assert benchmark["stats"]["median"] == benchmark["extra_info"]["seconds"]["median"]
    compared = subprocess.run(
        [sys.executable, "-m", "pytest_benchmark", "compare", str(path)], capture_output=True, text=True
    )
    assert "eager baddbmm" in compared.stdout, compared.stdout + compared.stderr
