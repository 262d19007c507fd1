"""Alphabets of tokenizers that other people made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer


@dataclass(frozen=True)
class Alphabet:
    """Symbols for the task ctc.

    Attributes:
        symbols: in the order of the logits; a space for the delimiter of words.
        blank: index of the blank.
        case: "upper" or "lower" if all letters are, else "keep".
    """

    symbols: tuple[str, ...]
    blank: int
    case: str


def read_tokenizer(path: Path) -> Tokenizer | Alphabet:
    """A JSON file of the library `tokenizers`, or a folder with a tokenizer of transformers.

    ValueError, naming the path, if it holds none.
    """
    path = path.expanduser()
    if not path.exists():
        raise ValueError(f"tokenizer {path} does not exist; give a JSON file or a folder")
    if path.is_dir():
        tokenizer = _load(str(path))
        backend = getattr(tokenizer, "backend_tokenizer", None)
        return backend if isinstance(backend, Tokenizer) else read_alphabet(tokenizer, str(path))
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:
        # The library raises plain exceptions.
        reason = " ".join(str(error).split())
        raise ValueError(f"tokenizer {path} is no JSON file of the library tokenizers ({reason})") from error


def find_alphabet(source: str, size: int, blank: int | None) -> Alphabet:
    """The alphabet of the tokenizer of a pretrained model, for `size` logits."""
    return read_alphabet(_load(source), source, size=size, blank=blank)


def read_alphabet(
    tokenizer: Any, source: str, *, size: int | None = None, blank: int | None = None
) -> Alphabet:
    """The symbols of a tokenizer of characters; those past `size` logits are left out.

    ValueError, naming `source`, if it has no token for the blank (its padding).
    """
    ids: dict[str, int] = tokenizer.get_vocab()
    blank = tokenizer.pad_token_id if blank is None else blank
    size = max(ids.values()) + 1 if size is None else size
    if blank is None or not 0 <= blank < size:
        raise ValueError(f"the tokenizer of {source} has no padding token, which is the blank")
    delimiter = getattr(tokenizer, "word_delimiter_token", None)
    symbols = [f"<unused {index}>" for index in range(size)]
    for symbol, index in ids.items():
        # A space in the vocabulary as well is in no transcript: the tokenizer writes the delimiter.
        if index < size and (symbol != " " or delimiter in (None, " ")):
            symbols[index] = " " if symbol == delimiter else symbol
    return Alphabet(tuple(symbols), blank, _case(symbols))


def _load(source: str) -> Any:
    try:
        return AutoTokenizer.from_pretrained(source)
    except Exception as error:
        # Loaders of several libraries are behind this call.
        reason = " ".join(str(error).split())[:200].removesuffix(".")
        raise ValueError(f"no tokenizer can be loaded from {source} ({reason})") from error


def _case(symbols: list[str]) -> str:
    letters = [symbol for symbol in symbols if len(symbol) == 1 and symbol.upper() != symbol.lower()]
    for case in ("upper", "lower"):
        if letters and all(getattr(letter, case)() == letter for letter in letters):
            return case
    return "keep"
