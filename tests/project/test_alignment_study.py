"""The study of aligned times: its metrics and materials by hand, its record, and the tables in the docs."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # benches are not installed

from benches.studies import alignment, alignment_report, known_times  # noqa: E402
from benches.studies.boundaries import (  # noqa: E402
    Span,
    Times,
    signed_errors,
    spread_evenly,
    summaries,
    summary,
)
from benches.studies.known_times import Utterance, joined, recorded, speech_start, synthesised  # noqa: E402
from mmkernels import compat  # noqa: E402
from mmtransfer import AdaptedModel  # noqa: E402
from mmtransfer.align import Aligner  # noqa: E402
from mmtransfer.data.inputs import AudioInput  # noqa: E402
from mmtransfer.data.recordings import Clip  # noqa: E402
from mmtransfer.demo.espeak import Spoken, SpokenWord  # noqa: E402
from mmtransfer.demo.experiments import synthetic_experiment  # noqa: E402
from mmtransfer.tasks import find_task  # noqa: E402

RATE = 16_000
RECORD = json.loads((ROOT / "docs/alignment.json").read_text())
PAGE = (ROOT / "docs/alignment.md").read_text()


class TestMetrics:
    def test_late_is_positive_and_unknown_times_are_left_out(self):
        words = [Times(0.1, 0.2), Times(0.3, 0.5), Times(0.6, 0.9)]
        spans = [Span(0, 1, 0.05, 0.52), Span(2, 2, 0.7, None)]
        errors = signed_errors(words, spans)
        assert errors["start"] == pytest.approx([50, -100])
        assert errors["end"] == pytest.approx([-20])
        assert set(summaries({"start": [1.0], "end": []})) == {"start"}

    def test_summary(self):
        found = summary([-10, 20, 30, 60, 300])
        assert found["count"] == 5
        assert found["bias"] == 30
        assert found["mean"] == pytest.approx(84)
        assert found["median"] == 30
        assert found["p95"] == pytest.approx(60 + 0.8 * 240)
        assert found["within_50"] == 0.6
        assert found["within_100"] == 0.8
        assert found["steady"] == 30  # of 40, 10, 0, 30, 270
        assert found["percentiles"][0] == 10
        assert found["percentiles"][25] == 30
        assert found["percentiles"][-1] == 300
        assert len(found["percentiles"]) == 51

    def test_limits_count_as_within(self):
        assert summary([-50.0, 50.0])["within_50"] == 1
        assert summary([-50.1, 50.1])["within_50"] == 0

    def test_words_by_their_letters(self):
        """Six letters and two spaces in four seconds, from the third on."""
        expected = [(3, 3.5), (4, 5.5), (6, 7)]
        assert [(word.start, word.end) for word in spread_evenly("a bcd ef", 3, 7)] == expected
        assert spread_evenly("abc", 0, 2) == [Times(0, 2)]

    def test_spread_words_are_judged_inside_of_their_sentence(self):
        spans = [Span(0, 0, 1, 2.1), Span(1, 1, 2.4, 3), Span(2, 2, 3.9, 5)]
        sentence = Utterance(np.zeros(1, np.float32), "a b c", spans)
        unknown = Utterance(np.zeros(1, np.float32), "d", [Span(0, 0, 1, None)])
        found = alignment.evenly([sentence, unknown])
        # Found are 1 to 1.8, 2.6 to 3.4, 4.2 to 5.
        assert found["start"]["count"] == found["end"]["count"] == 2
        assert found["start"]["bias"] == pytest.approx((200 + 300) / 2)
        assert found["end"]["bias"] == pytest.approx((400 - 300) / 2)
        assert alignment.evenly([unknown]) == {}


def tone(seconds: float, loudness: float = 0.5) -> np.ndarray:
    time = np.arange(round(seconds * RATE)) / RATE
    return (loudness * np.sin(2 * np.pi * 440 * time)).astype(np.float32)


class TestKnownTimes:
    def test_speech_starts_behind_the_background(self):
        noise = np.random.default_rng(0).normal(0, 0.005, RATE).astype(np.float32)
        noise[round(0.3 * RATE) :] += tone(0.7)
        assert speech_start(noise, RATE, 6) == pytest.approx(0.3)
        assert speech_start(noise, RATE, 12) == pytest.approx(0.3)

    def test_speech_in_digital_silence_and_in_none(self):
        silent = np.concatenate([np.zeros(round(0.25 * RATE), np.float32), tone(0.5)])
        assert speech_start(silent, RATE, 6) == pytest.approx(0.25)
        # Nothing is above the background: all is one sound.
        assert speech_start(tone(0.5), RATE, 6) == 0

    def test_recordings_have_a_start_alone(self):
        samples = np.concatenate([np.zeros(round(0.1 * RATE), np.float32), tone(0.5)])
        (found,) = recorded([Clip(samples, None, 0.6, "a bc d")], RATE, 6)
        assert found.spans == [Span(0, 2, pytest.approx(0.1), None)]

    def test_joined_times_are_those_of_the_samples(self):
        """A click at each known time, found again in the joined recording."""
        parts = []
        for place, text in ((0.2, "a bc"), (0.4, "d")):
            samples = np.zeros(RATE, np.float32)
            samples[round(place * RATE)] = 1
            last = len(text.split()) - 1
            parts.append(
                Utterance(samples, text, [Span(0, last, place, None), Span(last, last, None, place)])
            )
        whole = joined(parts, RATE, seed=3)
        assert whole.text == "a bc d"
        assert [(span.first, span.last) for span in whole.spans] == [(0, 1), (1, 1), (2, 2), (2, 2)]
        clicks = np.flatnonzero(whole.samples > 0.5) / RATE
        assert [span.start for span in whole.spans[::2]] == pytest.approx(list(clicks))
        assert [span.end for span in whole.spans[1::2]] == pytest.approx(list(clicks))
        assert whole.spans[0].end is None
        low, high = known_times.PAUSE
        assert 0.2 + low <= clicks[0] <= 0.2 + high
        assert 2 + 3 * low <= len(whole.samples) / RATE <= 2 + 3 * high
        assert np.array_equal(joined(parts, RATE, seed=3).samples, whole.samples)

    def test_words_that_are_spoken_as_one_are_one_span(self):
        class Voice:
            def speak(self, text: str) -> Spoken:
                assert text == "na to že"
                words = [SpokenWord("na to", 0.1, 0.4), SpokenWord("že", 0.5, 0.8)]
                return Spoken(tone(1)[::2], RATE // 2, words)

        (found,) = synthesised(["na to že"], Voice(), RATE)
        assert found.spans == [Span(0, 1, 0.1, 0.4), Span(2, 2, 0.5, 0.8)]
        assert len(found.samples) == RATE


def test_a_model_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights on generated sentences: every number is there, and paths of a peer are compared."""
    monkeypatch.setattr(alignment, "peer", lambda: compat.forced_align)
    experiment = synthetic_experiment(transcribed=True)
    task = find_task("ctc").of(experiment.recordings)
    torch.manual_seed(0)
    model = AdaptedModel(experiment.model, "head", task)
    model.audio = AudioInput(experiment.extractor)
    utterances = recorded(experiment.recordings.test[:3], RATE, 6)
    done: list[float] = []
    judge = alignment.Judge(Aligner(model, window=2.0, context=0.2), done.append)
    alone, whole = judge.alone(utterances), joined(utterances, RATE)
    in_one_pass = judge.in_one_pass(whole)
    assert (judge.compared, judge.identical) == (3, 3)
    monkeypatch.setattr(alignment, "peer", lambda: lambda *given, blank: (torch.zeros(1, 1), None))
    judge.alone(utterances)
    assert (judge.compared, judge.identical) == (6, 3)
    monkeypatch.setattr(alignment, "peer", lambda: None)
    judge.alone(utterances)
    assert (judge.compared, judge.identical) == (6, 3)
    assert alone["start"]["count"] == in_one_pass["start"]["count"] == 3
    assert "end" not in alone
    every = (*3 * utterances, whole)
    assert sum(done) == pytest.approx(sum(len(each.samples) for each in every) / RATE)
    assert 0 <= in_one_pass["blank"] < 1
    assert in_one_pass["frames_per_token"] >= 1
    assert in_one_pass["character_error"] > 0
    assert in_one_pass["op_seconds"] > 0


def test_text_of_the_best_characters() -> None:
    from mmtransfer.align import Posteriors

    best = [1, 1, 0, 1, 2, 2]
    log_probs = torch.full((6, 4), -5.0)
    log_probs[range(6), best] = -0.1
    log_probs[:, -1] = 0.0  # the best of all classes is no character
    frames = Posteriors(log_probs, ("", "a", "b", "*"), torch.tensor(best), (1, 1, 2), 0.02)
    assert alignment.greedy_text(frames) == "aab"


class TestRecord:
    def test_tables_are_those_of_the_record(self):
        lines = alignment_report.table(RECORD)
        assert len(lines) > 10
        assert set(filter(None, lines)) <= set(PAGE.splitlines())

    def test_other_figures_give_other_lines(self):
        other: dict[str, Any] = copy.deepcopy(RECORD)
        other["rows"][-1]["joined"]["start"]["median"] += 3
        assert not set(alignment_report.table(other)) <= set(PAGE.splitlines()) | {""}

    def test_every_path_was_the_peers(self):
        assert RECORD["paths"]["identical"] == RECORD["paths"]["compared"] > 0

    def test_every_model_is_in_it_but_those_that_were_skipped(self):
        found = {(row["model"], row.get("trained_on"), row["material"]) for row in RECORD["rows"]}
        models = [
            (each.method, each.speech) for each in alignment.MODELS if each.folder not in RECORD["skipped"]
        ]
        materials = ("recorded", "synthesised")
        assert found == {(*each, name) for each in [(None, None), *models] for name in materials}

    def test_the_figure_is_drawn(self, tmp_path):
        alignment_report.draw(RECORD, tmp_path / "figure.svg")
        assert (tmp_path / "figure.svg").read_text().rstrip().endswith("</svg>")
