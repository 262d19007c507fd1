"""The task ctc: symbols, loss against its definition, decoding, error rates, and clips that are too short."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from prepared_models import complete
from small_experiment import small_experiment
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import set_seed

from mmtransfer import AdaptedModel, registry
from mmtransfer.data import synthetic, synthetic_speech
from mmtransfer.data.features import Collator
from mmtransfer.encoders import TappedEncoder
from mmtransfer.tasks import CTC, find_task
from mmtransfer.tasks.ctc import PADDING
from mmtransfer.training.batches import drop_infeasible, find_infeasible
from mmtransfer.training.caching import EncoderCollator, cache_features, cache_inputs

TASK = CTC.of_texts(["ab a", "b"])


def likelihood(log_probs: torch.Tensor, ids: list[int], blank: int = 0) -> float:
    """The probability of a text by its definition: a sum over all paths that collapse to it."""
    frames, symbols = log_probs.shape
    total = 0.0
    for path in itertools.product(range(symbols), repeat=frames):
        merged = [symbol for symbol, _ in itertools.groupby(path) if symbol != blank]
        if merged == ids:
            total += math.exp(sum(float(log_probs[t, symbol]) for t, symbol in enumerate(path)))
    return total


class TestSymbols:
    def test_the_characters_of_the_training_texts(self) -> None:
        recordings = synthetic_speech(train_clips=8, test_clips=2)
        task = CTC.of(recordings)
        assert task.vocabulary[0] == ""
        assert set(task.vocabulary[1:]) == set("".join(clip.text or "" for clip in recordings.train))
        assert list(task.vocabulary) == sorted(task.vocabulary)

    def test_encode_and_unknown(self) -> None:
        assert TASK.vocabulary == ("", " ", "a", "b")
        assert TASK.encode("ab a") == [2, 3, 1, 2]
        assert TASK.encode("axb!") == [2, 3]
        assert TASK.unknown("axb!x") == ["x", "!", "x"]

    def test_spaces_alone_are_no_text(self) -> None:
        assert TASK.is_empty("xyz xyz")
        assert TASK.is_empty("")
        assert not TASK.is_empty("xyz a")

    def test_case(self) -> None:
        task = CTC(vocabulary=("<pad>", "A", "B"), case="upper")
        assert task.encode("ab") == [1, 2]
        assert task.unknown("ab") == []

    def test_a_tokenizer(self) -> None:
        tokenizer = Tokenizer(models.WordLevel({"ab": 0, "c": 1, "?": 2}, unk_token="?"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        task = CTC.of_tokenizer(tokenizer)
        assert task.vocabulary == ("ab", "c", "?", "")
        assert task.blank == 3
        assert task.encode("ab c ab") == [0, 1, 0]
        logits = torch.nn.functional.one_hot(torch.tensor([0, 0, 3, 0, 1, 3]), 4).float()
        assert task.decode(logits, torch.tensor([6])) == ["ab ab c"]
        # All of it is in the options, which a checkpoint keeps.
        assert CTC(**task.options()) == task

    def test_a_tokenizer_neither_pads_nor_cuts(self) -> None:
        tokenizer = Tokenizer(models.WordLevel({"ab": 0, "c": 1, "?": 2}, unk_token="?"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.enable_padding(pad_id=2, pad_token="?", length=8)
        assert CTC.of_tokenizer(tokenizer).encode("ab c ab") == [0, 1, 0]
        tokenizer.enable_truncation(2)
        assert CTC.of_tokenizer(tokenizer).encode("ab c ab") == [0, 1, 0]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"vocabulary": ("",)}, "at least one symbol"),
            ({"vocabulary": ("", "a", "a")}, "vocabulary has 'a' twice"),
            ({"vocabulary": ("", "a"), "blank": 2}, "blank must be at most 1"),
            ({"vocabulary": ("", "a"), "case": "title"}, "case must be one of keep, upper, lower"),
            ({"vocabulary": ("", "ab")}, "vocabulary has no characters"),
        ],
    )
    def test_what_cannot_be(self, options, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            CTC(**options)

    def test_tasks_name_what_they_need(self) -> None:
        with pytest.raises(ValueError, match="needs transcripts, in a column called text"):
            find_task("ctc").of(synthetic(classes=2, train_clips=1, test_clips=1))
        with pytest.raises(ValueError, match="needs labels, in a column label"):
            find_task("classification").of(synthetic_speech(train_clips=1, test_clips=1))
        with pytest.raises(ValueError, match="transcripts are empty"):
            CTC.of_texts(["", ""])


class TestLoss:
    def test_against_the_definition(self) -> None:
        torch.manual_seed(0)
        lengths = torch.tensor([4, 5])
        logits = torch.randn(9, 4, dtype=torch.float64)
        targets = ["ab", "aa"]
        found = TASK.loss(logits, TASK.collate(targets), lengths)
        expected = [
            -math.log(likelihood(part.log_softmax(-1), TASK.encode(target))) / len(target)
            for part, target in zip(logits.split([4, 5]), targets, strict=True)
        ]
        assert float(found) == pytest.approx(sum(expected) / 2, rel=1e-5)

    def test_an_utterance_alone_and_in_a_batch(self) -> None:
        torch.manual_seed(0)
        logits = torch.randn(30, 4, requires_grad=True)
        lengths, targets = torch.tensor([20, 10]), ["ab ab", "b"]
        TASK.loss(logits, TASK.collate(targets), lengths).backward()
        alone = logits.detach()[20:].requires_grad_()
        TASK.loss(alone, TASK.collate(targets[1:]), lengths[1:]).backward()
        torch.testing.assert_close(2 * logits.grad[20:], alone.grad)  # type: ignore[index]

    def test_too_few_frames_are_no_loss_and_no_gradient(self) -> None:
        logits = torch.randn(7, 4, requires_grad=True)
        # "aa" needs three frames: a blank parts equal characters.
        loss = TASK.loss(logits, TASK.collate(["aa", "ab"]), torch.tensor([2, 5]))
        loss.backward()
        assert bool(loss.isfinite())
        assert not bool(logits.grad[:2].any())  # type: ignore[index]
        assert bool(logits.grad[2:].any())  # type: ignore[index]

    def test_nan_stays_nan(self) -> None:
        logits = torch.full((4, 4), math.nan)
        assert bool(TASK.loss(logits, TASK.collate(["a"]), torch.tensor([4])).isnan())

    def test_an_empty_text(self) -> None:
        labels = TASK.collate(["", "ab"])
        assert labels.tolist() == [[PADDING, PADDING], [2, 3]]
        assert bool(TASK.loss(torch.randn(8, 4), labels, torch.tensor([4, 4])).isfinite())


class TestScore:
    def test_decode_merges_and_drops_blanks(self) -> None:
        best = torch.tensor([0, 2, 2, 0, 2, 3, 1, 3, 3])
        logits = torch.nn.functional.one_hot(best, 4).float()
        assert TASK.decode(logits, torch.tensor([6, 3])) == ["aab", " b"]

    def test_special_symbols_are_not_written(self) -> None:
        task = CTC(vocabulary=("<pad>", "a", "<unk>", "[X]"))
        logits = torch.nn.functional.one_hot(torch.tensor([2, 1, 3, 1]), 4).float()
        assert task.decode(logits, torch.tensor([4])) == ["aa"]

    def test_error_rates_by_hand(self) -> None:
        # One substitution and one deletion in 4 + 3 characters; one wrong word of 2 and one of 1.
        scores = TASK.score(["ab b", "ab"], ["ab a", "abb"])
        assert scores == {"cer": pytest.approx(2 / 7), "wer": pytest.approx(2 / 3)}

    def test_empty_references_count_for_nothing(self) -> None:
        assert TASK.score(["ab", "a"], ["ab", ""]) == {"cer": 0.0, "wer": 0.0}
        with pytest.raises(ValueError, match="all references are empty"):
            TASK.score(["a"], [""])


class TestInfeasible:
    @pytest.mark.parametrize(("text", "frames"), [("ab a", 4), ("aab", 4), ("aaa", 5), ("", 0), ("xax", 1)])
    def test_frames_needed(self, text: str, frames: int) -> None:
        assert TASK.frames_needed(text) == frames

    def test_all_kinds_of_examples_leave_out_the_same_clips(self) -> None:
        experiment = small_experiment(synthetic_speech(train_clips=6, test_clips=1))
        clips = [
            clip if index % 2 else type(clip)(clip.source, None, clip.seconds, text="ab" * 90)
            for index, clip in enumerate(experiment.recordings.train)
        ]
        task = CTC.of(experiment.recordings)
        encoder = TappedEncoder(experiment.model, [-1])
        collate = EncoderCollator(Collator(experiment.recordings, experiment.extractor), encoder, task)
        for examples in (clips, cache_features(encoder, clips, collate), cache_inputs(clips, collate)):
            found = find_infeasible(examples, collate, encoder, task)
            assert list(found) == [0, 2, 4]
            assert "180 frames needed" in found[0]
            kept, names = drop_infeasible(examples, collate, encoder, task)
            assert len(kept) == 3
            assert len(names) == 3
            targets = [each["target"] if isinstance(each, dict) else each.text for each in kept]
            assert targets == [clip.text for clip in clips[1::2]]


@pytest.mark.parametrize("method", [*registry.methods(), "hff-b+aat-ms"])
def test_every_method_is_trained_on_transcripts(method: str) -> None:
    """A step changes what is trained, and the loss of the same batch falls."""
    experiment = small_experiment(synthetic_speech(train_clips=4, test_clips=1))
    task = CTC.of(experiment.recordings)
    set_seed(0)
    model = AdaptedModel(copy.deepcopy(experiment.model), complete(method), task)
    collate = EncoderCollator(Collator(experiment.recordings, experiment.extractor), model.encoder, task)
    batch = collate(experiment.recordings.train)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        output = model(**batch)
        output.loss.backward()
        optimizer.step()
        losses.append(float(output.loss.detach()))
    assert losses[-1] < losses[0]
    texts = task.decode(output.logits, output.lengths)
    assert len(texts) == 4
    assert set("".join(texts)) <= set("".join(task.vocabulary))
