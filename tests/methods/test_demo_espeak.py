"""Speech with the times of its words: events of a simulated espeak-ng, and the real one if there."""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from mmtransfer.data import DataError
from mmtransfer.demo import download, espeak
from mmtransfer.demo.espeak import Espeak, Event, RawEvent, SpokenWord, words_of

RATE = 1000


def raw(kind: int, sample: int, position: int = 0, phoneme: bytes = b"") -> RawEvent:
    event = RawEvent(type=kind, sample=sample, text_position=position)
    event.id.string = phoneme
    return event


class FakeLibrary:
    """Gives each call's blocks, of samples and events, to the callback."""

    def __init__(self, blocks: Sequence[tuple[list[int], list[RawEvent]]] = (), **answers: int) -> None:
        self.blocks, self.answers = blocks, answers
        self.texts: list[str] = []

    def espeak_Initialize(self, output: int, length: int, path: bytes, options: int) -> int:
        assert (output, options) == (2, 0x8001)
        return self.answers.get("rate", RATE)

    def espeak_SetVoiceByName(self, name: bytes) -> int:
        return 0 if name == b"cs" else -1

    def espeak_SetSynthCallback(self, callback: Any) -> None:
        self.callback = callback

    def espeak_ng_SetRandSeed(self, seed: Any) -> None:
        assert seed.value == 0

    def espeak_Synth(self, text: bytes, size: int, *options: Any) -> int:
        assert size == len(text)
        assert text.endswith(b"\0")
        self.texts.append(text[:-1].decode())
        for samples, events in self.blocks:
            array = (ctypes.c_short * len(samples))(*samples)
            listed = (RawEvent * (len(events) + 1))(*events)
            assert self.callback(array, len(samples), listed) == 0
        return self.answers.get("status", 0)


class TestSpeaking:
    def test_samples_and_words_of_all_blocks(self):
        blocks = [
            ([0, 16384], [raw(8, 0), raw(1, 0, 1), raw(7, 10, 1, b"t"), raw(7, 30, 1, b"'e")]),
            ([-32768], [raw(1, 50, 5), raw(7, 60, 5, b"m")]),
            ([], [raw(7, 90, 8, b"_:"), raw(5, 100)]),
        ]
        library = FakeLibrary(blocks)
        spoken = Espeak(library=library).speak("těn muž")
        assert library.texts == ["těn muž"]
        assert spoken.sampling_rate == RATE
        assert spoken.samples.dtype == np.float32
        assert spoken.samples.tolist() == [0, 0.5, -1]
        assert spoken.words == [SpokenWord("těn", 0.01, 0.05), SpokenWord("muž", 0.06, 0.09)]

    def test_each_text_has_its_own(self):
        blocks = [([1], [raw(1, 0, 1), raw(7, 0, 1, b"a"), raw(5, 9)])]
        voice = Espeak(library=FakeLibrary(blocks))
        assert [len(voice.speak("a").words) for _ in range(2)] == [1, 1]

    @pytest.mark.parametrize(
        ("blocks", "answers", "text", "message"),
        [
            ((), {}, "  ", "text has no words"),
            ((), {}, "a", "speaks nothing of 'a'"),
            ([([1], [raw(5, 9)])], {"status": 2}, "a", r"\(status 2\)"),
            ([([1], [raw(1, 0, 1), raw(7, 0, 1, b"_"), raw(5, 9)])], {}, "a", "speaks nothing of 'a'"),
        ],
    )
    def test_nothing_is_spoken(self, blocks, answers, text, message):
        with pytest.raises(ValueError, match=message):
            Espeak(library=FakeLibrary(blocks, **answers)).speak(text)

    def test_no_data(self, tmp_path):
        with pytest.raises(DataError, match=f"finds no data in {tmp_path}; remove the folder"):
            Espeak(library=FakeLibrary(rate=-1), data=tmp_path)

    def test_no_voice(self):
        with pytest.raises(DataError, match="has no voice 'xx'"):
            Espeak("xx", library=FakeLibrary())


class TestWords:
    def word(self, position: int, sample: int) -> Event:
        return Event(sample, position=position)

    def sound(self, sample: int, phoneme: str = "a") -> Event:
        return Event(sample, phoneme=phoneme)

    def test_a_word_that_has_no_event_joins_the_one_before(self):
        """ "k nám a" with "k nám" spoken as one; the sound before a pause ends where the pause begins."""
        events = [
            self.word(0, 0), self.sound(5), self.sound(20),
            self.sound(30, "_"), self.word(6, 50), self.sound(50), Event(80),
        ]  # fmt: skip
        assert words_of("k nám a", events, 100) == [
            SpokenWord("k nám", 0.05, 0.3),
            SpokenWord("a", 0.5, 0.8),
        ]

    def test_a_word_without_a_sound_joins_the_one_before(self):
        events = [
            self.word(0, 0),
            self.sound(0),
            self.word(2, 40),
            self.word(4, 60),
            self.sound(70),
            Event(99),
        ]
        assert [word.text for word in words_of("a b c", events, 1)] == ["a b", "c"]

    def test_the_first_word_is_never_lost(self):
        events = [self.word(2, 10), self.sound(20), Event(30)]
        assert words_of("a b", events, 1) == [SpokenWord("a b", 20, 30)]

    def test_a_pause_inside_a_word_is_part_of_it(self):
        events = [self.word(0, 0), self.sound(0), self.sound(10, "_!"), self.sound(20), Event(30)]
        assert words_of("ab", events, 1) == [SpokenWord("ab", 0, 30)]

    def test_a_place_inside_a_word_begins_none(self):
        events = [self.word(0, 0), self.sound(0), self.word(1, 10), self.sound(10), Event(20)]
        assert words_of("ab", events, 1) == [SpokenWord("ab", 0, 20)]


class TestFetching:
    def test_other_platforms(self, monkeypatch, tmp_path):
        monkeypatch.setattr(espeak.platform, "machine", lambda: "riscv64")
        with pytest.raises(DataError, match=r"for Linux x86_64 alone; on \w+ riscv64 install it"):
            Espeak(cache=tmp_path)

    def test_a_library_that_does_not_load(self, monkeypatch, tmp_path):
        monkeypatch.setattr(espeak.platform, "system", lambda: "Linux")
        monkeypatch.setattr(espeak.platform, "machine", lambda: "x86_64")

        def unpack(package: download.Wheel, folder: Any) -> None:
            assert package is espeak.PACKAGE
            (folder / "espeakng_loader").mkdir()
            (folder / "espeakng_loader/libespeak-ng.so").write_text("no library")

        monkeypatch.setattr(espeak, "unpack_wheel", unpack)
        with pytest.raises(DataError, match=r"libespeak-ng.so does not load on this machine \("):
            Espeak(cache=tmp_path)


class TestRealLibrary:
    """With the package that an earlier fetch left in the user's cache; skipped where there is none."""

    @pytest.fixture
    def voice(self) -> Espeak:
        if not (download.cache_root() / f"espeak-ng-{espeak.PACKAGE.sha256[:12]}").is_dir():
            pytest.skip("espeak-ng is not in the user's cache")
        return Espeak("cs")

    def test_words_have_sound_and_pauses_have_none(self, voice):
        words = ["ten", "muž", "se", "ptá", "proč", "je", "v", "lese", "tma"]
        spoken = voice.speak(" ".join(words))
        assert [word.text for word in spoken.words] == words
        assert all(a.end <= b.start for a, b in itertools.pairwise(spoken.words))
        rate = spoken.sampling_rate
        seconds = len(spoken.samples) / rate
        assert 1 < seconds < 4
        assert 0.9 * seconds < spoken.words[-1].end <= seconds

        def loudest(start: float, end: float) -> float:
            return float(np.abs(spoken.samples[round(start * rate) : round(end * rate)]).max())

        assert all(loudest(word.start, word.end) > 0.01 for word in spoken.words)
        # The closed lips before "ptá" and "proč".
        for before, after in ((2, 3), (3, 4)):
            start, end = spoken.words[before].end, spoken.words[after].start
            assert end - start > 0.03
            assert loudest(start + 0.01, end - 0.005) < 1e-3
