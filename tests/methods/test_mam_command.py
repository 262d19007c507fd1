"""`mmtransfer merge`: linear merges and attention merging of checkpoints on disk, against plain torch."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import run
from merge_files import linear, load, merge, merged, random_tensors, same, save
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_encoders import TINY
from transformers import AutoModel, AutoModelForCTC, BertConfig, BertForMaskedLM, Wav2Vec2FeatureExtractor

from mmtransfer import mam
from mmtransfer.mam.files import pieces
from mmtransfer.mam.files.checkpoint import Stored
from mmtransfer.mam.files.pieces import cut
from mmtransfer.mam.files.plan import Entry, Term
from mmtransfer.mam.files.streams import Reader
from mmtransfer.mam.files.weights import find_depths
from mmtransfer.model_files import read_header


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return save(tmp_path / "a", random_tensors(1)), save(tmp_path / "b", random_tensors(2))


def test_two_models_are_interpolated(pair: tuple[Path, Path], tmp_path: Path) -> None:
    found = merged(linear((pair[0], 0.7), (pair[1], 0.3)), tmp_path / "out")
    a, b = map(load, pair)
    same(found, {name: torch.lerp(a[name], b[name], 0.3) for name in a})
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"model_type": "none"}
    assert (tmp_path / "out" / "merge_recipe.yaml").read_text() == (tmp_path / "recipe.yaml").read_text()


@pytest.mark.parametrize(("normalize", "factor"), [(None, 1.0), (True, 1.0), (False, 1.1)])
def test_weights_are_normalised_unless_told_otherwise(
    tmp_path: Path, normalize: bool | None, factor: float
) -> None:
    """Weights 0.1 and 1 of two equal models: the model, or 1.1 times it."""
    tensors = random_tensors(1)
    a, b = save(tmp_path / "a", tensors), save(tmp_path / "b", tensors)
    settings = {} if normalize is None else {"parameters": {"normalize": normalize, "int8_mask": True}}
    found = merged(linear((a, 0.1), (b, 1), **settings), tmp_path / "out")
    for name, tensor in tensors.items():
        assert torch.allclose(found[name], factor * tensor, rtol=1e-6, atol=0)
        assert torch.equal(found[name], tensor) == (factor == 1)


def test_keys_without_a_value_are_as_if_not_there(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """As mergekit writes and takes them."""
    expected = merged(linear((pair[0], 0.7), (pair[1], 0.3)), tmp_path / "expected")
    recipe = linear((pair[0], 0.7), (pair[1], 0.3), base_model=None, dtype=None, tokenizer_source=None)
    same(merged({**recipe, "slices": None, "parameters": None}, tmp_path / "nulls"), expected)
    half = {**linear((pair[0], 0.5)), "parameters": {"weight": 0.5, "normalize": None}}
    half["models"].append({"model": str(pair[1]), "parameters": None})
    expected = merged(linear((pair[0], 0.5), (pair[1], 0.5)), tmp_path / "expected_halves")
    same(merged(half, tmp_path / "halves"), expected)


def test_weights_one_and_zero_copy_the_first_model(tmp_path: Path) -> None:
    tensors, others = random_tensors(1), random_tensors(2)
    others["norm.weight"][:] = float("nan")
    a, b = save(tmp_path / "a", tensors), save(tmp_path / "b", others)
    same(merged(linear((a, 1), (b, 0)), tmp_path / "out"), tensors)
    same(merged(linear((b, 0.0), (a, 3)), tmp_path / "second"), tensors)
    same(merged(linear((a, 1), (b, 0), (a, 1)), tmp_path / "third"), tensors)


def test_three_models_are_summed_in_float32(tmp_path: Path) -> None:
    models = [random_tensors(seed, torch.bfloat16) for seed in range(3)]
    folders = [save(tmp_path / str(seed), each) for seed, each in enumerate(models)]
    weights = [1.0, -2.0, 5.0]
    found = merged(linear(*zip(folders, weights, strict=True)), tmp_path / "out")
    expected = {}
    for name in models[0]:
        total = models[0][name].float() * (weights[0] / 4)
        total.add_(models[1][name].float(), alpha=weights[1] / 4)
        expected[name] = total.add_(models[2][name].float(), alpha=weights[2] / 4).bfloat16()
    same(found, expected)


def test_lists_run_over_the_layers_and_filters_choose_tensors(tmp_path: Path) -> None:
    """As in mergekit, tensors outside of layers take the first value of a list, the first filter that fits
    counts, and the recipe's weight where none does."""
    a = save(tmp_path / "a", {name: torch.zeros_like(each) for name, each in random_tensors(1).items()})
    b = save(tmp_path / "b", {name: torch.ones_like(each) for name, each in random_tensors(1).items()})

    def values(given: Any, name: str, **settings: Any) -> dict[str, float]:
        recipe = linear((a, 1), (b, given), parameters={"normalize": False, **settings})
        return {key: float(each.flatten()[0]) for key, each in merged(recipe, tmp_path / name).items()}

    gradient = values([0, 1, 5], "gradient")
    assert gradient == {
        "embed.weight": 0, "norm.weight": 0,
        "layers.0.attn.q.weight": 0, "layers.1.attn.q.weight": 1, "layers.2.attn.q.weight": 5,
        "layers.0.mlp.bias": 0, "layers.1.mlp.bias": 1, "layers.2.mlp.bias": 5,
    }  # fmt: skip
    filters = [{"filter": "attn", "value": [2, 4]}, {"filter": "layers.1", "value": 7}]
    filtered = values(filters, "filters", weight=0.25)
    assert filtered == {
        "embed.weight": 0.25, "norm.weight": 0.25,
        "layers.0.attn.q.weight": 2, "layers.1.attn.q.weight": 3, "layers.2.attn.q.weight": 4,
        "layers.0.mlp.bias": 0.25, "layers.1.mlp.bias": 7, "layers.2.mlp.bias": 0.25,
    }  # fmt: skip
    assert values([*filters, {"value": 9}], "default", weight=0.25)["embed.weight"] == 9
    assert values([{"filter": "*", "value": 8}], "any")["layers.0.mlp.bias"] == 8
    assert values({"filter": "attn", "value": 8}, "alone", weight=0)["layers.0.attn.q.weight"] == 8


def test_a_layer_that_is_alone_is_the_last() -> None:
    """As in mergekit."""
    assert find_depths(["layers.0.q", "blocks.0.q", "blocks.2.q", "blocks.1.q", "norm"]) == {
        "layers.0.q": 1, "blocks.0.q": 0, "blocks.1.q": 0.5, "blocks.2.q": 1, "norm": 0,
    }  # fmt: skip


@pytest.mark.parametrize("files_in", [1, 3])
@pytest.mark.parametrize(("limit", "size"), [("5GB", 5e9), ("0.4KB", 400), ("600", 600), ("1", 1)])
def test_files_in_and_out(tmp_path: Path, files_in: int, limit: str, size: float) -> None:
    a = save(tmp_path / "a", random_tensors(1), files_in)
    b = save(tmp_path / "b", random_tensors(2), 2)
    found = merged(linear((a, 1), (b, 1)), tmp_path / "out", "--max-shard-size", limit)
    one, other = load(a), load(b)
    same(found, {name: torch.lerp(one[name], other[name], 0.5) for name in one})
    names = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    if size > 1212:
        assert names == ["model.safetensors"]
        assert not (tmp_path / "out" / "model.safetensors.index.json").exists()
        return
    assert names == [f"model-{i + 1:05d}-of-{len(names):05d}.safetensors" for i in range(len(names))]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_parameters": 303, "total_size": 1212}
    assert index["weight_map"].keys() == one.keys()
    for file in names:
        inside = {name: one[name].numel() * 4 for name, each in index["weight_map"].items() if each == file}
        with safe_open(tmp_path / "out" / file, "pt") as shard:
            assert set(shard.keys()) == inside.keys()
        assert sum(inside.values()) <= size or len(inside) == 1


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16", "float16"])
def test_dtypes_are_the_targets_or_the_recipes(tmp_path: Path, dtype: str | None) -> None:
    mixed = random_tensors(1, torch.float16)
    mixed["norm.weight"] = mixed["norm.weight"].double()
    mixed["embed.weight"] = mixed["embed.weight"].float()
    mixed["positions"] = torch.arange(7)
    mixed["flags"] = torch.tensor([True, False, True])
    other = {**random_tensors(2, torch.bfloat16), "positions": mixed["positions"], "flags": mixed["flags"]}
    a = save(tmp_path / "a", mixed, 3, torch_dtype="float16")
    recipe = linear((a, 3), (save(tmp_path / "b", other), 1), **({} if dtype is None else {"dtype": dtype}))
    found = merged(recipe, tmp_path / "out")
    expected = {"positions": mixed["positions"], "flags": mixed["flags"]}
    for name in random_tensors(1):
        wide = torch.float64 if name == "norm.weight" else torch.float32
        weight = torch.tensor(0.25, dtype=wide)
        value = torch.lerp(mixed[name].to(wide), other[name].to(wide), weight)
        expected[name] = value.to(mixed[name].dtype if dtype is None else getattr(torch, dtype))
    same(found, expected)
    start, header = read_header(tmp_path / "out" / "model.safetensors")
    for name, each in header.items():
        assert (start + each["data_offsets"][0]) % found[name].element_size() == 0, name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == (dtype or "float16")


def test_the_target_is_the_base_model(pair: tuple[Path, Path], tmp_path: Path) -> None:
    (pair[1] / "vocab.txt").write_text("b")
    (pair[1] / "training_args.bin").write_bytes(b"state")
    (pair[0] / "tokenizer.json").write_text("{}")
    merged(linear((pair[0], 1), (pair[1], 1), base_model=str(pair[1])), tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "vocab.txt", "model.safetensors", "merge_recipe.yaml"}


def test_tensors_that_one_side_lacks(tmp_path: Path) -> None:
    tensors, others = random_tensors(1), random_tensors(2)
    del others["norm.weight"]
    others["head.weight"] = torch.ones(3)
    a, b = save(tmp_path / "a", tensors), save(tmp_path / "b", others)
    kept = merge({**linear((a, 1), (b, 1)), "missing": "keep"}, tmp_path / "out")
    assert kept.code == 0
    assert f"{b} lacks 1 tensor (norm.weight) of {a}, kept" in kept.stderr
    assert f"{b} has 1 tensor (head.weight) more than {a}, unused" in kept.stderr
    expected = {name: torch.lerp(tensors[name], others[name], 0.5) for name in tensors if name in others}
    same(load(tmp_path / "out"), expected | {"norm.weight": tensors["norm.weight"]})


def bert(folder: Path, seed: int, *, tied: bool) -> BertForMaskedLM:
    torch.manual_seed(seed)
    config = BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, vocab_size=30,
        max_position_embeddings=12, tie_word_embeddings=tied,
    )  # fmt: skip
    model = BertForMaskedLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("tied", [(True, True), (False, True)])
def test_tied_weights_stay_as_in_the_target(tmp_path: Path, tied: tuple[bool, bool]) -> None:
    """An untied head takes the other model's embeddings, which are its head."""
    models = [bert(tmp_path / str(seed), seed, tied=each) for seed, each in enumerate(tied)]
    assert merge(linear((tmp_path / "0", 1), (tmp_path / "1", 3)), tmp_path / "out").code == 0
    found, report = BertForMaskedLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    head, embeddings = found.cls.predictions.decoder.weight, found.bert.embeddings.word_embeddings.weight
    assert (head is embeddings) == tied[0]
    for name in ("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"):
        ours, theirs = (model.get_parameter(name) for model in models)
        assert torch.equal(found.get_parameter(name), torch.lerp(ours, theirs, 0.75))


def test_names_with_and_without_the_prefix_of_a_head(tmp_path: Path) -> None:
    """An encoder with older names of weights merges with one inside a recogniser."""
    head, plain = TINY["wav2vec2"].build(head=True), TINY["wav2vec2"].build()
    head.save_pretrained(tmp_path / "head")
    save_file(
        {
            name.replace("parametrizations.weight.original0", "weight_g")
            .replace("parametrizations.weight.original1", "weight_v"): tensor + 1
            for name, tensor in plain.state_dict().items()
        },
        tmp_path / "plain.safetensors",
    )  # fmt: skip
    plain.config.save_pretrained(tmp_path / "plain")
    (tmp_path / "plain.safetensors").rename(tmp_path / "plain" / "model.safetensors")
    recipe = linear((tmp_path / "head", 1), (tmp_path / "plain", 1), missing="keep")
    result = merge(recipe, tmp_path / "out")
    assert result.code == 0, result.stderr
    assert "lacks 2 tensors (lm_head.bias, lm_head.weight)" in result.stderr
    found = AutoModelForCTC.from_pretrained(tmp_path / "out")
    for name, tensor in plain.state_dict().items():
        expected = torch.lerp(head.wav2vec2.state_dict()[name], tensor + 1, 0.5)
        assert torch.equal(found.wav2vec2.state_dict()[name], expected), name
    assert torch.equal(found.lm_head.weight, head.lm_head.weight)


def test_the_dry_run_prints_and_writes_nothing(pair: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = pair
    recipe = linear((a, 3), (b, [{"filter": "attn", "value": 0}, {"value": 1}]))
    result = merge(recipe, tmp_path / "out", "--dry-run")
    assert result.code == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["embed.weight", "11x8", "F32", "0.75", str(a), "+", "0.25", str(b)] in lines
    assert ["layers.1.attn.q.weight", "8x8", "F32", "copy", "of", str(a)] in lines
    assert "8 tensors, 5 merged and 3 copied; 1,212 bytes; nothing was written" in result.stdout
    assert not (tmp_path / "out").exists()
    assert run("merge", tmp_path / "recipe.yaml", "--dry-run").stdout == result.stdout


def test_a_merge_needs_no_memory_for_the_models(tmp_path: Path) -> None:
    """Sixteen tensors of 16 MB, half of them copied: the peak stays below one and a half of one, on top of
    torch."""
    weights = [{"filter": "layers.1", "value": 0}, {"value": 2}]
    recipe = linear((tmp_path / "a", 1), (tmp_path / "b", weights))
    for name in ("a", "b"):
        save(tmp_path / name, {f"layers.{i}.w": torch.full((4 << 20,), float(i)) for i in range(16)})
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    code = (
        "import re, sys, mmkernels, mmtransfer.mam.files.linear, mmtransfer.mam.files.run\n"
        "from pathlib import Path\n"
        "from mmtransfer.cli import main\n"
        "def peak():\n"
        "    return int(re.search(r'VmHWM:\\s*(\\d+)', Path('/proc/self/status').read_text())[1])\n"
        # Forget the peak of the imports.
        "Path('/proc/self/clear_refs').write_text('5')\n"
        "before = peak()\n"
        "main(sys.argv[1:])\n"
        "print(peak() - before)"
    )
    command = [sys.executable, "-c", code, "merge", tmp_path / "recipe.yaml", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout.splitlines()[-1]) < 24 << 10


@pytest.mark.parametrize("weights", [[1.0], [0.5, 0.5]])
@pytest.mark.parametrize("shape", [(3,), (8 << 20,), (5000, 5003), (0, 4)])
def test_work_is_cut_into_portions(weights: list[float], shape: tuple[int, ...]) -> None:
    """A few for each tensor, copies too, which cover it once."""
    size = 4 * math.prod(shape)
    stored = Stored("w", Path("w"), 0, size, "F32", shape)
    entry = Entry("w", "F32", shape, tuple(Term(stored, weight) for weight in weights))
    pieces = list(cut(entry, 0, 0))
    assert len(pieces) == -(-size // (32 << 20))
    ends = [0, *(piece.end for piece in pieces)]
    assert [piece.begin for piece in pieces] == ends[:-1]
    assert ends[-1] == (size if len(weights) == 1 else size // 4)


MODELS = ("hubert", "whisper", "vit", "bert", "distilbert", "gpt2")


@pytest.mark.filterwarnings("ignore:the target has")
@pytest.mark.parametrize("target", MODELS)
@pytest.mark.parametrize("source", MODELS)
def test_attention_is_merged_as_in_memory(tmp_path: Path, target: str, source: str) -> None:
    own, theirs = TINY[target].build(), TINY[source].build()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.mul_(2).add_(0.5)
    own.save_pretrained(tmp_path / "target")
    theirs.save_pretrained(tmp_path / "source")
    recipe = {
        "merge_method": "mam", "target": str(tmp_path / "target"), "source": str(tmp_path / "source"),
        "lambda": [0.25, 1.0], "layers": "1-2", "parts": ["k", "v"], "bias": True,
    }  # fmt: skip
    result = merge(recipe, tmp_path / "out")
    assert result.code == 0, result.stderr
    before = {name: each.clone() for name, each in own.state_dict().items()}
    mam.merge(own, theirs, [0.25, 1.0], layers=[1, 2], parts=("k", "v"), bias=True)
    found, report = AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report.values())
    same(found.state_dict(), own.state_dict())
    changed = [name for name, each in own.state_dict().items() if not torch.equal(each, before[name])]
    assert len(changed) in (4, 6, 8)
    assert f"{len(changed)} merged" in result.stdout


def test_attention_of_models_with_heads_in_other_dtypes(tmp_path: Path) -> None:
    own, theirs = TINY["hubert"].build(head=True).bfloat16(), TINY["bert"].build(head=True)
    own.save_pretrained(tmp_path / "target")
    Wav2Vec2FeatureExtractor().save_pretrained(tmp_path / "target")
    theirs.save_pretrained(tmp_path / "source")
    recipe = {
        "merge_method": "mam", "target": str(tmp_path / "target"), "source": str(tmp_path / "source"),
        "lambda": 0.2, "match_rms": True,
    }  # fmt: skip
    assert merge({**recipe, "dtype": "float32"}, tmp_path / "wide").code == 0
    wide = AutoModelForCTC.from_pretrained(tmp_path / "wide")
    assert (wide.dtype, wide.config.dtype) == (torch.float32, torch.float32)
    assert (tmp_path / "wide" / "preprocessor_config.json").exists()
    assert merge(recipe, tmp_path / "out").code == 0
    found = AutoModelForCTC.from_pretrained(tmp_path / "out")
    same({name: each.bfloat16() for name, each in wide.state_dict().items()}, found.state_dict())
    mam.merge(own, theirs, 0.2, match_rms=True)
    same(found.state_dict(), own.state_dict())


def test_fused_weights_are_read_once_and_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tensor with matrices to merge is in memory as a whole."""
    running, most, read = [0], [0], []
    patch, read_whole = pieces._patch, Reader.read_whole

    def watched(*arguments: Any) -> int:
        running[0] += 1
        most[0] = max(most[0], running[0])
        time.sleep(0.02)
        count = patch(*arguments)
        running[0] -= 1
        return count

    def noted(self: Reader, stored: Stored) -> torch.Tensor:
        read.append(stored)
        return read_whole(self, stored)

    monkeypatch.setattr(pieces, "_patch", watched)
    monkeypatch.setattr(Reader, "read_whole", noted)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(4))
    places = {side: str(tmp_path / side) for side in ("target", "source")}
    for place in places.values():
        TINY["gpt2"].build().save_pretrained(place)
    merged({"merge_method": "mam", **places, "lambda": 0.2}, tmp_path / "out")
    assert most == [1]
    # The target's and the source's, of four layers.
    assert len(read) == len(set(read)) == 8


def test_heads_of_other_numbers_are_said(tmp_path: Path) -> None:
    TINY["hubert"].build().save_pretrained(tmp_path / "target")
    TINY["bert"].build(num_attention_heads=4).save_pretrained(tmp_path / "source")
    recipe = {
        "merge_method": "mam", "target": str(tmp_path / "target"), "source": str(tmp_path / "source"),
        "lambda": 0.2,
    }  # fmt: skip
    result = merge(recipe, tmp_path / "out")
    assert result.code == 0
    assert "has 2 attention heads and" in result.stderr
    assert "Warning" not in result.stderr


def test_layers_of_models_of_other_depth_are_mapped(tmp_path: Path) -> None:
    own, theirs = TINY["hubert"].build(), TINY["bert"].build(num_hidden_layers=2)
    own.save_pretrained(tmp_path / "target")
    theirs.save_pretrained(tmp_path / "source")
    recipe = {
        "merge_method": "mam", "target": str(tmp_path / "target"), "source": str(tmp_path / "source"),
        "lambda": 1, "layer_map": [0, 0, 1, 1],
    }  # fmt: skip
    assert merge(recipe, tmp_path / "out").code == 0
    found = AutoModel.from_pretrained(tmp_path / "out")
    for layer in range(4):
        for ours, other in zip(
            mam.find_projections(found, [layer]), mam.find_projections(theirs, [layer // 2]), strict=True
        ):
            assert torch.equal(ours.view, other.view)
    dry = merge({**recipe, "layers": [3]}, tmp_path / "dry", "--dry-run")
    row = next(line for line in dry.stdout.splitlines() if "layers.3.attention.q_proj.weight" in line)
    assert "q: 0 own + 1 encoder.layer.1.attention.self.query.weight" in row
