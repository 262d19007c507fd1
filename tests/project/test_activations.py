"""The table of activations agrees with PyTorch's functions, the C++ header and transformers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import activations as theirs

from mmkernels import activations

ROOT = Path(__file__).resolve().parents[2]
X = torch.linspace(-6, 6, 1001)


def test_order_is_that_of_the_header() -> None:
    header = (ROOT / "csrc/include/mmkernels/activation.h").read_text()
    (names,) = re.findall(r"enum class Activation : int32_t \{ (.*) \}", header)
    spelled = [re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name.strip()[1:]).lower() for name in names.split(",")]
    assert spelled == list(activations.ACTIVATIONS)


@pytest.mark.parametrize("name", activations.TRANSFORMERS_NAMES)
def test_configuration_names_of_transformers(name: str) -> None:
    ours = activations.ACTIVATIONS[activations.TRANSFORMERS_NAMES[name]]
    torch.testing.assert_close(ours(X), theirs.ACT2FN[name](X))


@pytest.mark.parametrize("name", [name for name in activations.TRANSFORMERS_CLASSES if hasattr(theirs, name)])
def test_classes_of_transformers(name: str) -> None:
    ours = activations.ACTIVATIONS[activations.TRANSFORMERS_CLASSES[name]]
    torch.testing.assert_close(ours(X), getattr(theirs, name)()(X))
