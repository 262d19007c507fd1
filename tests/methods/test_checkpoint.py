"""Checkpoints: their content, loading, and refusals that leave the model alone."""

from __future__ import annotations

import json

import pytest
import torch
from prepared_models import build, encode, exactly, perturb, prepared, rewritten
from safetensors.torch import load_file, save_file
from tiny_encoders import TINY, make_input

import mmtransfer
from mmtransfer import AdaptedModel
from mmtransfer.tasks import Classification

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
    assert config["format"] == "mmtransfer"
    assert config["method"] == "aat-ms"
    assert config["head"] == ["classifier"]
    assert config["base_model"]["model_type"] == AST
    assert config["options"] == {
        "aat-ms": {"layers": None, "bottleneck": 3, "activation": "gelu", "scale": 0.5}
    }


@pytest.mark.parametrize("runtime", [{}, {"rewrite": True}, {"recompute": "selective"}])
def test_loading_into_a_fresh_model(saved, runtime):
    model, folder = saved
    fresh = with_head(seed=1)
    handle = mmtransfer.load_prepared(fresh, folder, backend="reference", **runtime)
    assert handle is mmtransfer.get_prepared(fresh)
    assert bool(rewritten(fresh)) == ("rewrite" in runtime)
    torch.testing.assert_close(logits(fresh), logits(model))
    perturb(fresh)
    mmtransfer.load_prepared(fresh, folder)
    torch.testing.assert_close(logits(fresh), logits(model))


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("prompt", {"layers": [1, 2], "prompt_tokens": 3}),
        ("houlsby", {"layers": [1, 2], "activation": "silu"}),
        ("hff-adapters", {"layers": [1, 2], "bottleneck": 5}),
        ("lora", {"layers": [1, 2], "rank": 2}),
        ("partial", {"layers": [1, 2]}),
        ("aat-s", {"layers": [-1], "bottleneck": 8}),
        ("bitfit", {}),
        ("head", {}),
        ("full", {}),
    ],
)
def test_every_method_comes_back(tmp_path, method, options):
    model = with_head()
    mmtransfer.prepare(model, method, **options, **exactly(method))
    perturb(model)
    mmtransfer.save(model, tmp_path)
    fresh = with_head(seed=1)
    handle = mmtransfer.load_prepared(fresh, tmp_path, **exactly(method))
    assert handle.method == mmtransfer.get_prepared(model).method
    torch.testing.assert_close(logits(fresh), logits(model))


def test_trained_with_kernels_used_without(tmp_path):
    model = with_head()
    mmtransfer.prepare(model, "aat-ms", backend="auto")
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
        """Compared with its earlier state after each test."""
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
        with pytest.raises(ValueError, match=r"on an encoder of hidden_size 16, got 32"):
            mmtransfer.load_prepared(wide, saved[1])
        assert not any("adapter" in name for name in wide.state_dict())

    def test_a_model_of_another_type_with_parameters_of_the_same_names(self, tmp_path):
        mmtransfer.save(prepared(build("wav2vec2"), "aat-m"), tmp_path)
        other = build("hubert")
        with pytest.raises(ValueError, match="on an encoder of model_type 'wav2vec2', got 'hubert'"):
            mmtransfer.load_prepared(other, tmp_path)
        assert not any("adapter" in name for name in other.state_dict())
        model = prepared(other, "aat-m")
        with pytest.raises(ValueError, match="model_type 'wav2vec2', got 'hubert'"):
            mmtransfer.load_prepared(model, tmp_path)

    def test_a_model_prepared_in_another_way(self, saved):
        model = with_head()
        mmtransfer.prepare(model, "aat-m", head="classifier.dense")
        with pytest.raises(
            ValueError,
            match=r"prepared with method 'aat-ms', not 'aat-m'; head \['classifier'\], not .*dense'\]; "
            "bottleneck 3, not None; scale 0.5, not 1.0$",
        ):
            mmtransfer.load_prepared(model, saved[1])

    def test_checkpoints_of_something_else(self, saved, tmp_path, fresh):
        adapted = AdaptedModel(build("bert"), "weighted-sum", Classification(num_labels=2))
        adapted.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"saved from an AdaptedModel; load it by load\("):
            mmtransfer.load_prepared(fresh, tmp_path)
        with pytest.raises(ValueError, match=r"from a prepared model; load it by load_prepared\("):
            mmtransfer.load(saved[1], fresh)
        with pytest.raises(FileNotFoundError, match=r"no config\.json"):
            mmtransfer.load_prepared(fresh, tmp_path / "nowhere")
        (tmp_path / "config.json").write_text('{"model_type": "bert"}')
        with pytest.raises(ValueError, match="no checkpoint of mmtransfer"):
            mmtransfer.load_prepared(fresh, tmp_path)
        for model in (prepared(build("bert")), adapted):
            with pytest.raises(FileExistsError, match=r"config\.json that is not from mmtransfer"):
                mmtransfer.save(model, tmp_path)
        assert (tmp_path / "config.json").read_text() == '{"model_type": "bert"}'
        (tmp_path / "config.json").unlink()
        with pytest.raises(FileExistsError, match=r"model\.safetensors that is not from mmtransfer"):
            mmtransfer.save(adapted, tmp_path)

    @pytest.mark.parametrize("part", ["method", "options", "base_model", "head"])
    @pytest.mark.parametrize("value", [None, {"later": 1}, "missing"])
    def test_configurations_that_are_not_whole(self, saved, fresh, part, value):
        self.edit(saved[1], part, value)
        with pytest.raises(ValueError, match="must have method, options by part, head"):
            mmtransfer.load_prepared(fresh, saved[1])

    @pytest.mark.parametrize("part", ["method", "options", "base_model", "task"])
    @pytest.mark.parametrize("value", [None, {"later": 1}, "missing"])
    def test_configurations_of_adapted_models_that_are_not_whole(self, tmp_path, fresh, part, value):
        AdaptedModel(with_head(), "head", Classification(num_labels=2)).save_pretrained(tmp_path)
        if (part, value) == ("task", None):
            pytest.skip("a model without a task")
        self.edit(tmp_path, part, value)
        with pytest.raises(ValueError, match="must have method, options by part, task"):
            mmtransfer.load(tmp_path, fresh)

    def edit(self, folder, part, value):
        config = json.loads((folder / "config.json").read_text())
        config[part] = value
        if value == "missing":
            del config[part]
        (folder / "config.json").write_text(json.dumps(config))

    @pytest.mark.parametrize(
        ("edit", "message"),
        [
            ({"method": "later"}, "no method is called 'later'"),
            ({"options": {"aat-ms": {"later": 1}}}, "aat-ms has no option 'later'"),
            ({"options": {"aat-ms": {"bottleneck": "3"}}}, "bottleneck must be"),
            ({"head": ["decoder"]}, "head 'decoder' has no parameters"),
        ],
    )
    def test_configurations_of_a_later_version(self, saved, fresh, edit, message):
        path = saved[1] / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **edit}))
        with pytest.raises(ValueError, match=message):
            mmtransfer.load_prepared(fresh, saved[1])

    def test_runtime_options_only(self, saved, fresh):
        for option in ({"bottleneck": 4}, {"scale": 2.0}, {"activation": "relu"}):
            with pytest.raises(
                ValueError, match=f"loading may set how it is computed .*{next(iter(option))}"
            ):
                mmtransfer.load_prepared(fresh, saved[1], **option)

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


OPTIONS = {"bottleneck": 3, "out_dim": 6, "layers": [1, 2]}
THREE = Classification(num_labels=3)


class TestAdaptedModels:
    def adapted(self, method="hff-b+aat-ms", task=THREE, seed=0, **options):
        torch.manual_seed(seed)
        model = AdaptedModel(TINY["whisper"].build(), method, task, **options).eval()
        with torch.no_grad():
            for tensor in model.trained_tensors().values():
                tensor.add_(0.1 * torch.randn_like(tensor))
        return model

    def call(self, model):
        output = model(input_features=make_input("whisper"))
        return output.last_hidden_state if output.logits is None else output.logits

    @pytest.mark.parametrize("task", [None, THREE])
    def test_a_pair_comes_back_with_its_options(self, tmp_path, task):
        model = self.adapted(task=task, backend="reference", **OPTIONS)
        model.save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        assert config["method"] == "hff-b+aat-ms"
        assert (config["options"]["hff-b"]["out_dim"], config["options"]["aat-ms"]["bottleneck"]) == (6, 3)
        assert {name.partition(".")[0] for name in load_file(tmp_path / "model.safetensors")} == {
            "readout",
            "encoder",
            *(["head"] if task else []),
        }
        assert all("conv" not in name for name in load_file(tmp_path / "model.safetensors"))
        loaded = AdaptedModel.from_pretrained(tmp_path, TINY["whisper"].build(), backend="reference")
        assert loaded.method == model.method
        assert loaded.task == task
        assert not loaded.training
        torch.testing.assert_close(self.call(loaded), self.call(model))
        again = mmtransfer.load(tmp_path, TINY["whisper"].build(), recompute="full", rewrite=True)
        assert again.method.of[1].recompute == "full"
        torch.testing.assert_close(self.call(again), self.call(model), rtol=1e-4, atol=1e-5)

    def test_the_model_named_in_the_configuration(self, tmp_path):
        TINY["whisper"].build().save_pretrained(tmp_path / "base")
        from transformers import AutoModel

        base = AutoModel.from_pretrained(tmp_path / "base")
        model = AdaptedModel(base, "aat-m", Classification(num_labels=2))
        model.save_pretrained(tmp_path / "adapted")
        torch.testing.assert_close(self.call(mmtransfer.load(tmp_path / "adapted")), self.call(model.eval()))

    def test_refusals_leave_the_model_alone(self, tmp_path):
        self.adapted(**OPTIONS).save_pretrained(tmp_path)
        base = TINY["whisper"].build()
        state = {name: set(module.__dict__) for name, module in base.named_modules()}
        flags = [p.requires_grad for p in base.parameters()]
        with pytest.raises(ValueError, match="an unnamed encoder; pass it as model"):
            mmtransfer.load(tmp_path)
        with pytest.raises(ValueError, match="num_layers 4, got 3"):
            mmtransfer.load(tmp_path, TINY["whisper"].build(encoder_layers=3))
        with pytest.raises(ValueError, match=r"hff-b\+aat-ms has no option 'later'"):
            mmtransfer.load(tmp_path, base, later=1)
        tensors = load_file(tmp_path / "model.safetensors")
        del tensors["head.classifier.bias"]
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=r"do not fit: head\.classifier\.bias is missing"):
            mmtransfer.load(tmp_path, base)
        assert {name: set(module.__dict__) for name, module in base.named_modules()} == state
        assert [p.requires_grad for p in base.parameters()] == flags

    def test_neither_of_the_two(self, tmp_path):
        with pytest.raises(ValueError, match="is not prepared"):
            mmtransfer.save(torch.nn.Linear(2, 2), tmp_path)
