"""`mmtransfer align`: which recordings and texts, which files, and what happens when one fails."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from command_line import Result, fails, run
from finetune_data import write_model
from transformers import Wav2Vec2FeatureExtractor

from mmtransfer import AdaptedModel, checkpoint
from mmtransfer.align.pairs import find_pairs
from mmtransfer.data import DataError
from mmtransfer.data.inputs import AudioInput
from mmtransfer.encoders.loading import load_model
from mmtransfer.tasks import Classification
from mmtransfer.tasks.ctc import CTC

SUFFIXES = (".TextGrid", ".ctm", ".csv", ".json", ".srt")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`ctc`, a model of transformers with its head; `encoder`, one without; `trained`, by finetune."""
    root = tmp_path_factory.mktemp("models")
    write_model(root / "ctc", head=True)
    write_model(root / "encoder")
    for name, task in (
        ("trained", CTC(vocabulary=("", " ", *"abcde"))),
        ("labels", Classification(num_labels=2)),
    ):
        model = AdaptedModel(load_model(root / "encoder"), "head", task)
        model.audio = AudioInput(Wav2Vec2FeatureExtractor(return_attention_mask=True), max_seconds=3.0)
        checkpoint.save(model, root / name)
    return root


def write(path: Path, seconds: float = 1.0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = np.random.default_rng(0).standard_normal(round(16_000 * seconds)) * 0.1
    soundfile.write(path, samples, 16_000)
    return path


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    (tmp_path / "clip.txt").write_text("Bad cab,\n25 dead\n", encoding="utf-8")
    return write(tmp_path / "clip.wav")


def align(models: Path, *arguments: str | Path, model: str = "ctc") -> Result:
    return run("align", *arguments, "--model", models / model, "--cpu")


@pytest.mark.parametrize("model", ["ctc", "trained"])
def test_one_recording_is_printed(models: Path, pair: Path, model: str) -> None:
    """With the text next to it; the model that was trained on 3 s sees windows of no more."""
    result = align(models, pair, "--context", "0.5", model=model)
    assert result.code == 0, result.stderr
    rows = list(csv.DictReader(io.StringIO(result.stdout)))
    assert [row["word"] for row in rows] == ["Bad", "cab,", "25", "dead"]
    assert [row["exact"] for row in rows] == ["true", "true", "false", "true"]
    assert [row["line"] for row in rows] == ["1", "1", "2", "2"]
    times = [float(row[key]) for row in rows for key in ("start", "end")]
    assert times == sorted(times)
    assert 0 <= times[0] < times[-1] <= 1


def test_results_in_a_folder(models: Path, pair: Path, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    formats = ("textgrid", "ctm", "csv", "json", "srt")
    result = align(models, pair, tmp_path / "clip.txt", "--output", out, "--formats", *formats, "--figures")
    assert result.code == 0, result.stderr
    assert sorted(path.name for path in out.iterdir()) == sorted(
        f"clip{each}" for each in (*SUFFIXES, ".png")
    )
    assert result.stdout.startswith(f"{pair}\t4 words, 1 marked, 1.0 s, mean score 0.")
    record = json.loads((out / "clip.json").read_text(encoding="utf-8"))
    assert [word["text"] for word in record["words"]] == ["Bad", "cab,", "25", "dead"]
    # Again, over the earlier results.
    assert align(models, pair, "--output", out, "--formats", "srt").code == 0


def test_folders_and_failures(models: Path, tmp_path: Path) -> None:
    """Every file that can be aligned is; the others are named, and the exit status is 1."""
    audio, texts, out = tmp_path / "audio", tmp_path / "texts", tmp_path / "out"
    for name in ("a.wav", "deep/b.flac", "deep/c.wav", "d.wav", "e.wav", "f.wav"):
        write(audio / name, 0.1 if name == "d.wav" else 1.0)
    (audio / "f.wav").write_bytes(b"no audio")
    (texts / "deep").mkdir(parents=True)
    for name, text in (("a", "bad"), ("deep/b", "cab"), ("d", "bad cab bad cab"), ("e", "123"), ("f", "a")):
        (texts / f"{name}.txt").write_text(text)
    result = align(models, audio, texts, "--output", out)
    assert result.code == 1
    assert [line.split("\t")[0] for line in result.stdout.splitlines()] == [
        str(audio / "a.wav"),
        str(audio / "deep/b.flac"),
    ]
    problems = result.stderr.strip().splitlines()
    assert len(problems) == 4
    for part in (
        "c.wav has no text",
        "d.wav is too short for its text",
        "e.wav has no character of the model's vocabulary",
        "f.wav cannot be read as audio",
    ):
        assert sum(part in line and line.startswith("mmtransfer: ") for line in problems) == 1, part
    assert (out / "a.TextGrid").exists()
    assert (out / "deep/b.json").exists()
    strict = align(models, audio, texts, "--output", tmp_path / "strict", "--strict")
    assert strict.code == 1
    assert len(strict.stderr.strip().splitlines()) == 1


def test_a_manifest(models: Path, tmp_path: Path) -> None:
    write(tmp_path / "clips/a.wav")
    write(tmp_path / "b.wav")
    manifest = tmp_path / "clips/list.csv"
    manifest.write_text("path,text\na.wav,bad cab\n../b.wav,dead\nmissing.wav,bad\n")
    result = align(models, manifest, "--output", tmp_path / "out", "--formats", "json")
    assert result.code == 1
    assert "list.csv line 4: " in result.stderr
    # Not outside the folder of results.
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.json", "b.json"]
    lines = tmp_path / "list.jsonl"
    lines.write_text('{"audio_filepath": "b.wav", "text": "dead"}\n')
    assert align(models, lines, "--output", tmp_path / "out2").code == 0


def test_text_from_standard_input(models: Path, pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("dead cab"))
    result = align(models, pair, "-")
    assert [row["word"] for row in csv.DictReader(io.StringIO(result.stdout))] == ["dead", "cab"]


def test_rules(models: Path, pair: Path, tmp_path: Path) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text('"2(.)": bee \\1\n5: cad\n')
    result = align(models, pair, "--rules", rules)
    assert [row["exact"] for row in csv.DictReader(io.StringIO(result.stdout))] == ["true"] * 4
    rules.write_text("- a\n")
    fails(align(models, pair, "--rules", rules), "must be lines of pattern: replacement")
    rules.write_text('"(": a\n')
    fails(align(models, pair, "--rules", rules), "the rule '('")
    fails(align(models, pair, "--rules", tmp_path / "none.yaml"), "cannot be read as YAML")


def test_wrong_use(models: Path, pair: Path, tmp_path: Path) -> None:
    two = tmp_path / "two"
    for name in ("a", "b"):
        write(two / f"{name}.wav")
        (two / f"{name}.txt").write_text("bad")
    fails(align(models, two), "give --output, the folder for the results of 2 recordings", code=2)
    fails(align(models, pair, "--figures"), "--figures needs --output", code=2)
    fails(align(models, pair, "--figure-start", "-1"), "--figure-start must be at least 0", code=2)
    fails(align(models, pair, "--window", "1"), "window must be longer than two contexts of 2 s, got 1 s")
    fails(align(models, pair, tmp_path / "none.txt"), "none.txt cannot be read as a text")
    fails(align(models, tmp_path / "none.wav"), "none.wav does not exist")
    fails(align(models, pair, model="encoder"), "lacks 2 weights of the model")
    fails(align(models, pair, model="labels"), "is a model of classification, not of ctc")
    fails(align(models, pair, model="missing"), "does not exist")
    fails(align(models, pair, "--encoder", models / "encoder"), "no encoder to give")
    late = align(models, pair, "--output", tmp_path / "late", "--figures", "--figure-start", "3")
    assert late.code == 1
    assert "--figure-start 3 lies behind the end of" in late.stderr


def test_an_encoder_that_has_moved(models: Path, pair: Path) -> None:
    result = align(models, pair, "--encoder", models / "encoder", "--context", "0.5", model="trained")
    assert result.code == 0, result.stderr


@pytest.mark.parametrize("names", [("a.wav", "a.flac"), ("x/a.wav", "x/a.flac")])
def test_results_of_one_name_are_refused(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        write(tmp_path / name)
    with pytest.raises(DataError, match="would have one name for their results"):
        find_pairs(tmp_path, None)


def test_manifests_without_what_is_needed(tmp_path: Path) -> None:
    manifest = tmp_path / "list.csv"
    write(tmp_path / "a.wav")
    for text, message in (
        ("path,label\na.wav,x\n", "lacks the column 'text'"),
        ("text\nbad\n", "lacks the column 'path'"),
        ("path,text\n", "lists no recording"),
    ):
        manifest.write_text(text)
        with pytest.raises(DataError, match=message):
            find_pairs(manifest, None)
    manifest.write_text("path,text\na.wav,x\n")
    with pytest.raises(DataError, match="is a manifest, which has the texts itself"):
        find_pairs(manifest, tmp_path / "a.txt")
    with pytest.raises(DataError, match="holds no"):
        find_pairs(tmp_path / "empty", None) if (tmp_path / "empty").mkdir() is None else None


def test_texts_of_decomposed_names(tmp_path: Path) -> None:
    """As some file systems write accents."""
    write(tmp_path / "r\u030ceka.wav")
    (tmp_path / "řeka.txt").write_text("bad")
    (pair,) = find_pairs(tmp_path, None)
    assert pair.text == "bad"


def test_long_recordings_need_little_memory(models: Path, tmp_path: Path) -> None:
    """5 minutes of 48 kHz stereo are 115 MB of float32, which are never there at once."""
    path = tmp_path / "long.wav"
    minute = (np.random.default_rng(0).standard_normal((48_000 * 60, 2)) * 3000).astype(np.int16)
    with soundfile.SoundFile(path, "w", 48_000, 2) as file:
        for _ in range(5):
            file.write(minute)
    code = (
        "import re, sys\n"
        "from mmtransfer.align import Aligner, load_ctc\n"
        "aligner = Aligner(load_ctc(sys.argv[1]), window=10, context=1, batch_size=1)\n"
        "aligner.align(sys.argv[2], 'bad ' * 3)\n"
        "def memory(name):\n"
        "    return int(re.search(name + r':\\s+(\\d+) kB', open('/proc/self/status').read())[1])\n"
        # Forgets the peak of the imports.
        "open('/proc/self/clear_refs', 'w').write('5')\n"
        "before = memory('VmRSS')\n"
        "found = aligner.align(sys.argv[3], 'bad cab ' * 900)\n"
        "assert len(found.words) == 1800, len(found.words)\n"
        "print(memory('VmHWM') - before)\n"
    )
    short = write(tmp_path / "short.wav", 20.0)
    done = subprocess.run(
        [sys.executable, "-c", code, models / "ctc", short, path], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 60_000  # kB
