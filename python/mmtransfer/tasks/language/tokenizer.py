"""The tokens of a language model, and the places of their characters in a text."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer

from mmtransfer.data import DataError
from mmtransfer.encoders.loading import quiet_transformers

from .source import find_place, read_outline

#: Of tokenizers in the manner of SentencePiece: a space, also one that is put in front of a text.
_SPACE = "▁"


class TextTokenizer:
    """A fast tokenizer of transformers.

    Attributes:
        source: where it is from, for messages.
        bos, eos: ids, or None.
        size: the largest id + 1.
    """

    def __init__(self, tokenizer: Any, source: str) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                f"the tokenizer of {source} is not a fast one ({type(tokenizer).__name__}), and only "
                "those give the places of characters; choose a language model with a tokenizer.json"
            )
        self.source = source
        self.bos: int | None = tokenizer.bos_token_id
        self.eos: int | None = tokenizer.eos_token_id
        self._unknown: int | None = tokenizer.unk_token_id
        # A copy: each call of transformers' own tokenizer sets padding and truncation anew.
        self._template = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._template.no_padding()
        self._template.no_truncation()
        self._texts = Tokenizer.from_str(self._template.to_str())
        # A transcript that has "</s>" in it does not end there.
        self._texts.encode_special_tokens = True
        ids = self._texts.get_vocab(with_added_tokens=True)
        if not ids:
            raise ValueError(f"the tokenizer of {source} has no tokens")
        self.size = max(ids.values()) + 1

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Copies and worker processes: the library does not keep this setting."""
        self.__dict__.update(state)
        self._texts.encode_special_tokens = True

    def check_table(self, rows: int) -> None:
        """ValueError unless an embedding table of so many rows has one for each token."""
        if rows < self.size:
            raise ValueError(
                f"the embedding table of {self.source} has {rows} rows, and its tokenizer has ids up to "
                f"{self.size - 1}; give a tokenizer and a model that belong together"
            )

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, without special ones."""
        return self._texts.encode(text, add_special_tokens=False).ids

    def encode_template(self, text: str) -> list[int]:
        """The tokens of a part of a template, which may name special ones."""
        return self._template.encode(text, add_special_tokens=False).ids

    def encode_with_ends(self, text: str) -> tuple[list[int], list[int]]:
        """The tokens of a text, and of each how many characters lie before its end.

        Ends never decrease. White space behind a token belongs to it, as does what no token has, such as an
        accent that normalisation joins to its letter. The parts of one character, tokens of single bytes,
        share its end; a space that the tokenizer adds in front of a text has the end 0.
        """
        found = self._texts.encode(text, add_special_tokens=False)
        ends: list[int] = []
        end = 0
        following = [start for start, _ in found.offsets[1:]] + [len(text)]
        for place, (token, (_, stop)) in enumerate(zip(found.tokens, found.offsets, strict=True)):
            added = place == 0 and token == _SPACE and not text[:1].isspace()
            end = max(end, 0 if added else max(stop, following[place]))
            while end < len(text) and text[end].isspace():
                end += 1
            ends.append(end)
        return found.ids, ends

    def unknown(self, text: str) -> list[str]:
        """The characters of a text that have no token but the one for the unknown."""
        if self._unknown is None:
            return []
        found = self._texts.encode(text, add_special_tokens=False)
        pairs = zip(found.ids, found.offsets, strict=True)
        return [each for index, (start, stop) in pairs if index == self._unknown for each in text[start:stop]]

    def is_empty(self, text: str) -> bool:
        """Whether a text has no words: white space, or characters that are unknown."""
        return not text.strip() or all(index == self._unknown for index in self.encode(text))

    def decode(self, ids: list[int]) -> str:
        """The text of tokens, without special ones."""
        return self._texts.decode(ids, skip_special_tokens=True)


def read_tokenizer(source: str) -> TextTokenizer:
    """The tokenizer of a language model, a folder or a hub name.

    Raises:
        DataError: there is none.
        ValueError: it is not a fast one, or the model is no causal language model.
    """
    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(find_place(source))
    except DataError:
        raise
    except Exception as error:
        # Another kind of model has none, or one of another kind.
        read_outline(source)
        # Loaders of several libraries are behind this call.
        reason = " ".join(str(error).split())[:200].removesuffix(".")
        raise DataError(f"no tokenizer can be loaded from {source} ({reason})") from error
    return TextTokenizer(tokenizer, source)
