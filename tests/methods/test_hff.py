"""The assembled model: training part, heads, stored features, saving and loading."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from tiny_encoders import TINY, make_input
from torch import nn
from transformers import AutoModel, Trainer, TrainingArguments

import mmkernels
from mmtransfer.hff import (
    HFF,
    LFF,
    FrozenEncoder,
    FusedOutput,
    HFFb,
    SequenceClassificationHead,
    Taps,
    WeightedSum,
)

LENGTHS = torch.tensor([120, 77, 50])
LABELS = torch.tensor([0, 2, 1])


def make_hff(model_type="wav2vec2", taps=(0, 1, 2, 3), num_labels=4, seed=1, **options):
    model = TINY[model_type].build()
    torch.manual_seed(seed)
    options.setdefault("out_dim", 6)
    return HFF.build(model, taps, num_labels=num_labels, **options)


def tree(folder):
    return sorted(path.name for path in folder.iterdir())


class TestForward:
    @pytest.mark.parametrize("model_type", TINY)
    def test_every_model_classifies(self, model_type):
        hff, inputs = make_hff(model_type), make_input(model_type)
        name = hff.encoder.description.main_input
        out = hff(**{name: inputs}, labels=LABELS)
        assert out.logits.shape == (3, 4)
        torch.testing.assert_close(out.loss, nn.functional.cross_entropy(out.logits, LABELS))
        out.loss.backward()
        trainable = [*hff.fusion.parameters(), *hff.head.parameters()]
        assert all(parameter.grad is not None for parameter in trainable)
        assert all(parameter.grad is None for parameter in hff.encoder.parameters())

    @pytest.mark.parametrize("fusion", ["weighted_sum", "lff", "hff_b", "hff_ub"])
    def test_logits_are_the_mean_of_valid_frames(self, fusion):
        hff, inputs = make_hff(fusion=fusion), make_input("wav2vec2")
        logits = hff(inputs, lengths=LENGTHS).logits
        for row, length in enumerate(LENGTHS.tolist()):
            fused = hff.fusion(hff.encoder(inputs[row : row + 1, :length]).features)
            torch.testing.assert_close(logits[row], hff.head.classifier(fused.mean(0)), rtol=1e-4, atol=1e-5)

    def test_an_utterance_without_frames_is_zeros(self):
        hff = make_hff()
        logits = hff(make_input("wav2vec2"), lengths=torch.tensor([120, 0, 50])).logits
        torch.testing.assert_close(logits[1], hff.head.classifier.bias)

    def test_fused_sequence_without_a_head(self):
        hff, inputs = make_hff(num_labels=None), make_input("wav2vec2")
        out = hff(inputs, attention_mask=(torch.arange(120) < LENGTHS[:, None]).long())
        assert isinstance(out, FusedOutput)
        taps = hff.extract(inputs, LENGTHS)
        assert out.lengths.tolist() == taps.lengths.tolist()
        torch.testing.assert_close(out.last_hidden_state, taps.scatter(hff.fuse(taps)))
        assert out.last_hidden_state.shape == (3, taps.steps, 6)
        assert out.last_hidden_state[2, out.lengths[2] :].count_nonzero() == 0
        out.last_hidden_state.sum().backward()
        with pytest.raises(ValueError, match="labels need a head"):
            hff(inputs, labels=LABELS)

    @pytest.mark.parametrize("num_labels", [4, None])
    def test_stored_features_give_the_same(self, num_labels, monkeypatch):
        hff, inputs = make_hff(num_labels=num_labels), make_input("wav2vec2")
        taps = hff.extract(inputs, LENGTHS)
        expected = hff(inputs, lengths=LENGTHS)
        stored = [utterance.clone() for utterance in taps.split()]
        monkeypatch.setattr(hff.encoder, "forward", None)
        again = hff(features=torch.cat(stored), lengths=taps.lengths)
        for ours, theirs in zip(expected.to_tuple(), again.to_tuple(), strict=True):
            assert torch.equal(ours, theirs)

    def test_bfloat16_features_meet_float32_weights(self):
        hff, inputs = make_hff(dtype=torch.bfloat16), make_input("wav2vec2")
        out = hff(inputs, labels=LABELS)
        assert hff.extract(inputs).features.dtype == torch.bfloat16
        assert out.logits.dtype == torch.float32
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = hff(inputs, labels=LABELS)
        assert cast.logits.dtype == torch.bfloat16
        assert cast.loss.dtype == torch.float32
        torch.testing.assert_close(cast.loss, out.loss, rtol=0.05, atol=0.05)

    def test_input_errors(self):
        hff, inputs = make_hff(), make_input("wav2vec2")
        features = hff.extract(inputs).features
        with pytest.raises(ValueError, match="called 'input_values', got 'input_ids'"):
            hff(input_ids=inputs)
        with pytest.raises(ValueError, match="features go with lengths"):
            hff(features=features)
        with pytest.raises(ValueError, match="features go with lengths"):
            hff(inputs, features=features, lengths=LENGTHS)
        with pytest.raises(ValueError, match="give the main input once"):
            hff()

    def test_parts_must_fit(self):
        encoder = FrozenEncoder(TINY["bert"].build(), (0, 1))
        with pytest.raises(ValueError, match=r"fusion takes 3 taps of width 16.*gives 2 of width 16"):
            HFF(encoder, LFF(3, 16, 4))
        with pytest.raises(ValueError, match="head takes width 5, the fusion gives 4"):
            HFF(encoder, LFF(2, 16, 4), SequenceClassificationHead(5, 2))
        with pytest.raises(ValueError, match="num_labels"):
            SequenceClassificationHead(5, 0)


def test_learns_and_leaves_the_encoder_alone():
    hff, inputs = make_hff(num_labels=3), make_input("wav2vec2")
    before = {name: tensor.clone() for name, tensor in hff.encoder.state_dict().items()}
    optimiser = torch.optim.Adam([p for p in hff.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(30):
        loss = hff(inputs, lengths=LENGTHS, labels=LABELS).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in hff.encoder.state_dict().items())


def test_trains_with_the_transformers_trainer(tmp_path):
    hff, inputs = make_hff(num_labels=3), make_input("wav2vec2")
    rows = [{"input_values": inputs[i], "lengths": LENGTHS[i], "labels": LABELS[i]} for i in range(3)] * 4
    arguments = TrainingArguments(
        str(tmp_path), max_steps=8, learning_rate=1e-2, report_to=[], save_strategy="no", use_cpu=True, seed=0
    )
    trainer = Trainer(hff, arguments, train_dataset=rows, eval_dataset=rows)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    assert trainer.predict(rows).predictions.shape == (12, 3)
    assert not hff.encoder.training


class TestSaving:
    @pytest.mark.parametrize("num_labels", [4, None])
    @pytest.mark.parametrize(
        ("fusion", "options"),
        [
            ("weighted_sum", {"norm": True}),
            ("weighted_sum", {"out_dim": None}),
            ("lff", {"depth": 2}),
            ("hff_b", {"norm": False, "activation": "silu"}),
            ("hff_ub", {}),
        ],
    )
    def test_round_trip(self, tmp_path, fusion, options, num_labels):
        hff = make_hff(taps=("embeddings", 1, -1), fusion=fusion, num_labels=num_labels, **options)
        hff.save_pretrained(tmp_path / "new" / "folder")
        again = HFF.from_pretrained(tmp_path / "new" / "folder", TINY["wav2vec2"].build())
        inputs = make_input("wav2vec2")
        for ours, theirs in zip(hff(inputs).to_tuple(), again(inputs).to_tuple(), strict=True):
            assert torch.equal(ours, theirs)
        assert again.encoder.taps == ("embeddings", 1, 3)
        assert again.fusion.options == hff.fusion.options
        assert not again.training

    def test_files(self, tmp_path):
        hff = make_hff(dtype=torch.bfloat16)
        hff.save_pretrained(tmp_path)
        assert tree(tmp_path) == ["config.json", "model.safetensors"]
        config = json.loads((tmp_path / "config.json").read_text())
        assert config["method"] == "hff"
        assert config["mmkernels_version"] == mmkernels.__version__
        assert config["encoder"] == {
            "name_or_path": "",
            "model_type": "wav2vec2",
            "hidden_size": 16,
            "num_layers": 4,
            "dtype": "bfloat16",
            "kind": "frozen",
            "options": {},
        }
        assert config["taps"] == [0, 1, 2, 3]
        assert config["fusion"]["kind"] == "hff_b"
        assert config["head"] == {"kind": "sequence_classification", "num_labels": 4}
        with safe_open(tmp_path / "model.safetensors", "pt") as weights:
            names = set(weights.keys())
        trained = {name for name, parameter in hff.named_parameters() if parameter.requires_grad}
        assert names == trained
        assert HFF.from_pretrained(tmp_path, TINY["wav2vec2"].build()).encoder.dtype == torch.bfloat16

    def test_encoder_is_found_by_name(self, tmp_path):
        TINY["whisper"].build().save_pretrained(tmp_path / "base")
        model = AutoModel.from_pretrained(tmp_path / "base")
        hff = HFF.build(model, (1, 3), num_labels=2, out_dim=6)
        hff.save_pretrained(tmp_path / "hff")
        again = HFF.from_pretrained(tmp_path / "hff")
        inputs = make_input("whisper", size=20)
        assert torch.equal(again(input_features=inputs).logits, hff(input_features=inputs).logits)

    def test_unnamed_encoder_must_be_given(self, tmp_path):
        make_hff().save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="unnamed encoder; pass it as model"):
            HFF.from_pretrained(tmp_path)

    def test_saving_again_replaces(self, tmp_path):
        make_hff(seed=1).save_pretrained(tmp_path)
        (tmp_path / "training_args.bin").write_bytes(b"mine")
        second = make_hff(seed=2, taps=(0, 1), fusion="lff")
        second.save_pretrained(tmp_path)
        assert tree(tmp_path) == ["config.json", "model.safetensors", "training_args.bin"]
        again = HFF.from_pretrained(tmp_path, TINY["wav2vec2"].build())
        assert torch.equal(again.fusion.projector[0].weight, second.fusion.projector[0].weight)

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
        with pytest.raises(FileExistsError, match="not from method 'hff'"):
            make_hff().save_pretrained(tmp_path)
        assert {path.name: path.read_text() for path in tmp_path.iterdir()} == files

    @pytest.mark.parametrize("step", ["save_file", "os.replace"])
    def test_a_failed_save_leaves_the_old_one(self, tmp_path, monkeypatch, step):
        make_hff(seed=1).save_pretrained(tmp_path)
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

        def fail(_, path, **__):
            if step == "save_file":
                path.write_bytes(b"half")
            raise OSError("disk full")

        monkeypatch.setattr(f"mmtransfer.checkpoint.{step}", fail)
        with pytest.raises(OSError, match="disk full"):
            make_hff(seed=2).save_pretrained(tmp_path)
        monkeypatch.undo()
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

    @pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
    def test_missing_file(self, tmp_path, missing):
        make_hff().save_pretrained(tmp_path)
        (tmp_path / missing).unlink()
        with pytest.raises(FileNotFoundError, match=f"has no {missing}"):
            HFF.from_pretrained(tmp_path, TINY["wav2vec2"].build())

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"method": "aat"}, "must have \"method\": 'hff', got 'aat'"),
            ({"fusion": {"kind": "mean"}}, "fusion kind must be one of"),
            ({"head": {"kind": "ctc"}}, "head kind must be"),
            ({"head": {"kind": "sequence_classification", "num_labels": 5}}, r"\(4, 6\), not \(5, 6\)"),
            ({"head": None}, "head.classifier.bias is unknown"),
            ({"taps": [0, 1, 2]}, "fusion takes 4 taps"),
            ({"taps": [0, 1, 2, 9]}, "layer indices"),
        ],
    )
    def test_changed_configuration(self, tmp_path, change, message):
        make_hff().save_pretrained(tmp_path)
        path = tmp_path / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
        with pytest.raises(ValueError, match=message):
            HFF.from_pretrained(tmp_path, TINY["wav2vec2"].build())

    @pytest.mark.parametrize(
        ("model", "message"),
        [
            (TINY["hubert"].build(), "encoder of model_type 'wav2vec2', got 'hubert'"),
            (TINY["wav2vec2"].build(num_hidden_layers=5), "encoder of num_layers 4, got 5"),
            (TINY["wav2vec2"].build(hidden_size=32), "encoder of hidden_size 16, got 32"),
        ],
    )
    def test_another_encoder(self, tmp_path, model, message):
        make_hff().save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=message):
            HFF.from_pretrained(tmp_path, model)


def test_parts_compose_by_hand():
    encoder = FrozenEncoder(TINY["wav2vec2"].build(), (1, 3))
    for fusion in (HFFb(2, 16, 6), WeightedSum(2, 16)):
        out = HFF(encoder, fusion)(make_input("wav2vec2"))
        assert out.last_hidden_state.shape[2] == fusion.out_dim
    assert isinstance(HFF(encoder, fusion).extract(make_input("wav2vec2")), Taps)
