"""Splits in which no speaker is in two parts, and warnings of those that are."""

from __future__ import annotations

from pathlib import Path

import hypothesis
import pytest
from audio_files import write_tiny_clip
from hypothesis import strategies

from mmtransfer.data import DataError, Recordings, from_manifest
from mmtransfer.data.drawing import draw_split
from mmtransfer.data.rows import Row

SPEAKERS = ("anna", "bob", "cleo", "dora", "emil")


def listed(folder: Path, rows: list[str], header: str = "path,text,speaker") -> Path:
    """A manifest of `rows`, with the clips that it needs."""
    for number, row in enumerate(rows):
        write_tiny_clip(folder / row.split(",")[0], number)
    path = folder / "list.csv"
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def sides(recordings: Recordings) -> tuple[set[str | None], set[str | None]]:
    return {clip.speaker for clip in recordings.train}, {clip.speaker for clip in recordings.test}


def spoken(count: int) -> list[str]:
    return [f"{take}.wav,word {take},{SPEAKERS[take % 5]}" for take in range(count)]


class TestDrawn:
    @pytest.mark.parametrize("column", ["speaker", "Speaker_ID", "client id", "speakerId", "spk-id"])
    def test_no_speaker_is_in_both_parts(self, tmp_path, column):
        recordings = from_manifest(listed(tmp_path, spoken(20), f"path,text,{column}"))
        train, test = sides(recordings)
        assert len(train) == 4
        assert len(test) == 1
        assert train | test == set(SPEAKERS)
        assert recordings.ignored == ()

    def test_the_draw_depends_on_names_and_seed_alone(self, tmp_path):
        rows = spoken(20)

        def test_part(rows: list[str], seed: int = 0) -> set[str | None]:
            return sides(from_manifest(listed(tmp_path, rows), seed=seed))[1]

        assert test_part(rows) == test_part(rows[::-1]) == test_part([f"./{row}" for row in rows])
        assert len({name for seed in range(9) for name in test_part(rows, seed)}) > 2

    def test_clips_without_a_speaker_are_drawn_alone(self, tmp_path):
        rows = [*spoken(10), *(f"x{take}.wav,word,  " for take in range(10))]
        recordings = from_manifest(listed(tmp_path, rows), test_fraction=0.35)
        train, test = sides(recordings)
        assert (train & test) <= {None}
        assert {None} == train & test
        assert len(recordings.test) == 7

    def test_the_fraction_is_that_of_clips(self, tmp_path):
        """A speaker of half of all clips does not fit into a test part of a fifth."""
        rows = [f"{take}.wav,word,{'anna' if take < 20 else f's{take}'}" for take in range(40)]
        for seed in range(8):
            recordings = from_manifest(listed(tmp_path, rows), seed=seed)
            assert "anna" in sides(recordings)[0]
            assert len(recordings.test) == 8

    def test_two_speakers(self, tmp_path):
        """The smaller one, as either is more than was asked for."""
        rows = [f"{take}.wav,word,{'anna' if take < 6 else 'bob'}" for take in range(10)]
        for seed in range(4):
            assert sides(from_manifest(listed(tmp_path, rows), seed=seed)) == ({"anna"}, {"bob"})

    def test_one_speaker(self, tmp_path):
        path = listed(tmp_path, [f"{take}.wav,word,anna" for take in range(4)])
        with pytest.raises(DataError, match="list has the clips from one speaker, and a drawn split has no"):
            from_manifest(path)

    def test_classes_of_one_speaker(self, tmp_path):
        rows = [f"{take}.wav,{'crow' if take < 6 else 'owl'},{SPEAKERS[take % 3]}" for take in range(9)]
        rows += [f"1{take}.wav,wren,bob" for take in range(4)]
        with pytest.raises(
            DataError, match=r"the clips of 1 class \(wren\) from one speaker, .*; give the split"
        ):
            from_manifest(listed(tmp_path, rows, "path,label,speaker"))

    def test_a_class_of_few_speakers_is_in_both_parts(self, tmp_path):
        rows = [f"{take}.wav,crow,{SPEAKERS[take % 5]}" for take in range(20)]
        rows += ["a.wav,owl,dora", "b.wav,owl,emil"]
        for seed in range(8):
            recordings = from_manifest(listed(tmp_path, rows, "path,label,speaker"), seed=seed)
            train, test = sides(recordings)
            assert not train & test
            assert {clip.label for clip in recordings.test} == {0, 1}


class TestGiven:
    def rows(self, test_speaker: str, validation_speaker: str = "z") -> list[str]:
        rows = [f"{take}.wav,word,{SPEAKERS[take % 3]},train" for take in range(6)]
        return [
            *rows,
            f"a.wav,word,{test_speaker},test",
            "b.wav,word,x,test",
            f"c.wav,word,{validation_speaker},dev",
        ]

    def test_a_speaker_in_both_parts_is_said(self, tmp_path, caplog):
        from_manifest(listed(tmp_path, self.rows("bob", "cleo"), "path,text,speaker,split"))
        assert "list has 1 speaker (bob) in train and in test" in caplog.text
        assert "list has 1 speaker (cleo) in train and in validation" in caplog.text

    def test_no_warning_without_one(self, tmp_path, caplog):
        recordings = from_manifest(listed(tmp_path, self.rows("x", ""), "path,text,speaker,split"))
        assert not caplog.records
        assert [clip.speaker for clip in recordings.test] == ["x", "x"]
        assert recordings.validation[0].speaker is None


ROWS = strategies.lists(
    strategies.tuples(strategies.sampled_from("ab"), strategies.sampled_from(["", *SPEAKERS])),
    min_size=4,
    max_size=40,
)


@hypothesis.settings(max_examples=300, deadline=None, derandomize=True, database=None)
@hypothesis.given(ROWS, strategies.booleans(), strategies.floats(0.05, 0.6), strategies.integers(0, 9))
def test_any_draw(pairs: list[tuple[str, str]], labelled: bool, fraction: float, seed: int) -> None:
    rows = [
        Row(
            Path(f"{number}.wav"),
            f"{number}.wav",
            "",
            label=label if labelled else None,
            text=None if labelled else "word",
            speaker=speaker or None,
        )
        for number, (label, speaker) in enumerate(pairs)
    ]
    voices = {(row.label, row.speaker or row.name) for row in rows}
    counts = [sum(1 for label, _ in voices if label == own) for own in {label for label, _ in voices}]
    if min(counts) < 2:
        with pytest.raises(DataError):
            draw_split("list", rows, fraction, seed)
        return
    drawn = draw_split("list", rows, fraction, seed)
    parts = {part: [row for row in drawn if row.split == part] for part in ("train", "test")}
    assert [row.name for row in drawn] == [row.name for row in rows]
    assert len(parts["train"]) + len(parts["test"]) == len(rows)
    speakers = {part: {row.speaker for row in own} - {None} for part, own in parts.items()}
    assert not speakers["train"] & speakers["test"]
    assert {row.label for row in parts["train"]} == {row.label for row in rows}
    # Three speakers of both classes leave one that is free for each.
    if min(counts) > 2 or not labelled:
        assert {row.label for row in parts["test"]} == {row.label for row in rows}
    again = {row.name: row.split for row in draw_split("list", rows[::-1], fraction, seed)}
    assert again == {row.name: row.split for row in drawn}
