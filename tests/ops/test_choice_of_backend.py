"""`"auto"` takes the compiled CUDA kernels only where they run. The answer of CUDA is a stub here, and the
tensors are fake."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo
from torch import Tensor
from torch._subclasses import FakeTensorMode

import mmkernels
from mmkernels import _cuda, _library, backends
from mmkernels.ops._common import choose_backend

OLD_DRIVER = ("CUDA driver version is insufficient for CUDA runtime version", 12080, 13000)
NO_IMAGE = ("no kernel image is available for execution on the device", 13000, 13000)
FINE = (None, 13000, 13000)


class Devices:
    """GPUs that torch sees, and what CUDA answers on each."""

    def __init__(self, *answers: tuple[str | None, int, int]) -> None:
        self.answers = answers
        self.capabilities = [(9, 0)] * len(answers)
        self.asked: list[int] = []
        self.capturing = False

    def probe(self, index: int) -> tuple[str | None, int, int]:
        torch._dynamo.graph_break()  # a trace that enters this function fails, as at the real one's ctypes
        self.asked.append(index)
        return self.answers[index]


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Devices:
    devices = Devices(FINE, OLD_DRIVER, NO_IMAGE)
    monkeypatch.setattr(_cuda, "_reasons", {})
    monkeypatch.setattr(_cuda, "_capabilities", {})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: devices.capabilities[index])
    monkeypatch.setattr(_cuda, "_probe", devices.probe)
    monkeypatch.setattr(_library, "load_errors", {})
    monkeypatch.setattr(backends, "TRITON_INSTALLED", True)
    monkeypatch.setattr(_cuda, "_device_count", lambda: len(devices.answers))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: devices.capturing)
    return devices


@pytest.fixture
def fake() -> Iterator[None]:
    with FakeTensorMode():
        yield


def on(index: int) -> Tensor:
    return torch.empty(3, device=f"cuda:{index}")


@pytest.mark.usefixtures("fake")
def test_each_device_is_asked_once(gpus: Devices) -> None:
    for _ in range(3):
        chosen = [choose_backend("op", "auto", on(index)) for index in range(3)]
        assert chosen == ["native", "triton", "triton"]
    assert gpus.asked == [0, 1, 2]


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(
    ("index", "reason"), [(1, "driver for CUDA 12.8.*insufficient"), (2, "no kernel image")]
)
def test_native_by_name_says_why_it_cannot(gpus: Devices, index: int, reason: str) -> None:
    assert choose_backend("op", "native", on(0)) == "native"
    with pytest.raises(ValueError, match=rf"'native' cannot be used: .*CUDA 13\.0.*cuda:{index}.*{reason}"):
        choose_backend("op", "native", on(index))


@pytest.mark.usefixtures("fake")
def test_without_triton_the_reference_serves(gpus: Devices, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "TRITON_INSTALLED", False)
    assert [choose_backend("op", "auto", on(index)) for index in range(3)] == ["native", *["reference"] * 2]


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize("preference", backends.PREFERENCES, ids=lambda each: each.op)
def test_the_table_of_preferences(gpus: Devices, preference: backends.Preference) -> None:
    """One op, its dtypes and one architecture; not where that backend cannot serve, and not by name."""

    def chosen(op: str, dtype: torch.dtype, backend: str = "auto", index: int = 0) -> str:
        return choose_backend(op, backend, torch.empty(3, device=f"cuda:{index}", dtype=dtype))

    other = next(op for op in mmkernels._info.op_names() if op not in {e.op for e in backends.PREFERENCES})
    gpus.capabilities = [divmod(preference.capability, 10), (8, 0), (8, 0)]
    gpus.answers = (FINE, FINE, FINE)
    for dtype in preference.dtypes:
        assert chosen(preference.op, dtype) == preference.backend
        assert chosen(preference.op, dtype, "native") == "native"
        assert chosen(preference.op, dtype, index=1) == "native"
        assert chosen(other, dtype) == "native"
    assert chosen(preference.op, torch.float32) == "native"


@pytest.mark.usefixtures("fake")
def test_a_preferred_backend_that_is_missing(gpus: Devices, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "TRITON_INSTALLED", False)
    for each in backends.PREFERENCES:
        assert choose_backend(each.op, "auto", on(0).to(each.dtypes[0])) == "native"


@pytest.mark.usefixtures("fake")
def test_devices_out_of_sight_are_not_asked(gpus: Devices, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model may be traced with fake tensors of another machine."""
    assert choose_backend("op", "auto", on(5)) == "native"
    monkeypatch.setattr(_cuda, "_device_count", lambda: 0)
    assert choose_backend("op", "auto", on(1)) == "native"
    assert gpus.asked == []


def test_a_missing_library_asks_nothing(gpus: Devices, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_library.load_errors, "cuda", "not built")
    assert backends.why_not("native", "cuda:0", torch.float32) == "not built"
    assert gpus.asked == []


def test_tracing_keeps_the_answer_and_does_not_enter_the_probe(gpus: Devices) -> None:
    def serves(x: Tensor) -> Tensor:
        reasons = [backends.why_not("native", torch.device("cuda", i), x.dtype) for i in range(3)]
        return x + sum(2**i for i, reason in enumerate(reasons) if reason is None)

    torch._dynamo.reset()
    compiled = torch.compile(serves, backend="eager", fullgraph=True)
    for _ in range(2):
        assert compiled(torch.zeros(1)).item() == 1
    assert gpus.asked == [0, 1, 2]


def test_a_failure_inside_a_capture_is_no_answer(gpus: Devices) -> None:
    gpus.capturing = True
    with pytest.raises(
        RuntimeError, match=r"inside a CUDA graph capture.*run the step once before.*\(CUDA driver"
    ):
        backends.why_not("native", "cuda:1", torch.float32)
    assert backends.why_not("native", "cuda:0", torch.float32) is None
    gpus.capturing = False
    assert "insufficient" in str(backends.why_not("native", "cuda:1", torch.float32))


def test_triton_kernels_loaded_inside_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the remedy; another error stays as it is."""
    message = "Triton Error [CUDA]: operation not permitted when stream is capturing"

    def refused(*args: object) -> None:
        raise RuntimeError(message)

    monkeypatch.setattr(importlib, "import_module", lambda name: SimpleNamespace(layer_mix_fwd=refused))
    arguments = ([torch.ones(1, 2, 3)], torch.ones(1), None, None, None, False, 0.0, False)
    with pytest.raises(RuntimeError, match=r"layer_mix_fwd: .*first time inside a CUDA graph capture"):
        torch.ops.mmkernels.layer_mix_fwd_triton(*arguments)
    message = "another"
    with pytest.raises(RuntimeError, match="another"):
        torch.ops.mmkernels.layer_mix_fwd_triton(*arguments)


def test_info_says_why(gpus: Devices, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the current device, which has no image."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    for state in (by_device["cuda"] for by_device in mmkernels.info()["ops"].values()):
        assert state["serves"] == "triton"
        assert "do not run on cuda:2" in state["cannot"]["native"]
    assert gpus.asked == [2]


def test_info_names_preferences(gpus: Devices, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H100")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    facts = mmkernels.info()
    found = {op: by_device["cuda"].get("half_precision") for op, by_device in facts["ops"].items()}
    assert {op for op, half in found.items() if half} == {each.op for each in backends.PREFERENCES}
    assert facts["ops"]["layer_project"]["cuda"]["serves"] == "native"
    assert "triton in half precision: " in mmkernels._info.render(facts)


@pytest.mark.skipif("cuda" in _library.load_errors, reason="no compiled CUDA kernels")
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_library_answers_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    error, _, built_with = _cuda._probe(0)
    assert error is not None
    assert "CUDA" in error
    assert built_with >= 12000
