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

PARTS = ("train", "validation", "test")
LAYOUTS = ("drawn", "above", "below")
SEVERAL = strategies.sets(strategies.sampled_from([*NAMES, *CHANGES]), max_size=5).map(sorted)
SEEDS = strategies.integers(0, 2**16)


def number_ignored(recordings: Recordings) -> int:
    """The sum of the counts behind `ignored:` in the description."""
    _, _, listed = recordings.describe().partition("; ignored: ")
    return sum(int(count) for count in re.findall(r"(?:^|, )(\d+) ", re.sub(r"\(.*?\)", "", listed)))


def found(recordings: Recordings) -> dict[Path, tuple[str, str]]:
    return {
        clip.source.resolve(): (clip.text if clip.label is None else recordings.classes[clip.label], part)
        for part in PARTS
        for clip in getattr(recordings, part)
    }


def check_each_file_once(recordings: Recordings) -> None:
    clips = recordings.train + recordings.validation + recordings.test
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
        for clip in tree.damaged:
            with pytest.raises(DataError, match=re.escape(f"{clip} cannot be read as audio")):
                from_folder(tree.root, strict=True)
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
        for part in PARTS:
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


def check_manifest(mistake: str, kind: str, form: str, has_split: bool, plain: bool, seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        manifest = RandomManifest(
            Path(folder).resolve(), random.Random(seed), has_split, plain, kind=kind, form=form
        )
        manifest.build()
        if mistake in MISTAKES:
            MISTAKES[mistake](manifest)
        path = manifest.write()
        for wrong, strict in ((manifest.wrong, False), (manifest.unusable or None, True)):
            if wrong is None:
                continue
            with pytest.raises(DataError, match=rf"\blist(\.{form})?\b") as refusal:
                from_manifest(path, strict=strict)
            for entry in wrong:
                assert re.search(rf"\bline {manifest.lines[id(entry)]}\b", str(refusal.value))
        if manifest.wrong is None:
            check_all_is_read(manifest, from_manifest(path))


def check_all_is_read(manifest: RandomManifest, recordings: Recordings) -> None:
    check_each_file_once(recordings)
    assert recordings.transcribed == (manifest.kind == "text")
    meanings = found(recordings)
    assert meanings.keys() == manifest.used.keys()
    for file, (value, part, _) in manifest.used.items():
        assert meanings[file] in ([(value, part)] if part else [(value, "train"), (value, "test")])
    assert number_ignored(recordings) == manifest.ignored
    assert ("notes" in recordings.describe()) == (manifest.header["more"] == "notes")
    speakers = {part: {clip.speaker for clip in getattr(recordings, part)} - {None} for part in PARTS}
    assert set.union(*speakers.values()) == {speaker for _, _, speaker in manifest.used.values()} - {None}
    for clip in recordings.train + recordings.validation + recordings.test:
        assert clip.speaker == manifest.used[clip.source.resolve()][2]
    assert manifest.has_split or not speakers["train"] & speakers["test"]


KINDS = ("label", "text")
FORMS = ("csv", "jsonl")


@pytest.mark.parametrize("has_split", [False, True], ids=["drawn", "given"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mistake", ["none", *MISTAKES])
def test_a_manifest_with(mistake: str, kind: str, form: str, has_split: bool) -> None:
    for seed in range(2):
        check_manifest(mistake, kind, form, has_split, seed == 0, seed)


@hypothesis.settings(max_examples=80, deadline=None, derandomize=True, database=None)
@hypothesis.given(
    strategies.sampled_from(["none", *MISTAKES]),
    strategies.sampled_from(KINDS),
    strategies.sampled_from(FORMS),
    strategies.booleans(),
    strategies.booleans(),
    SEEDS,
)
def test_any_manifest(mistake: str, kind: str, form: str, has_split: bool, plain: bool, seed: int) -> None:
    check_manifest(mistake, kind, form, has_split, plain, seed)
