"""A saved method names the classes of audio files."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from audio_files import write_clip
from command_line import run
from tiny_encoders import TINY
from transformers import AutoModelForAudioClassification, Wav2Vec2Config, Wav2Vec2FeatureExtractor

import mmtransfer
from mmtransfer import AdaptedModel
from mmtransfer.compare import step as measure
from mmtransfer.data import DataError
from mmtransfer.data.inputs import AudioInput, find_audio_input
from mmtransfer.tasks import Classification
from mmtransfer.training.finite import NotFiniteError

DOCUMENT = Path(__file__).resolve().parents[2] / "docs/methods.md"
METHODS = ("head", "aat-m")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, recordings, a clip of the class "low", and a comparison's models."""
    root = tmp_path_factory.mktemp("work")
    options = {"layerdrop": 0.0, "mask_time_prob": 0.0}
    TINY["wav2vec2"].build(**options).save_pretrained(root / "model")
    Wav2Vec2FeatureExtractor(return_attention_mask=True).save_pretrained(root / "model")
    for label, base in (("high", 3000.0), ("low", 100.0)):
        for take in range(6):
            write_clip(root / "tones" / label / f"{take}.wav", base + 5 * take, 0.1 + 0.01 * take)
    write_clip(root / "clip.wav", 103.0, 0.12)
    write_clip(root / "other.wav", 3003.0, 0.3)
    arguments = ["--model", "model", "--data", "tones", "--methods", *METHODS, "--save-models"]
    arguments += ["--epochs", "12", "--seeds", "1", "--batch-size", "4", "--tuning-epochs", "1", "--cpu"]
    arguments += ["--learning-rate", "0.02", "--max-seconds", "0.2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr(measure, "ROUNDS", (1, 1))
        result = run("compare", *arguments)
    assert result.code == 0, result.stderr
    return root


def documented(method: str) -> str:
    """The lines of the documentation that load a saved method, for this one."""
    blocks = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    (block,) = [block for block in blocks if "recognize(" in block]
    assert len([line for line in block.splitlines() if line]) == 3
    return block.replace("aat-ms-seed0", f"{method}-seed0")


@pytest.mark.parametrize("method", METHODS)
def test_the_documented_lines(work: Path, method: str, monkeypatch, capsys) -> None:
    monkeypatch.chdir(work)
    exec(documented(method), {})
    assert capsys.readouterr().out == "['low']\n"


def test_several_files_in_their_order(work: Path, monkeypatch, tmp_path: Path) -> None:
    """From any folder: the path of the encoder is absolute."""
    monkeypatch.chdir(tmp_path)
    model = mmtransfer.load(work / "reports/compare/models/head-seed0")
    files = [work / "other.wav", str(work / "clip.wav"), work / "other.wav"]
    assert mmtransfer.recognize(model, files, batch_size=2) == ["high", "low", "high"]
    assert mmtransfer.recognize(model, []) == []


def test_configurations_say_what_was_trained(work: Path) -> None:
    for method in METHODS:
        config = json.loads((work / f"reports/compare/models/{method}-seed0/config.json").read_text())
        assert config["labels"] == config["task"]["options"]["labels"] == ["high", "low"]
        assert config["sampling_rate"] == 16_000
        assert config["base_model"]["model_type"] == "wav2vec2"
        assert config["base_model"]["name_or_path"] == str(work / "model")
        assert config["input"]["max_seconds"] == 0.2
    task = json.loads((work / "reports/compare/report.json").read_text())["task"]
    assert (task["labels"], task["sampling_rate"], task["model_type"]) == (
        ["high", "low"],
        16_000,
        "wav2vec2",
    )
    assert task["model_path"] == str(work / "model")


def test_the_input_survives_another_save(work: Path, tmp_path: Path) -> None:
    model = mmtransfer.load(work / "reports/compare/models/head-seed0")
    model.save_pretrained(tmp_path / "again")
    again = mmtransfer.load(tmp_path / "again")
    assert again.audio is not None
    assert model.audio is not None
    assert again.audio.describe() == model.audio.describe()
    assert mmtransfer.recognize(again, work / "clip.wav") == ["low"]


def test_a_model_that_lacks_something(work: Path) -> None:
    encoder = TINY["wav2vec2"].build()
    with pytest.raises(ValueError, match="model has no task"):
        mmtransfer.recognize(AdaptedModel(encoder, "head"), work / "clip.wav")
    encoder = TINY["wav2vec2"].build()
    model = AdaptedModel(encoder, "head", Classification(num_labels=2))
    with pytest.raises(ValueError, match=r"does not know its feature extractor; set model\.audio"):
        mmtransfer.recognize(model, work / "clip.wav")
    model.audio = AudioInput(Wav2Vec2FeatureExtractor(return_attention_mask=True))
    # Without names, numbers.
    assert mmtransfer.recognize(model, work / "clip.wav")[0] in (0, 1)
    with pytest.raises(DataError, match=r"missing\.wav does not exist"):
        mmtransfer.recognize(model, [work / "missing.wav"])
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        mmtransfer.recognize(model, work / "clip.wav", batch_size=0)
    with torch.no_grad():
        model.head.classifier.weight.fill_(float("nan"))
    with pytest.raises(NotFiniteError, match=r"the logits of .*clip\.wav are not finite"):
        mmtransfer.recognize(model, work / "clip.wav")


def test_an_extractor_that_transformers_does_not_have() -> None:
    with pytest.raises(ValueError, match="the feature extractor 'Mine' is not in transformers"):
        AudioInput.of({"max_seconds": None, "extractor": {"feature_extractor_type": "Mine"}})


def test_models_without_an_extractor_on_this_machine(tmp_path: Path) -> None:
    assert find_audio_input(None) is None
    assert find_audio_input("") is None
    assert find_audio_input(str(tmp_path)) is None
    assert find_audio_input("nobody/has-this") is None


class TestLabels:
    @pytest.mark.parametrize("labels", [("a",), ("a", "b", "c"), ("a", "a")])
    def test_names_must_fit(self, labels) -> None:
        with pytest.raises(ValueError, match="labels must be 2 distinct names"):
            Classification(num_labels=2, labels=labels)

    @pytest.mark.parametrize("count", [0, -1, 2.0, True, "2", float("nan")])
    def test_counts(self, count) -> None:
        with pytest.raises(ValueError, match="num_labels must be"):
            Classification(num_labels=count)


class TestPrepared:
    def classifier(self, labels: list[str] | None, folder: Path | None = None) -> torch.nn.Module:
        options = {**TINY["wav2vec2"].options, "num_labels": 2, "layerdrop": 0.0, "classifier_proj_size": 4}
        names = {} if labels is None else {"id2label": dict(enumerate(labels))}
        model = AutoModelForAudioClassification.from_config(Wav2Vec2Config(**options, **names))
        if folder is not None:
            model.save_pretrained(folder)
            Wav2Vec2FeatureExtractor().save_pretrained(folder)
            model = AutoModelForAudioClassification.from_pretrained(folder)
        return model

    def test_the_names_come_back(self, tmp_path: Path) -> None:
        model = self.classifier(["dog", "cat"], tmp_path / "model")
        mmtransfer.prepare(model, "aat-m")
        mmtransfer.save(model, tmp_path / "saved")
        config = json.loads((tmp_path / "saved/config.json").read_text())
        assert (config["labels"], config["sampling_rate"]) == (["dog", "cat"], 16_000)
        assert config["base_model"]["name_or_path"] == str(tmp_path / "model")
        other = self.classifier(None)
        for _ in range(2):
            mmtransfer.load_prepared(other, tmp_path / "saved")
            assert other.config.id2label == {0: "dog", 1: "cat"}
            assert other.config.label2id == {"dog": 0, "cat": 1}

    def test_other_names_are_refused(self, tmp_path: Path) -> None:
        model = self.classifier(["dog", "cat"])
        mmtransfer.prepare(model, "aat-m")
        mmtransfer.save(model, tmp_path)
        other = self.classifier(["cat", "dog"])
        with pytest.raises(ValueError, match=r"was trained for the classes \['dog', 'cat'\], the"):
            mmtransfer.load_prepared(other, tmp_path)
        assert not any("adapter" in name for name, _ in other.named_parameters())

    def test_without_names(self, tmp_path: Path) -> None:
        model = self.classifier(None)
        mmtransfer.prepare(model, "aat-m")
        mmtransfer.save(model, tmp_path)
        assert json.loads((tmp_path / "config.json").read_text())["labels"] is None


def test_earlier_checkpoints_are_loaded(work: Path, tmp_path: Path) -> None:
    shutil.copytree(work / "reports/compare/models/head-seed0", tmp_path / "old")
    path = tmp_path / "old/config.json"
    config = json.loads(path.read_text())
    for name in ("labels", "sampling_rate", "input"):
        del config[name]
    del config["base_model"]["encoder_dtype"], config["task"]["options"]["labels"]
    path.write_text(json.dumps(config))
    model = mmtransfer.load(tmp_path / "old")
    assert model.task == Classification(num_labels=2)
    model.audio = find_audio_input(str(work / "model"))
    model.task = replace(model.task, labels=("high", "low"))
    assert mmtransfer.recognize(model, work / "clip.wav") == ["low"]
