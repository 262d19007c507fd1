"""The facts that predicted times come from are those of the machine code of the build."""

from __future__ import annotations

import json

import kernel_facts
import pytest
from machine_code import missing_tools

from benches.predict.model import FACTS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(missing_tools() is not None, reason=str(missing_tools())),
]


def test_the_facts_are_those_of_the_build() -> None:
    """After a change: python tests/csrc/kernel_facts.py --write. Another nvcc may differ a little."""
    found = kernel_facts.facts()["kernels"]
    written = json.loads(FACTS.read_text())["kernels"]
    assert list(found) == list(written)
    for name, facts in found.items():
        numbers = {key: value for key, value in facts.items() if key != "instance"}
        assert facts["instance"] == written[name]["instance"]
        assert numbers == pytest.approx({key: written[name][key] for key in numbers}, rel=0.05), name
