"""A text as the symbols of a CTC model, with the way back to the user's words."""

from __future__ import annotations

import bisect
import functools
import itertools
import json
import re
import unicodedata
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from mmtransfer.tasks.ctc import CTC

#: Places where audio may hold words that the text lacks.
WILDCARDS = ("start", "end", "between")
#: A pattern and its replacement, as `re.sub` takes them.
Rule = tuple[str, str]

#: Characters that people and programs write for others.
_SPELLED = {
    **dict.fromkeys("’‘‛ʼ＇`´", "'"),
    **dict.fromkeys("‐‑‒–—―−﹘﹣－", "-"),
    **{"ß": "ss", "æ": "ae", "œ": "oe", "ø": "o", "ł": "l", "đ": "d", "ð": "d", "þ": "th", "ı": "i"},
}
#: Between the parts of a word, where the vocabulary has no such sign.
_PARTING = set("-_/+&@.:…")
_SPACE = " "


@dataclass(frozen=True)
class TextWord:
    """One word of the user's text.

    Attributes:
        text: as it was written, with its punctuation.
        line: number of its line in the text, from 0.
        spoken: what of it the model can write; "" if that is nothing.
        exact: whether `spoken` stands for all of it, but for punctuation.
    """

    text: str
    line: int
    spoken: str
    exact: bool


class Normalizer:
    """Spells words in the characters of a model.

    A word loses its punctuation, takes the case of the vocabulary, and has a letter with an accent replaced
    by the letter without, where the vocabulary lacks it. Digits and letters of other alphabets have no
    spelling: give a rule for them, or the word is aligned as one that the model does not know.

    Args:
        task: of the model.
        rules: (pattern, replacement) pairs for `re.sub`, applied to each word in their order before anything
            else: `(r"(\\d+)%", r"\\1 procent")`, `("Dr\\.", "doctor")`. A replacement may be several words.

    ValueError for a pattern that is no regular expression.
    """

    def __init__(self, task: CTC, rules: Sequence[Rule] = ()) -> None:
        self.task = task
        self.rules: list[tuple[re.Pattern[str], str]] = []
        for pattern, replacement in rules:
            try:
                compiled = re.compile(pattern)
                compiled.sub(replacement, "")
            except (re.error, IndexError) as error:
                raise ValueError(
                    f"the rule {pattern!r} -> {replacement!r} is not usable ({error})"
                ) from error
            self.rules.append((compiled, replacement))
        self._letters = {
            symbol
            for index, symbol in enumerate(task.vocabulary)
            if len(symbol) == 1 and index != task.blank and not symbol.isspace()
        }

    def words(self, text: str) -> list[TextWord]:
        """The words of a text, which are what spaces and line ends part."""
        return [
            self._word(word, number) for number, line in enumerate(text.splitlines()) for word in line.split()
        ]

    def _word(self, text: str, line: int) -> TextWord:
        ruled = unicodedata.normalize("NFC", text)
        for pattern, replacement in self.rules:
            ruled = pattern.sub(replacement, ruled)
        spell = self._spell if self.task.tokenizer is None else self._spell_by_tokenizer
        spoken, exact = spell(ruled)
        return TextWord(text, line, spoken, exact)

    def _spell(self, word: str) -> tuple[str, bool]:
        found: list[str] = []
        exact = True
        for character in word:
            spelled = self._character(character)
            if spelled is None:
                exact &= unicodedata.category(character)[0] not in "LNS"
                # 1,000 is one number; a colon or a dash parts what stands on its sides.
                spelled = _SPACE if _SPELLED.get(character, character) in _PARTING else ""
            found.append(spelled)
        return " ".join("".join(found).split()), exact

    @functools.cache  # noqa: B019 - as long as the normalizer
    def _character(self, character: str) -> str | None:
        """The character in the vocabulary's letters; None if it cannot be written."""
        if character.isspace():
            return _SPACE
        for variant in _variants(character):
            for cased in (variant, variant.lower(), variant.upper()):
                if cased and set(cased) <= self._letters:
                    return cased
        # A sign alone, as a combining accent of a letter that is written without it, stands for no sound.
        return "" if unicodedata.category(character) in ("Mn", "Cf") else None

    def _spell_by_tokenizer(self, word: str) -> tuple[str, bool]:
        bare = re.sub(r"^\W+|\W+$", "", word)
        for variant in dict.fromkeys((word, bare, bare.lower(), bare.upper())):
            if variant and self._known(variant):
                return variant, True
        return "", not any(unicodedata.category(character)[0] in "LNS" for character in word)

    def _known(self, word: str) -> bool:
        ids = self.task.encode(word)
        return bool(ids) and self._unknown_id not in ids

    @functools.cached_property
    def _unknown_id(self) -> int | None:
        model = json.loads(self.task.tokenizer or "{}").get("model", {})
        name = model.get("unk_token")
        if name is None:
            return model.get("unk_id")
        return self.task.vocabulary.index(name) if name in self.task.vocabulary else None


def _variants(character: str) -> Iterator[str]:
    """Spellings of a character, the nearest first."""
    for each in (character, _SPELLED.get(character, ""), _SPELLED.get(character.lower(), "")):
        if each:
            yield each
            yield unicodedata.normalize("NFKC", each)
            decomposed = unicodedata.normalize("NFKD", each)
            yield "".join(part for part in decomposed if not unicodedata.combining(part))


@dataclass(frozen=True)
class Target:
    """The tokens that are aligned.

    Attributes:
        ids: of the vocabulary; its size stands for a wildcard.
        words: for each token the words, by their index, that it is part of, or that it stands for; () for
            spaces, and for wildcards where the audio may hold more than the text.
    """

    ids: tuple[int, ...]
    words: tuple[tuple[int, ...], ...]


def encode(words: Sequence[TextWord], task: CTC, wildcards: Collection[str] = ()) -> Target:
    """The tokens of the words. Neighbours that the model cannot write share a wildcard.

    Args:
        words: from a `Normalizer` for this task.
        task: of the model.
        wildcards: of `WILDCARDS`: where the audio may hold words that the text lacks.
    """
    star, space = len(task.vocabulary), task.encode(_SPACE) if task.tokenizer is None else []
    tokens: list[tuple[int, tuple[int, ...]]] = []

    def add_wildcard(owners: tuple[int, ...] = ()) -> None:
        # Two in a row would ask for a blank between them.
        if not tokens or tokens[-1][0] != star:
            tokens.append((star, owners))

    if "start" in wildcards and words and words[0].spoken:
        add_wildcard()
    runs = [
        (spoken, [index for index, _ in run])
        for spoken, run in itertools.groupby(enumerate(words), lambda each: bool(each[1].spoken))
    ]
    for number, (spoken, run) in enumerate(runs):
        if number:
            tokens += [(each, ()) for each in space]
        if not spoken:
            add_wildcard(tuple(run))
            continue
        parts = [[index] for index in run] if "between" in wildcards else [run]
        for place, part in enumerate(parts):
            if place:
                tokens += [(each, ()) for each in space]
                add_wildcard()
            tokens += _encode_run(words, part, task)
    if "end" in wildcards and words and words[-1].spoken:
        add_wildcard()
    return Target(tuple(each for each, _ in tokens), tuple(owners for _, owners in tokens))


def _encode_run(
    words: Sequence[TextWord], run: Sequence[int], task: CTC
) -> Iterator[tuple[int, tuple[int, ...]]]:
    """The tokens of neighbouring words, with the word of each."""
    text = _SPACE.join(words[index].spoken for index in run)
    ends = list(itertools.accumulate(len(words[index].spoken) + 1 for index in run))
    for token, (start, end) in task.encode_with_places(text):
        # A space in front is part of many sub-word tokens, and the whole of a token of characters.
        begin = start + len(text[start:end]) - len(text[start:end].lstrip(_SPACE))
        if begin >= end and end in ends:
            yield token, ()
            continue
        first, last = (bisect.bisect_right(ends, place) for place in (min(begin, end - 1), end - 1))
        yield token, tuple(run[first : last + 1])
