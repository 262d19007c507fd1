"""The Czech dialogues: scripts in Lua, transcripts, rooms; from generated packages, without a network."""

from __future__ import annotations

import shutil
import unicodedata
from pathlib import Path

import pytest
import soundfile
from audio_files import write_clip
from package_clients import Debian

from mmtransfer.data import DataError
from mmtransfer.demo import czech, czech_dialogues, download
from mmtransfer.demo.czech import LETTERS, TEST_ROOMS, spoken_text
from mmtransfer.demo.dialogues import Line, read_dialogues

TEST_ROOM = TEST_ROOMS[0]


def line(key: str, text: str, font: str = "font_small") -> str:
    return f'dialogId("{key}", "{font}", "English")\ndialogStr("{text}")\n\n'


def write_script(root: Path, room: str, *lines: str, name: str = "dialogs_cs.lua") -> Path:
    script = root / czech.SCRIPTS.tree / room / name
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text("".join(lines), encoding="utf-8")
    return script


def write_sound(root: Path, place: str, seconds: float = 0.5) -> Path:
    return write_clip(root / czech.SOUND.tree / f"{place}.ogg", seconds=seconds)


def make_game(root: Path) -> None:
    """A room that trains, one that tests, the remarks for all rooms, and recordings to leave out."""
    write_script(root, "aztec", line("b-second", "Druhá - věta!", "font_big"), line("a-first", "Ahoj."))
    write_script(root, "aztec", line("c-statue", "Chceš-li…", "font_statue"), name="demo_dialogs_cs.lua")
    write_script(root, "aztec", line("a-first", "Hello."), name="dialogs_en.lua")
    for place in ("aztec/cs/b-second", "aztec/cs/a-first", "aztec/cs/c-statue", "aztec/en/a-first"):
        write_sound(root, place)
    write_script(root, TEST_ROOM, line("test", "Žluťoučký kůň?"), line("silent", "Bez zvuku."))
    write_sound(root, f"{TEST_ROOM}/cs/test", seconds=0.75)
    write_script(root, "share", line("remark", "Ach jo...", "font_both"), name="bore_dialogs_cs.lua")
    write_sound(root, "share/borejokes/cs/remark")
    write_script(root, "gods", line("digit", "B%1."), line("empty", ""), line("dots", "..."))
    for key in ("digit", "empty", "dots", "unwritten"):
        write_sound(root, f"gods/cs/{key}")
    write_sound(root, "noscript/cs/other")


@pytest.fixture
def game(tmp_path: Path) -> Path:
    make_game(tmp_path / "game")
    return tmp_path / "game"


class TestRecordings:
    def test_clips_of_a_given_folder(self, game):
        recordings = czech_dialogues(folder=game)
        sound = game / czech.SOUND.tree
        found = [
            (clip.source.relative_to(sound).as_posix(), clip.text, clip.speaker) for clip in recordings.train
        ]
        assert found == [
            ("aztec/cs/a-first.ogg", "ahoj", "small fish"),
            ("aztec/cs/b-second.ogg", "druhá věta", "big fish"),
            ("aztec/cs/c-statue.ogg", "chceš li", "statue in aztec"),
            ("share/borejokes/cs/remark.ogg", "ach jo", "both fish"),
        ]
        assert [(clip.text, clip.seconds, clip.label) for clip in recordings.test] == [
            ("žluťoučký kůň", 0.75, None)
        ]
        assert recordings.transcribed
        assert not recordings.validation
        assert recordings.ignored == (
            "2 with an empty transcript",
            "1 with digits or signs in the transcript",
            "2 without a transcript",
        )
        assert len(recordings.load(recordings.train[0])) == 8000

    def test_the_folder_of_the_game_will_do(self, game):
        for folder in (game / "usr/share/games/fillets-ng", str(game)):
            assert len(czech_dialogues(folder=folder).train) == 4

    def test_the_order_does_not_depend_on_the_disk(self, game, monkeypatch):
        expected = [clip.source for clip in czech_dialogues(folder=game).train]
        for name in ("iterdir", "glob", "rglob"):
            listed = getattr(Path, name)
            monkeypatch.setattr(
                Path, name, lambda *arguments, listed=listed: reversed(list(listed(*arguments)))
            )
        assert [clip.source for clip in czech_dialogues(folder=game).train] == expected

    @pytest.mark.parametrize("package", ["SOUND", "SCRIPTS"])
    def test_a_folder_without_one_of_them(self, game, package):
        package = getattr(czech, package)
        shutil.rmtree(game / package.tree)
        name = package.tree.rpartition("/")[2]
        with pytest.raises(
            DataError, match=rf"holds neither {package.tree} nor {name}; unpack {package.name} there"
        ):
            czech_dialogues(folder=game)

    def test_a_room_without_sound(self, game):
        shutil.rmtree(game / czech.SOUND.tree / TEST_ROOM)
        with pytest.raises(DataError, match="czech dialogues has no test clip"):
            czech_dialogues(folder=game)

    def test_a_damaged_script(self, game):
        script = write_script(game, "aztec", line("a", "Ahoj."), "dialogStr(text)\n")
        with pytest.raises(DataError, match=rf"^{script} line 4 has 'text\)' "):
            czech_dialogues(folder=game)

    def test_a_damaged_recording(self, game):
        file = game / czech.SOUND.tree / "aztec/cs/a-first.ogg"
        file.write_bytes(b"OggS" + bytes(100))
        with pytest.raises(DataError, match=rf"^{file} cannot be read as audio"):
            czech_dialogues(folder=game)

    def test_the_rooms_that_test(self):
        assert list(TEST_ROOMS) == sorted(set(TEST_ROOMS))


class TestPackages:
    @pytest.fixture
    def debian_client(self, game: Path, monkeypatch: pytest.MonkeyPatch) -> Debian:
        return Debian.install(monkeypatch, game, czech, "SOUND", "SCRIPTS")

    def test_fetched_once(self, debian_client, tmp_path):
        for _ in range(2):
            recordings = czech_dialogues(tmp_path / "cache")
        assert [clip.text for clip in recordings.test] == ["žluťoučký kůň"]
        names = (czech.SOUND.name, czech.SCRIPTS.name)
        clients = ("apt-get", "apt-helper", "dpkg-deb")
        assert debian_client.calls == [(client, name) for name in names for client in clients]
        assert len(list((tmp_path / "cache").iterdir())) == 2

    def test_other_content(self, debian_client, game, tmp_path):
        write_script(game, "aztec", line("a-first", "Něco jiného."))
        with pytest.raises(
            DataError, match=r"files of fillets-ng-data in \S+/script have SHA-256 \w{64}, expected \w{64}; "
        ):
            czech_dialogues(tmp_path / "cache")
        assert [entry.name.rpartition("-")[0] for entry in (tmp_path / "cache").iterdir()] == [
            czech.SOUND.name
        ]


class TestTranscripts:
    @pytest.mark.parametrize(
        ("text", "spoken"),
        [
            ("Ta tvoje tloušťka. Ta nás vždycky zdržuje.", "ta tvoje tloušťka ta nás vždycky zdržuje"),
            ("  No... a co?! ", "no a co"),
            ("Chceš-li – tak: m-m-magazín…", "chceš li tak m m magazín"),
            ("„Sedm mečů!” řekl 'voda'", "sedm mečů řekl voda"),
            ("Raději bych rychle vypad’.", "raději bych rychle vypad"),
            ("PŘÍLIŠ\nŽLUŤOUČKÝ\tKŮŇ", "příliš žluťoučký kůň"),
            ("...", ""),
            ("", ""),
        ],
    )
    def test_spoken(self, text, spoken):
        assert spoken_text(text) == spoken

    @pytest.mark.parametrize(
        "text", ["Poseidon 737", "B%1.", "C:\\WINDOWS", "Подожди", "(tiše)", "a/b", "Köln", "²", "a@b"]
    )
    def test_not_spoken_so(self, text):
        assert spoken_text(text) is None

    def test_composed(self):
        decomposed = unicodedata.normalize("NFD", "Žluťoučký kůň")
        assert spoken_text(decomposed) == unicodedata.normalize("NFC", "žluťoučký kůň")

    def test_the_letters(self):
        assert len(LETTERS) == len(set(LETTERS)) == 41
        assert unicodedata.normalize("NFC", LETTERS) == LETTERS == LETTERS.lower()
        assert spoken_text(LETTERS.upper()) == LETTERS


class TestScripts:
    def read(self, tmp_path: Path, script: str | bytes) -> list[Line]:
        path = tmp_path / "dialogs_cs.lua"
        path.write_bytes(script.encode() if isinstance(script, str) else script)
        return read_dialogues(path)

    def test_lines(self, tmp_path):
        script = line("a", "Ahoj.") + line("b", "Čau!", "font_big") + line("c", "", "")
        assert self.read(tmp_path, script) == [
            Line("a", "font_small", "Ahoj."),
            Line("b", "font_big", "Čau!"),
            Line("c", "", ""),
        ]

    @pytest.mark.parametrize("script", ["", "\n\n", "-- nothing", "--[[ nothing\n]]\n"])
    def test_nothing(self, tmp_path, script):
        assert self.read(tmp_path, script) == []

    @pytest.mark.parametrize(
        "written",
        [
            'dialogId( "a",\n"font",   "English" )\n\ndialogStr(\n"Ahoj.")',
            '-- "comment"\ndialogId("a", "font", "English") -- dialogId("b",\n--\ndialogStr("Ahoj.")--',
            '--[[ several\ndialogStr("no") ]]dialogId("a", "font", "English")dialogStr("Ahoj.")',
            'dialogId("a", "fo" .. "nt", "English")\ndialogStr("Ah" ..\n "oj" .. ".")',
            'dialogId("a", "font", "Say \\"hello\\".")\r\ndialogStr("Ahoj.")\r\n',
            '\ufeffdialogId("a", "font", "English")\ndialogStr("Ahoj.")\n',
            'dialogId("x", "font", "never said")\ndialogId("a", "font", "")\ndialogStr("Ahoj.")\n'
            'dialogId("y", "", "")\n',
        ],
        ids=["spaces", "comments", "long comment", "concatenation", "CRLF", "BOM", "without text"],
    )
    def test_forms(self, tmp_path, written):
        assert self.read(tmp_path, written) == [Line("a", "font", "Ahoj.")]

    def test_escapes(self, tmp_path):
        script = line("a", r"Řekl: \"C:\\dir\"\n-- \'ne\'")
        assert self.read(tmp_path, script)[0].text == "Řekl: \"C:\\dir\"\n-- 'ne'"

    @pytest.mark.parametrize(
        ("script", "message"),
        [
            (line("a", "x") + 'dialogStr("y")', "line 4 has a dialogStr without a dialogId before it; "),
            (line("a", "x") + line("a", "y"), "line 5 gives a a second text; "),
            ('print("a")', "line 1 has 'print(\"a\")' in a place where dialogId"),
            ('\ndialogId("a", "font")', "line 2 has ')' in a place where"),
            ('dialogStr("a", "b")', "line 1 has ',' in a place where"),
            ('dialogId("a", font, "b")', "line 1 has 'font, "),
            ('dialogId("a", "font", "b"', "line 1 ends where"),
            ('dialogId("a",\n"font",', "line 2 ends where"),
            ('dialogId "a"', "line 1 has '\"a\"' in a place where"),
            ('dialogStr("a\n")', "line 1 has '\"a' in a place where"),
            (line("a", r"\q"), r"line 2 has '\\q' in a place where"),
            (line("a", "x") + ")", "line 4 has ')' in a place where"),
            (line("a", "x") + '"b"', "line 4 has '\"b\"' in a place where"),
            ("dialogIdx()", "line 1 has 'x()' in a place where"),
            ("--[[ for ever", "line 1 has '--[[ for ever' in a place where"),
        ],
    )
    def test_anything_else(self, tmp_path, script, message):
        with pytest.raises(DataError) as caught:
            self.read(tmp_path, script)
        assert str(caught.value).startswith(f"{tmp_path / 'dialogs_cs.lua'} {message}")
        assert str(caught.value).endswith("; unpack the package again, or correct the script")

    def test_another_encoding(self, tmp_path):
        with pytest.raises(DataError, match=r"dialogs_cs\.lua cannot be read as a UTF-8 script \('utf-8'"):
            self.read(tmp_path, line("a", "Žluťoučký").encode("iso-8859-2"))


class TestRealCache:
    """Files that an earlier fetch left in the user's cache; skipped where there are none."""

    @pytest.fixture
    def no_fetching(self, monkeypatch: pytest.MonkeyPatch) -> None:
        wanted = [f"{package.name}-{package.sha256[0][:12]}" for package in (czech.SOUND, czech.SCRIPTS)]
        missing = [name for name in wanted if not (download.cache_root() / name).is_dir()]
        if missing:
            pytest.skip(f"not in the user's cache: {', '.join(missing)}")

        def refuse(*call: object) -> None:
            raise AssertionError(f"called {call}")

        monkeypatch.setattr(download, "run_client", refuse)

    def test_the_real_dialogues(self, no_fetching):
        recordings = czech_dialogues()
        assert (len(recordings.train), len(recordings.test)) == (1529, 263)
        rooms = {clip.source.parts[-3] for clip in recordings.test}
        assert rooms == set(TEST_ROOMS)
        share = sum(clip.seconds for clip in recordings.test) / sum(
            clip.seconds for clip in (*recordings.train, *recordings.test)
        )
        assert 0.15 < share < 0.16
        letters = {letter for clip in recordings.train for letter in clip.text}
        assert letters == set(LETTERS + " ") - {"q"}
        seen = {clip.text for clip in recordings.train}
        assert sum(clip.text in seen for clip in recordings.test) == 3
        # The pirates' parrot says the same, in the same recordings, in both cabins.
        assert not {"cabin1", "cabin2"} & rooms
        assert soundfile.info(recordings.test[0].source).duration == recordings.test[0].seconds
