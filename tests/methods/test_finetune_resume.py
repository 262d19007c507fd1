"""A run of `mmtransfer finetune` that is killed, wherever that is, and resumed ends as one that was not."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command_line import fails
from finetune_data import finetune, results, speech, write_model, write_speech

import mmtransfer
from mmtransfer.checkpoint import WEIGHTS
from mmtransfer.data import DataError, Recordings
from mmtransfer.training import run_folder
from mmtransfer.training.finetune_settings import FinetuneSettings

#: Of the audit events of Python, those that change a folder.
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "os.chmod")
FILES = {"config.json", "model.safetensors", "run.json", "results.json"}
METHOD = "aat-m"
SETTINGS = FinetuneSettings(
    epochs=3,
    batch_size=4,
    cpu=True,
    learning_rate=0.02,
    evaluate_every=3,
    start_epochs=2,
    patience=3,
    workers=0,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "wav2vec2")


@pytest.fixture(scope="module")
def recordings() -> Recordings:
    return speech(train=14)


def outcome(folder: Path) -> tuple[dict, dict]:
    """The weights, and what the results say but for the time."""
    record = results(folder)
    del record["seconds"], record["machine"]
    for point in record["curve"]:
        del point["seconds"]
    return mmtransfer.load(folder).trained_tensors(), record


@pytest.fixture(scope="module")
def whole(tmp_path_factory, model: Path, recordings: Recordings) -> tuple[dict, dict]:
    output = tmp_path_factory.mktemp("whole") / "run"
    mmtransfer.finetune(model, METHOD, recordings, output, SETTINGS)
    return outcome(output)


def same(found: tuple[dict, dict], expected: tuple[dict, dict]) -> bool:
    return found[1] == expected[1] and all(
        torch.equal(tensor, expected[0][name]) for name, tensor in found[0].items()
    )


def in_child(call: Callable[[], object]) -> int:
    """The exit status of a forked process that makes the call; negative for a signal."""
    child = os.fork()
    if child == 0:
        try:
            call()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def count_changes(folder: Path, kill_at: int | None) -> list[str]:
    """A list that grows with each change below a folder; the process is killed before one of them."""
    seen: list[str] = []

    def hook(event: str, arguments: tuple) -> None:
        opens = event == "open" and len(arguments) > 2 and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)
        # shutil.rmtree removes names within an open folder.
        inside = event in ("os.remove", "os.rmdir") and arguments[1] >= 0
        inside |= str(arguments[0]).startswith(str(folder)) if arguments else False
        if not (opens or event in CHANGES) or not inside:
            return
        if len(seen) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        seen.append(event)

    sys.addaudithook(hook)
    return seen


def train_in_child(model: Path, recordings: Recordings, output: Path, kill_at: int | None) -> int:
    def call() -> None:
        seen = count_changes(output, kill_at)
        mmtransfer.finetune(model, METHOD, recordings, output, SETTINGS, resume=True)
        (output.parent / "changes").write_text(str(len(seen)))

    return in_child(call)


@pytest.fixture(scope="module")
def changes(tmp_path_factory, model: Path, recordings: Recordings, whole) -> int:
    """How many changes of its folder a run makes."""
    output = tmp_path_factory.mktemp("counted") / "run"
    assert train_in_child(model, recordings, output, None) == 0
    assert same(outcome(output), whole)
    return int((output.parent / "changes").read_text())


@pytest.mark.parametrize("part", range(12))
def test_killed_before_any_change_of_the_folder(
    model, recordings, whole, changes, tmp_path, part: int
) -> None:
    """In each twelfth of the run at a random place: writes of states, the model and the results."""
    assert changes > 60
    place = random.Random(part).randrange(part * changes // 12, (part + 1) * changes // 12)
    output = tmp_path / "run"
    assert train_in_child(model, recordings, output, place) == -signal.SIGKILL
    mmtransfer.finetune(model, METHOD, recordings, output, SETTINGS, resume=True)
    assert same(outcome(output), whole), place
    assert {path.name for path in output.iterdir()} == FILES


def test_killed_again_and_again(model, recordings, whole, changes, tmp_path) -> None:
    """Each try ends a little later; those in between start from the states of the one before."""
    output = tmp_path / "run"
    tries = 0
    while train_in_child(model, recordings, output, changes // 4) == -signal.SIGKILL:
        tries += 1
        assert tries < 20
    assert tries > 1
    assert same(outcome(output), whole)


def test_a_run_that_stopped_early_and_was_killed_does_not_go_on(model, recordings, tmp_path) -> None:
    settings = replace(SETTINGS, epochs=10, evaluate_every=None, patience=1, learning_rate=0.05)
    expected = mmtransfer.finetune(model, METHOD, recordings, tmp_path / "whole", settings)
    assert expected.stopped
    output = tmp_path / "run"

    def call() -> None:
        def kill(*_: object) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        mmtransfer.training.run.checkpoint.save = kill
        mmtransfer.finetune(model, METHOD, recordings, output, settings)

    assert in_child(call) == -signal.SIGKILL
    found = mmtransfer.finetune(model, METHOD, recordings, output, settings, resume=True)
    assert found.stopped
    assert same(outcome(output), outcome(tmp_path / "whole"))


def test_the_command_killed_at_any_time(model, tmp_path) -> None:
    data = write_speech(tmp_path / "speech")
    arguments = ["--method", "full", "--model", model, "--data", data]
    arguments += ["--epochs", "12", "--start-epochs", "2"]
    assert finetune(tmp_path / "whole", *arguments).code == 0
    output = tmp_path / "run"
    command = [sys.executable, "-m", "mmtransfer.cli", "finetune", "--output", output, *arguments]
    command += ["--batch-size", "4", "--cpu"]
    # As many threads as here: their number decides on the last bits of a product.
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen([str(word) for word in command], stderr=subprocess.PIPE, env=environment)
    while process.poll() is None and not list(output.glob("states/checkpoint-*/whole")):
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (output / WEIGHTS).exists()
    done = finetune(output, *arguments, "--resume")
    assert done.code == 0, done.stderr
    assert same(outcome(output), outcome(tmp_path / "whole"))


class TestFolders:
    @pytest.fixture
    def done(self, model, recordings, tmp_path) -> Path:
        settings = replace(SETTINGS, epochs=1, start_epochs=0)
        mmtransfer.finetune(model, METHOD, recordings, tmp_path / "run", settings)
        return tmp_path / "run"

    def again(self, model, recordings, output: Path, method: str = METHOD, **changes) -> object:
        resume, force = changes.pop("resume", False), changes.pop("force", False)
        settings = replace(SETTINGS, **{"epochs": 1, "start_epochs": 0, **changes})
        return mmtransfer.finetune(model, method, recordings, output, settings, resume=resume, force=force)

    def test_a_run_that_has_ended_is_not_repeated(self, model, recordings, done) -> None:
        before = (done / WEIGHTS).stat().st_mtime_ns
        found = self.again(model, recordings, done, resume=True)
        assert found.earlier
        assert found.test == results(done)["test"]
        assert [point.steps for point in found.curve] == [p["steps"] for p in results(done)["curve"]]
        assert (done / WEIGHTS).stat().st_mtime_ns == before

    def test_the_command_says_so(self, model, tmp_path) -> None:
        data = write_speech(tmp_path / "speech")
        arguments = ["--method", "head", "--model", model, "--data", data]
        first = finetune(tmp_path / "run", *arguments)
        second = finetune(tmp_path / "run", *arguments, "--resume")
        assert second.code == 0
        said, *lines = second.stdout.splitlines()
        assert said == f"The run in {tmp_path / 'run'} has ended already; nothing was done."
        assert lines == first.stdout.splitlines()

    def test_another_run_needs_a_word(self, model, recordings, done) -> None:
        with pytest.raises(DataError, match="holds a run already; resume goes on with it, force begins"):
            self.again(model, recordings, done)
        with pytest.raises(DataError, match="give one of the two"):
            self.again(model, recordings, done, resume=True, force=True)
        found = self.again(model, recordings, done, method="head", force=True)
        assert not found.earlier
        assert mmtransfer.load(done).method.name == "head"

    def test_a_run_goes_on_as_it_began(self, model, recordings, done) -> None:
        (done / run_folder.RESULTS).unlink()
        with pytest.raises(DataError, match=r"has learning_rate 0\.02, not 0\.5; resume it as it began"):
            self.again(model, recordings, done, resume=True, learning_rate=0.5)
        with pytest.raises(DataError, match="has method 'aat-m', not 'head'"):
            self.again(model, recordings, done, method="head", resume=True)
        other = replace(recordings, train=recordings.train[:-1])
        with pytest.raises(DataError, match="has data "):
            self.again(model, other, done, resume=True)
        # How fast clips are decoded decides on nothing.
        assert self.again(model, recordings, done, resume=True, workers=2).steps == 4

    def test_resume_of_nothing_begins(self, model, recordings, tmp_path) -> None:
        found = self.again(model, recordings, tmp_path / "new", resume=True)
        assert not found.earlier
        assert found.steps == 4

    def test_a_damaged_description(self, model, recordings, done) -> None:
        (done / run_folder.RUN).write_text("{")
        (done / run_folder.RESULTS).unlink()
        with pytest.raises(DataError, match=r"run\.json cannot be read"):
            self.again(model, recordings, done, resume=True)


def test_the_command_refuses_a_second_run(model, tmp_path) -> None:
    data = write_speech(tmp_path / "speech")
    arguments = ["--method", "head", "--model", model, "--data", data]
    assert finetune(tmp_path / "run", *arguments).code == 0
    fails(finetune(tmp_path / "run", *arguments), "holds a run already")
    fails(finetune(tmp_path / "run", *arguments, "--resume", "--force"), "give one of the two")
