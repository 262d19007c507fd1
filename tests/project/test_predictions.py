"""Predicted times of the CUDA kernels: every case has one, each resource can limit it, none is shown as
measured.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
import torch
from tree import ROOT

from benches.measure.record import Record, load
from benches.predict import model
from benches.predict.launches import Launch, launches
from benches.predict.model import KernelFacts, predict, times
from benches.registry import registry
from benches.report import predicted

CASES = [case for case in registry("cuda") if launches(case) is not None]
H100 = ROOT / "benches/results/nvidia-h100-80gb-hbm3.json"
FACTS = KernelFacts("kernel", 100, 400, 512, 4096, 2, 16)


def test_every_op_has_predictions() -> None:
    from mmkernels._info import op_names

    assert {case.op for case in CASES} == set(op_names())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_a_case(case) -> None:
    found, prediction = launches(case), predict(case)
    assert found
    assert prediction is not None
    assert prediction.seconds > len(found) * model.LAUNCH
    assert prediction.seconds >= sum(launch.moved for launch in found) / model.COPY
    # What a definition needs is moved by some kernel; gradients of short parameters are not counted.
    assert sum(launch.moved for launch in found) >= 0.9 * case.minimum_bytes
    assert prediction.share_of_copy <= 1.1


def test_cases_without_a_prediction() -> None:
    without = {case.direction for case in registry("cuda") if predict(case) is None}
    assert without == {"training step", "call", "import"}


@pytest.mark.parametrize(
    ("limit", "launch", "facts"),
    [
        ("bytes", Launch("kernel", moved=1e9, loaded=1e8), FACTS),
        ("issue", Launch("kernel", loaded=1e9), dataclasses.replace(FACTS, instructions=1e4)),
        ("shared memory", Launch("kernel", loaded=1e9), dataclasses.replace(FACTS, wavefronts=1e4)),
        ("latency", Launch("kernel", loaded=1e9), dataclasses.replace(FACTS, critical_path=1e5)),
        ("latency", Launch("kernel", steps=1e6), FACTS),
        ("tensor cores", Launch("kernel", flops=1e12), dataclasses.replace(FACTS, tensor_flops=1e6)),
    ],
)
def test_each_resource_can_limit_a_kernel(limit: str, launch: Launch, facts: KernelFacts) -> None:
    found = times(launch, {"kernel": facts})
    assert max(found, key=lambda name: found[name]) == limit


def test_times_of_a_launch() -> None:
    """1e9 bytes by iterations of 512: 1,953,125 of them."""
    found = times(Launch("kernel", moved=3e9, loaded=1e9), {"kernel": FACTS})
    clocks = model.MULTIPROCESSORS * model.CLOCK
    assert found["bytes"] == pytest.approx(1e-3)
    assert found["issue"] == pytest.approx(1_953_125 * 100 / 4 / clocks)
    assert found["shared memory"] == pytest.approx(1_953_125 * 2 / clocks)
    assert found["latency"] == pytest.approx(1_953_125 * 400 / 16 / clocks)


def test_products_of_the_library_need_no_facts() -> None:
    assert times(Launch("", flops=6.5e11), {})["tensor cores"] == pytest.approx(1e-3)
    assert times(Launch("", flops=5e10), {}, half=False)["products"] == pytest.approx(1e-3)


def test_a_prediction_is_named_as_one() -> None:
    text = [*predicted.lines(ops=["layer_mix"])]
    assert text[1].startswith("Predicted, H100: ")
    assert "not measured" in text[1]
    assert "predicted, H100" in text[2]
    assert "measured" not in text[2].replace("predicted", "")


def test_measured_times_stand_next_to_predictions() -> None:
    record = load(H100)
    text = [*predicted.lines(record, ["layer_mix"])]
    assert "measured: NVIDIA H100" in text[2]
    assert "measured / predicted" in text[3]
    row = next(line for line in text if "wav2vec2-large, forward, bfloat16" in line)
    measured = next(
        row["seconds"]["median"]
        for row in record.rows
        if row["id"] == "layer_mix/wav2vec2-large/forward/bfloat16/system" and row["role"] == "kernel"
    )
    assert f"{measured * 1e6:.3g} us" in row


def test_no_case_no_table() -> None:
    assert [*predicted.lines(ops=["hff"])] == []


def test_times_of_another_gpu_are_not_compared() -> None:
    record = load(H100)
    other = Record({**record.machine, "name": "NVIDIA A100"}, record.commit, record.date, record.rows)
    assert not predicted._measured(other)
    assert predicted._measured(record)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a short form of what runs there")
def test_the_command() -> None:
    command = [sys.executable, "-m", "benches", "--predict", "--ops", "merge", "--match", "hubert"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[1] == predicted.TITLE
    assert len(lines) == 4 + 3
