"""A language model's folder or hub name: its configuration, its sizes, its weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from mmtransfer.data import DataError
from mmtransfer.encoders.loading import quiet_transformers
from mmtransfer.model_files import find_fault

_CAUSAL = ("ForCausalLM", "LMHeadModel")


def find_place(source: str) -> str:
    """What transformers loads a language model from: the whole path of a folder, or a hub name.

    DataError, naming the first fault, for a folder that is missing or has no model.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        if (fault := find_fault(folder)) is not None:
            raise DataError(f"{source} is no language model: {fault}")
        return str(folder.resolve())
    if folder.is_absolute() or source.startswith((".", "~")):
        raise DataError(f"{source} does not exist; give the folder or the hub name of a language model")
    return source


@dataclass(frozen=True)
class Outline:
    """A language model without weights.

    Attributes:
        source: where it is from.
        config: its configuration; `text` is the part of the language model, where it has several.
        model: on the meta device.
    """

    source: str
    config: Any
    model: nn.Module

    @property
    def text(self) -> Any:
        return self.config.get_text_config(decoder=True)

    @property
    def embedding(self) -> torch.Tensor:
        """The embedding table `(V, H)`, on the meta device; ValueError if there is none."""
        return find_embedding(self.model, self.source)

    @property
    def shape(self) -> dict[str, Any]:
        """The sizes of a layer: width, heads, key_heads, hidden (of the feed-forward network) and eps."""
        width = self.embedding.shape[1]
        heads = _first(self.text, ("num_attention_heads",), 1)
        return {
            "width": width,
            "heads": heads,
            "key_heads": _first(self.text, ("num_key_value_heads",), heads),
            "hidden": _first(self.text, ("intermediate_size", "ffn_dim", "n_inner"), 4 * width),
            "eps": _first(self.text, ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"), 1e-5),
        }


def read_outline(source: str) -> Outline:
    """A language model without weights, from its configuration.

    Raises:
        DataError: no configuration can be read.
        ValueError: it is not that of a causal language model.
    """
    place = find_place(source)
    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(place)
    except Exception as error:
        # Loaders of several libraries are behind this call.
        reason = " ".join(str(error).split())[:200].removesuffix(".")
        raise DataError(
            f"no configuration of a language model can be read from {source} ({reason})"
        ) from error
    kind = f"{source} has a model of type {config.model_type}"
    try:
        with quiet_transformers(), torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise ValueError(f"{kind}, which is no causal language model") from error
    # transformers takes BERT and its like as language models too, whose attention looks ahead.
    text = config.get_text_config(decoder=True)
    named = any(name.endswith(_CAUSAL) for name in getattr(config, "architectures", None) or ())
    if getattr(text, "is_decoder", None) is False and not named:
        raise ValueError(f"{kind} that is no decoder, so no causal language model")
    return Outline(source, config, model)


def find_embedding(model: nn.Module, source: str) -> nn.Parameter:
    """The embedding table `(V, H)` of a model; ValueError, naming `source`, if it has none."""
    try:
        weight = model.get_input_embeddings().weight  # type: ignore[operator]
    except (AttributeError, NotImplementedError) as error:
        raise ValueError(f"{source} has no embedding table ({type(model).__name__})") from error
    if weight is None or weight.dim() != 2:
        raise ValueError(f"{source} has no embedding table ({type(model).__name__})")
    return weight


def check_table_finite(table: torch.Tensor, source: str) -> None:
    """ValueError for NaN or infinity, found by two numbers and not by a mask of the size of the table."""
    if table.numel() and not all(value.isfinite() for value in torch.aminmax(table.detach())):
        raise ValueError(f"the embedding table of {source} has values that are not finite")


def load_language_model(source: str, dtype: torch.dtype | str = torch.float32) -> Any:
    """A language model with its weights, in eval mode.

    Raises:
        DataError: it cannot be loaded, or weights are missing, which transformers would draw at random.
        ValueError: it is no causal language model.
    """
    read_outline(source)
    try:
        with quiet_transformers():
            found: Any = AutoModelForCausalLM.from_pretrained(
                find_place(source), dtype=dtype, output_loading_info=True
            )
    except Exception as error:
        reason = " ".join(str(error).split())[:300].removesuffix(".")
        raise DataError(f"no language model can be loaded from {source} ({reason})") from error
    model, report = found
    if missing := sorted(report["missing_keys"]):
        raise DataError(
            f"{source} lacks {len(missing)} weights of its language model ({', '.join(missing[:2])}); give a "
            "complete checkpoint"
        )
    return model.eval()


def _first(config: Any, names: tuple[str, ...], default: Any) -> Any:
    """The first of these values that a configuration has."""
    values = (getattr(config, name, None) for name in names)
    return next((value for value in values if value is not None), default)
