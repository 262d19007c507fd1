"""The activations of the ops: their names, their plain PyTorch functions, and their names in transformers."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional

#: Name -> function. The position of a name is the number that stands for it in the torch ops: the value of
#: ``mmk::Activation`` in csrc/include/mmkernels/activation.h.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda z: z,
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda z: functional.gelu(z, approximate="tanh"),
    "silu": functional.silu,
}
#: Name in a configuration of transformers (``config.hidden_act`` and the like) -> name here. An activation
#: that is missing has no equal here.
TRANSFORMERS_NAMES = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_python": "gelu",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "linear": "none",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
#: Name of a class of ``transformers.activations`` -> name here.
TRANSFORMERS_CLASSES = {
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "LinearActivation": "none",
    "NewGELUActivation": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "SiLUActivation": "silu",
}
