"""Synthesised speech with the time of each word, by espeak-ng.

The library comes in a wheel, fetched by the user's own pip and never redistributed (espeak-ng is GPL-3+); it
is called through ctypes.
"""

from __future__ import annotations

import ctypes
import itertools
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmtransfer.data.errors import DataError

from .download import Wheel, cached_folder, unpack_wheel

PACKAGE = Wheel(
    name="espeakng-loader",
    version="0.2.4",
    sha256="08721baf27d13d461f6be6eed9a65277e70d68234ff484fd8b9897b222cdcb6d",
    size=10_078_484,
)
#: The wheel with this hash is for one platform.
_PLATFORM = ("Linux", "x86_64")
_FOLDER = "espeakng_loader"
_LIBRARY = "libespeak-ng.so"

# Of speak_lib.h: audio goes to the callback; phonemes are reported, and a fault does not end the process.
_SYNCHRONOUS = 2
_PHONEME_EVENTS, _DO_NOT_EXIT = 1, 1 << 15
_CHARACTER, _UTF8 = 1, 1
_WORD, _END, _PHONEME = 1, 5, 7


@dataclass(frozen=True)
class SpokenWord:
    """A word of a text, or neighbours that are spoken as one, and when it sounds, in seconds.

    The closed lips or tongue before a stop that begins a word are silent, and count to neither word.
    """

    text: str
    start: float
    end: float


@dataclass(frozen=True)
class Spoken:
    """Samples `(n,)`, float32, at `sampling_rate` Hz, and the words in them."""

    samples: np.ndarray
    sampling_rate: int
    words: list[SpokenWord]


@dataclass(frozen=True)
class Event:
    """A word or phoneme that begins, or the end of the text: at a sample.

    Attributes:
        position: of a word, its first character in the text.
        phoneme: its name, where the event is a phoneme; pauses begin with "_".
    """

    sample: int
    position: int | None = None
    phoneme: str | None = None


class _Identity(ctypes.Union):
    _fields_ = [("number", ctypes.c_int), ("name", ctypes.c_char_p), ("string", ctypes.c_char * 8)]


class RawEvent(ctypes.Structure):
    """`espeak_EVENT`."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _Identity),
    ]


Callback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(RawEvent)
)


class Espeak:
    """A voice of espeak-ng. The library has one state, so threads must not speak at the same time.

    Args:
        voice: its name: "cs" is Czech; "cs+f2" a variant of it.
        cache: where the package is kept; by default the user's cache folder.
        library: use this one, loaded already, whose data folder is in `data`, and fetch nothing.
        data: the folder that holds `espeak-ng-data`.

    Raises:
        DataError: the package cannot be had or does not load on this machine; it has no such voice.
    """

    def __init__(
        self,
        voice: str = "cs",
        cache: str | Path | None = None,
        *,
        library: Any = None,
        data: Path | None = None,
    ) -> None:
        if library is None:
            data = espeak_folder(cache)
            library = _load(data / _LIBRARY)
        self._library, self._voice = library, voice
        options = _PHONEME_EVENTS | _DO_NOT_EXIT
        path = None if data is None else str(data).encode()
        self.sampling_rate = int(library.espeak_Initialize(_SYNCHRONOUS, 0, path, options))
        if self.sampling_rate <= 0:
            raise DataError(
                f"espeak-ng finds no data in {data}; remove the folder, so that it is fetched again"
            )
        if library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise DataError(f"espeak-ng has no voice {voice!r}")
        # Else the noise in the voice would depend on the time of day.
        library.espeak_ng_SetRandSeed(ctypes.c_long(0))

    def speak(self, text: str) -> Spoken:
        """The text, words without punctuation, with their times.

        The library's state goes on from text to text: the same texts in the same order sound the same.
        ValueError for a text without words, or of which nothing is spoken.
        """
        if not text.split():
            raise ValueError("text has no words")
        blocks: list[np.ndarray] = []
        events: list[Event] = []

        def receive(samples: Any, count: int, raw: Any) -> int:
            if samples and count > 0:
                blocks.append(np.ctypeslib.as_array(samples, (count,)).copy())
            events.extend(_read_events(raw))
            return 0

        callback = Callback(receive)
        encoded = text.encode() + b"\0"
        library = self._library
        library.espeak_SetVoiceByName(self._voice.encode())
        library.espeak_SetSynthCallback(callback)
        status = library.espeak_Synth(encoded, len(encoded), 0, _CHARACTER, 0, _UTF8, None, None)
        library.espeak_SetSynthCallback(Callback())
        if status != 0 or not blocks:
            raise ValueError(f"espeak-ng speaks nothing of {text!r} (status {status})")
        samples = np.concatenate(blocks).astype(np.float32) / 32768
        return Spoken(samples, self.sampling_rate, words_of(text, events, self.sampling_rate))


def espeak_folder(cache: str | Path | None = None) -> Path:
    """The folder with the library and its data; the first call downloads a 10 MB wheel with pip."""
    if (platform.system(), platform.machine()) != _PLATFORM:
        raise DataError(
            f"espeak-ng is fetched for {' '.join(_PLATFORM)} alone; on {platform.system()} "
            f"{platform.machine()} install it, and give Espeak its library and data"
        )

    def build(folder: Path) -> None:
        unpack_wheel(PACKAGE, folder)

    return cached_folder(f"espeak-ng-{PACKAGE.sha256[:12]}", build, cache) / _FOLDER


def words_of(text: str, events: Sequence[Event], sampling_rate: int) -> list[SpokenWord]:
    """The words of a text from the events of its speech, in their order.

    A written word that has no event, or no sound, is part of the word before it.
    """
    starts = _word_starts(text)
    # Each sound that is no pause, with the written word that it was reported in.
    sounds: list[tuple[int, int, int]] = []
    word = 0
    for event, following in itertools.pairwise(events):
        if event.position is not None and event.position in starts:
            word = starts.index(event.position)
        if event.phoneme is not None and not event.phoneme.startswith("_"):
            sounds.append((word, event.sample, following.sample))
    if not sounds:
        raise ValueError(f"espeak-ng speaks nothing of {text!r}")
    groups = [list(each) for _, each in itertools.groupby(sounds, key=lambda sound: sound[0])]
    # The first has all written words from the beginning.
    firsts = [0, *(group[0][0] for group in groups[1:]), len(starts)]
    written = text.split()
    return [
        SpokenWord(" ".join(written[first:last]), group[0][1] / sampling_rate, group[-1][2] / sampling_rate)
        for group, (first, last) in zip(groups, itertools.pairwise(firsts), strict=True)
    ]


def _word_starts(text: str) -> list[int]:
    """The place of each word's first character."""
    return [
        place
        for place, character in enumerate(text)
        if not character.isspace() and (place == 0 or text[place - 1].isspace())
    ]


def _read_events(raw: Any) -> list[Event]:
    """The events of one block, whose list ends with type 0."""
    found: list[Event] = []
    for event in itertools.takewhile(
        lambda each: each.type != 0, (raw[place] for place in itertools.count())
    ):
        if event.type == _WORD:
            found.append(Event(event.sample, position=event.text_position - 1))
        elif event.type == _PHONEME:
            found.append(Event(event.sample, phoneme=event.id.string.decode(errors="replace")))
        elif event.type == _END:
            found.append(Event(event.sample))
    return found


def _load(path: Path) -> Any:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise DataError(f"{path} does not load on this machine ({error})") from error
