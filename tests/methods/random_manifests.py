"""Random manifests in the styles of people's programs, and mistakes with the line that must be named."""

from __future__ import annotations

import csv
import io
import json
import random
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from audio_files import write_tiny_clip

LABELS = ("café", "dog", "Å two words")
TEXTS = (
    "Plain words",
    "  two  spaces, a comma; a bar | and a tab\tinside ",
    "é, ñ and Å, 한글, 🎙, ß",
    'he said "no", she "yes"',
    '"all of it"',
    "two\nlines",
    "it's 1.50 – or 007?",
    "null",
    "\u00a0not breaking\u00a0",
    "zero\u200bwidth and a separator\u2028",
)
VOICES = ("anna", "bob", "Zoë", "3")


@dataclass
class Entry:
    """A line for a clip, as it is to be written."""

    file: Path
    path: str
    value: str
    part: str
    speaker: str = ""
    more: str = ""
    extra: tuple[str, ...] = ()


@dataclass
class RandomManifest:
    """Three classes, or texts, with clips in each part; each entry has a style of its own, unless it is
    `plain`.

    Attributes:
        kind: "label" or "text".
        form: "csv" or "jsonl".
        lines: the first line of each entry, once written.
        wrong: the entries whose line a refusal must name; None if there must be none.
        used: the label or text, the part and the speaker of each file; the part is empty without a split.
        unusable: the entries that are errors when strict, and left out otherwise.
        ignored: how many comments and clips must be reported.
    """

    folder: Path
    random: random.Random
    has_split: bool
    plain: bool
    kind: str = "label"
    form: str = "csv"
    entries: list[Entry] = field(default_factory=list)
    header: dict[str, str] = field(default_factory=dict)
    encoding: str = "utf-8"
    raw_line: str = ""
    lines: dict[int, int] = field(default_factory=dict)
    wrong: list[Entry] | None = None
    used: dict[Path, tuple[str, str, str | None]] = field(default_factory=dict)
    unusable: list[Entry] = field(default_factory=list)
    ignored: int = 0

    def choose(self, styles: tuple[str, ...]) -> str:
        return styles[0] if self.plain else self.random.choice(styles)

    def build(self) -> None:
        choose = self.choose
        self.delimiter = choose((",", ";", "\t", "|"))
        self.line_end = choose(("\n", "\r\n", "\r"))
        self.encoding = choose(("utf-8", "utf-8-sig"))
        names = {
            "label": ("label", "Label ", "LABEL"),
            "text": ("text", "Text", "sentence", "Transcript", "transcription "),
        }
        self.header = {
            "path": choose(("path", "Path", "file_name", "filename", "audio", " PATH ", "audio_filepath")),
            "value": choose(names[self.kind]),
            "more": choose(("notes", "", "Fold")),
        }
        if speaker := choose(("", "speaker", "Speaker ID", "client_id")):
            self.header["speaker"] = speaker
        if self.has_split:
            self.header["split"] = choose(("split", "Split"))
        parts = ("train", "test", "validation") if self.has_split else ("train", "test")
        for label in LABELS:
            for part in parts:
                for take in range(2):
                    self.add(label, part, take)
        self.random.shuffle(self.entries)

    def add(self, label: str, part: str, take: int) -> None:
        form = self.choose(("NFC", "NFD"))
        relative = unicodedata.normalize(form, f"é {part}/{label}/{take}.wav")
        file = write_tiny_clip(self.folder / relative, len(self.entries) + 1)
        value, written = self.labelled(label) if self.kind == "label" else self.spoken()
        # Three voices of each class at least, so that a split can be drawn.
        voice = VOICES[(len(self.entries) + (part == "test")) % len(VOICES)] if take or part == "test" else ""
        word = {"validation": ("validation", "Dev", "valid ")}.get(
            part, (part, part.title(), f" {part.upper()}", f"{part}ing")
        )
        self.entries.append(
            Entry(
                file,
                self.spelled_path(relative),
                written,
                self.choose(word),
                self.choose((voice, f" {voice} ")),
                self.choose(("", "x", "two\nlines", 'a "quote"', "a, b; c")),
            )
        )
        speaker = voice if voice and "speaker" in self.header else None
        self.used[file] = (value, part if self.has_split else "", speaker)

    def labelled(self, label: str) -> tuple[str, str]:
        """A label as it must be read, and as it is written."""
        forms = (label, unicodedata.normalize("NFD", label), f" {label} ", label.replace(" ", "  "))
        return label, self.choose(forms)

    def spoken(self) -> tuple[str, str]:
        """A transcript as it must be read, and as it is written."""
        text = f"{self.choose(TEXTS)}{len(self.entries)}{self.choose(TEXTS)}"
        written = unicodedata.normalize(self.choose(("NFC", "NFD")), text)
        return unicodedata.normalize("NFC", text).strip(), written

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
        if self.form == "csv":
            self._record(out, [self.header[name] for name in order])
        for entry in self.entries:
            self._blank(out)
            self.lines[id(entry)] = self._line(out)
            if self.form == "csv":
                cells = self._cells(entry)
                self._record(out, [*(cells[name] for name in order), *entry.extra])
            else:
                self._object(out, entry)
        path = self.folder / f"list.{self.form}"
        path.write_bytes((out.getvalue() + self.raw_line).encode(self.encoding))
        return path

    def _cells(self, entry: Entry) -> dict[str, str]:
        return {
            "path": entry.path,
            "value": entry.value,
            "split": entry.part,
            "speaker": entry.speaker,
            "more": entry.more,
        }

    def _object(self, out: io.StringIO, entry: Entry) -> None:
        cells = {self.header[name]: cell for name, cell in self._cells(entry).items() if name in self.header}
        cells.update(dict(pair.split("=") for pair in entry.extra))
        if not self.plain:
            cells = dict(self.random.sample(list(cells.items()), len(cells)))
            empty = self.random.choice(({}, None))
            cells = {name: cell or empty for name, cell in cells.items() if cell or empty is None}
        spaces = self.choose(("", " "))
        text = json.dumps(cells, ensure_ascii=self.choose(("", "x")) == "x")
        out.write(f"{spaces}{text}{spaces}{self.line_end}")

    def _blank(self, out: io.StringIO) -> None:
        """Sometimes a line without an entry."""
        if self.form == "jsonl":
            out.write(self.choose(("", "", "", self.line_end, f"  {self.line_end}")))
            return
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

    def leave_out(self, entry: Entry) -> None:
        self.unusable.append(entry)
        self.used.pop(entry.file)
        self.ignored += 1


Mistake = Callable[[RandomManifest], None]
MISTAKES: dict[str, Mistake] = {}


def mistake(function: Mistake) -> Mistake:
    MISTAKES[function.__name__] = function
    return function


def listed_again(manifest: RandomManifest, **other: str) -> None:
    first = manifest.some()
    values = {"path": first.path, "value": first.value, "part": first.part, **other}
    again = Entry(first.file, **values)
    manifest.entries.insert(manifest.random.randrange(len(manifest.entries) + 1), again)
    manifest.wrong = [first, again]


@mistake
def a_line_twice(manifest: RandomManifest) -> None:
    listed_again(manifest)


@mistake
def a_file_with_two_values(manifest: RandomManifest) -> None:
    listed_again(manifest, value="another")


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
def no_label_or_no_text(manifest: RandomManifest) -> None:
    wrong_cell(manifest, "value", "", "  ")
    if manifest.kind == "text":
        (entry,) = manifest.wrong or []
        manifest.leave_out(entry)
        manifest.wrong = None


@mistake
def no_path(manifest: RandomManifest) -> None:
    wrong_cell(manifest, "path", "", "  ")


@mistake
def more_cells_than_columns(manifest: RandomManifest) -> None:
    if manifest.form == "csv":
        wrong_cell(manifest, "more", "x")
        (manifest.wrong or [])[0].extra = ("surplus",)


@mistake
def a_damaged_file(manifest: RandomManifest) -> None:
    entry = manifest.some()
    entry.file.write_bytes(b"no audio")
    manifest.leave_out(entry)


@mistake
def mostly_damaged_files(manifest: RandomManifest) -> None:
    for entry in manifest.random.sample(manifest.entries, len(manifest.entries) // 2 + 1):
        entry.file.write_bytes(b"")
    manifest.wrong = []


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
        entry.path, entry.value = (unicodedata.normalize("NFC", text) for text in (entry.path, entry.value))
        entry.value = entry.value.encode("cp1252", "ignore").decode("cp1252")
        entry.speaker = ""
    manifest.encoding = "cp1252"
    manifest.wrong = []


@mistake
def a_quote_that_is_not_closed(manifest: RandomManifest) -> None:
    manifest.raw_line = {
        "csv": f'"0.wav{manifest.delimiter}dog{manifest.line_end}',
        "jsonl": '{"path": "0.wav, "label": "dog"}',
    }[manifest.form]
    manifest.wrong = []


@mistake
def no_column_of_labels_or_texts(manifest: RandomManifest) -> None:
    manifest.header["value"] = "class name"
    manifest.wrong = []


@mistake
def two_columns_of_paths(manifest: RandomManifest) -> None:
    manifest.header.update(path="audio", more="file_name")
    manifest.wrong = []


@mistake
def labels_and_texts(manifest: RandomManifest) -> None:
    """In two columns, or in some lines of JSON."""
    other = "transcript" if manifest.kind == "label" else "Label"
    if manifest.form == "jsonl":
        manifest.some().extra = (f"{other}=some words",)
    else:
        manifest.header["more"] = other
        manifest.some().more = "some words"
    manifest.wrong = []


@mistake
def two_columns_of_texts(manifest: RandomManifest) -> None:
    if manifest.kind == "text":
        manifest.header.update(value="sentence", more="Transcription")
        manifest.some().more = "another"
        manifest.wrong = []


@mistake
def pieces_of_long_files(manifest: RandomManifest) -> None:
    manifest.header["more"] = "offset"
    for entry in manifest.entries:
        entry.more = manifest.random.choice(("", "0", "0.0"))
    wrong_cell(manifest, "more", "0.1", "12")


@mistake
def a_split_by_another_name(manifest: RandomManifest) -> None:
    if manifest.has_split:
        manifest.header["split"] = "subset"
        manifest.wrong = []
