"""Which tensors have kernels, as far as their dtype decides."""

from __future__ import annotations

import torch
from torch import Tensor

from mmkernels.ops._common import FLOATING


def dtype_served(tensor: Tensor) -> bool:
    return tensor.dtype in FLOATING and (tensor.dtype != torch.float64 or tensor.device.type == "cpu")
