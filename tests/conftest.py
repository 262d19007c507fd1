from __future__ import annotations

import os

import pytest
import torch

pytest.register_assert_rewrite("op_tests")

# Tests are about values; hub look-ups would make them depend on a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
