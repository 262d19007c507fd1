"""Names as people mean them: labels, and the folders and columns that are parts of a data set."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

PARTS = {
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "validation": ("validation", "valid", "val", "dev", "development", "eval", "evaluation"),
}
# Names that others give to parts; a folder of such a name is refused as a class, and never taken for a part.
_LIKE_PARTS = {
    *("tr", "trn", "tt", "ts", "tst", "te", "tests", "cv", "dv", "devel", "validate", "trainval", "traindev"),
    *("holdout", "heldout", "unseen", "seen", "enroll", "enrol", "trial", "trials"),
}
#: Columns of a manifest that are a split by their name.
SPLIT_COLUMNS = ("splits", "set", "subset", "partition", "part", "is_train", "is_test", "is_training")
_PART_OF = {word: part for part, words in PARTS.items() for word in words}
VALIDATION = "validation"
# What operating systems and programs leave between the files of people.
LITTER = {
    "__macosx",
    "thumbs.db",
    "desktop.ini",
    "@eadir",
    "$recycle.bin",
    "system volume information",
    "lost+found",
}


def is_hidden(name: str) -> bool:
    """Whether a file or folder called `name` is no data: `.git`, `._a.wav`, `__MACOSX`, `Thumbs.db`."""
    return name.startswith(".") or name.casefold() in LITTER


def composed(text: str) -> str:
    """`text` in Unicode's form C; some file systems and programs write accents as characters of their own."""
    return unicodedata.normalize("NFC", text)


def normal(text: str) -> str:
    """`text` in form C, without outer spaces, runs of spaces made one: one spelling of one name."""
    return " ".join(composed(text).split())


def transcript(text: str) -> str:
    """`text` in form C without outer spaces; what is inside is left as it was written."""
    return composed(text).strip()


def part_of(name: str) -> str | None:
    """ "train", "test" or "validation" for the name of a part in any case (`Train`, `dev`), else None."""
    return _PART_OF.get(normal(name).casefold())


def names_a_part(name: str) -> bool:
    """Whether a word of `name` is that of a part (`train-clean-100`, `testset`) or of a fold (`fold_3`)."""
    text = normal(name).casefold()
    words = (re.sub(r"(?<=.)(set|data)$", "", word) for word in re.findall(r"[^\W\d_]+", text))
    numbered = re.search(r"\b(fold|split|part|partition|subset|set)[\W_]*\d", text)
    return numbered is not None or any(word in _PART_OF or word in _LIKE_PARTS for word in words)


def look_alike(labels: Iterable[str]) -> list[list[str]]:
    """Groups of labels that differ in case, width or invisible characters alone."""
    groups: dict[str, list[str]] = {}
    for label in labels:
        text = unicodedata.normalize("NFKC", label).casefold()
        visible = "".join(character for character in text if unicodedata.category(character) != "Cf")
        groups.setdefault(visible, []).append(label)
    return [group for group in groups.values() if len(group) > 1]


def is_text(name: str) -> bool:
    """Whether the bytes of a file's `name` are UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
