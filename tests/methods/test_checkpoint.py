"""Adapter checkpoints: what is in them, what loads, and what is refused without touching the model."""

from __future__ import annotations

import json

import pytest
import torch
from prepared_models import build, encode, perturb, prepared
from safetensors.torch import load_file, save_file
from tiny_encoders import TINY, make_input

import mmtransfer
from mmtransfer.hff import HFF

AST = "audio-spectrogram-transformer"


def with_head(seed: int = 0):
    model = TINY[AST].build(head=True).eval()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.classifier.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return model


def logits(model):
    return model(make_input(AST)).logits


@pytest.fixture
def saved(tmp_path):
    model = with_head()
    mmtransfer.prepare(model, "aat-ms", bottleneck=3, scale=0.5, backend="reference")
    perturb(model)
    mmtransfer.save(model, tmp_path / "new" / "folder")
    return model, tmp_path / "new" / "folder"


def test_a_folder_has_the_trainable_part_and_no_more(saved):
    model, folder = saved
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}
    tensors = load_file(folder / "model.safetensors")
    assert tensors.keys() == set(mmtransfer.get_prepared(model).trainable)
    config = json.loads((folder / "config.json").read_text())
    assert config["method"] == "aat"
    assert config["base_model"]["model_type"] == AST
    assert config["prepare"]["bottleneck"] == 3


@pytest.mark.parametrize("runtime", [{}, {"rewrite": True}, {"recompute": "selective"}])
def test_loading_into_a_fresh_model(saved, runtime):
    model, folder = saved
    fresh = with_head(seed=1)
    handle = mmtransfer.load_prepared(fresh, folder, backend="reference", **runtime)
    assert handle is mmtransfer.get_prepared(fresh)
    assert bool(handle.rewritten) == ("rewrite" in runtime)
    torch.testing.assert_close(logits(fresh), logits(model))
    perturb(fresh)
    mmtransfer.load_prepared(fresh, folder)
    torch.testing.assert_close(logits(fresh), logits(model))


@pytest.mark.parametrize("method", ["prompt", "houlsby", "lora", "bitfit", "partial", "head", "full"])
def test_every_method_comes_back(tmp_path, method):
    model = with_head()
    mmtransfer.prepare(model, method, layers=[1, 2], backend="reference")
    perturb(model)
    mmtransfer.save(model, tmp_path)
    fresh = with_head(seed=1)
    mmtransfer.load_prepared(fresh, tmp_path, backend="reference")
    torch.testing.assert_close(logits(fresh), logits(model))


def test_trained_with_kernels_used_without(tmp_path):
    model = with_head()
    mmtransfer.prepare(model, backend="auto")
    perturb(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    labels = torch.tensor([0, 1, 1])
    losses = []
    for _ in range(5):
        loss = model(make_input(AST), labels=labels).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    mmtransfer.save(model, tmp_path)
    fresh = with_head(seed=1)
    mmtransfer.load_prepared(fresh, tmp_path, backend="reference")
    torch.testing.assert_close(logits(fresh), logits(model), rtol=1e-4, atol=1e-5)


class TestRefusals:
    @pytest.fixture
    def fresh(self):
        """Is compared with what it was, whatever the test does."""
        model = with_head(seed=1)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        yield model
        assert model.state_dict().keys() == before.keys()
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert all(parameter.requires_grad for parameter in model.parameters())

    def change(self, folder, edit):
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "model.safetensors")

    def test_wrong_shapes_and_names(self, saved, fresh):
        _, folder = saved
        name = "audio_spectrogram_transformer.layers.1.adapter_mlp.up_weight"
        self.change(folder, lambda tensors: tensors.update({name: torch.zeros(16, 5)}))
        with pytest.raises(ValueError, match=rf"{name} has shape \(16, 5\), not \(16, 3\)"):
            mmtransfer.load_prepared(fresh, folder)
        self.change(folder, lambda tensors: tensors.pop(name))
        with pytest.raises(ValueError, match=f"{name} is missing"):
            mmtransfer.load_prepared(fresh, folder)

    def test_wrong_shapes_for_a_prepared_model(self, saved):
        model, folder = saved
        before = logits(model)
        self.change(folder, lambda tensors: tensors.update({"classifier.dense.bias": torch.zeros(7)}))
        with pytest.raises(ValueError, match=r"classifier.dense.bias has shape \(7,\)"):
            mmtransfer.load_prepared(model, folder)
        assert torch.equal(logits(model), before)

    def test_a_model_of_another_width(self, saved):
        wide = TINY[AST].build(head=True, hidden_size=32)
        with pytest.raises(
            ValueError, match=r"adapter_attention.down_weight has shape \(3, 16\), not \(3, 32\)"
        ):
            mmtransfer.load_prepared(wide, saved[1])
        assert not any("adapter" in name for name in wide.state_dict())

    def test_a_model_prepared_in_another_way(self, saved):
        model = with_head()
        mmtransfer.prepare(model, "aat-m")
        with pytest.raises(
            ValueError, match="prepared with method 'aat_ms', not 'aat_m'; bottleneck 3, not 4"
        ):
            mmtransfer.load_prepared(model, saved[1])

    def test_checkpoints_of_something_else(self, tmp_path, fresh):
        hff = HFF.build(build("bert").float(), [0, 1], fusion="weighted_sum")
        hff.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="\"method\": 'aat', got 'hff'"):
            mmtransfer.load_prepared(fresh, tmp_path)
        with pytest.raises(FileExistsError, match="not from method 'aat'"):
            mmtransfer.save(prepared(build("bert")), tmp_path)
        with pytest.raises(FileNotFoundError, match=r"no config\.json"):
            mmtransfer.load_prepared(fresh, tmp_path / "nowhere")

    @pytest.mark.parametrize("edit", [{}, {"later": 1}, None])
    def test_configurations_that_are_not_whole(self, saved, fresh, edit):
        path = saved[1] / "config.json"
        config = json.loads(path.read_text())
        config["prepare"] = None if edit is None else {"method": "aat-ms", **edit}
        path.write_text(json.dumps(config))
        with pytest.raises(ValueError, match='must have "prepare" with method, bottleneck'):
            mmtransfer.load_prepared(fresh, saved[1])

    def test_unprepared_models_have_nothing_to_save(self, tmp_path, fresh):
        with pytest.raises(ValueError, match="is not prepared"):
            mmtransfer.save(fresh, tmp_path)
        assert not list(tmp_path.iterdir())


def test_running_statistics_come_along(tmp_path):
    """Batch norms of a frozen encoder count on in training mode."""
    fresh = build("wav2vec2-conformer", layerdrop=0.0, mask_time_prob=0.0)
    model = prepared(fresh, "aat-m").train()
    encode(model)
    mmtransfer.save(model.eval(), tmp_path)
    mmtransfer.load_prepared(fresh, tmp_path, backend="reference")
    torch.testing.assert_close(encode(fresh), encode(model))


def test_values_are_those_of_a_double_model(tmp_path):
    model = prepared(build("whisper"))
    mmtransfer.save(model, tmp_path)
    again = build("whisper")
    mmtransfer.load_prepared(again, tmp_path, backend="reference")
    assert torch.equal(encode(again), encode(model))
