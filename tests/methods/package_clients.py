"""pip, apt and dpkg without a network: what they answer, and which commands they got."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from mmtransfer.demo import download


def finished(returncode: int = 0, stderr: str = "", stdout: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.CompletedProcess([], returncode, stdout, stderr)


class Debian:
    """An apt that "downloads" a .deb, and a dpkg that unpacks `<root>/<tree>` of its package from it.

    `calls` are the commands in short: client and package.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.trees: dict[str, str] = {}
        self.calls: list[tuple[str, str]] = []

    @staticmethod
    def install(monkeypatch: pytest.MonkeyPatch, root: Path, module: object, *names: str) -> Debian:
        """Simulate the clients, with the packages `names` of `module` pinned to what lies under `root`."""
        debian = Debian(root)
        for name in names:
            package = getattr(module, name)
            debian.trees[package.name] = package.tree
            digest = download.tree_sha256(root / package.tree)
            monkeypatch.setattr(module, name, download.DebianPackage(package.name, package.tree, (digest,)))
        monkeypatch.setattr(download, "run_client", debian.run)
        monkeypatch.setattr(download.shutil, "which", lambda name: name)
        return debian

    def run(
        self, command: Sequence[str], folder: Path, expected: download.Download | None = None
    ) -> subprocess.CompletedProcess[str]:
        client, archive = Path(command[0]).name, command[-1]
        if client == "apt-get":
            self.calls.append((client, archive))
            return finished(
                stdout=f"'http://mirror/pool/{archive}_1_all.deb' {archive}_1_all.deb 5 SHA256:00\n"
            )
        archive = command[3 if client == "apt-helper" else 2]
        name = archive.removesuffix(".deb")
        self.calls.append((client, name))
        if client == "apt-helper":
            assert command[2:] == [f"http://mirror/pool/{name}_1_all.deb", archive, "SHA256:00"]
            assert expected == download.Download(name, 5)
            (folder / archive).write_text("a deb")
        else:
            assert (folder / archive).read_text() == "a deb"
            tree = self.trees[name]
            shutil.copytree(self.root / tree, Path(command[3]) / tree)
            Path(command[3], "usr/share/doc").mkdir()
        return finished()
