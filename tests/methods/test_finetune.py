"""`mmtransfer finetune`, `evaluate` and `predict`: the round with one method of each kind, on both tasks."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import random
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import psutil
import pytest
import soundfile
import torch
from audio_files import write_clip
from command_line import fails, run
from finetune_data import finetune, json_lines, results, speech, write_model, write_speech, write_tones
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import TrainerCallback

import mmtransfer
from mmtransfer import cli
from mmtransfer.data import DataError, Recordings, from_manifest, synthetic, synthetic_speech
from mmtransfer.encoders.loading import load_model
from mmtransfer.tasks import CTC
from mmtransfer.training import loop
from mmtransfer.training.finetune_settings import FinetuneSettings
from mmtransfer.training.selection import Findings, hold_out
from mmtransfer.training.settings import Training

#: A readout, an edit, a pair, LoRA, prompts, and all weights.
METHODS = ("weighted-sum", "aat-m", "hff-b+hff-adapters", "lora", "prompt", "full")
QUICK = FinetuneSettings(epochs=2, batch_size=4, cpu=True, start_epochs=2, workers=0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "wav2vec2")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("data")
    return {"ctc": write_speech(root / "speech"), "classification": write_tones(root / "tones")}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, model: Path, data: dict[str, Path]) -> Path:
    """A model of transcripts, of clips that two processes decoded."""
    output = tmp_path_factory.mktemp("trained") / "run"
    arguments = ["--method", "head", "--model", model, "--data", data["ctc"]]
    result = finetune(output, *arguments, "--epochs", "4", "--workers", "2")
    assert result.code == 0, result.stderr
    return output


def find_root_change(folder: Path, model: Path) -> set[str]:
    """The parts of a trained model whose tensors differ from those that it started with."""
    saved = mmtransfer.load(folder)
    torch.manual_seed(0)
    fresh = mmtransfer.AdaptedModel(load_model(model), saved.method, saved.task)
    tensors = fresh.trained_tensors()
    return {
        name.split(".")[0]
        for name, tensor in saved.trained_tensors().items()
        if not torch.equal(tensor, tensors[name])
    }


class TestRound:
    @pytest.mark.parametrize("task", ["classification", "ctc"])
    @pytest.mark.parametrize("method", METHODS)
    def test_a_model_is_trained_scored_and_used(self, model, data, tmp_path, method, task) -> None:
        output, lines = tmp_path / "run", tmp_path / "lines.jsonl"
        arguments = ["--method", method, "--task", task, "--model", model, "--data", data[task]]
        done = finetune(output, *arguments, "--learning-rate", "0.01")
        assert done.code == 0, done.stderr
        found = results(output)
        assert not (output / "states").exists()
        assert (found["method"]["name"], found["task"]["name"]) == (method, task)
        assert [point["steps"] for point in found["curve"]] == [found["steps"] // 2, found["steps"]]
        parts = find_root_change(output, model)
        assert "head" in parts
        assert ("encoder" in parts) == (method != "weighted-sum")

        scores = run("evaluate", output, "--data", data[task], "--json", "--output", lines, "--cpu")
        assert scores.code == 0, scores.stderr
        record = json.loads(scores.stdout)
        assert (record.pop("split"), record.pop("clips")) == ("test", 4)
        assert record == pytest.approx(found["test"], abs=1e-12)
        validated = run("evaluate", output, "--data", data[task], "--json", "--split", "validation", "--cpu")
        for name, value in found["validation"].items():
            assert json.loads(validated.stdout)[name] == pytest.approx(value, abs=1e-12)

        rows = json_lines(lines.read_text(encoding="utf-8"))
        # Each clip has its own scores; those of all weigh transcripts by their length.
        metric = {"classification": "accuracy", "ctc": "cer"}[task]
        sizes = [1 if task == "classification" else len(row["reference"]) for row in rows]
        mean = sum(row[metric] * size for row, size in zip(rows, sizes, strict=True)) / sum(sizes)
        assert mean == pytest.approx(found["test"][metric])
        predicted = run("predict", output, *(row["path"] for row in rows), "--json", "--cpu")
        assert predicted.code == 0, predicted.stderr
        key = {"classification": "label", "ctc": "text"}[task]
        expected = [{"path": row["path"], key: row["prediction"]} for row in rows]
        assert json_lines(predicted.stdout) == expected
        recordings = from_manifest(data[task])
        targets = [clip.text or recordings.classes[clip.label] for clip in recordings.test]
        assert [row["reference"] for row in rows] == targets

    def test_classes_are_learnt(self, model, data, tmp_path) -> None:
        arguments = ["--method", "full", "--model", model, "--data", data["classification"]]
        done = finetune(tmp_path / "run", *arguments, "--epochs", "5", "--learning-rate", "0.01")
        assert done.code == 0, done.stderr
        assert results(tmp_path / "run")["test"] == {"accuracy": 1.0}
        folder = data["classification"].parent
        files = [folder / "low-test0.wav", folder / "high-test1.wav"]
        found = run("predict", tmp_path / "run", *files)
        assert found.stdout == f"{files[0]}\tlow\n{files[1]}\thigh\n"

    def test_transcripts_are_learnt(self, tmp_path) -> None:
        """Tones as letters: in some seconds of training a model this small gets half of them."""
        recordings = synthetic_speech(train_clips=48, test_clips=8, letters="ab")
        settings = FinetuneSettings(
            epochs=15,
            batch_size=8,
            cpu=True,
            learning_rate=0.01,
            start_epochs=0,
            workers=0,
            validation_fraction=0.0,
        )
        folder = write_model(tmp_path / "model", hidden_size=32, intermediate_size=48)
        found = mmtransfer.finetune(folder, "full", recordings, tmp_path / "run", settings)
        assert found.test["cer"] < 0.7

    def test_the_function_and_the_command_give_the_same(self, model, data, trained, tmp_path) -> None:
        settings = replace(QUICK, epochs=4)
        found = mmtransfer.finetune(model, "head", data["ctc"], tmp_path / "run", settings)
        assert found.test == results(trained)["test"]
        assert found.curve[-1].scores == results(trained)["curve"][-1]["scores"]
        ours, theirs = (mmtransfer.load(each).trained_tensors() for each in (tmp_path / "run", trained))
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())

    def test_a_module_needs_its_extractor(self, model, data, tmp_path) -> None:
        module = load_model(model)
        with pytest.raises(ValueError, match="extractor must be given"):
            mmtransfer.finetune(module, "head", data["ctc"], tmp_path / "run", QUICK)
        mmtransfer.finetune(module, "head", data["ctc"], tmp_path / "run", QUICK, extractor=model)
        assert mmtransfer.load(tmp_path / "run", model).audio is not None

    def test_a_folder_of_classes_gets_its_parts(self, model, tmp_path) -> None:
        recordings = synthetic(classes=3, train_clips=8, test_clips=3, seconds=0.3)
        for index, clip in enumerate([*recordings.train, *recordings.test]):
            folder = tmp_path / "words" / recordings.classes[clip.label]
            folder.mkdir(parents=True, exist_ok=True)
            soundfile.write(folder / f"{index}.wav", clip.source, 16_000)
        done = finetune(tmp_path / "run", "--method", "head", "--model", model, "--data", tmp_path / "words")
        assert done.code == 0, done.stderr
        assert results(tmp_path / "run")["data"]["clips"] == {"train": 24, "validation": 3, "test": 6}


class TestSettings:
    def test_a_recipe_gives_the_same_as_flags(self, model, data, tmp_path) -> None:
        recipe = tmp_path / "mine.yaml"
        recipe.write_text(
            f"method: aat-m\nmodel: {model}\ndata: {data['ctc']}\nepochs: 3\nbatch-size: 4\ncpu: true\n"
            "learning_rate: 2e-3\npatience: 5\nevaluate-every: 2\nset: {bottleneck: 3}\n"
        )
        by_recipe = run("finetune", "--recipe", recipe, "--output", tmp_path / "a", "--epochs", "2")
        flags = ["--method", "aat-m", "--model", model, "--data", data["ctc"], "--set", "bottleneck=3"]
        flags += ["--learning-rate", "2e-3", "--patience", "5", "--evaluate-every", "2"]
        flags += ["--epochs", "2", "--batch-size", "4", "--cpu"]
        by_flags = run("finetune", "--output", tmp_path / "b", *flags)
        assert (by_recipe.code, by_flags.code) == (0, 0), by_recipe.stderr + by_flags.stderr
        ours, theirs = results(tmp_path / "a"), results(tmp_path / "b")
        assert ours["training"] == theirs["training"]
        assert ours["training"]["epochs"] == 2
        assert ours["method"]["options"]["aat-m"]["bottleneck"] == 3
        assert (tmp_path / "a/run.json").read_text() == (tmp_path / "b/run.json").read_text()
        assert ours["test"] == theirs["test"]

    def test_values_reach_the_training(self, model, data, tmp_path) -> None:
        flags = ["--learning-rate", "0.005", "--weight-decay", "0.1", "--accumulate", "2", "--seed", "7"]
        flags += ["--max-steps", "3", "--bf16", "--workers", "0"]
        done = finetune(tmp_path / "run", "--method", "head", "--model", model, "--data", data["ctc"], *flags)
        assert done.code == 0, done.stderr
        found = results(tmp_path / "run")
        expected = Training(
            epochs=2,
            batch_size=4,
            learning_rate=0.005,
            weight_decay=0.1,
            accumulate=2,
            seed=7,
            max_steps=3,
            bf16=True,
            cpu=True,
        )
        assert Training(**found["training"]) == expected
        assert found["steps"] == 3

    @pytest.mark.parametrize("flags", [("--no-cache", "--workers", "1"), ("--recompute",)])
    def test_what_saves_memory_changes_no_result(self, model, data, tmp_path, flags) -> None:
        """But for rounding."""
        arguments = ["--method", "aat-m", "--model", model, "--data", data["ctc"], "--start-epochs", "0"]
        for name, more in (("plain", ()), ("other", flags)):
            done = finetune(tmp_path / name, *arguments, *more)
            assert done.code == 0, done.stderr
        ours, theirs = (mmtransfer.load(tmp_path / name).trained_tensors() for name in ("plain", "other"))
        for name, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[name], atol=2e-4, rtol=1e-3, msg=name)

    @pytest.mark.parametrize("method", ["head", "full"])
    def test_clips_are_made_in_every_step_if_there_is_no_room(
        self, model, data, tmp_path, monkeypatch, method: str
    ) -> None:
        small = psutil.virtual_memory()._replace(available=1000)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: small)
        arguments = ["--method", method, "--model", model, "--data", data["ctc"]]
        done = finetune(tmp_path / "run", *arguments, "--epochs", "1", "--workers", "1")
        assert done.code == 0, done.stderr
        what = "features" if method == "head" else "inputs"
        assert re.search(rf"the cached {what} need .* are free: they are made in every step", done.stderr)
        assert len(results(tmp_path / "run")["notes"]) > 0

    @pytest.mark.parametrize(("part", "flags"), [("train", []), ("test", ["--no-cache"])])
    def test_an_error_of_a_worker_is_one_sentence(self, model, tmp_path, part: str, flags) -> None:
        data = write_speech(tmp_path / "data")
        file = tmp_path / "data" / f"{part}1.wav"
        samples, rate = soundfile.read(file, dtype="float32")
        samples[100] = np.nan
        soundfile.write(file, samples, rate, subtype="FLOAT")
        arguments = ["--method", "head", "--model", model, "--data", data, "--workers", "1", "--epochs", "1"]
        done = finetune(tmp_path / "run", *arguments, *flags)
        assert done.code == 1
        expected = f"mmtransfer: {file} holds NaN or infinite samples; re-export the file or leave it out"
        assert done.stderr.splitlines()[-1] == expected

    def test_a_tokenizer(self, model, data, tmp_path) -> None:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        texts = [clip.text for clip in from_manifest(data["ctc"]).train]
        tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=12))
        tokenizer.save(str(tmp_path / "tokens.json"))
        arguments = ["--method", "head", "--model", model, "--data", data["ctc"]]
        done = finetune(tmp_path / "run", *arguments, "--tokenizer", tmp_path / "tokens.json")
        assert done.code == 0, done.stderr
        task = mmtransfer.load(tmp_path / "run").task
        assert len(task.vocabulary) == tokenizer.get_vocab_size() + 1
        scores = run("evaluate", tmp_path / "run", "--data", data["ctc"], "--json")
        assert json.loads(scores.stdout)["cer"] == pytest.approx(results(tmp_path / "run")["test"]["cer"])


class TestLog:
    def test_scalars_for_tensorboard_where_it_is_installed(self, model, data, tmp_path, monkeypatch) -> None:
        class Writer(TrainerCallback):
            logging_dir: str | None = None
            seen: ClassVar[list[tuple[str | None, int, set[str]]]] = []

            def on_log(self, args, state, control, logs=None, **_) -> None:
                self.seen.append((self.logging_dir, state.global_step, set(logs)))

        monkeypatch.setattr(loop, "is_tensorboard_available", lambda: True)
        monkeypatch.setattr(loop, "TensorBoardCallback", Writer)
        mmtransfer.finetune(model, "head", data["ctc"], tmp_path / "run", replace(QUICK, epochs=1))
        assert {folder for folder, _, _ in Writer.seen} == {str(tmp_path / "run/log")}
        names = set().union(*(names for _, step, names in Writer.seen if step == 4))
        assert {"loss", "learning_rate", "eval_cer", "eval_wer"} <= names

    def test_nothing_elsewhere(self, model, data, tmp_path, monkeypatch) -> None:
        monkeypatch.setattr(loop, "is_tensorboard_available", lambda: False)
        mmtransfer.finetune(model, "head", data["ctc"], tmp_path / "run", replace(QUICK, epochs=1))
        assert not (tmp_path / "run/log").exists()


class TestEvaluation:
    def test_the_best_weights_are_kept(self, model, data, tmp_path, monkeypatch) -> None:
        """Those of the second evaluation of four, by scores that are made up."""
        scores = iter((0.9, 0.3, 0.5, 0.8))
        weights = []
        plain = loop.predict

        def predict(adapted, *arguments):
            weights.append({name: tensor.clone() for name, tensor in adapted.trained_tensors().items()})
            return plain(adapted, *arguments)

        monkeypatch.setattr(loop, "predict", predict)
        monkeypatch.setattr(CTC, "score", lambda *_: {"cer": next(scores, 0.7), "wer": 0.0})
        settings = replace(QUICK, epochs=4, evaluate_every=None)
        found = mmtransfer.finetune(model, "head", data["ctc"], tmp_path / "run", settings)
        assert [point.scores["cer"] for point in found.curve] == [0.9, 0.3, 0.5, 0.8]
        assert (found.validation, found.test) == ({"cer": 0.3, "wer": 0.0}, {"cer": 0.7, "wer": 0.0})
        kept = mmtransfer.load(tmp_path / "run").trained_tensors()
        assert kept.keys() == weights[1].keys()
        assert all(torch.equal(kept[name], tensor) for name, tensor in weights[1].items())
        assert not all(torch.equal(kept[name], tensor) for name, tensor in weights[3].items())

    def test_training_stops_where_nothing_improves(self, model, data, tmp_path) -> None:
        arguments = ["--method", "head", "--model", model, "--data", data["ctc"], "--patience", "2"]
        done = finetune(tmp_path / "run", *arguments, "--epochs", "10", "--learning-rate", "0")
        assert done.code == 0, done.stderr
        assert "Training: stopped early after 12 steps" in done.stdout
        found = results(tmp_path / "run")
        assert found["stopped"] is True
        assert [point["steps"] for point in found["curve"]] == [4, 8, 12]

    def test_without_a_validation_part_the_last_weights_are_kept(self, model, data, tmp_path) -> None:
        one = replace(speech(), validation=[])
        settings = replace(QUICK, validation_fraction=0.0)
        found = mmtransfer.finetune(model, "head", one, tmp_path / "run", settings)
        assert (found.validation, found.curve, found.steps) == (None, [], 8)
        with pytest.raises(DataError, match="patience and evaluate_every need a validation part"):
            mmtransfer.finetune(model, "head", one, tmp_path / "new", replace(settings, patience=1))


class TestHeldOut:
    def findings(self) -> Findings:
        return Findings(strict=False, tell=lambda _: None)

    def drawn(self, recordings: Recordings, fraction: float = 0.2, seed: int = 0) -> Recordings:
        return hold_out(recordings, fraction, seed, self.findings())

    def test_speakers_are_in_one_part(self) -> None:
        recordings = synthetic_speech(train_clips=24, test_clips=4)
        found = self.drawn(recordings)
        train, validation = ({clip.speaker for clip in part} for part in (found.train, found.validation))
        assert train
        assert validation
        assert not train & validation
        assert found.test == recordings.test
        assert Counter(found.train + found.validation) == Counter(recordings.train)

    def test_the_draw_is_of_names_alone(self, data) -> None:
        recordings = replace(from_manifest(data["ctc"]), validation=[])
        recordings = replace(recordings, train=[replace(c, speaker=None) for c in recordings.train])
        names = [clip.source for clip in self.drawn(recordings).validation]
        assert len(names) == 3
        shuffled = list(recordings.train)
        random.Random(0).shuffle(shuffled)
        again = self.drawn(replace(recordings, train=shuffled)).validation
        assert {clip.source for clip in again} == set(names)
        assert {clip.source for clip in self.drawn(recordings, seed=1).validation} != set(names)

    def test_each_class_has_a_part_in_it_but_those_of_one_clip(self) -> None:
        recordings = synthetic(classes=3, train_clips=5, test_clips=1, seconds=0.2)
        clips = [clip for clip in recordings.train if clip.label != 2] + [recordings.train[-1]]
        found = self.drawn(replace(recordings, train=clips))
        assert Counter(clip.label for clip in found.validation) == {0: 1, 1: 1}
        assert Counter(clip.label for clip in found.train) == {0: 4, 1: 4, 2: 1}

    def test_one_clip_a_class_leaves_nothing_to_draw(self) -> None:
        recordings = synthetic(classes=3, train_clips=1, test_clips=1, seconds=0.2)
        findings = self.findings()
        assert hold_out(recordings, 0.1, 0, findings) is recordings
        assert "one training clip of each class): the last weights are kept" in findings.notes[0]
        hold_out(speech(train=1, validation=0), 0.1, 0, findings)
        assert "has one training clip): the last weights are kept" in findings.notes[1]

    def test_a_part_that_is_there_is_taken(self) -> None:
        recordings = speech()
        assert self.drawn(recordings) is recordings


class TestUnusable:
    def notes(self, model: Path, recordings: Recordings, output: Path, **changes) -> list[str]:
        settings = replace(QUICK, epochs=1, **changes)
        found = mmtransfer.finetune(model, "head", recordings, output, settings)
        assert found.notes == results(output)["notes"]
        return found.notes

    def strict(self, model: Path, recordings: Recordings, output: Path, match: str, **changes) -> None:
        settings = replace(QUICK, strict=True, **changes)
        with pytest.raises(DataError, match=match):
            mmtransfer.finetune(model, "head", recordings, output, settings)

    def test_characters_outside_the_alphabet(self, model, tmp_path) -> None:
        recordings = speech()
        recordings.test[0] = replace(recordings.test[0], text="ab qq!")
        (note,) = self.notes(model, recordings, tmp_path / "run")
        assert note.startswith("1 transcript of synthetic speech has characters outside the alphabet")
        assert "('q' 2, '!' 1)" in note
        self.strict(model, recordings, tmp_path / "new", r"outside the alphabet \('q' 2, '!' 1\)")

    def test_texts_without_a_known_character(self, model, tmp_path) -> None:
        recordings = speech()
        recordings.train[3] = replace(recordings.train[3], text="")
        (note,) = self.notes(model, recordings, tmp_path / "run")
        assert note == "1 training clip (a generated clip) is without a known character, and left out"
        assert results(tmp_path / "run")["data"]["clips"]["train"] == 15

    def test_clips_that_are_too_short_for_their_text(self, model, tmp_path) -> None:
        recordings = speech()
        recordings.train[0] = replace(recordings.train[0], text="abcde" * 200)
        recordings.train[1] = replace(recordings.train[1], text="aa" * 300)
        (note,) = self.notes(model, recordings, tmp_path / "run")
        assert note.startswith("2 training clips (clip ")
        assert "(1000 frames needed, " in note
        assert "(1199 frames needed, " in note
        self.strict(model, recordings, tmp_path / "new", "cannot hold their text and are left out")
        notes = self.notes(model, recordings, tmp_path / "other", cache=False, workers=0)
        assert "(1000 frames needed, " in notes[0]

    def test_clips_that_are_too_long(self, model, tmp_path) -> None:
        recordings = speech()
        longest = sorted(clip.seconds for clip in recordings.train)
        (note,) = self.notes(model, recordings, tmp_path / "run", max_seconds=longest[-2])
        assert re.match(r"1 training clip \(a generated clip\) is longer than [\d.]+ s", note)
        self.strict(model, recordings, tmp_path / "new", "is longer than", max_seconds=longest[-2])
        with pytest.raises(DataError, match="has no training clip that can be used"):
            mmtransfer.finetune(model, "head", recordings, tmp_path / "none", replace(QUICK, max_seconds=0.1))

    def test_broken_audio_among_others(self, model, tmp_path) -> None:
        manifest = write_speech(tmp_path / "speech")
        (tmp_path / "speech/train3.wav").write_bytes(b"no audio")
        arguments = ["--method", "head", "--model", model, "--data", manifest]
        done = finetune(tmp_path / "run", *arguments)
        assert done.code == 0, done.stderr
        assert results(tmp_path / "run")["data"]["ignored"] == ["1 unusable clip (train3.wav)"]
        fails(finetune(tmp_path / "new", *arguments, "--strict"), "train3.wav", "cannot be read as audio")

    def test_names_that_are_not_utf8(self, model, tmp_path, caplog) -> None:
        """In notes, in the lines of evaluate, and in those of predict."""
        # A report of pytest-xdist cannot hold such names.
        caplog.set_level(logging.CRITICAL, logger="mmtransfer")
        folder = os.fsencode(tmp_path) + b"/clips"
        os.mkdir(folder)
        for index in range(10):
            stem = folder + b"/\xff%d" % index
            write_clip(tmp_path / "clip.wav", 300.0, 0.04 if index == 3 else 0.5)
            os.rename(tmp_path / "clip.wav", stem + b".wav")
            Path(os.fsdecode(stem + b".txt")).write_text("abcabc")
        output, data = tmp_path / "run", tmp_path / "clips"
        done = finetune(output, "--method", "head", "--model", model, "--data", data, "--task", "ctc")
        assert done.code == 0, done.stderr
        assert any("\udcff3.wav" in note for note in results(output)["notes"])
        lines = tmp_path / "lines.jsonl"
        found = run("evaluate", output, "--data", data, "--split", "all", "--output", lines)
        assert found.code == 0, found.stderr
        paths = {row["path"] for row in json_lines(lines.read_text(encoding="utf-8"))}
        files = {str(path) for path in data.glob("*.wav")}
        assert paths == files
        for flags, escapes in (([], "surrogateescape"), (["--json"], "strict")):
            # As a process has it: io.StringIO takes every name.
            stdout = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict")
            with contextlib.redirect_stdout(stdout):
                cli.main(["predict", str(output), str(data), *flags])
            text = stdout.buffer.getvalue().decode("utf-8", escapes)
            rows = [json.loads(line)["path"] if flags else line.split("\t")[0] for line in text.splitlines()]
            assert set(rows) == files


class TestMistakes:
    def arguments(self, base: Path, sets: dict[str, Path], /, **changes: str | Path) -> list[str | Path]:
        given = {"method": "head", "model": base, "data": sets["ctc"], **changes}
        return [word for name, value in given.items() for word in (f"--{name}", value)]

    @pytest.mark.parametrize(
        ("changes", "parts"),
        [
            ({"method": "nowhere"}, ["no method is called 'nowhere'"]),
            ({"task": "nowhere"}, ["task must be one of classification, ctc, text, got 'nowhere'"]),
            ({"model": "/nowhere/model"}, ["/nowhere/model does not exist"]),
            ({"data": "/nowhere/data.csv"}, ["/nowhere/data.csv does not exist"]),
            ({"task": "classification"}, ["speech.jsonl", "label"]),
            ({"set": "bottleneck=3"}, ["head has no option 'bottleneck'"]),
            ({"tokenizer": "/nowhere.json"}, ["tokenizer /nowhere.json does not exist"]),
        ],
    )
    def test_one_sentence_each(self, model, data, tmp_path, changes, parts) -> None:
        fails(finetune(tmp_path / "run", *self.arguments(model, data, **changes)), *parts)
        assert not (tmp_path / "run").exists()

    def test_a_tokenizer_that_is_none(self, model, data, tmp_path) -> None:
        (tmp_path / "bad.json").write_text("{}")
        arguments = self.arguments(model, data, tokenizer=tmp_path / "bad.json")
        fails(finetune(tmp_path / "run", *arguments), "bad.json is no JSON file of the library tokenizers")
        arguments = self.arguments(model, data, tokenizer=model)
        fails(finetune(tmp_path / "run", *arguments), "no tokenizer can be loaded from")
        labels = {"data": data["classification"], "tokenizer": tmp_path / "bad.json"}
        fails(finetune(tmp_path / "run", *self.arguments(model, data, **labels)), "takes no tokenizer")

    @pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has float16")
    def test_float16_on_the_cpu(self, model, data, tmp_path) -> None:
        fails(finetune(tmp_path / "run", *self.arguments(model, data), "--fp16"), "fp16 needs a GPU")

    def test_a_folder_with_other_files(self, model, data, tmp_path) -> None:
        (tmp_path / "notes.txt").write_text("mine")
        fails(finetune(tmp_path, *self.arguments(model, data)), "holds other files; force")
        done = finetune(tmp_path, *self.arguments(model, data), "--force")
        assert done.code == 0, done.stderr
        assert (tmp_path / "notes.txt").read_text() == "mine"

    def test_a_model_of_others_is_never_replaced(self, model, data, tmp_path) -> None:
        (tmp_path / "config.json").write_text('{"model_type": "wav2vec2"}')
        done = finetune(tmp_path, *self.arguments(model, data), "--force")
        fails(done, "holds a config.json that is not from mmtransfer")
        assert (tmp_path / "config.json").read_text() == '{"model_type": "wav2vec2"}'

    def test_a_file_as_output(self, model, data, tmp_path) -> None:
        (tmp_path / "run").write_text("")
        fails(finetune(tmp_path / "run", *self.arguments(model, data)), "is no folder")

    def test_features_that_are_not_finite(self, model, data, tmp_path) -> None:
        broken = load_model(model)
        with torch.no_grad():
            broken.encoder.layers[3].final_layer_norm.weight.fill_(float("nan"))
        broken.save_pretrained(tmp_path / "model")
        (tmp_path / "model/preprocessor_config.json").write_bytes(
            (model / "preprocessor_config.json").read_bytes()
        )
        done = finetune(tmp_path / "run", *self.arguments(tmp_path / "model", data))
        fails(done, "the features of", "are not finite")

    @pytest.mark.parametrize("missing", ["--method", "--model", "--data"])
    def test_missing_options(self, model, data, tmp_path, missing: str) -> None:
        arguments = self.arguments(model, data)
        place = arguments.index(missing)
        done = finetune(tmp_path / "run", *arguments[:place], *arguments[place + 2 :])
        assert done.code == 2
        assert missing in done.stderr

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"epochs": 0}, "epochs must be at least 1"),
            ({"start_epochs": -1}, "start_epochs must be at least 0"),
            ({"patience": 0}, "patience must be at least 1"),
            ({"evaluate_every": 0}, "evaluate_every must be at least 1"),
            ({"validation_fraction": 1.0}, "validation_fraction must be below 1"),
            ({"max_seconds": -1.0}, "max_seconds must be finite and not negative"),
            ({"bf16": True, "fp16": True}, "bf16 and fp16 exclude each other"),
            ({"keep_head": True, "tokenizer": Path("x")}, "tokenizer and keep_head exclude each other"),
            ({"cache": "no"}, "cache must be True or False"),
        ],
    )
    def test_settings_out_of_range(self, options, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            FinetuneSettings(**options)


class TestEvaluate:
    def test_all_parts_and_single_ones(self, trained, data) -> None:
        counts = {}
        for split in ("train", "validation", "test", "all"):
            found = run("evaluate", trained, "--data", data["ctc"], "--split", split, "--json")
            counts[split] = json.loads(found.stdout)["clips"]
        assert counts == {"train": 16, "validation": 4, "test": 4, "all": 24}

    def test_words_for_people(self, trained, data) -> None:
        found = run("evaluate", trained, "--data", data["ctc"])
        assert re.fullmatch(r"speech, test, 4 clips: cer \d+\.\d%, wer \d+\.\d%\n", found.stdout)

    def test_classes_by_their_names(self, model, data, tmp_path) -> None:
        """The classes of the data may be fewer, and in another order, than those of the model."""
        arguments = ["--method", "head", "--model", model, "--data", data["classification"]]
        finetune(tmp_path / "run", *arguments)
        folder = data["classification"].parent
        other = tmp_path / "other.csv"
        rows = ["path,label,split"]
        for part in ("train", "test"):
            rows += [f"{folder}/low-{part}0.wav,low,{part}", f"{folder}/high-{part}0.wav,a,{part}"]
        other.write_text("\n".join(rows) + "\n")
        fails(
            run("evaluate", tmp_path / "run", "--data", other),
            "other has the class 'a', and the model was trained for high, low",
        )

    def test_mistakes(self, trained, data, tmp_path) -> None:
        fails(run("evaluate", tmp_path / "no", "--data", data["ctc"]), "has no config.json")
        fails(run("evaluate", trained, "--data", tmp_path / "no.csv"), "no.csv does not exist")
        fails(run("evaluate", trained, "--data", data["classification"]), "tones.csv")
        manifest = write_speech(tmp_path / "speech", speech(validation=0))
        fails(run("evaluate", trained, "--data", manifest, "--split", "validation"), "has no validation clip")


class TestPredict:
    def test_folders_lists_and_files(self, trained, data, tmp_path) -> None:
        folder = data["ctc"].parent
        (tmp_path / "list.txt").write_text(f"{folder}/test1.wav\n\n../{tmp_path.name}/own.wav\n")
        (tmp_path / "own.wav").write_bytes((folder / "test2.wav").read_bytes())
        found = run("predict", trained, folder / "test0.wav", f"@{tmp_path}/list.txt", "--json")
        assert found.code == 0, found.stderr
        rows = json_lines(found.stdout)
        assert [Path(row["path"]).name for row in rows] == ["test0.wav", "test1.wav", "own.wav"]
        every = json_lines(run("predict", trained, folder, "--json").stdout)
        assert len(every) == 24
        by_name = {Path(row["path"]).name: row["text"] for row in every}
        assert [row["text"] for row in rows] == [by_name[f"test{index}.wav"] for index in range(3)]

    def test_batches_change_no_prediction(self, trained, data) -> None:
        """Clips of like length share a batch; their order is that of the files."""
        files = sorted(data["ctc"].parent.glob("*.wav"))
        model = mmtransfer.load(trained)
        alone = [mmtransfer.recognize(model, file)[0] for file in files]
        for batch_size in (2, 5, 64):
            assert mmtransfer.recognize(model, files, batch_size=batch_size) == alone
        assert len(set(alone)) > 1

    def test_files_that_cannot_be_read(self, trained, data, tmp_path) -> None:
        (tmp_path / "broken.wav").write_bytes(b"RIFF....")
        good = data["ctc"].parent / "test0.wav"
        files = [tmp_path / "broken.wav", good, tmp_path / "missing.wav"]
        found = run("predict", trained, *files)
        assert found.code == 1
        assert [line.split("\t")[0] for line in found.stdout.splitlines()] == [str(good)]
        errors = found.stderr.strip().splitlines()
        assert len(errors) == 2
        assert all(line.startswith("mmtransfer: ") for line in errors)
        assert "broken.wav cannot be read as audio" in errors[0]
        assert "missing.wav does not exist" in errors[1]
        strict = run("predict", trained, *files, "--strict")
        fails(strict, "broken.wav cannot be read as audio")

    def test_mistakes(self, trained, tmp_path, model) -> None:
        fails(run("predict", tmp_path, tmp_path / "a.wav"), "has no config.json")
        fails(run("predict", trained), "give audio files, folders, or @FILE", code=2)
        (tmp_path / "empty").mkdir()
        fails(run("predict", trained, tmp_path / "empty"), "holds no audio files")
        fails(run("predict", trained, "@/nowhere.txt"), "the list /nowhere.txt cannot be read")
        mmtransfer.AdaptedModel(load_model(model), "head").save_pretrained(tmp_path / "bare")
        fails(run("predict", tmp_path / "bare", tmp_path / "a.wav"), "has no task or no feature extractor")

    def test_logits_that_are_not_finite(self, trained, data, tmp_path) -> None:
        loaded = mmtransfer.load(trained)
        with torch.no_grad():
            loaded.head.classifier.bias.fill_(float("nan"))
        loaded.save_pretrained(tmp_path)
        file = data["ctc"].parent / "test0.wav"
        found = run("predict", tmp_path, file)
        assert (found.code, found.stdout) == (1, "")
        assert f"the logits of {file} are not finite" in found.stderr


def test_whole_clips_of_a_model_with_a_window(tmp_path: Path) -> None:
    """Whisper's input is cut at its window; a text of half of a clip would be wrong, and is refused."""
    from tiny_encoders import TINY
    from transformers import WhisperFeatureExtractor

    TINY["whisper"].build(max_source_positions=50).save_pretrained(tmp_path / "model")
    WhisperFeatureExtractor(feature_size=6, chunk_length=1).save_pretrained(tmp_path / "model")
    recordings = speech()
    found = mmtransfer.finetune(tmp_path / "model", "head", recordings, tmp_path / "run", QUICK)
    long = [clip for part in (recordings.train, recordings.validation, recordings.test) for clip in part]
    long = [clip for clip in long if clip.seconds > 1]
    assert {clip in recordings.train for clip in long} == {True, False}
    assert found.notes[0].endswith("longer than 1 s, all that the model takes, and left out")
    assert re.search(
        r"longer than 1 s, all that the model takes: what is said later counts as", found.notes[1]
    )
    data = write_speech(tmp_path / "data", recordings)
    evaluate = ["evaluate", tmp_path / "run", "--data", data, "--split", "all", "--cpu"]
    assert run(*evaluate).stderr.startswith(f"mmtransfer: {len(long)} clips (")
    fails(run(*evaluate, "--strict"), "longer than 1 s, all that the model takes")
    soundfile.write(tmp_path / "long.wav", np.zeros(20_000, np.float32) + 0.1, 16_000)
    predicted = run("predict", tmp_path / "run", tmp_path / "long.wav")
    assert predicted.code == 1
    assert "long.wav lasts 1.2 s and the model takes 1 s" in predicted.stderr


def test_the_commands_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    printed = capsys.readouterr().out
    for name in ("finetune", "evaluate", "predict"):
        assert re.search(rf"^  {name} ", printed, re.M)
