"""Segments of tokens: every aligner on cases whose answer is known."""

from __future__ import annotations

import random

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

from mmtransfer.encoders.taps import Taps
from mmtransfer.ssr.aligners import CIFWeights, CTCAligner, FixedRate, UnitY2Aligner, drop_empty
from mmtransfer.ssr.aligners.segments import token_ends
from mmtransfer.tasks.ctc import CTC
from mmtransfer.tokens import PADDING, TokenLabels

TASK = CTC(vocabulary=("", " ", "a", "b", "c"))


class Given(nn.Module):
    """A readout or head that hands its input on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.out_dim = 5

    def forward(self, features: torch.Tensor, taps: Taps | None = None) -> torch.Tensor:
        return features.flatten(1)


def taps_of(*paths: str, task: CTC = TASK, score: float = 9.0) -> Taps:
    """Logits that have these symbols for their frames, a dot for a blank."""
    rows = []
    for path in paths:
        for symbol in path:
            row = torch.zeros(len(task.vocabulary))
            row[task.blank if symbol == "." else task.vocabulary.index(symbol)] = score
            rows.append(row)
    return Taps.pack(torch.stack(rows).unsqueeze(1), torch.tensor([len(path) for path in paths]))


def words(text: str) -> tuple[list[int], list[int]]:
    """Each word as a token, with the space behind it, by a definition of one's own."""
    ends, place = [], 0
    for word in text.split(" "):
        place = min(place + len(word) + 1, len(text))
        ends.append(place)
    return list(range(len(ends))), ends


def labels_of(*texts: str) -> TokenLabels:
    ids, ends = zip(*map(words, texts), strict=True)
    return TokenLabels.of(ids, ends, texts)


def tokenize(texts: list[str]) -> torch.Tensor:
    return labels_of(*texts).pack()


def aligner(task: CTC = TASK) -> CTCAligner:
    return CTCAligner(Given(), Given(), task)


def test_labels_go_through_one_tensor() -> None:
    labels = labels_of("ab c", "a")
    found = TokenLabels.unpack(labels.pack())
    assert found.counts.tolist() == [2, 1]
    assert found.lengths.tolist() == [4, 1]
    assert found.ids.tolist() == [[0, 1], [0, PADDING]]
    assert found.ends.tolist() == [[3, 4], [1, PADDING]]
    kept = found.keep(torch.tensor([[False, True], [True, True]]))
    assert kept.ids[:, 0].tolist() == [1, 0]
    assert kept.counts.tolist() == [1, 1]
    with pytest.raises(ValueError, match=r"must be integers \(B, 3, L\)"):
        TokenLabels.unpack(torch.zeros(2, 4, dtype=torch.int64))


def test_blanks_belong_to_the_token_before_them() -> None:
    #                      0123456789012
    found = aligner()(taps_of("..a.bb. ..cc.", "a.b"), labels_of("ab c", "ab"), tokenize)
    # The word ends where the first symbol behind its space begins; the last one with the frames.
    assert found.ends.tolist() == [[10, 13], [3, 3]]
    assert found.counts.tolist() == [2, 1]


def test_a_token_without_a_frame_is_dropped_from_the_text_too() -> None:
    ends = torch.tensor([[2, 2, 5], [0, 3, 3]])
    labels = labels_of("a b c", "a b c")
    found = drop_empty(ends, torch.tensor([3, 3]), labels)
    assert found.ends.tolist() == [[2, 5, 5], [3, 3, 3]]
    assert found.counts.tolist() == [2, 1]
    assert found.labels is not None
    assert found.labels.ids[:, :3].tolist() == [[0, 2, PADDING], [1, PADDING, PADDING]]


def test_characters_outside_the_alphabet_have_no_segment() -> None:
    # "xyz" is of no known character: its token has the space behind it alone.
    found = aligner()(taps_of("aa.. .cc"), labels_of("a xyz c"), tokenize)
    assert found.labels is not None
    assert found.labels.ids[0, : found.counts[0]].tolist() == [0, 1, 2]
    found = aligner()(taps_of("aa....cc"), labels_of("a cx"), tokenize)
    assert found.ends[0, : found.counts[0]].tolist()[-1] == 8


def test_the_case_of_the_alphabet() -> None:
    upper = CTC(vocabulary=("", " ", "A", "B", "C"), case="upper")
    found = aligner(upper)(taps_of("A.B C", task=upper), labels_of("ab c"), tokenize)
    assert found.ends.tolist() == [[4, 5]]


def test_without_a_text_the_greedy_one_is_aligned() -> None:
    taps = taps_of("..a.bb. ..cc.", "a.b", "....")
    found = aligner()(taps, None, tokenize)
    assert found.counts.tolist() == [2, 1, 0]
    assert found.ends[:2].tolist() == [[10, 13], [3, 3]]
    alone = aligner()(taps, None, None)
    assert alone.counts.tolist()[:2] == [4, 2]
    assert alone.ends[0, :4].tolist() == [4, 7, 10, 13]


def test_sub_words_and_tokens_meet_at_characters() -> None:
    vocabulary = {"ab": 0, "c": 1, "a": 2, "b": 3, " ": 4}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="b"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    task = CTC.of_tokenizer(tokenizer)
    frames = torch.tensor([0, 0, 5, 4, 5, 1, 1])
    features = nn.functional.one_hot(frames, len(task.vocabulary)).float().unsqueeze(1) * 9
    found = aligner(task)(Taps.pack(features, torch.tensor([7])), labels_of("ab c"), tokenize)
    assert found.ends.tolist() == [[5, 7]]


def test_a_text_without_room_names_its_row() -> None:
    with pytest.raises(ValueError, match=r"row 1 of the batch has 4 symbols of text in 3 frames"):
        aligner()(taps_of("aa...b", "abc"), labels_of("ab", "ab c"), tokenize)
    unity = UnitY2Aligner(5, "abc ")
    with pytest.raises(ValueError, match=r"row 1 of the batch has 4 symbols of text in 3 frames"):
        unity(taps_of("aa...b", "abc"), labels_of("ab", "ab c"), tokenize)
    found = unity.eval()(taps_of("aa...b", "abc"), labels_of("ab", "ab c"), tokenize)
    assert found.counts.tolist() == [1, 0]


def test_token_ends_against_a_loop() -> None:
    generator = random.Random(0)
    for _ in range(300):
        size, tokens = generator.randint(1, 12), generator.randint(1, 6)
        places = sorted(generator.randint(1, 20) for _ in range(size))
        frames = sorted(generator.randint(0, 40) for _ in range(size))
        count = generator.randint(0, size)
        ends = sorted(generator.randint(0, 20) for _ in range(tokens))
        labels = TokenLabels(*(torch.tensor([ends]) for _ in range(3)))
        found = token_ends(torch.tensor([frames]), torch.tensor([places]), torch.tensor([count]), labels)
        expected = [
            max(
                (frame for frame, place in zip(frames[:count], places, strict=False) if place <= end),
                default=0,
            )
            for end in ends
        ]
        assert found[0].tolist() == expected


def test_dropping_against_a_loop() -> None:
    generator = random.Random(1)
    for _ in range(300):
        tokens = generator.randint(1, 8)
        ends = sorted(generator.randint(0, 10) for _ in range(tokens))
        count = generator.randint(0, tokens)
        ids = torch.arange(tokens)[None].masked_fill(torch.arange(tokens)[None] >= count, PADDING)
        found = drop_empty(torch.tensor([ends]), torch.tensor([count]), TokenLabels(ids, ids, ids))
        expected, before = [], 0
        for index, end in enumerate(ends[:count]):
            if end > before:
                expected.append((index, end))
                before = end
        assert found.counts.tolist() == [len(expected)]
        assert found.ends[0, : len(expected)].tolist() == [end for _, end in expected]
        assert found.ends[0, len(expected) :].eq(before).all()
        assert found.labels is not None
        assert found.labels.ids[0, : len(expected)].tolist() == [index for index, _ in expected]


def test_fixed_segments() -> None:
    taps = taps_of("a" * 10, "a" * 4)
    found = FixedRate(4)(taps, None, None)
    assert found.counts.tolist() == [3, 1]
    assert found.ends[0, :3].tolist() == [4, 8, 10]
    shared = FixedRate(4)(taps, labels_of("a b c", "a"), None)
    assert shared.ends.tolist() == [[3, 6, 10], [4, 4, 4]]
    half = FixedRate(2.5)(taps, None, None)
    assert half.ends[0, : half.counts[0]].tolist() == [2, 5, 8, 10]
    with pytest.raises(ValueError, match="frames_per_token must be at least 1"):
        FixedRate(0.5)


def test_unity2_scores_are_distances() -> None:
    torch.manual_seed(0)
    unity = UnitY2Aligner(5, "abc ", width=8).eval()
    taps, labels = taps_of("aab.c", "a.b"), labels_of("a bc", "ab")
    scores = unity.scores(taps, labels)
    assert scores.shape == (2, 5, 4)
    assert torch.isinf(scores[1, :, 2:]).all()
    # An utterance alone has the same.
    alone = unity.scores(taps_of("a.b"), labels_of("ab"))
    torch.testing.assert_close(scores[1, :3, :2], alone[0])


def test_unity2_learns_where_characters_are() -> None:
    torch.manual_seed(0)
    generator = random.Random(0)
    unity = UnitY2Aligner(5, "abc ", width=32, dropout=0.0)
    optimizer = torch.optim.AdamW(unity.parameters(), 3e-3)

    def draw(count: int) -> tuple[list[str], list[str], list[list[int]]]:
        texts, paths, ends = [], [], []
        for _ in range(count):
            text = " ".join(generator.choice(["ab", "c", "ba", "cab"]) for _ in range(3))
            path, found = "", []
            for character in text:
                path += character * generator.randint(2, 4)
                found.append(len(path))
            texts.append(text)
            paths.append(path)
            ends.append([found[end - 1] for end in words(text)[1]])
        return texts, paths, ends

    for _ in range(120):
        texts, paths, _ = draw(8)
        loss = unity(taps_of(*paths, score=1.0), labels_of(*texts), None).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    texts, paths, ends = draw(20)
    found = unity.eval()(taps_of(*paths, score=1.0), labels_of(*texts), None)
    assert found.loss is None
    errors = [
        abs(a - b)
        for row, expected in zip(found.ends.tolist(), ends, strict=True)
        for a, b in zip(row, expected, strict=False)
    ]
    assert sum(errors) / len(errors) < 1.0
    with pytest.raises(ValueError, match="unity2 needs the text"):
        unity(taps_of("aab"), None, None)


@pytest.mark.parametrize("texts", [("", ""), ("", "ab c")])
def test_unity2_has_no_segment_and_no_loss_for_an_empty_text(texts: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    taps = Taps.pack(torch.randn(16, 1, 5), torch.tensor([8, 8]))
    model = UnitY2Aligner(5, " abc", 8, dropout=0.0).train()
    labels = TokenLabels.of([[], [7] * bool(texts[1])], [[], [4] * bool(texts[1])], texts)
    found = model(taps, labels, None)
    assert found.counts.tolist() == [0, int(bool(texts[1]))]
    found.loss.backward()
    alone = 0.0
    if texts[1]:
        other = Taps.pack(taps.features[8:], torch.tensor([8]))
        alone = model(other, TokenLabels.of([[7]], [[4]], texts[1:]), None).loss.item()
    assert found.loss.item() == pytest.approx(alone / 2)
    grads = [each.grad for each in model.parameters() if each.grad is not None]
    assert all(bool(grad.isfinite().all()) for grad in grads)


def test_cif_weights_learn_the_number_of_tokens() -> None:
    torch.manual_seed(0)
    weights = CIFWeights(5)
    taps = taps_of("a" * 16, "a" * 8)
    features, counts, loss = weights(taps, labels_of("a b c", "a"))
    assert features.shape == (2, 3, 5)
    assert counts.tolist() == [3, 1]
    assert not features[1, 1:].any()
    assert loss is not None
    before = loss.item()
    optimizer = torch.optim.AdamW(weights.parameters(), 1e-2)
    for _ in range(60):
        loss = weights(taps, labels_of("a b c d", "a b"))[2]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2 * before + 0.05
    _, counts, loss = weights(taps, None)
    assert loss is None
    assert counts.tolist() == [4, 2]


def test_the_ctc_model_stays_frozen_and_in_eval_mode() -> None:
    found = aligner().train()
    assert not found.training
    assert not any(parameter.requires_grad for parameter in found.parameters())
