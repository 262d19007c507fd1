"""The CTC model that an aligner takes from a checkpoint."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mmtransfer.encoders.encoder import Encoder

from .aligners import CTCAligner

if TYPE_CHECKING:
    from mmtransfer.method import Method

#: Of a checkpoint's `base_model`: the encoder must be the same in these.
_SAME = ("model_type", "hidden_size", "num_layers")


@dataclass(frozen=True)
class CTCDescription:
    """What is needed to build a CTC model on an encoder again: its method and the options of its task.

    Attributes:
        name: of its method.
        options: of that, by part.
        task: the fields of the task ctc.
        base: type and size of the encoder.
    """

    name: str
    options: Mapping[str, Any]
    task: Mapping[str, Any]
    base: Mapping[str, Any]

    @classmethod
    def from_json(cls, text: str) -> CTCDescription:
        """ValueError for what `to_json` has not written."""
        try:
            return cls(**json.loads(text))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"ssr: aligner_description is what a checkpoint says of its aligner, got {text[:40]!r}; the "
                "option that is given is aligner_model"
            ) from error

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    def method(self) -> Method:
        from mmtransfer import registry

        return registry.find(self.name, **self.options)

    def build(self, encoder: Encoder, source: Path | None) -> CTCAligner:
        """The aligner, with its weights from the folder `source`; None: without, a checkpoint has them.

        ValueError for another encoder than that of the checkpoint, or weights that do not fit.
        """
        from mmtransfer.encoders.edit import restored
        from mmtransfer.method import Compressor
        from mmtransfer.tasks.ctc import CTC

        own = {
            "model_type": encoder.description.model_type,
            "hidden_size": encoder.hidden_size,
            "num_layers": encoder.num_layers,
        }
        if wrong := [name for name in _SAME if own[name] != self.base[name]]:
            raise ValueError(
                f"ssr: aligner_model was trained on an encoder of {wrong[0]} {self.base[wrong[0]]!r}, got "
                f"{own[wrong[0]]!r}"
            )
        task = CTC(**self.task)
        # Its weights are loaded: the random state is as without it.
        readout: Any = restored(self.method().readout, encoder)
        if isinstance(readout, Compressor):
            raise ValueError(
                f"ssr: aligner_model was trained by {self.name}, which has no logits of frames; take a "
                "model of a method that has, such as hff-b or head"
            )
        head = restored(task.head, readout.out_dim)
        if source is not None:
            _load({"readout": readout, "head": head}, source)
        return CTCAligner(readout, head, task)


def describe_ctc(folder: Path) -> CTCDescription:
    """Of a checkpoint. ValueError for one that is no CTC model on a frozen encoder."""
    from mmtransfer import checkpoint

    config = checkpoint.read_config(folder)
    if (config.get("task") or {}).get("name") != "ctc":
        raise ValueError(f"ssr: aligner_model {folder} is no model of the task ctc")
    base = {name: config["base_model"][name] for name in _SAME}
    found = CTCDescription(config["method"], config["options"], config["task"]["options"], base)
    if found.method().has_edit:
        raise ValueError(
            f"ssr: aligner_model {folder} was trained by {config['method']}, which changes its encoder; take "
            "a model of a method that leaves it frozen, such as hff-b or head"
        )
    return found


def _load(parts: Mapping[str, nn.Module], folder: Path) -> None:
    from mmtransfer import checkpoint

    own: dict[str, torch.Tensor] = {
        f"{part}.{name}": tensor
        for part, module in parts.items()
        for name, tensor in module.state_dict(keep_vars=True).items()
    }
    checkpoint.copy_weights(own, folder)
