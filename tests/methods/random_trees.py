"""Random folder trees of recordings, and what must become of each file in them."""

from __future__ import annotations

import contextlib
import os
import random
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from audio_files import write_tiny_clip

HELD_OUT = ("validation", "valid", "val", "dev", "Eval")
FOREIGN = (".m4a", ".aac", ".opus", ".aiff", ".wma", ".webm", ".amr", ".3gp", ".txt", "")


@dataclass
class RandomTree:
    """A tree of three classes; every clip has its own content.

    Attributes:
        layout: "drawn" has no part folders, "above" has train/cat, "below" has cat/train.
        used: the label and the part of each clip that must be used; the part is empty if it is drawn.
        ignored: how many files, hidden entries and links must be reported as ignored.
        damaged: clips that cannot be read, which are errors when strict.
        refused: whether nothing but a refusal is right.
    """

    root: Path
    layout: str
    random: random.Random
    folders: dict[str, str] = field(default_factory=lambda: {label: label for label in ("cat", "dog", "owl")})
    parts: dict[str, str] = field(default_factory=lambda: {part: part for part in ("train", "test")})
    used: dict[Path, tuple[str, str]] = field(default_factory=dict)
    ignored: int = 0
    damaged: list[Path] = field(default_factory=list)
    refused: bool = False
    _clips: int = 0

    def build(self) -> None:
        for label in self.folders:
            for part in self.parts:
                for _ in range(2):
                    self.use(self.folder(label, part) / f"{self.number()}.wav", label, part)

    def folder(self, label: str, part: str) -> Path:
        """Where the clips of a class and a part are."""
        own, split = self.folders[label], self.parts[part]
        return self.root / {"drawn": own, "above": f"{split}/{own}", "below": f"{own}/{split}"}[self.layout]

    def number(self) -> int:
        self._clips += 1
        return self._clips

    def clip(self, path: Path) -> Path:
        return write_tiny_clip(path, self.number())

    def use(self, path: Path, label: str, part: str) -> None:
        self.used[self.clip(path)] = (label, "" if self.layout == "drawn" else part)

    def some_folder(self) -> tuple[Path, str, str]:
        label, part = self.random.choice(list(self.folders)), self.random.choice(list(self.parts))
        return self.folder(label, part), label, part

    def some_clip(self, **but: str) -> Path:
        """A clip in another class or part than the one given."""
        clips = [
            path
            for path, (label, part) in self.used.items()
            if but.get("label") != label and but.get("part") != part and "outside" not in str(path)
        ]
        return self.random.choice(clips)


Change = Callable[[RandomTree], None]
#: Changes of names, before the tree is built, and of the tree itself.
NAMES: dict[str, Change] = {}
CHANGES: dict[str, Change] = {}


def names(function: Change) -> Change:
    NAMES[function.__name__] = function
    return function


def change(function: Change) -> Change:
    CHANGES[function.__name__] = function
    return function


@names
def labels_in_unicode(tree: RandomTree) -> None:
    for plain, word in (("cat", "café"), ("dog", "Zürich Å"), ("owl", "한글 ñ")):
        form = tree.random.choice(("NFC", "NFD"))
        spaces = tree.random.choice(("", " ", "  "))
        del tree.folders[plain]
        tree.folders[unicodedata.normalize("NFC", word)] = unicodedata.normalize(form, word) + spaces


@names
def parts_in_any_case(tree: RandomTree) -> None:
    tree.parts = {
        "train": tree.random.choice(("Train", "TRAIN", "training")),
        "test": tree.random.choice(("Test", "TEST", "testing")),
    }


@change
def hidden_folder_in_a_class(tree: RandomTree) -> None:
    folder, _, _ = tree.some_folder()
    for name in ("0-checkpoint.wav", "deep/1-checkpoint.wav"):
        tree.clip(folder / tree.random.choice((".ipynb_checkpoints", "__MACOSX", "night/.cache")) / name)
    tree.ignored += sum(
        1 for found in folder.rglob("*") if found.name in (".ipynb_checkpoints", "__MACOSX", ".cache")
    )


@change
def hidden_folder_on_top(tree: RandomTree) -> None:
    tree.clip(tree.root / tree.random.choice(("__MACOSX", ".Trash", "@eaDir")) / "cat" / "0.wav")
    tree.ignored += 1


@change
def hidden_files(tree: RandomTree) -> None:
    folder, _, _ = tree.some_folder()
    for name in ("._0.wav", ".DS_Store", "Thumbs.db"):
        (folder / name).write_bytes(b"no audio")
        tree.ignored += 1


@change
def foreign_files(tree: RandomTree) -> None:
    folder, _, _ = tree.some_folder()
    for suffix in tree.random.sample(FOREIGN, 3):
        (folder / f"clip{suffix}").write_bytes(b"of another type")
        tree.ignored += 1


@change
def loose_clips(tree: RandomTree) -> None:
    tree.clip(tree.root / "loose.wav")
    tree.ignored += 1


@change
def other_suffixes(tree: RandomTree) -> None:
    folder, label, part = tree.some_folder()
    tree.use(folder / tree.random.choice(("LOUD.WAV", "a.b.Wav", "c .wav")), label, part)


@change
def deeper_folders(tree: RandomTree) -> None:
    folder, label, part = tree.some_folder()
    tree.use(folder / "speaker 1.wav" / "session" / "0.wav", label, part)


@change
def another_spelling_of_a_class(tree: RandomTree) -> None:
    label = tree.random.choice(list(tree.folders))
    part = tree.random.choice(list(tree.parts))
    usual, other = tree.folders[label], tree.folders[label] + " "
    tree.folders[label] = other
    tree.use(tree.folder(label, part) / "0.wav", label, part)
    tree.folders[label] = usual


@change
def link_to_a_folder_outside(tree: RandomTree) -> None:
    folder, label, part = tree.some_folder()
    outside = tree.root.parent / "outside" / str(tree.number())
    tree.use(outside / "a" / "0.wav", label, part)
    tree.use(outside / "1.wav", label, part)
    (folder / "more").symlink_to(outside)


@change
def link_in_a_loop(tree: RandomTree) -> None:
    folder, _, _ = tree.some_folder()
    target = tree.random.choice(
        [parent for parent in (folder, *folder.parents) if tree.root in parent.parents or parent == tree.root]
    )
    (folder / "loop").symlink_to(target)
    tree.ignored += 1


@change
def link_to_a_clip_of_the_same_class(tree: RandomTree) -> None:
    folder, _, _ = tree.some_folder()
    target = tree.random.choice(sorted(folder.glob("[0-9]*.wav")))
    (folder / "a link.wav").symlink_to(target)
    tree.ignored += 1


@change
def hard_link_to_a_clip_of_another_class(tree: RandomTree) -> None:
    folder, label, _ = tree.some_folder()
    os.link(tree.some_clip(label=label), folder / f"linked {tree.number()}.wav")
    tree.refused = True


@change
def link_to_another_class(tree: RandomTree) -> None:
    folder, label, _ = tree.some_folder()
    (folder / f"linked {tree.number()}").symlink_to(tree.some_clip(label=label).parent)
    tree.refused = True


@change
def link_to_a_clip_of_another_part(tree: RandomTree) -> None:
    folder, label, part = tree.some_folder()
    but = {"label": label} if tree.layout == "drawn" else {"part": part}
    (folder / f"linked {tree.number()}.wav").symlink_to(tree.some_clip(**but))
    tree.refused = True


@change
def broken_link(tree: RandomTree) -> None:
    folder, _, _ = tree.some_folder()
    (folder / tree.random.choice(("gone.wav", "gone"))).symlink_to(tree.root / "nowhere")
    tree.refused = True


@change
def damaged_file(tree: RandomTree) -> None:
    folder, _, _ = tree.some_folder()
    (folder / "damaged.wav").write_bytes(tree.random.choice((b"", b"RIFF", b"no audio")))
    tree.damaged.append(folder / "damaged.wav")
    tree.ignored += 1


def _new_class_folder(tree: RandomTree) -> Path:
    tree.folders["new"] = f"new {tree.number()}"
    folder = tree.folder("new", "train")
    del tree.folders["new"]
    folder.mkdir(parents=True)
    return folder


@change
def class_folder_that_is_empty(tree: RandomTree) -> None:
    _new_class_folder(tree)
    tree.refused = True


@change
def class_folder_of_foreign_files(tree: RandomTree) -> None:
    (_new_class_folder(tree) / "0.m4a").write_bytes(b"of another type")
    tree.refused = True


@change
def held_out_part(tree: RandomTree) -> None:
    word = tree.random.choice(HELD_OUT)
    label, own = tree.random.choice(list(tree.folders.items()))
    if tree.layout == "drawn":
        tree.clip(tree.root / word / own / "0.wav")
        tree.refused = True
        return
    tree.use(
        tree.root / {"above": f"{word}/{own}", "below": f"{own}/{word}"}[tree.layout] / "0.wav",
        label,
        "validation",
    )


@change
def class_in_the_held_out_part_alone(tree: RandomTree) -> None:
    tree.clip(tree.root / "dev" / "wren" / "0.wav")
    tree.ignored += 1
    tree.refused |= tree.layout != "above"


@change
def folder_without_audio_on_top(tree: RandomTree) -> None:
    (tree.root / "logs").mkdir()
    (tree.root / "logs" / "log.txt").write_text("no audio")
    tree.ignored += 2
    tree.refused |= tree.layout != "above"


@change
def clips_in_no_part(tree: RandomTree) -> None:
    """Beside the part folders; where there are none, in a folder with the name of one."""
    own = next(iter(tree.folders.values()))
    tree.clip(tree.root / {"drawn": "test", "above": "new", "below": own}[tree.layout] / "0.wav")
    tree.refused = True


@change
def two_folders_of_one_part(tree: RandomTree) -> None:
    if tree.layout == "above":
        for folder in tree.folders.values():
            tree.clip(tree.root / "tRAIN" / folder / "0.wav")
    else:
        # The other way round: one clip below the folders of both.
        tree.clip(tree.root / next(iter(tree.folders.values())) / "train" / "test" / "0.wav")
    tree.refused = True


@change
def parts_without_test(tree: RandomTree) -> None:
    """Nothing but names of parts on top, or inside the classes."""
    words = ["train", *tree.random.sample(("Validation", "development", "evaluation"), 2)]
    if tree.layout == "above":
        (tree.root / tree.parts["test"]).rename(tree.root / words[1])
    elif tree.layout == "below":
        for folder in tree.folders.values():
            (tree.root / folder / tree.parts["test"]).rename(tree.root / folder / words[1])
    else:
        for folder, word in zip(tree.folders.values(), words, strict=True):
            (tree.root / folder).rename(tree.root / word)
    tree.refused = True


@contextlib.contextmanager
def listed_in_another_order(seed: int) -> Iterator[None]:
    """File systems list folders in any order."""
    scandir, listdir = os.scandir, os.listdir

    class Shuffled:
        def __init__(self, *args: Any) -> None:
            with scandir(*args) as entries:
                self.entries = sorted(entries, key=lambda entry: entry.name)
            random.Random(seed).shuffle(self.entries)

        def __enter__(self) -> Iterator[Any]:
            return iter(self.entries)

        def __exit__(self, *error: object) -> None:
            pass

        def __iter__(self) -> Iterator[Any]:
            return iter(self.entries)

    def shuffled(*args: Any) -> list[str]:
        found = sorted(listdir(*args))
        random.Random(seed).shuffle(found)
        return found

    with mock.patch("os.scandir", Shuffled), mock.patch("os.listdir", shuffled):
        yield
