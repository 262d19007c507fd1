"""Folders of models that are broken, or of another kind: one sentence that names the file and the remedy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_encoders import TINY

from mmtransfer import AdaptedModel
from mmtransfer.data import DataError
from mmtransfer.encoders.loading import load_model

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1262\n"
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    TINY["wav2vec2"].build(head=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    TINY["wav2vec2"].build(head=True).save_pretrained(folder, max_shard_size="10KB")
    assert len([*folder.glob("model-*.safetensors")]) > 2
    return folder


def cut(path: Path, by: int = 1) -> None:
    path.write_bytes(path.read_bytes()[:-by])


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def change_tensors(folder: Path, **tensors: torch.Tensor) -> None:
    found = load_file(folder / WEIGHTS)
    assert found.keys() >= tensors.keys()
    save_file({**found, **tensors}, folder / WEIGHTS, metadata={"format": "pt"})


def make_lora(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": "facebook/some-model"})
    )
    (folder / "adapter_model.safetensors").write_bytes(b"")


def keep_only(folder: Path, name: str, content: bytes = b"x") -> None:
    for path in folder.iterdir():
        path.unlink()
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)


QUERY = "wav2vec2.encoder.layers.1.attention.q_proj.weight"
FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "pointer": (
        lambda folder: (folder / WEIGHTS).write_text(POINTER),
        "model.safetensors is a pointer of git-lfs and not the file itself; run git lfs pull",
    ),
    "configuration is a pointer": (
        lambda folder: (folder / "config.json").write_text(POINTER),
        "config.json is a pointer of git-lfs",
    ),
    "last byte": (
        lambda folder: cut(folder / WEIGHTS),
        r"model.safetensors is cut off after [\d,]+ bytes",
    ),
    "half of it": (
        lambda folder: cut(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size // 2),
        "model.safetensors is cut off after",
    ),
    "within the header": (
        lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:40]),
        "model.safetensors is cut off after 40 bytes; download",
    ),
    "empty": (lambda folder: (folder / WEIGHTS).write_bytes(b""), "model.safetensors is empty"),
    "web page": (
        lambda folder: (folder / WEIGHTS).write_text("<!DOCTYPE html><html>404"),
        "model.safetensors is a web page",
    ),
    "noise": (
        lambda folder: (folder / WEIGHTS).write_bytes(bytes(range(256)) * 9),
        "is no safetensors file",
    ),
    "wrong shape": (
        lambda folder: change_tensors(folder, **{QUERY: torch.zeros(3, 5)}),
        r"encoder.layers.1.attention.q_proj.weight has shape \(3, 5\), the configuration says \(16, 16\)",
    ),
    "wider": (
        lambda folder: change(folder / "config.json", intermediate_size=25),
        r"do not fit its configuration: \S+ has shape \(24,\), the configuration says \(25,\);.* and \d+ m",
    ),
    "fewer layers": (
        lambda folder: change(folder / "config.json", num_hidden_layers=2),
        "it has weights of 4 layers, and its configuration says 2",
    ),
    "more layers": (
        lambda folder: change(folder / "config.json", num_hidden_layers=5),
        "lacks 16 weights of the encoder",
    ),
    "lora": (make_lora, "is an adapter of peft .*no whole model; give facebook/some-model, or merge"),
    "nothing": (lambda folder: keep_only(folder, "readme.txt"), "has no config.json; it must be"),
    "fairseq": (
        lambda folder: keep_only(folder, "base.pt"),
        "no config.json, but base.pt, which is no",
    ),
    "training run": (
        lambda folder: keep_only(folder, "checkpoint-40/config.json"),
        "no config.json, but its folder checkpoint-40 does",
    ),
    "no json": (lambda folder: (folder / "config.json").write_text("{,}"), "no model can be loaded .*JSON"),
    "unknown type": (
        lambda folder: change(folder / "config.json", model_type="wav3vec"),
        "no model can be loaded .*wav3vec",
    ),
    "no weights": (
        lambda folder: (folder / WEIGHTS).unlink(),
        "no model can be loaded .*no file named",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_one_sentence_says_it(name, sound, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(sound, folder)
    spoil, message = FAULTS[name]
    spoil(folder)
    with pytest.raises(DataError, match=message) as caught:
        load_model(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (Path.unlink, r"its file model-00002-of-\d+.safetensors is missing; download it again"),
        (lambda path: path.write_text(POINTER), r"model-00002-of-\d+.safetensors is a pointer of git-lfs"),
        (cut, r"model-00002-of-\d+.safetensors is cut off"),
    ],
)
def test_shards(spoil, message, sharded, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(sharded, folder)
    spoil(next(folder.glob("model-00002-*.safetensors")))
    with pytest.raises(DataError, match=message):
        load_model(folder)
    (folder / "model.safetensors.index.json").write_text(POINTER)
    with pytest.raises(DataError, match=r"model.safetensors.index.json is a pointer of git-lfs"):
        load_model(folder)


def test_weights_of_torch(sound, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(sound, folder)
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    load_model(folder)
    cut(folder / "pytorch_model.bin", 100)
    with pytest.raises(DataError, match=r"pytorch_model.bin is cut off after [\d,]+ bytes"):
        load_model(folder)


def test_a_checkpoint_of_this_package(tmp_path):
    AdaptedModel(TINY["wav2vec2"].build(), "aat-ms").save_pretrained(tmp_path)
    with pytest.raises(DataError, match=r"checkpoint of mmtransfer.*load it by mmtransfer\.load"):
        load_model(tmp_path)


@pytest.mark.parametrize("folder", ["sound", "sharded"])
def test_sound_folders(folder, request):
    model = load_model(request.getfixturevalue(folder))
    plain = TINY["wav2vec2"].build(head=True)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, plain.wav2vec2.get_parameter(name))
