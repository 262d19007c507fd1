"""Random trees and manifests: every file is used as its place says, refused or reported."""

from __future__ import annotations

import random
import re
import tempfile
import unicodedata
from pathlib import Path

import hypothesis
import pytest
from hypothesis import strategies
from random_manifests import MISTAKES, RandomManifest
from random_trees import CHANGES, NAMES, RandomTree, listed_in_another_order

from mmtransfer.data import DataError, Recordings, from_folder, from_manifest

LAYOUTS = ("drawn", "above", "below")
SEVERAL = strategies.sets(strategies.sampled_from([*NAMES, *CHANGES]), max_size=5).map(sorted)
SEEDS = strategies.integers(0, 2**16)


def number_ignored(recordings: Recordings) -> int:
    """The sum of the counts behind `ignored:` in the description."""
    _, _, listed = recordings.describe().partition("; ignored: ")
    return sum(int(count) for count in re.findall(r"(?:^|, )(\d+) ", re.sub(r"\(.*?\)", "", listed)))


def found(recordings: Recordings) -> dict[Path, tuple[str, str]]:
    return {
        clip.source.resolve(): (recordings.classes[clip.label], part)
        for part in ("train", "test")
        for clip in getattr(recordings, part)
    }


def check_each_file_once(recordings: Recordings) -> None:
    clips = recordings.train + recordings.test
    assert len({clip.source.resolve() for clip in clips}) == len(clips)
    assert all(label == unicodedata.normalize("NFC", label).strip() for label in recordings.classes)


def check(changes: list[str], layout: str, seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        # A hidden part above the root hides nothing.
        tree = RandomTree(Path(folder).resolve() / ".cache" / "sounds", layout, random.Random(seed))
        for name in changes:
            if name in NAMES:
                NAMES[name](tree)
        tree.build()
        for name in changes:
            if name in CHANGES:
                CHANGES[name](tree)
        if tree.refused:
            with pytest.raises(DataError) as refusal:
                from_folder(tree.root)
            assert tree.root.name in str(refusal.value)
            return
        recordings = from_folder(tree.root)
        check_each_file_once(recordings)
        meanings = found(recordings)
        assert meanings.keys() == tree.used.keys()
        for path, (label, part) in tree.used.items():
            assert meanings[path] in ([(label, part)] if part else [(label, "train"), (label, "test")])
        assert number_ignored(recordings) == tree.ignored
        with listed_in_another_order(seed):
            again = from_folder(tree.root)
        assert again.describe() == recordings.describe()
        for part in ("train", "test"):
            sources = [[clip.source for clip in getattr(each, part)] for each in (recordings, again)]
            assert sources[0] == sources[1]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["nothing", *NAMES, *CHANGES])
def test_a_tree_with(name: str, layout: str) -> None:
    for seed in range(3):
        check([name], layout, seed)


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True, database=None)
@hypothesis.given(SEVERAL, strategies.sampled_from(LAYOUTS), SEEDS)
def test_a_tree_with_several(changes: list[str], layout: str, seed: int) -> None:
    check(changes, layout, seed)


def check_manifest(mistake: str, has_split: bool, plain: bool, seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        manifest = RandomManifest(Path(folder).resolve(), random.Random(seed), has_split, plain)
        manifest.build()
        if mistake in MISTAKES:
            MISTAKES[mistake](manifest)
        path = manifest.write()
        if manifest.wrong is not None:
            with pytest.raises(DataError, match=r"list\.csv") as refusal:
                from_manifest(path)
            for entry in manifest.wrong:
                assert re.search(rf"\bline {manifest.lines[id(entry)]}\b", str(refusal.value))
            return
        recordings = from_manifest(path)
        check_each_file_once(recordings)
        meanings = found(recordings)
        assert meanings.keys() == manifest.used.keys()
        for file, (label, part) in manifest.used.items():
            assert meanings[file] in ([(label, part)] if part else [(label, "train"), (label, "test")])
        assert number_ignored(recordings) == manifest.ignored
        assert ("speaker" in recordings.describe()) == (manifest.header["more"] == "speaker")


@pytest.mark.parametrize("has_split", [False, True], ids=["drawn", "given"])
@pytest.mark.parametrize("mistake", ["none", *MISTAKES])
def test_a_manifest_with(mistake: str, has_split: bool) -> None:
    for seed in range(4):
        check_manifest(mistake, has_split, seed == 0, seed)


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True, database=None)
@hypothesis.given(
    strategies.sampled_from(["none", *MISTAKES]), strategies.booleans(), strategies.booleans(), SEEDS
)
def test_any_manifest(mistake: str, has_split: bool, plain: bool, seed: int) -> None:
    check_manifest(mistake, has_split, plain, seed)
