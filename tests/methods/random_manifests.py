"""Random CSV manifests in the styles of people's programs, and mistakes with the line that must be named."""

from __future__ import annotations

import csv
import io
import random
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from audio_files import write_tiny_clip

LABELS = ("café", "dog", "Å two words")


@dataclass
class Entry:
    """A line for a clip, as it is to be written."""

    file: Path
    path: str
    label: str
    part: str
    more: str = ""
    extra: tuple[str, ...] = ()


@dataclass
class RandomManifest:
    """Three classes with two clips in each part; each entry has a style of its own, unless it is `plain`.

    Attributes:
        lines: the first line of each entry, once written.
        wrong: the entries whose line a refusal must name; None if there must be none.
        used: the label and the part of each file; the part is empty if there is no split.
        ignored: how many comments must be reported.
    """

    folder: Path
    random: random.Random
    has_split: bool
    plain: bool
    entries: list[Entry] = field(default_factory=list)
    header: dict[str, str] = field(default_factory=dict)
    encoding: str = "utf-8"
    raw_line: str = ""
    lines: dict[int, int] = field(default_factory=dict)
    wrong: list[Entry] | None = None
    used: dict[Path, tuple[str, str]] = field(default_factory=dict)
    ignored: int = 0

    def choose(self, styles: tuple[str, ...]) -> str:
        return styles[0] if self.plain else self.random.choice(styles)

    def build(self) -> None:
        choose = self.choose
        self.delimiter = choose((",", ";", "\t", "|"))
        self.line_end = choose(("\n", "\r\n", "\r"))
        self.encoding = choose(("utf-8", "utf-8-sig"))
        name = choose(("path", "Path", "file_name", "filename", "audio", " PATH "))
        self.header = {
            "path": name,
            "label": choose(("label", "Label ", "LABEL")),
            "more": choose(("speaker", "", "Fold")),
        }
        if self.has_split:
            self.header["split"] = choose(("split", "Split"))
        for label in LABELS:
            for part in ("train", "test"):
                for take in range(2):
                    self.add(label, part, take)
        self.random.shuffle(self.entries)

    def add(self, label: str, part: str, take: int) -> None:
        form = self.choose(("NFC", "NFD"))
        relative = unicodedata.normalize(form, f"é {part}/{label}/{take}.wav")
        file = write_tiny_clip(self.folder / relative, len(self.entries) + 1)
        self.entries.append(
            Entry(
                file,
                self.spelled_path(relative),
                self.choose(
                    (label, unicodedata.normalize("NFD", label), f" {label} ", label.replace(" ", "  "))
                ),
                self.choose((part, part.title(), f" {part.upper()}", f"{part}ing")),
                self.choose(("", "x", "two\nlines", 'a "quote"', "a, b; c")),
            )
        )
        self.used[file] = (label, part if self.has_split else "")

    def spelled_path(self, relative: str) -> str:
        other = unicodedata.normalize(self.choose(("NFC", "NFD")), relative)
        forms = (
            relative,
            other,
            f" {other} ",
            f"./{relative}",
            str(self.folder / other),
            other.replace("/", "\\"),
        )
        return self.choose(forms)

    def write(self) -> Path:
        order = self.random.sample(list(self.header), len(self.header))
        out = io.StringIO(newline="")
        self._blank(out)
        self._record(out, [self.header[name] for name in order])
        for entry in self.entries:
            self._blank(out)
            self.lines[id(entry)] = self._line(out)
            cells = {"path": entry.path, "label": entry.label, "split": entry.part, "more": entry.more}
            self._record(out, [*(cells[name] for name in order), *entry.extra])
        path = self.folder / "list.csv"
        path.write_bytes((out.getvalue() + self.raw_line).encode(self.encoding))
        return path

    def _blank(self, out: io.StringIO) -> None:
        """Sometimes a line without an entry."""
        text = self.choose(
            ("", "", "", self.line_end, self.delimiter + self.line_end, "# a comment" + self.line_end)
        )
        self.ignored += text.startswith("#")
        out.write(text)

    def _record(self, out: io.StringIO, cells: list[str]) -> None:
        # The writer quotes line ends of its own kind alone.
        quoting = csv.QUOTE_ALL if "\n" in "".join(cells) else csv.QUOTE_MINIMAL
        csv.writer(out, delimiter=self.delimiter, lineterminator=self.line_end, quoting=quoting).writerow(
            cells
        )

    def _line(self, out: io.StringIO) -> int:
        return len(list(io.StringIO(out.getvalue(), newline=""))) + 1

    def some(self) -> Entry:
        return self.random.choice(self.entries)


Mistake = Callable[[RandomManifest], None]
MISTAKES: dict[str, Mistake] = {}


def mistake(function: Mistake) -> Mistake:
    MISTAKES[function.__name__] = function
    return function


def listed_again(manifest: RandomManifest, **other: str) -> None:
    first = manifest.some()
    values = {"path": first.path, "label": first.label, "part": first.part, **other}
    again = Entry(first.file, **values)
    manifest.entries.insert(manifest.random.randrange(len(manifest.entries) + 1), again)
    manifest.wrong = [first, again]


@mistake
def a_line_twice(manifest: RandomManifest) -> None:
    listed_again(manifest)


@mistake
def a_file_with_two_labels(manifest: RandomManifest) -> None:
    listed_again(manifest, label="another")


@mistake
def a_file_in_two_spellings(manifest: RandomManifest) -> None:
    listed_again(manifest)
    first, again = manifest.wrong or []
    link = manifest.folder / "link.wav"
    link.symlink_to(first.file)
    again.path = manifest.random.choice(("link.wav", str(first.file), f"../{manifest.folder.name}/link.wav"))


@mistake
def a_file_in_two_parts(manifest: RandomManifest) -> None:
    listed_again(manifest)
    first, again = manifest.wrong or []
    again.part = "test" if "train" in first.part.lower() else "train"


def wrong_cell(manifest: RandomManifest, name: str, *values: str) -> None:
    entry = manifest.some()
    setattr(entry, name, manifest.random.choice(values))
    manifest.wrong = [entry]


@mistake
def no_such_file(manifest: RandomManifest) -> None:
    wrong_cell(manifest, "path", "gone.wav", "gone/0.wav", "~nobody/0.wav", ".", "x" * 300 + ".wav")


@mistake
def an_address(manifest: RandomManifest) -> None:
    wrong_cell(manifest, "path", "https://host/0.wav", "s3://bucket/0.wav", "file:///0.wav")


@mistake
def no_label(manifest: RandomManifest) -> None:
    wrong_cell(manifest, "label", "", "  ")


@mistake
def no_path(manifest: RandomManifest) -> None:
    wrong_cell(manifest, "path", "", "  ")


@mistake
def more_cells_than_columns(manifest: RandomManifest) -> None:
    wrong_cell(manifest, "more", "x")
    (manifest.wrong or [])[0].extra = ("surplus",)


@mistake
def a_damaged_file(manifest: RandomManifest) -> None:
    entry = manifest.some()
    entry.file.write_bytes(b"no audio")
    manifest.wrong = [entry]


@mistake
def an_unknown_part(manifest: RandomManifest) -> None:
    if manifest.has_split:
        wrong_cell(manifest, "part", "", "trian", "fold 1")


@mistake
def utf_16(manifest: RandomManifest) -> None:
    manifest.encoding = manifest.random.choice(("utf-16", "utf-16-le"))
    manifest.wrong = []


@mistake
def code_page_1252(manifest: RandomManifest) -> None:
    for entry in manifest.entries:
        entry.path, entry.label = (unicodedata.normalize("NFC", text) for text in (entry.path, entry.label))
    manifest.encoding = "cp1252"
    manifest.wrong = []


@mistake
def a_quote_that_is_not_closed(manifest: RandomManifest) -> None:
    manifest.raw_line = f'"0.wav{manifest.delimiter}dog{manifest.line_end}'
    manifest.wrong = []


@mistake
def no_column_of_labels(manifest: RandomManifest) -> None:
    manifest.header["label"] = "class name"
    manifest.wrong = []


@mistake
def two_columns_of_paths(manifest: RandomManifest) -> None:
    manifest.header.update(path="audio", more="file_name")
    manifest.wrong = []


@mistake
def a_split_by_another_name(manifest: RandomManifest) -> None:
    if manifest.has_split:
        manifest.header["split"] = "subset"
        manifest.wrong = []
