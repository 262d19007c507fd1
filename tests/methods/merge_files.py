"""Checkpoints and recipes for the tests of `mmtransfer merge`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from command_line import Result, run
from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = dict[str, Tensor]


def random_tensors(seed: int, dtype: torch.dtype = torch.float32, layers: int = 3) -> Tensors:
    """Tensors of a model with layers, embeddings in front of them and a norm behind."""
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (11, 8), "norm.weight": (8,)}
    for layer in range(layers):
        shapes |= {f"layers.{layer}.attn.q.weight": (8, 8), f"layers.{layer}.mlp.bias": (5,)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def save(folder: Path, tensors: Mapping[str, Tensor], files: int = 1, **config: Any) -> Path:
    """A checkpoint of one file, or of several with an index."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "none", **config}))
    names = sorted(tensors)
    if files == 1:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for index in range(files):
        file = f"model-{index + 1:05d}-of-{files:05d}.safetensors"
        part = {name: tensors[name] for name in names[index::files]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index_text = json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index_text)
    return folder


def load(folder: Path) -> Tensors:
    """All tensors of a checkpoint."""
    return {
        name: each for file in sorted(folder.glob("*.safetensors")) for name, each in load_file(file).items()
    }


def linear(*models: tuple[Path, Any], **settings: Any) -> dict[str, Any]:
    """A recipe in mergekit's form."""
    listed = [{"model": str(folder), "parameters": {"weight": weight}} for folder, weight in models]
    return {"merge_method": "linear", "models": listed, **settings}


def merge(recipe: Any, output: Path, *options: str) -> Result:
    """Run the command on a recipe, which is written next to the output."""
    file = output.parent / "recipe.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(recipe if isinstance(recipe, str) else yaml.safe_dump(recipe))
    return run("merge", file, output, *options)


def merged(recipe: Any, output: Path, *options: str) -> Tensors:
    """The tensors that the command makes."""
    result = merge(recipe, output, *options)
    assert result.code == 0, result.stderr
    return load(output)


def same(found: Tensors, expected: Mapping[str, Tensor]) -> None:
    """Equal bit for bit, dtypes too."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert torch.equal(found[name].contiguous().view(-1).view(torch.uint8), bits(tensor)), name


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def untouched(output: Path) -> None:
    """Nothing was written at the output's place, nor next to it but the recipe."""
    assert not output.exists()
    assert not [each.name for each in output.parent.iterdir() if each.name.startswith(f".{output.name}")]
