"""Checkpoints of adapted models: round trips, their two files, and every refusal."""

from __future__ import annotations

import json

import pytest
import torch
from encoder_cases import model_state
from hff_models import FUSIONS, LENGTHS, WITH_ADAPTERS, make_model
from safetensors import safe_open
from tiny_encoders import TINY, make_input
from transformers import AutoModel

import mmkernels
import mmtransfer
from mmtransfer import AdaptedModel, registry
from mmtransfer.tasks import Classification

both = pytest.mark.parametrize("method", ["hff-b", WITH_ADAPTERS])


def tree(folder):
    return sorted(path.name for path in folder.iterdir())


def load(folder, **changes):
    return AdaptedModel.from_pretrained(folder, TINY["wav2vec2"].build(**changes))


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


class TestRoundTrip:
    @pytest.mark.parametrize("num_labels", [4, None])
    @pytest.mark.parametrize(
        ("method", "options"),
        [
            ("weighted-sum-norm", {}),
            ("weighted-sum", {"out_dim": None}),
            ("lff", {"depth": 2}),
            ("hff-b", {"norm": False, "activation": "silu"}),
            ("hff-ub", {}),
            (WITH_ADAPTERS, {}),
            (WITH_ADAPTERS, {"layers": (1, 3), "bottleneck": 5, "activation": "silu", "norm": False}),
            (WITH_ADAPTERS, {"taps": (2, "embeddings", 1), "dtype": torch.bfloat16}),
        ],
    )
    def test_the_same_model(self, tmp_path, method, options, num_labels):
        options = {"taps": ("embeddings", 1, -1), **options}
        model = make_model(method, num_labels=num_labels, **options)
        model.save_pretrained(tmp_path / "new" / "folder")
        again = load(tmp_path / "new" / "folder")
        inputs = make_input("wav2vec2")
        ours, theirs = (each(inputs, lengths=LENGTHS).to_tuple() for each in (model, again))
        for one, other in zip(ours, theirs, strict=True):
            assert torch.equal(one, other)
        assert again.encoder.taps == model.encoder.taps
        assert again.encoder.dtype == model.encoder.dtype
        assert again.method == model.method
        assert again.task == model.task
        assert trained(again) == trained(model)
        assert not again.training

    @pytest.mark.parametrize("method", [*FUSIONS, *(f"{fusion}+hff-adapters" for fusion in FUSIONS)])
    def test_options_build_it_again(self, method):
        found = registry.find(method, taps=("embeddings", -1))
        assert registry.find(method, **json.loads(json.dumps(found.options()))) == found

    def test_the_reference_backend_gives_the_same(self, tmp_path):
        model, inputs = make_model(WITH_ADAPTERS), make_input("wav2vec2")
        model.save_pretrained(tmp_path)
        again = AdaptedModel.from_pretrained(tmp_path, TINY["wav2vec2"].build(), backend="reference")
        backends = {module.backend for module in again.modules() if hasattr(module, "backend")}
        assert backends == {"reference"}
        torch.testing.assert_close(again(inputs).logits, model(inputs).logits, rtol=1e-4, atol=1e-5)

    @both
    def test_encoder_is_found_by_name(self, tmp_path, method):
        TINY["whisper"].build().save_pretrained(tmp_path / "base")
        named = AutoModel.from_pretrained(tmp_path / "base")
        model = make_model(method, model=named, taps=(1, 3), num_labels=2)
        mmtransfer.save(model, tmp_path / "trained")
        again = mmtransfer.load(tmp_path / "trained")
        inputs = make_input("whisper", size=20)
        assert torch.equal(again(input_features=inputs).logits, model(input_features=inputs).logits)

    def test_unnamed_encoder_must_be_given(self, tmp_path):
        make_model().save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="unnamed encoder; pass it as model"):
            AdaptedModel.from_pretrained(tmp_path)


class TestFiles:
    def test_frozen_encoder(self, tmp_path):
        model = make_model(dtype=torch.bfloat16)
        model.save_pretrained(tmp_path)
        assert tree(tmp_path) == ["config.json", "model.safetensors"]
        config = json.loads((tmp_path / "config.json").read_text())
        assert len(config.pop("save_id")) == 32
        refusal = "this is no model of transformers: load it by mmtransfer.load(folder)"
        assert config == {
            "format": "mmtransfer",
            "mmkernels_version": mmkernels.__version__,
            "model_type": "wav2vec2",
            **dict.fromkeys(("hidden_size", "d_model", "dim"), refusal),
            "method": "hff-b",
            "options": {
                "hff-b": {"taps": [0, 1, 2, 3], "out_dim": 6, "norm": True, "activation": "relu"},
            },
            "task": {"name": "classification", "options": {"num_labels": 4, "labels": None}},
            "labels": None,
            "sampling_rate": None,
            "input": None,
            "base_model": {
                "name_or_path": "",
                "model_type": "wav2vec2",
                "hidden_size": 16,
                "num_layers": 4,
                "dtype": "bfloat16",
                "encoder_dtype": "bfloat16",
            },
        }
        with safe_open(tmp_path / "model.safetensors", "pt") as weights:
            assert set(weights.keys()) == trained(model)
        assert all(name.startswith(("readout.", "head.")) for name in trained(model))
        assert load(tmp_path).encoder.dtype == torch.bfloat16

    def test_adapters(self, tmp_path):
        model = make_model(WITH_ADAPTERS, layers=(1, 3), num_labels=None)
        model.save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        assert config["method"] == "hff-b+hff-adapters"
        assert config["options"]["hff-adapters"] == {
            "bottleneck": 4,
            "layers": [1, 3],
            "activation": "relu",
            "scale": 1.0,
            "norm": True,
        }
        assert config["task"] is None
        assert config["base_model"]["dtype"] is None
        with safe_open(tmp_path / "model.safetensors", "pt") as weights:
            names = set(weights.keys())
        assert names == trained(model)
        inside = {name for name in names if not name.startswith("readout.")}
        assert len(inside) == 2 * 6
        assert all("adapter_output." in name for name in inside)

    def test_saving_again_replaces(self, tmp_path):
        first = make_model(WITH_ADAPTERS)
        first.save_pretrained(tmp_path)
        (tmp_path / "training_args.bin").write_bytes(b"mine")
        second = make_model("lff", seed=2, taps=(0, 1))
        second.save_pretrained(tmp_path)
        assert tree(tmp_path) == ["config.json", "model.safetensors", "training_args.bin"]
        again = load(tmp_path)
        assert again.edit_is_empty
        assert torch.equal(again.readout.projector[0].weight, second.readout.projector[0].weight)

    @pytest.mark.parametrize(
        "files",
        [
            {"config.json": '{"method": "mam"}'},
            {"config.json": '{"model_type": "wav2vec2"}', "model.safetensors": "x"},
            {"config.json": "not json"},
            {"model.safetensors": "x"},
        ],
    )
    def test_foreign_files_are_not_replaced(self, tmp_path, files):
        for name, text in files.items():
            (tmp_path / name).write_text(text)
        with pytest.raises(FileExistsError, match="is not from mmtransfer"):
            make_model().save_pretrained(tmp_path)
        assert {path.name: path.read_text() for path in tmp_path.iterdir()} == files

    @pytest.mark.parametrize("step", ["save_file", "os.replace"])
    def test_a_failed_save_leaves_the_old_one(self, tmp_path, monkeypatch, step):
        make_model(seed=1).save_pretrained(tmp_path)
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

        def fail(_, path, **__):
            if step == "save_file":
                path.write_bytes(b"half")
            raise OSError("disk full")

        monkeypatch.setattr(f"mmtransfer.checkpoint.{step}", fail)
        with pytest.raises(OSError, match="disk full"):
            make_model(seed=2).save_pretrained(tmp_path)
        monkeypatch.undo()
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

    def test_a_model_that_was_never_adapted(self, tmp_path):
        with pytest.raises(ValueError, match="Wav2Vec2Model is not prepared"):
            mmtransfer.save(TINY["wav2vec2"].build(), tmp_path)
        assert tree(tmp_path) == []


class TestRefusals:
    @pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
    def test_missing_file(self, tmp_path, missing):
        make_model().save_pretrained(tmp_path)
        (tmp_path / missing).unlink()
        with pytest.raises(FileNotFoundError, match=f"has no {missing}"):
            load(tmp_path)

    @staticmethod
    def refuse(tmp_path, model, change, message):
        """Loading with a changed configuration fails, and the model given is as before."""
        model.save_pretrained(tmp_path)
        path = tmp_path / "config.json"
        config = json.loads(path.read_text())
        for name, value in change.items():
            merge = isinstance(value, dict) and isinstance(config[name], dict)
            config[name] = {**config[name], **value} if merge else value
        path.write_text(json.dumps(config))
        other = TINY["wav2vec2"].build().train()
        other.requires_grad_(True)
        before = model_state(other)
        with pytest.raises(ValueError, match=message):
            AdaptedModel.from_pretrained(tmp_path, other)
        assert model_state(other) == before

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"format": "aat"}, "must have \"format\": 'mmtransfer'"),
            ({"method": "hff-c"}, "no method is called 'hff-c'.*did you mean 'hff-"),
            ({"method": "lff"}, "lff has no option 'hff-b'"),
            ({"task": {"name": "words"}}, "task must be one of .*classification.*, got 'words'"),
            ({"task": {"options": {"num_labels": 5}}}, r"head.classifier.bias has shape \(4,\), not \(5,\)"),
            ({"task": None}, "head.classifier.bias is unknown"),
            ({"options": {"hff-b": {"taps": [0, 1, 2]}}}, r"readout\.levels\.0\.bias is unknown"),
            ({"options": {"hff-b": {"taps": [0, 1, 2, 9]}}}, "layer indices"),
            ({"options": {"hff-b": {"rate": 1}}}, "hff-b has no option 'rate'"),
        ],
    )
    def test_changed_configuration(self, tmp_path, change, message):
        self.refuse(tmp_path, make_model(dtype=torch.bfloat16), change, message)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (
                {"bottleneck": 8},
                r"layers\.0\.adapter_output\.down_weight has shape \(4, 16\), not \(8, 16\)",
            ),
            ({"norm": False}, r"layers\.0\.adapter_output\.norm_weight is unknown"),
            ({"layers": [1]}, r"layers\.0\.adapter_output\.down_bias is unknown"),
            ({"layers": [9]}, "layers must be layer indices"),
        ],
    )
    def test_changed_configuration_of_adapters(self, tmp_path, change, message):
        model = make_model(WITH_ADAPTERS, dtype=torch.bfloat16)
        options = {**model.method.options()["hff-adapters"], **change}
        self.refuse(tmp_path, model, {"options": {"hff-adapters": options}}, message)

    def test_a_readout_alone_has_no_adapters(self, tmp_path):
        model = make_model(WITH_ADAPTERS)
        model.save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        config |= {"method": "hff-b", "options": {"hff-b": config["options"]["hff-b"]}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=r"layers\.0\.adapter_output\.down_bias is unknown"):
            load(tmp_path)

    @pytest.mark.parametrize(
        ("model_type", "changes", "message"),
        [
            ("hubert", {}, "encoder of model_type 'wav2vec2', got 'hubert'"),
            ("wav2vec2", {"num_hidden_layers": 5}, "encoder of num_layers 4, got 5"),
            ("wav2vec2", {"hidden_size": 32}, "encoder of hidden_size 16, got 32"),
        ],
    )
    @both
    def test_another_encoder(self, tmp_path, method, model_type, changes, message):
        make_model(method, dtype=torch.bfloat16).save_pretrained(tmp_path)
        other = TINY[model_type].build(**changes).train()
        before = model_state(other)
        with pytest.raises(ValueError, match=message):
            AdaptedModel.from_pretrained(tmp_path, other)
        assert model_state(other) == before

    def test_an_edited_model(self, tmp_path):
        model = make_model(WITH_ADAPTERS)
        model.save_pretrained(tmp_path)
        before = model_state(model.encoder.model)
        with pytest.raises(ValueError, match="edited already, by method 'hff-adapters'"):
            AdaptedModel.from_pretrained(tmp_path, model.encoder.model)
        assert model_state(model.encoder.model) == before

    def test_the_checkpoint_of_a_prepared_model(self, tmp_path):
        prepared = TINY["wav2vec2"].build(head=True)
        mmtransfer.prepare(prepared, "hff-adapters", bottleneck=4)
        mmtransfer.save(prepared, tmp_path)
        with pytest.raises(ValueError, match="was saved from a prepared model"):
            load(tmp_path)
        task = Classification(num_labels=2)
        AdaptedModel(TINY["wav2vec2"].build(), "head", task).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="was saved from an AdaptedModel"):
            mmtransfer.load_prepared(prepared, tmp_path)
