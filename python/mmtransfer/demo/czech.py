"""Transcribed Czech speech for the demonstration: the dialogues of the game Fish Fillets.

Two voices, the fish, speak five of six recordings, and other characters the rest. Held-out rooms of the game
test: sentences that training has not seen, mostly from the same two voices. The recordings and their
transcripts are GPL-2+; they are fetched from the user's own Debian or Ubuntu mirror and never redistributed.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from pathlib import Path

from mmtransfer.data.audio import duration
from mmtransfer.data.recordings import Clip, Recordings

from .dialogues import Line, read_dialogues
from .download import DebianPackage, debian_tree, tree_in

_GAME = "usr/share/games/fillets-ng"
SOUND = DebianPackage(
    name="fillets-ng-data-cs",
    tree=f"{_GAME}/sound",
    sha256=("e89ff43992219209b6c99ed1de77d0e3eeaf692c3012021e9495a582a3c55ebd",),
)
SCRIPTS = DebianPackage(
    name="fillets-ng-data",
    tree=f"{_GAME}/script",
    sha256=("ca50e1caa04373d814847d4f183d9b39a340febfa2d2f5ac645d7a96bad03014",),
)

# Every sixth of the sorted rooms (`share` apart, remarks that any room may play): 15 % of the audio, as long
# and as fast as the rest.
TEST_ROOMS = (
    "bathroom",
    "cancan",
    "city",
    "creatures",
    "emulator",
    "gems",
    "imprisoned",
    "magnet",
    "party2",
    "reactor",
    "start",
    "ufo",
    "wreck",
)

LETTERS = "aábcčdďeéěfghiíjklmnňoópqrřsštťuúůvwxyýzž"
# Hyphens part words, as in "chceš-li" and stuttered "m-m-magazín"; an apostrophe stands for no sound.
_PAUSES = re.compile(r"[-–—.,:;?!…\s]+")
_SILENT = re.compile(r"['\"’‘“”„]")
_FISH = {"font_small": "small fish", "font_big": "big fish", "font_both": "both fish"}


def czech_dialogues(cache: str | Path | None = None, *, folder: str | Path | None = None) -> Recordings:
    """Czech sentences with transcripts: about 80 rooms of a game, of which `TEST_ROOMS` test.

    A transcript is in lower case, Czech letters and single spaces (`LETTERS`, NFC). Left out, and counted in
    `ignored`: recordings without words, and those whose transcript has digits or other signs, which are not
    spoken as they are written. `speaker` is "small fish" (a woman), "big fish" (a man) or "both fish", and
    elsewhere the game's name for the style of the character's lines, and the room. The first call downloads
    two Debian packages (110 MB) with apt, without root; later calls need no network.

    Args:
        cache: where packages are kept; by default the user's cache folder.
        folder: use this folder and fetch nothing: both packages unpacked or installed there, or a folder that
            holds their `sound` and `script`. Its content is not checked against the known recordings.

    Raises:
        DataError: the packages cannot be had or are not the expected ones, `folder` lacks one of them, or a
            script does not parse.
    """
    if folder is None:
        sound, scripts = debian_tree(SOUND, cache), debian_tree(SCRIPTS, cache)
    else:
        sound, scripts = (tree_in(Path(folder), package) for package in (SOUND, SCRIPTS))
    train: list[Clip] = []
    test: list[Clip] = []
    ignored: Counter[str] = Counter()
    for room in sorted(entry.name for entry in sound.iterdir() if entry.is_dir()):
        lines = _lines(scripts / room)
        for file in _recordings(sound / room):
            line = lines.get(file.stem)
            text = None if line is None else spoken_text(line.text)
            if line is None or not text:
                ignored[_reason(line, text)] += 1
                continue
            clip = Clip(file, None, duration(file), text, _speaker(line, room))
            (test if room in TEST_ROOMS else train).append(clip)
    counts = tuple(f"{count} {reason}" for reason, count in sorted(ignored.items()))
    return Recordings("czech dialogues", (), train, test, ignored=counts)


def spoken_text(text: str) -> str | None:
    """Lower-case letters and single spaces of `text`; None where it has signs that are spoken otherwise."""
    text = _SILENT.sub("", unicodedata.normalize("NFC", text).lower())
    text = _PAUSES.sub(" ", text).strip()
    return text if set(text) <= {" ", *LETTERS} else None


def _lines(scripts: Path) -> dict[str, Line]:
    """The lines of a room by key."""
    files = sorted(scripts.glob("*dialogs_cs.lua"))
    return {line.key: line for file in files for line in read_dialogues(file)}


def _recordings(sound: Path) -> list[Path]:
    """Files of a room, in the same order on every machine."""
    files = [file for file in sound.rglob("*.ogg") if file.parent.name == "cs"]
    return sorted(files, key=lambda file: file.relative_to(sound).as_posix())


def _reason(line: Line | None, text: str | None) -> str:
    if line is None:
        return "without a transcript"
    return "with an empty transcript" if text == "" else "with digits or signs in the transcript"


def _speaker(line: Line, room: str) -> str:
    return _FISH.get(line.font) or f"{line.font.removeprefix('font_')} in {room}"
