"""The baselines: edits that published methods are compared with."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from mmtransfer.encoders.autocast import autocast_takes
from mmtransfer.encoders.edit import Edit, check_layers
from mmtransfer.encoders.encoder import Encoder, default_taps
from mmtransfer.method import AdapterMethod, EditMethod, Foreign, LayerEditMethod, Method, option
from mmtransfer.training.settings import Training

from . import peft_format


@dataclass(frozen=True, kw_only=True)
class Head(Method):
    """The head alone, on the last layer of the frozen encoder (linear probing)."""

    name: ClassVar[str] = "head"
    title: ClassVar[str] = "Head"
    paper: ClassVar[str] = "arXiv 1610.01644"
    training: ClassVar[Training] = Training(learning_rate=1e-2)


@dataclass(frozen=True, kw_only=True)
class MLP(Method):
    """A hidden layer on the last layer of the frozen encoder: the control of fusions, with as many parameters
    and no other layer.

    Attributes:
        hidden: its width; None for as many parameters as the tree of HFF-b has on all layers.
        out_dim: width of the result; None for 5/8 of the encoder's.
    """

    name: ClassVar[str] = "mlp"
    title: ClassVar[str] = "MLP"
    paper: ClassVar[str] = "the control of arXiv 2211.02712 here"
    training: ClassVar[Training] = Training(learning_rate=3e-3)

    hidden: int | None = option(None, least=1)
    out_dim: int | None = option(None, least=1)

    def readout(self, encoder: Encoder) -> nn.Module:
        width = encoder.hidden_size
        out = max(width * 5 // 8, 1) if self.out_dim is None else self.out_dim
        hidden = self.hidden
        if hidden is None:
            hidden = max(round(_tree_size(len(default_taps(encoder)), width, out) / (width + out)), 1)
        return TwoLayers(width, hidden, out)


class TwoLayers(nn.Module):
    """LayerNorm, linear, ReLU, linear, ReLU on the frames of one tap."""

    def __init__(self, width: int, hidden: int, out_dim: int) -> None:
        super().__init__()
        self.out_dim = out_dim
        self.layers = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, out_dim), nn.ReLU()
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """`(N, 1, C)` to `(N, out_dim)`."""
        frames = features.squeeze(1)
        if not autocast_takes(frames):
            frames = frames.to(next(self.parameters()).dtype)
        return self.layers(frames)


@dataclass(frozen=True, kw_only=True)
class Full(EditMethod):
    """Full fine-tuning: every parameter of the model, but for layers past the last tap."""

    name: ClassVar[str] = "full"
    title: ClassVar[str] = "Full fine-tuning"
    paper: ClassVar[str] = "fine-tuning"
    training: ClassVar[Training] = Training(epochs=5, batch_size=16, learning_rate=1e-4)

    def change(self, edit: Edit, encoder: Encoder, layers: list[nn.Module]) -> None:
        edit.train(encoder.without_idle(encoder.root.parameters()))


@dataclass(frozen=True, kw_only=True)
class Partial(LayerEditMethod):
    """Fine-tuning of some layers.

    Attributes:
        layers: None for the upper half of those that run.
    """

    name: ClassVar[str] = "partial"
    title: ClassVar[str] = "Upper half fine-tuned"
    paper: ClassVar[str] = "fine-tuning"
    training: ClassVar[Training] = Training(epochs=5, batch_size=16, learning_rate=1e-4)

    def select(self, encoder: Encoder) -> list[nn.Module]:
        layers = encoder.select(self.layers)
        return layers if self.layers is not None else layers[-max(len(layers) // 2, 1) :]

    def change(self, edit: Edit, encoder: Encoder, layers: list[nn.Module]) -> None:
        for layer in layers:
            edit.train(layer.parameters())


@dataclass(frozen=True, kw_only=True)
class BitFit(EditMethod):
    """All biases of the encoder, those of its norms too, but for layers past the last tap."""

    name: ClassVar[str] = "bitfit"
    title: ClassVar[str] = "BitFit"
    paper: ClassVar[str] = "arXiv 2106.10199"

    def change(self, edit: Edit, encoder: Encoder, layers: list[nn.Module]) -> None:
        named = encoder.model.named_parameters()
        edit.train(encoder.without_idle(parameter for name, parameter in named if _is_bias(name)))


@dataclass(frozen=True, kw_only=True)
class Prompt(LayerEditMethod):
    """Learned tokens in front of the input of every layer (VPT-deep); their outputs are dropped.

    The code released with AAT overwrites patches instead.

    Attributes:
        prompt_tokens: how many.
    """

    name: ClassVar[str] = "prompt"
    title: ClassVar[str] = "Prompts (VPT-deep)"
    paper: ClassVar[str] = "arXiv 2203.12119"

    prompt_tokens: int = option(12, least=1)

    def check(self, encoder: Encoder, layers: list[nn.Module]) -> None:
        description = encoder.description
        if not description.attention_alone_mixes:
            raise ValueError(
                f"method {self.name!r} needs layers whose tokens, dimension 1, meet in the attention only "
                f"(attention_alone_mixes of the description), which those of {description.model_type} do not"
            )
        if description.shares_position_bias and len(layers) < encoder.num_layers:
            raise ValueError(
                f"method {self.name!r} needs all layers of {description.model_type}, which share one "
                "position bias"
            )

    def change(self, edit: Edit, encoder: Encoder, layers: list[nn.Module]) -> None:
        from .prompts import Prompted

        for layer in layers:
            prompt = torch.empty(self.prompt_tokens, encoder.hidden_size, **edit.place(layer))
            edit.add(layer, "prompt", nn.Parameter(nn.init.trunc_normal_(prompt, std=0.02)))
            edit.override(layer, Prompted(layer.forward, layer))


@dataclass(frozen=True, kw_only=True)
class LoRA(LayerEditMethod):
    """LoRA on queries and values, by peft, which has to be installed.

    Attributes:
        rank: of the updates; their scale is 1.
    """

    name: ClassVar[str] = "lora"
    title: ClassVar[str] = "LoRA"
    paper: ClassVar[str] = "arXiv 2106.09685"

    FOREIGN_FILES: ClassVar[tuple[str, ...]] = (peft_format.CONFIG, peft_format.WEIGHTS)

    rank: int = option(8, least=1)

    def check(self, encoder: Encoder, layers: list[nn.Module]) -> None:
        check_layers(encoder, layers)
        if encoder.description.fused is not None:
            raise ValueError(
                f"method {self.name!r} needs a projection of queries and one of values; "
                f"{encoder.description.model_type} has one of queries, keys and values together"
            )
        if not encoder.description.calls_projections:
            raise ValueError(
                f"method {self.name!r} needs projections that are called; {encoder.description.model_type} "
                "passes their weights to a function"
            )
        if importlib.util.find_spec("peft") is None:
            raise ImportError(f"method {self.name!r} needs peft; install it with: pip install peft")

    def change(self, edit: Edit, encoder: Encoder, layers: list[nn.Module]) -> None:
        from peft import LoraConfig, inject_adapter_in_model

        names = {module: name for name, module in encoder.model.named_modules()}
        targets = []
        for layer, path in self._targets(encoder, layers):
            parent, _, leaf = path.rpartition(".")
            targets.append(names[layer.get_submodule(path)])
            edit.note_child(layer.get_submodule(parent), leaf)
        edit.note(encoder.model, "peft_config")
        config = LoraConfig(r=self.rank, lora_alpha=self.rank, target_modules=targets)
        inject_adapter_in_model(config, encoder.model, adapter_name="lora")
        for layer, path in self._targets(encoder, layers):
            named = layer.get_submodule(path).named_parameters()
            added = [parameter for name, parameter in named if "lora_" in name]
            for parameter in added:
                # peft takes the dtype of the projection.
                parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
            edit.train(added)

    def foreign_files(
        self, model: nn.Module, head: Sequence[str], tensors: Mapping[str, torch.Tensor]
    ) -> dict[str, Callable[[Path], object]]:
        """Peft's own files, where its format has all that is trained."""
        return peft_format.files(model, head, tensors)

    @classmethod
    def read_foreign(cls, folder: Path, encoder: Encoder) -> Foreign | None:
        found = peft_format.read(folder)
        if found is None:
            return None
        names = {module: name for name, module in encoder.root.named_modules()}
        projections = [
            {names[layer.get_submodule(path)] for _, path in cls._targets(encoder, [layer])}
            for layer in encoder.all_layers
        ]
        layers = [index for index, own in enumerate(projections) if own <= set(found.targets)]
        others = set(found.targets).difference(*(projections[index] for index in layers))
        if others or not layers:
            raise ValueError(
                f"{folder} has updates of {', '.join(sorted(others)[:3]) or 'no layer'}; {cls.name} has them "
                "of queries and values in the encoder's layers; load others by peft.PeftModel.from_pretrained"
            )
        return Foreign(cls(rank=found.rank, layers=tuple(layers)), found.head, found.tensors)

    @staticmethod
    def _targets(encoder: Encoder, layers: list[nn.Module]) -> Iterator[tuple[nn.Module, str]]:
        for layer in layers:
            for path in (encoder.description.layer_query, encoder.description.layer_value):
                yield layer, path


@dataclass(frozen=True, kw_only=True)
class Houlsby(AdapterMethod):
    """Adapters in series: `x + (A + Adapter(A))` and `x + (F + Adapter(F))`, A the output of a layer's
    attention, projected, and F that of its MLP; options as `AdapterMethod`.
    """

    name: ClassVar[str] = "houlsby"
    title: ClassVar[str] = "Houlsby adapters"
    paper: ClassVar[str] = "arXiv 1902.00751"

    def change(self, edit: Edit, encoder: Encoder, layers: list[nn.Module]) -> None:
        places = {"attention": encoder.attention_path, "mlp": encoder.description.layer_mlp[1]}
        for layer in layers:
            for name, path in places.items():
                self.append(edit, encoder, layer, f"adapter_{name}", layer.get_submodule(path))


def _tree_size(features: int, width: int, out_dim: int) -> int:
    """The weights of a tree that projects neighbours to half their width while more than 3 are left."""
    size = 0
    while features > 3:
        odd = features % 2
        size += (features - odd) * width * width // 2
        features = features // 2 + odd
    return size + features * width * out_dim + 2 * out_dim * out_dim


def _is_bias(name: str) -> bool:
    # A parametrised one is stored elsewhere (torch.nn.utils.parametrize).
    return name.rpartition(".")[2] == "bias" or ".parametrizations.bias." in name
