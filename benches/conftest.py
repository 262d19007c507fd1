"""Options, and one test per candidate of each case; the candidates of a case are measured together."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benches.case import Candidate, Case
from benches.measure import machine
from benches.measure.devices import Device, open_device
from benches.measure.harness import Effort, Measurement, measure
from benches.measure.record import Row, compact

FAILURES = pytest.StashKey[list[dict[str, Any]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("mmkernels benches")
    group.addoption(
        "--device", choices=("cpu", "cuda"), default=None, help="default: cuda where there is one"
    )
    group.addoption("--ops", default="", help="comma-separated names of ops or methods; default: all")
    group.addoption("--headline", action="store_true", help="only the headline cases")
    group.addoption(
        "--tiny", action="store_true", help="shrunken sizes and three rounds: does it run at all?"
    )
    group.addoption("--seconds", type=float, default=4.0, help="measuring time per case")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[FAILURES] = []


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    config = metafunc.config
    ops = [name for name in config.getoption("ops").split(",") if name]
    cases = [
        case
        for case in metafunc.module.cases(_device_name(config), config.getoption("tiny"))
        if (not ops or case.op in ops) and (case.headline or not config.getoption("headline"))
    ]
    pairs = [
        pytest.param((case, candidate), id=f"{case.id}: {candidate.name}")
        for case in cases
        for candidate in case.candidates
    ]
    metafunc.parametrize("case_and_candidate", pairs)


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> Device:
    return open_device(_device_name(pytestconfig))


@pytest.fixture(scope="session")
def measured() -> dict[str, dict[str, Measurement]]:
    """Measurements by id of the case."""
    return {}


@pytest.fixture
def row(
    case_and_candidate: tuple[Case, Candidate],
    device: Device,
    measured: dict[str, dict[str, Measurement]],
    request: pytest.FixtureRequest,
) -> Row:
    case, candidate = case_and_candidate
    config = request.config

    def measurement() -> Measurement:
        if case.id not in measured:
            tiny = Effort(seconds=0.0, min_rounds=3)
            effort = tiny if config.getoption("tiny") else Effort(seconds=config.getoption("seconds"))
            measured[case.id] = measure(case, device, effort)
        return measured[case.id][candidate.name]

    return Row(case, candidate, measurement, request, config.stash[FAILURES])


def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, Any]:
    return machine.facts(_device_name(config))


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    compact(output_json, config.stash[FAILURES])


def _device_name(config: pytest.Config) -> str:
    return config.getoption("device") or ("cuda" if torch.cuda.is_available() else "cpu")
