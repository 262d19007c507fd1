"""Fused kernels for adapting speech and audio transformers, as torch ops.

Ops: :func:`adapter`, :func:`cif`, :func:`ctc_align`, :func:`distill_loss`, :func:`layer_mix`,
:func:`layer_project`, :func:`merge`, :func:`monotonic_align`, :func:`segment_attention`,
:func:`segment_pool`. Modules: :mod:`mmkernels.nn`. Existing models: :func:`accelerate`. Which backend runs
each op on this machine: :func:`info`, or ``python -m mmkernels``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mmkernels import _library
from mmkernels.ops.adapter import adapter
from mmkernels.ops.cif import cif
from mmkernels.ops.ctc_align import ctc_align
from mmkernels.ops.distill_loss import distill_loss
from mmkernels.ops.layer_mix import layer_mix
from mmkernels.ops.layer_project import layer_project
from mmkernels.ops.merge import merge
from mmkernels.ops.monotonic_align import monotonic_align
from mmkernels.ops.segment_attention import segment_attention
from mmkernels.ops.segment_pool import segment_pool

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mmkernels.patch import Report

__version__ = "0.1.0"
__all__ = [
    "__version__",
    "accelerate",
    "adapter",
    "cif",
    "ctc_align",
    "distill_loss",
    "info",
    "layer_mix",
    "layer_project",
    "merge",
    "monotonic_align",
    "segment_attention",
    "segment_pool",
]

_library.load()


def accelerate(model: Any, *, adapters: Sequence[str] = ()) -> Report:
    """Replace slow fragments of ``model`` by ops of mmkernels, in place; ``adapters`` names the
    ``nn.Sequential`` modules in it that are bottleneck adapters. See :func:`mmkernels.patch.accelerate`."""
    from mmkernels.patch import accelerate as patch_accelerate

    return patch_accelerate(model, adapters=adapters)


def info() -> dict[str, Any]:
    """Versions, devices, which backend runs each op, and the reasons against the other backends.

    ``python -m mmkernels`` prints the same.
    """
    from mmkernels._info import collect

    return collect()
