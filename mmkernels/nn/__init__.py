"""Modules that own the parameters of the ops."""

from __future__ import annotations

from mmkernels.nn.adapter import Adapter
from mmkernels.nn.cif import CIF
from mmkernels.nn.ctc_align import CTCAligner
from mmkernels.nn.distill_loss import DistillLoss
from mmkernels.nn.featurizer import Featurizer
from mmkernels.nn.layer_mix import LayerMix
from mmkernels.nn.layer_project import LayerProject
from mmkernels.nn.merge import Merge
from mmkernels.nn.monotonic_align import MonotonicAlign
from mmkernels.nn.segment_attention import SegmentAttention
from mmkernels.nn.segment_pool import SegmentPool

__all__ = [
    "CIF",
    "Adapter",
    "CTCAligner",
    "DistillLoss",
    "Featurizer",
    "LayerMix",
    "LayerProject",
    "Merge",
    "MonotonicAlign",
    "SegmentAttention",
    "SegmentPool",
]
