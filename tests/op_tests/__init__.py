"""Tests that every op gets from one declaration of its cases.

The test file of an op describes how to build its inputs (:class:`OpSpec`) and calls :func:`op_tests`, which
returns a test class made of the kinds below, each a small class. :func:`assert_close_to_reference` is the one
tolerance rule of the project.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from .base import OpTests
from .derivatives import Derivatives
from .exactness import BatchInvariance, NonFinite, Repeatability
from .frozen import Frozen, OnlyRequestedGradients
from .inference import InferenceTensors
from .layouts import GradientLayouts, InputLayouts, ZeroSizes
from .running import backends, generator_for, poisoned_memory, value_and_gradients
from .spec import DTYPES, Call, OpSpec, Shape, away_from_zero
from .tolerance import assert_close_to_reference, check_against_reference
from .torch_features import Autocast, BackendNames, Checkpointing, Compile, MetaTensors, Opcheck, Overwriting
from .values import Fuzz, Gradcheck, NarrowParameters, ValuesAndGradients, WideParameters

__all__ = [
    "BackendNames",
    "BatchInvariance",
    "Call",
    "Compile",
    "Derivatives",
    "Fuzz",
    "Gradcheck",
    "InferenceTensors",
    "MetaTensors",
    "NarrowParameters",
    "OpSpec",
    "OpTests",
    "Opcheck",
    "Overwriting",
    "Shape",
    "assert_close_to_reference",
    "away_from_zero",
    "backends",
    "check_against_reference",
    "generator_for",
    "op_tests",
    "poisoned_memory",
    "value_and_gradients",
]

KINDS: tuple[type[OpTests], ...] = (
    ValuesAndGradients,
    Gradcheck,
    Derivatives,
    Opcheck,
    InputLayouts,
    GradientLayouts,
    ZeroSizes,
    Repeatability,
    BatchInvariance,
    OnlyRequestedGradients,
    Frozen,
    InferenceTensors,
    Compile,
    WideParameters,
    NarrowParameters,
    Autocast,
    MetaTensors,
    Checkpointing,
    Overwriting,
    NonFinite,
    Fuzz,
    BackendNames,
)


def op_tests(
    spec: OpSpec, dtypes: Sequence[torch.dtype] = DTYPES, without: Collection[type[OpTests]] = ()
) -> type:
    """A pytest class that tests the op in every way that does not depend on which op it is.

    Args:
        spec: the op.
        dtypes: dtypes to test.
        without: kinds to leave out.
    """
    kinds = tuple(kind for kind in KINDS if kind not in without)
    return type(f"Test_{spec.name}", kinds, {"spec": spec, "dtypes": dtypes})
