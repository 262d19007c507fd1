"""The method that another one starts from."""

from __future__ import annotations

from mmtransfer import registry
from mmtransfer.method import Method


def find_start(method: Method) -> Method:
    """The method that `starts_from` names; in a pair the readout, with the options that it has there.

    ValueError if that one has a start too.
    """
    for part in method.parts():
        if part.name == method.starts_from:
            return part
    assert method.starts_from is not None
    found = registry.find(method.starts_from)
    if found.starts_from is not None:
        raise ValueError(f"{method.name} starts from {found.name}, which starts from another method itself")
    return found
