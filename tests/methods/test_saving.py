"""Prepared models in the formats that people save models in: outputs come back, or a call is named."""

from __future__ import annotations

import copy
import itertools
import json
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from prepared_models import complete, perturb
from safetensors.torch import load_file, load_model, save_file, save_model
from tiny_encoders import TINY, make_input
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import mmtransfer
from mmtransfer import AdaptedModel, EditMethod, registry
from mmtransfer.tasks import Classification

EDITS = [name for name, method in registry.methods().items() if method().has_edit or name == "head"]
#: Methods that train weights of the model alone.
INSIDE = {"head", "full", "partial", "bitfit"}
NOT_POSSIBLE = {("wav2vec2-conformer", "prompt")}
AST = "audio-spectrogram-transformer"
TYPES = ["wav2vec2", AST, "hubert", "wav2vec2-conformer", "bert"]


def build(model_type: str = "wav2vec2", seed: int = 0, **changes: Any) -> Any:
    torch.manual_seed(seed)
    return TINY[model_type].build(head=True, **changes).eval()


def prepare(model: nn.Module, method: str, **options: Any) -> nn.Module:
    torch.manual_seed(1)
    mmtransfer.prepare(model, complete(method), **options)
    perturb(model)
    return model


def logits(model: Any, model_type: str = "wav2vec2") -> torch.Tensor:
    with torch.no_grad():
        return model(make_input(model_type)).logits


@pytest.mark.parametrize("method", EDITS)
@pytest.mark.parametrize("model_type", TYPES)
def test_save_pretrained_loads_to_the_same_outputs_or_names_the_call(tmp_path, model_type, method):
    if (model_type, method) in NOT_POSSIBLE:
        pytest.skip("the model cannot have the method")
    model = prepare(build(model_type), method)
    model.save_pretrained(tmp_path)
    if method in INSIDE:
        again = type(model).from_pretrained(tmp_path).eval()
        torch.testing.assert_close(logits(again, model_type), logits(model, model_type))
        return
    with pytest.raises(Exception, match=r"load it by mmtransfer\.load_prepared\(model, folder\)"):
        type(model).from_pretrained(tmp_path)
    again = build(model_type)
    mmtransfer.load_prepared(again, tmp_path)
    torch.testing.assert_close(logits(again, model_type), logits(model, model_type))


def test_a_checkpoint_of_an_adapted_model_is_refused_by_transformers(tmp_path):
    base = TINY["wav2vec2"].build()
    AdaptedModel(base, "weighted-sum", Classification(num_labels=2)).save_pretrained(tmp_path)
    with pytest.raises(Exception, match=r"load it by mmtransfer\.load\(folder\)"):
        type(base).from_pretrained(tmp_path)


def test_a_part_of_a_model_is_refused(tmp_path):
    model = prepare(build(), "aat-ms")
    adapted = AdaptedModel(TINY["wav2vec2"].build(), "hff-adapters", Classification(num_labels=2))
    for part in (model.wav2vec2, adapted.encoder.model):
        with pytest.raises(ValueError, match=r"save the whole with mmtransfer\.save\(model, folder\)"):
            part.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    mmtransfer.revert(model)
    adapted.revert()
    for index, part in enumerate((model, model.wav2vec2, adapted.encoder.model)):
        part.save_pretrained(tmp_path / str(index))
        type(part).from_pretrained(tmp_path / str(index))


@pytest.mark.parametrize("method", EDITS)
def test_reverting_gives_every_attribute_back(method):
    model = build()
    model._keys_to_ignore_on_save = ["mine"]
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    mmtransfer.prepare(model, complete(method))
    mmtransfer.revert(model)
    assert {name: vars(module).keys() for name, module in model.named_modules()} == {
        name: attributes.keys() for name, attributes in before.items()
    }
    assert model._keys_to_ignore_on_save == ["mine"]


def test_uploading_at_once_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"saved first and uploaded then"):
        prepare(build(), "aat-m").save_pretrained(tmp_path, push_to_hub=True)


def test_a_copy_saves_itself(tmp_path):
    model = prepare(build(), "aat-m")
    twin = copy.deepcopy(model)
    perturb(twin)
    twin.save_pretrained(tmp_path)
    again = build()
    mmtransfer.load_prepared(again, tmp_path)
    torch.testing.assert_close(logits(again), logits(twin))
    assert not torch.allclose(logits(again), logits(model))


@pytest.mark.parametrize("method", EDITS)
def test_formats_of_torch_and_safetensors(tmp_path, method):
    model = prepare(build(AST), method)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    torch.testing.assert_close(logits(loaded, AST), logits(model, AST))
    loaded.save_pretrained(tmp_path / "again")
    twin = prepare(build(AST, seed=2), method)
    twin.load_state_dict(model.state_dict())
    torch.testing.assert_close(logits(twin, AST), logits(model, AST))
    save_model(model, str(tmp_path / "model.safetensors"))
    third = prepare(build(AST, seed=3), method)
    load_model(third, tmp_path / "model.safetensors")
    torch.testing.assert_close(logits(third, AST), logits(model, AST))
    if method not in INSIDE:
        with pytest.raises(RuntimeError, match="Unexpected key"):
            build(AST).load_state_dict(model.state_dict())


class Clips(torch.utils.data.Dataset):
    def __init__(self) -> None:
        self.inputs = make_input(AST)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_values": self.inputs[index], "labels": index % 2}


class Snapshots(TrainerCallback):
    """The model's tensors at each checkpoint."""

    def __init__(self) -> None:
        self.taken: dict[int, dict[str, torch.Tensor]] = {}

    def on_save(self, args, state, control, model=None, **_):
        self.taken[state.global_step] = {name: each.clone() for name, each in model.state_dict().items()}


@pytest.mark.parametrize("method", ["aat-ms", "lora", "prompt", "full", "partial", "bitfit", "head"])
def test_checkpoints_of_the_trainer(tmp_path, method, caplog):
    model_type = AST
    model = prepare(build(model_type), method)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=2,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        learning_rate=0.05,
        load_best_model_at_end=True,
        metric_for_best_model="earliness",
        greater_is_better=True,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    count, snapshots = itertools.count(), Snapshots()
    trainer = Trainer(
        model,
        arguments,
        train_dataset=Clips(),
        eval_dataset=Clips(),
        # The first checkpoint is the best: if it is not loaded, the model is that of the last.
        compute_metrics=lambda _: {"earliness": -next(count)},
        callbacks=[snapshots],
    )
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best.endswith("checkpoint-1")
    trained = mmtransfer.get_prepared(model).trainable
    assert not any(torch.equal(snapshots.taken[4][name], snapshots.taken[1][name]) for name in trained)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, snapshots.taken[1][name]), name
    assert "missing keys" not in caplog.text
    trainer.save_model(str(tmp_path / "final"))
    for folder in (best, tmp_path / "final"):
        if method in INSIDE:
            again = type(model).from_pretrained(folder).eval()
        else:
            with pytest.raises(Exception, match=r"mmtransfer\.load_prepared\(model, folder\)"):
                type(model).from_pretrained(folder)
            again = build(model_type)
            mmtransfer.load_prepared(again, folder)
        torch.testing.assert_close(logits(again, model_type), logits(model.eval(), model_type))
    resumed = prepare(build(model_type, seed=5), method)
    arguments.max_steps = 5
    arguments.load_best_model_at_end = False
    arguments.eval_strategy = arguments.save_strategy = "no"
    start = Snapshots()
    start.on_train_begin = start.on_save  # type: ignore[method-assign]
    Trainer(resumed, arguments, train_dataset=Clips(), callbacks=[start]).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-4")
    )
    for name in trained:
        assert torch.equal(start.taken[4][name], snapshots.taken[4][name]), name


def test_a_gathered_state_dict_is_what_is_saved(tmp_path):
    model = prepare(build(), "aat-m")
    gathered = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=gathered)
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == set(mmtransfer.get_prepared(model).trainable)
    assert all(torch.equal(tensor, gathered[name]) for name, tensor in saved.items())
    model.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other").exists()
    gathered.pop("lm_head.weight")
    with pytest.raises(ValueError, match=r"state_dict lacks 1 trained tensors, such as lm_head\.weight"):
        model.save_pretrained(tmp_path, state_dict=gathered)


@pytest.mark.parametrize("failing", ["config.json", "model.safetensors"])
def test_an_interrupted_save_is_noticed(tmp_path, monkeypatch, failing):
    from mmtransfer import checkpoint

    model = prepare(build(), "aat-m")
    mmtransfer.save(model, tmp_path)
    before = logits(model)
    replace = checkpoint.replace_file

    def interrupted(target, write):
        if target.name == failing:
            raise KeyboardInterrupt
        replace(target, write)

    perturb(model)
    monkeypatch.setattr(checkpoint, "replace_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        mmtransfer.save(model, tmp_path)
    monkeypatch.undo()
    fresh = build()
    if failing == "model.safetensors":
        mmtransfer.load_prepared(fresh, tmp_path)
        torch.testing.assert_close(logits(fresh), before)
        return
    with pytest.raises(ValueError, match="are from two saves, of which the later was interrupted"):
        mmtransfer.load_prepared(fresh, tmp_path)
    assert not mmtransfer.preparation.is_prepared(fresh)
    mmtransfer.save(model, tmp_path)
    mmtransfer.load_prepared(fresh, tmp_path)


def test_weights_are_widened_and_never_rounded(tmp_path):
    mmtransfer.save(prepare(build(), "full"), tmp_path)
    narrow = build().bfloat16()
    with pytest.raises(ValueError, match=r"rounded to torch\.bfloat16; load the model in torch\.float32"):
        mmtransfer.load_prepared(narrow, tmp_path)
    assert not mmtransfer.preparation.is_prepared(narrow)
    mmtransfer.load_prepared(build().double(), tmp_path)


def test_what_has_no_values_or_no_name_is_refused(tmp_path):
    model = prepare(build(), "aat-m")
    for folder in ("", None):
        with pytest.raises(ValueError, match="folder must be a path"):
            mmtransfer.save(model, folder)
    mmtransfer.save(model, tmp_path / "saved")
    with pytest.raises(ValueError, match="is on the meta device, load its model first"):
        mmtransfer.load_prepared(build().to("meta"), tmp_path / "saved")
    with pytest.raises(ValueError, match="is on the meta device and has no values to save"):
        mmtransfer.save(prepare(build().to("meta"), "aat-m"), tmp_path / "meta")
    torch.nn.utils.parametrizations.weight_norm(model.wav2vec2.encoder.layers[0].adapter_mlp, "down_weight")
    with pytest.raises(ValueError, match=r"down_weight, which is trained since prepare, is gone"):
        mmtransfer.save(model, tmp_path / "changed")


class Drawn(torch.nn.Module):
    """A frozen random projection with a learnt scale."""

    def __init__(self, width):
        super().__init__()
        self.register_buffer("projection", torch.randn(width, width) / 4)
        self.scale = torch.nn.Parameter(torch.full((width,), 0.5))

    def forward(self, x):
        return x + (x @ self.projection) * self.scale


class ThroughDrawn:
    def __init__(self, inner, drawn):
        self.inner, self.drawn = inner, drawn

    def __call__(self, *args, **kwargs):
        output = self.inner(*args, **kwargs)
        return (self.drawn(output[0]), *output[1:]) if isinstance(output, tuple) else self.drawn(output)


@pytest.fixture
def drawn():
    @dataclass(frozen=True, kw_only=True)
    class DrawnMethod(EditMethod):
        """Frozen random projections."""

        name: ClassVar[str] = "drawn"
        title: ClassVar[str] = "Drawn"
        paper: ClassVar[str] = "none"

        def change(self, edit, encoder, layers):
            for layer in layers:
                module = edit.add(layer, "drawn", Drawn(encoder.hidden_size))
                edit.override(layer, ThroughDrawn(layer.forward, module))

    registry.register(DrawnMethod)
    yield "drawn"
    registry.unregister("drawn")


def test_buffers_that_a_method_brings_are_saved(tmp_path, drawn):
    model = prepare(build(), drawn)
    mmtransfer.save(model, tmp_path / "prepared")
    fresh = build()
    mmtransfer.load_prepared(fresh, tmp_path / "prepared")
    assert torch.equal(logits(fresh), logits(model))
    adapted = AdaptedModel(TINY["wav2vec2"].build(), drawn)
    base = TINY["wav2vec2"].build()
    base.load_state_dict({k: v for k, v in adapted.encoder.model.state_dict().items() if "drawn" not in k})
    adapted.save_pretrained(tmp_path / "adapted")
    again = mmtransfer.load(tmp_path / "adapted", base)
    inputs = make_input("wav2vec2")
    assert torch.equal(again(inputs).last_hidden_state, adapted.eval()(inputs).last_hidden_state)


def test_an_encoder_that_moved_is_named(tmp_path):
    encoder = TINY["wav2vec2"].build()
    encoder.save_pretrained(tmp_path / "encoder")
    from mmtransfer.encoders.loading import load_model

    AdaptedModel(load_model(tmp_path / "encoder"), "aat-m").save_pretrained(tmp_path / "saved")
    (tmp_path / "encoder").rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match=r"encoder cannot|cannot be loaded from .*encoder; give it"):
        mmtransfer.load(tmp_path / "saved")
    assert mmtransfer.load(tmp_path / "saved", tmp_path / "moved").encoder.num_layers == 4


def test_tensors_that_share_memory_are_saved(tmp_path):
    adapted = AdaptedModel(TINY["wav2vec2"].build(), "lff", Classification(num_labels=2), depth=2)
    adapted.readout.projector.add_module("again", adapted.readout.projector[0])
    adapted.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert torch.equal(saved["readout.projector.again.weight"], saved["readout.projector.0.weight"])


class TestPeft:
    """LoRA in peft's own format."""

    @pytest.fixture(autouse=True)
    def peft(self):
        self.peft = pytest.importorskip("peft")

    @pytest.mark.parametrize("model_type", ["wav2vec2", AST, "wav2vec2-bert"])
    def test_there_and_back(self, tmp_path, model_type):
        model = prepare(build(model_type), "lora", rank=2)
        mmtransfer.save(model, tmp_path / "ours")
        theirs = self.peft.PeftModel.from_pretrained(build(model_type), tmp_path / "ours").eval()
        torch.testing.assert_close(logits(theirs, model_type), logits(model, model_type))
        theirs.save_pretrained(tmp_path / "theirs")
        assert not (tmp_path / "theirs" / "config.json").exists()
        fresh = build(model_type, seed=0)
        prepared = mmtransfer.load_prepared(fresh, tmp_path / "theirs")
        assert prepared.method.rank == 2
        torch.testing.assert_close(logits(fresh, model_type), logits(model, model_type))
        perturb(fresh)
        mmtransfer.load_prepared(fresh, tmp_path / "theirs")
        torch.testing.assert_close(logits(fresh, model_type), logits(model, model_type))

    def wrapped(self, tmp_path, **options):
        torch.manual_seed(1)
        config = self.peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], **options})
        theirs = self.peft.get_peft_model(build(), config).eval()
        with torch.no_grad():
            for name, parameter in theirs.named_parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter)) if "lora" in name else None
        theirs.save_pretrained(tmp_path)
        return theirs

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"lora_alpha": 2, "modules_to_save": ["lm_head"]},
            {"use_rslora": True, "lora_alpha": 3},
            {"layers_to_transform": [0, 2], "layers_pattern": "layers"},
        ],
        ids=str,
    )
    def test_folders_of_peft(self, tmp_path, options):
        theirs = self.wrapped(tmp_path, **options)
        fresh = build()
        prepared = mmtransfer.load_prepared(fresh, tmp_path)
        torch.testing.assert_close(logits(fresh), logits(theirs))
        assert prepared.head == options.get("modules_to_save", [])

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"use_dora": True}, "use_dora True; a plain LoRA can be loaded here"),
            ({"bias": "all"}, "bias 'all'"),
            ({"target_modules": ["q_proj", "v_proj", "k_proj"]}, r"updates of .*k_proj"),
            ({"target_modules": ["q_proj"]}, r"updates of .*q_proj"),
            ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
            ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
            ({"init_lora_weights": "olora"}, "init_lora_weights 'olora'"),
        ],
    )
    def test_other_adapters_of_peft_are_refused(self, tmp_path, options, message):
        self.wrapped(tmp_path, **options)
        fresh = build()
        with pytest.raises(ValueError, match=message):
            mmtransfer.load_prepared(fresh, tmp_path)
        assert not any("lora" in name for name, _ in fresh.named_parameters())

    def test_files_of_an_earlier_save_do_not_stay(self, tmp_path):
        mmtransfer.save(prepare(build(), "lora"), tmp_path)
        assert (tmp_path / "adapter_config.json").exists()
        mmtransfer.save(prepare(build(), "aat-m"), tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}

    def test_a_folder_of_peft_is_not_replaced(self, tmp_path):
        self.wrapped(tmp_path)
        with pytest.raises(FileExistsError, match=r"adapter_config\.json that is not from mmtransfer"):
            mmtransfer.save(prepare(build(), "aat-m"), tmp_path)

    @pytest.mark.parametrize("model_type", ["wav2vec2-conformer", "bert"])
    def test_what_the_format_lacks_is_in_ours_alone(self, tmp_path, model_type):
        """Running statistics; a head that is tied to the embeddings."""
        model = prepare(build(model_type), "lora")
        mmtransfer.save(model, tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}

    def test_a_configuration_without_weights_is_no_checkpoint(self, tmp_path):
        self.wrapped(tmp_path)
        (tmp_path / "adapter_model.safetensors").unlink()
        with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
            mmtransfer.load_prepared(build(), tmp_path)


def test_weights_without_a_mark_are_loaded(tmp_path):
    """As files of other tools are."""
    model = prepare(build(), "aat-m")
    mmtransfer.save(model, tmp_path)
    save_file(load_file(tmp_path / "model.safetensors"), tmp_path / "model.safetensors")
    fresh = build()
    mmtransfer.load_prepared(fresh, tmp_path)
    torch.testing.assert_close(logits(fresh), logits(model))
    assert json.loads((tmp_path / "config.json").read_text())["save_id"]
