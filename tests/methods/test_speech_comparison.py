"""A comparison on transcribed recordings: rows, curves, transcripts, steps with the encoder in the loop."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from small_experiment import small_experiment

from mmtransfer.compare import tables
from mmtransfer.compare.results import Comparison
from mmtransfer.compare.session import compare
from mmtransfer.compare.settings import CompareSettings
from mmtransfer.compare.store import evenly
from mmtransfer.data import Clip, DataError, synthetic_speech


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    experiment = small_experiment(synthetic_speech(train_clips=16, test_clips=6))
    settings = CompareSettings(
        methods=("head", "hff-b", "full"),
        seeds=2,
        epochs=4,
        batch_size=8,
        tuning_steps=3,
        tuning_batch_size=4,
        evaluations=2,
        cpu=True,
        workers=0,
    )
    return compare(experiment, settings)


def test_the_task_follows_from_the_data(comparison: Comparison) -> None:
    assert comparison.task["name"] == "ctc"
    assert comparison.task["metric"]["name"] == "cer"
    assert comparison.task["further"] == {"wer": "Word error"}


def test_steps_and_epochs(comparison: Comparison) -> None:
    head, hff_b, full = comparison.methods
    assert (head.steps, head.epochs) == (8, 4.0)
    assert (full.steps, full.epochs) == (3, 0.75)
    assert [len(method.runs) for method in (head, hff_b, full)] == [2, 2, 1]


def test_curves_end_where_the_run_ends(comparison: Comparison) -> None:
    head, _, full = comparison.methods
    assert [point.steps for point in head.runs[0].curve] == [4, 8]
    # What starts from a trained head is scored before its first step, and its clock goes on from the head's.
    assert [point.steps for point in full.runs[0].curve] == [0, 1, 2, 3]
    start = full.runs[0].curve[0]
    assert start.scores == head.runs[0].curve[-1].scores
    assert start.seconds == pytest.approx(head.runs[0].seconds, rel=0.05, abs=0.05)
    for method in comparison.methods:
        for run in method.runs:
            seconds = [point.seconds for point in run.curve]
            assert seconds == sorted(seconds)
            assert seconds[-1] == run.seconds
            # Six test clips: the curve is of all of them.
            assert run.curve[-1].scores == pytest.approx(run.scores)


def test_examples_have_a_transcript_of_each_method(comparison: Comparison) -> None:
    assert len(comparison.examples) == 6
    texts = [clip.text for clip in synthetic_speech(train_clips=16, test_clips=6).test]
    assert [example.target for example in comparison.examples] == texts
    assert set(comparison.examples[0].predictions) == {"head", "hff-b", "full"}


def test_the_whole_step_runs_the_encoder_for_every_method(comparison: Comparison) -> None:
    head, hff_b, full = comparison.methods
    assert comparison.task["whole_step_clips"] == 4
    # Gradients and optimiser state of all weights.
    assert full.whole_step.memory_mib > 2 * hff_b.whole_step.memory_mib
    assert hff_b.whole_step.memory_mib > head.whole_step.memory_mib
    assert full.step_clips == 4
    assert head.step_clips == 8


def test_tables_and_page(comparison: Comparison) -> None:
    head = comparison.methods[0]
    row = tables.table_row(comparison, head)
    assert len(row) == len(tables.header(comparison))
    assert row[2] == f"{100 * head.mean('wer'):.1f}"
    whole = tables.whole_row(comparison, comparison.methods[-1])
    assert whole[-2:] == ("1.00", "1.00")
    assert tables.reference_method(comparison) is comparison.methods[-1]
    page = tables.to_html(comparison)
    for text in ("Word error, %", "Test clips", comparison.examples[0].target, "seconds of training"):
        assert text in page
    assert "classes" not in page
    record = json.loads(json.dumps(tables._plain(tables.to_record(comparison))))
    assert record["methods"][0]["runs"][0]["curve"][0]["steps"] == 4
    assert record["examples"][0]["predictions"]["head"] == comparison.examples[0].predictions["head"]


def test_clips_that_are_too_short_for_their_text_are_left_out_and_named() -> None:
    recordings = synthetic_speech(train_clips=8, test_clips=2)
    first = recordings.train[0]
    recordings.train[0] = Clip(first.source, None, first.seconds, text="ab" * 90)
    settings = CompareSettings(methods=("head",), seeds=1, epochs=1, evaluations=0, cpu=True)
    result = compare(small_experiment(recordings), settings)
    assert len(result.task["infeasible"]) == 1
    assert "180 frames needed" in result.task["infeasible"][0]
    assert result.methods[0].runs[0].curve[-1].steps == 1


def test_no_clip_that_can_hold_its_text_is_one_sentence() -> None:
    recordings = synthetic_speech(train_clips=4, test_clips=2)
    clips = [Clip(clip.source, None, clip.seconds, text="ab" * 90) for clip in recordings.train]
    settings = CompareSettings(methods=("head",), seeds=1, epochs=1, cpu=True)
    with pytest.raises(DataError, match="no training clip that can hold its text"):
        compare(small_experiment(replace(recordings, train=clips)), settings)


def test_evenly_takes_all_lengths() -> None:
    clips = [Clip(None, None, float(seconds)) for seconds in (5, 1, 4, 2, 3)]  # type: ignore[arg-type]
    assert evenly(clips, 9) == [0, 1, 2, 3, 4]
    assert evenly(clips, 1) == [4]
    assert [clips[index].seconds for index in evenly(clips, 2)] == [4.0, 2.0]
