"""`--set field=value`: options of methods."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

import tyro

from . import values
from .messages import fail

SetOptions = Annotated[
    tuple[tuple[str, ...], ...],
    tyro.conf.UseAppendAction,
    tyro.conf.arg(name="set", metavar="[METHOD.]FIELD=VALUE ..."),
]


def parse_options(given: Iterable[str]) -> dict[str, Any]:
    """`field=value` and `method.field=value`; of several values of one field the last counts."""
    options: dict[str, Any] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not (key and equals):
            fail(f"--set takes field=value, got {text!r}", 2)
        if not value.strip():
            fail(f"--set {text!r} has no value; {key}=null leaves the choice to the method", 2)
        try:
            parsed = values.parse(value)
        except ValueError as error:
            fail(f"--set {text!r} has no value that YAML can read ({error})", 2)
        method, dot, field = key.rpartition(".")
        if not dot:
            # All that a recipe sets for one method, which is added to.
            earlier = options.get(key)
            if isinstance(parsed, dict) and isinstance(earlier, dict):
                parsed = {**earlier, **parsed}
            options[key] = parsed
            continue
        if not isinstance(options.setdefault(method, {}), dict):
            fail(f"--set takes {method!r} for a method in {text!r} and for a field elsewhere", 2)
        options[method][field] = parsed
    return options
