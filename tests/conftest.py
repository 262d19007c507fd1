from __future__ import annotations

import gc
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.register_assert_rewrite("op_tests")

# Tests are about values; hub look-ups would make them depend on a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

STATUS = Path("/proc/self/status")
LARGEST_PROCESS = 3 * 2**30


def peak_memory() -> int:
    """The most memory that this process has had, in bytes. Not ru_maxrss: that begins with the parent's."""
    return 1024 * int(re.findall(r"VmHWM:\s*(\d+) kB", STATUS.read_text())[0])


def pytest_collection_finish() -> None:
    """What the imports made stays to the end; a collection of garbage that walks over it takes 0.3 s."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _little_memory() -> Iterator[None]:
    """The tests fit a small machine; an error here means that something keeps what it should give back."""
    yield
    # The libraries of a GPU take memory of the host that is not of these tests.
    if STATUS.exists() and not torch.cuda.is_available():
        assert peak_memory() < LARGEST_PROCESS


@pytest.fixture(scope="session")
def all_threads() -> int:
    return torch.get_num_threads()


@pytest.fixture(scope="module", autouse=True)
def _threads(request: pytest.FixtureRequest, all_threads: int) -> None:
    """Models this small only lose time to a second thread, and much of it beside other processes."""
    of_ops = request.path.parent.name == "ops"  # threads are among the things that these test
    torch.set_num_threads(all_threads if of_ops else 1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
