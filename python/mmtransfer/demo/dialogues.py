"""Reader of Fish Fillets' dialogue scripts: Lua files that call `dialogId` and `dialogStr`, nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mmtransfer.data.errors import DataError

_STRING = r'"(?:[^"\\\n]|\\.)*"'
_TOKEN = re.compile(
    rf"""(?P<skipped>\s+|--\[\[.*?\]\]|--(?!\[\[)[^\n]*)
      |  (?P<string>{_STRING})
      |  (?P<word>dialogId|dialogStr|\.\.|[(),])""",
    re.VERBOSE | re.DOTALL,
)
_ESCAPES = {"\\": "\\", '"': '"', "'": "'", "n": "\n", "t": "\t"}
_ARGUMENTS = {"dialogId": 3, "dialogStr": 1}
_REMEDY = "unpack the package again, or correct the script"


@dataclass(frozen=True)
class Line:
    """One line of a dialogue: `key` names its recording, `font` its speaker; `text` is as displayed."""

    key: str
    font: str
    text: str


def read_dialogues(path: Path) -> list[Line]:
    """The lines of one script (UTF-8), in its order; a `dialogId` without `dialogStr` is left out.

    DataError, naming file and line, for anything but comments and the two calls with literal strings, a
    `dialogStr` without its `dialogId`, and a key that occurs twice.
    """
    lines: dict[str, Line] = {}
    named: list[str] = []
    for call, arguments, place in _Script(path).calls():
        if call == "dialogId":
            named = arguments
            continue
        if not named:
            raise DataError(f"{place} has a dialogStr without a dialogId before it; {_REMEDY}")
        key, font, _ = named
        if key in lines:
            raise DataError(f"{place} gives {key} a second text; {_REMEDY}")
        lines[key] = Line(key, font, arguments[0])
        named = []
    return list(lines.values())


class _Script:
    """The tokens of one file, and the calls made of them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.source = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path} cannot be read as a UTF-8 script ({error}); {_REMEDY}") from error

    def calls(self) -> Iterator[tuple[str, list[str], str]]:
        """Name, arguments, and `<file> line <number>` of each call."""
        tokens = self._tokens()
        for name, start in tokens:
            if name not in _ARGUMENTS:
                raise self._unexpected(name, start)
            arguments = self._arguments(tokens, _ARGUMENTS[name])
            yield name, arguments, self._place(start)

    def _arguments(self, tokens: Iterator[tuple[str, int]], count: int) -> list[str]:
        """`("a", "b" .. "c")`: as many strings as the call takes."""
        self._expect(tokens, "(")
        arguments = []
        for index in range(count):
            parts = [self._string(tokens)]
            end = ")" if index == count - 1 else ","
            while self._expect(tokens, "..", end) == "..":
                parts.append(self._string(tokens))
            arguments.append("".join(parts))
        return arguments

    def _string(self, tokens: Iterator[tuple[str, int]]) -> str:
        token, start = next(tokens, ("", len(self.source)))
        if not token.startswith('"'):
            raise self._unexpected(token, start)

        def unescape(match: re.Match[str]) -> str:
            if match[1] not in _ESCAPES:
                raise self._unexpected(match[0], start)
            return _ESCAPES[match[1]]

        return re.sub(r"\\(.)", unescape, token[1:-1], flags=re.DOTALL)

    def _expect(self, tokens: Iterator[tuple[str, int]], *wanted: str) -> str:
        token, start = next(tokens, ("", len(self.source)))
        if token not in wanted:
            raise self._unexpected(token, start)
        return token

    def _tokens(self) -> Iterator[tuple[str, int]]:
        position = 0
        while position < len(self.source):
            match = _TOKEN.match(self.source, position)
            if match is None:
                raise self._unexpected(self.source[position:].partition("\n")[0], position)
            if match["skipped"] is None:
                yield match[0], position
            position = match.end()

    def _unexpected(self, token: str, start: int) -> DataError:
        problem = f"has {token[:40]!r} in a place where" if token else "ends where"
        return DataError(
            f"{self._place(start)} {problem} dialogId(key, font, text) or dialogStr(text) goes on; {_REMEDY}"
        )

    def _place(self, start: int) -> str:
        return f"{self.path} line {self.source.count(chr(10), 0, start) + 1}"
