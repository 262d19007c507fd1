"""A pretrained model for CTC that keeps its own head and alphabet."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command_line import fails, run
from finetune_data import SYMBOLS, finetune, results, speech, write_model, write_speech, write_tokenizer
from tiny_encoders import BASE_VARIANT
from transformers import AutoModelForCTC, AutoProcessor, AutoTokenizer, Wav2Vec2CTCTokenizer

import mmtransfer
from mmtransfer import AdaptedModel
from mmtransfer.data import DataError, from_manifest, read_audio
from mmtransfer.encoders.loading import load_model
from mmtransfer.tasks import CTC, Classification
from mmtransfer.tasks.own_head import find_own_head
from mmtransfer.tasks.vocabulary import read_alphabet
from mmtransfer.training.finetune_settings import FinetuneSettings

KEEP = FinetuneSettings(epochs=1, batch_size=4, cpu=True, keep_head=True)
FAMILY = ("wav2vec2", "hubert", "wavlm", "unispeech", "unispeech-sat", "data2vec-audio", "wav2vec2-conformer")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "ctc", head=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_speech(tmp_path_factory.mktemp("data"))


def same_logits(folder: Path) -> None:
    """The adapted model computes the logits of the pretrained one."""
    whole = AutoModelForCTC.from_pretrained(folder).eval()
    task, tensors = CTC.of_own_head(whole, str(folder))
    adapted = AdaptedModel(load_model(folder, kind=AutoModelForCTC), "head", task).eval()
    adapted.head.load_state_dict(tensors)
    inputs = torch.randn(2, 16_000, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = whole(inputs).logits
        found = adapted(inputs).logits
    torch.testing.assert_close(found, expected.flatten(0, 1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", FAMILY)
def test_the_logits_are_those_of_the_model(name: str, tmp_path: Path) -> None:
    same_logits(write_model(tmp_path / name, head=True, name=name))


@pytest.mark.parametrize("name", ["wav2vec2", "hubert"])
def test_without_a_norm_behind_the_layers(name: str, tmp_path: Path) -> None:
    same_logits(write_model(tmp_path / name, head=True, name=name, **BASE_VARIANT))


def test_the_alphabet_is_that_of_the_tokenizer(model: Path) -> None:
    found = find_own_head(load_model(model, kind=AutoModelForCTC), str(model))
    assert found.alphabet.symbols == (*SYMBOLS[:4], " ", *SYMBOLS[5:])
    assert (found.alphabet.blank, found.alphabet.case) == (0, "upper")
    task, _ = CTC.of_own_head(load_model(model, kind=AutoModelForCTC), str(model))
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert task.encode("ab e") == tokenizer("AB E").input_ids
    assert task.unknown(task.target(replace(speech().test[0], text="abz"))) == ["Z"]


def test_an_alphabet_with_a_space_beside_the_delimiter(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text(json.dumps({"<pad>": 0, "|": 1, " ": 2, "a": 3, "<unk>": 4}))
    tokenizer = Wav2Vec2CTCTokenizer(tmp_path / "vocab.json", bos_token=None, eos_token=None)
    found = read_alphabet(tokenizer, "the model", size=5)
    assert found.symbols == ("<pad>", " ", "<unused 2>", "a", "<unk>")
    task = CTC(vocabulary=found.symbols, blank=found.blank)
    assert task.encode("a a") == tokenizer("a a").input_ids == [3, 1, 3]


def test_the_scores_and_texts_are_those_of_transformers(model: Path, data: Path, tmp_path: Path) -> None:
    """With a learning rate of 0 the model is the pretrained one."""
    arguments = ["--method", "head", "--model", model, "--data", data, "--keep-head", "--learning-rate", "0"]
    done = finetune(tmp_path / "run", *arguments)
    assert done.code == 0, done.stderr
    whole = AutoModelForCTC.from_pretrained(model).eval()
    processor = AutoProcessor.from_pretrained(model)
    texts = []
    for clip in from_manifest(data).test:
        inputs = processor(read_audio(clip.source), sampling_rate=16_000, return_tensors="pt")
        with torch.no_grad():
            ids = whole(inputs.input_values).logits.argmax(-1)
        texts += processor.batch_decode(ids)
    files = [clip.source for clip in from_manifest(data).test]
    found = mmtransfer.recognize(mmtransfer.load(tmp_path / "run"), files)
    # The tokenizer strips, and writes the names of symbols that stand for none.
    plain = [" ".join(re.sub("<.*?>", "", text).split()) for text in texts]
    assert [" ".join(text.split()) for text in found] == plain
    assert len(set(found)) > 1


@pytest.mark.parametrize("method", ["head", "aat-m", "full"])
def test_the_round(model: Path, data: Path, tmp_path: Path, method: str) -> None:
    arguments = ["--method", method, "--model", model, "--data", data, "--keep-head"]
    done = finetune(tmp_path / "run", *arguments)
    assert done.code == 0, done.stderr
    # There is nothing to start: the head is trained already.
    assert "to start" not in done.stderr
    scores = run("evaluate", tmp_path / "run", "--data", data, "--json")
    expected = results(tmp_path / "run")["test"]
    assert json.loads(scores.stdout)["cer"] == pytest.approx(expected["cer"], abs=1e-12)
    task = mmtransfer.load(tmp_path / "run").task
    assert (task.case, task.plain_head, task.vocabulary[4]) == ("upper", False, " ")
    # References are in the case of the alphabet, or all of them would be wrong.
    lines = run("evaluate", tmp_path / "run", "--data", data, "--output", tmp_path / "lines.jsonl")
    assert lines.code == 0
    reference = json.loads((tmp_path / "lines.jsonl").read_text().splitlines()[0])["reference"]
    assert reference == from_manifest(data).test[0].text.upper()


class TestTokenizerFolders:
    def test_the_alphabet_with_a_new_head(self, model: Path, data: Path, tmp_path: Path) -> None:
        tokenizer = write_tokenizer(tmp_path / "tokenizer")
        arguments = ["--method", "head", "--model", model, "--data", data, "--tokenizer", tokenizer]
        done = finetune(tmp_path / "run", *arguments)
        assert done.code == 0, done.stderr
        task = mmtransfer.load(tmp_path / "run").task
        assert task.vocabulary == (*SYMBOLS[:4], " ", *SYMBOLS[5:])
        assert (task.blank, task.case, task.plain_head) == (0, "upper", False)


class TestRefused:
    def test_a_model_without_a_head(self, data: Path, tmp_path: Path) -> None:
        bare = write_model(tmp_path / "bare")
        arguments = ["--method", "head", "--model", bare, "--data", data, "--keep-head"]
        fails(
            finetune(tmp_path / "run", *arguments),
            "keep_head needs a model with a CTC head",
            "lacks 2 weights of the model (lm_head.bias, lm_head.weight",
        )

    def test_a_readout(self, model: Path, data: Path, tmp_path: Path) -> None:
        arguments = ["--method", "weighted-sum", "--model", model, "--data", data, "--keep-head"]
        fails(
            finetune(tmp_path / "run", *arguments), "keep_head needs the last layer alone, and weighted-sum"
        )

    def test_classes(self, model: Path, tmp_path: Path) -> None:
        from mmtransfer.data import synthetic

        words = synthetic(classes=2, train_clips=4, test_clips=1, seconds=0.2)
        with pytest.raises(ValueError, match="the task classification keeps no head"):
            mmtransfer.finetune(model, "head", words, tmp_path / "run", KEEP)

    def test_no_tokenizer(self, data: Path, tmp_path: Path) -> None:
        folder = write_model(tmp_path / "model", head=True)
        for path in folder.glob("*"):
            if "vocab" in path.name or "token" in path.name:
                path.unlink()
        with pytest.raises(ValueError, match="no tokenizer can be loaded from"):
            mmtransfer.finetune(folder, "head", data, tmp_path / "run", KEEP)

    def test_layers_in_between(self, tmp_path: Path) -> None:
        folder = write_model(tmp_path / "model", head=True, add_adapter=True, output_hidden_size=16)
        with pytest.raises(ValueError, match="has layers between its encoder and its CTC head"):
            find_own_head(load_model(folder, kind=AutoModelForCTC), str(folder))

    def test_another_kind_of_model(self, model: Path) -> None:
        with pytest.raises(ValueError, match=r"has no CTC head to keep \(Wav2Vec2Model\)"):
            find_own_head(load_model(model), str(model))
        with pytest.raises(ValueError, match="keeps no head"):
            Classification.of_own_head(load_model(model), str(model))

    def test_characters_outside(self, model: Path, tmp_path: Path) -> None:
        recordings = speech()
        recordings.train[0] = replace(recordings.train[0], text="abzz")
        found = mmtransfer.finetune(model, "head", recordings, tmp_path / "run", KEEP)
        assert "characters outside the alphabet ('Z' 2)" in found.notes[0]
        with pytest.raises(DataError, match=r"outside the alphabet \('Z' 2\)"):
            mmtransfer.finetune(model, "head", recordings, tmp_path / "new", replace(KEEP, strict=True))
