"""A step of both stages of SSR against the paper's equations, in loops over frames and tokens, in float64."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from finetune_data import write_model
from tiny_language_models import tiny_language_model

from mmtransfer import AdaptedModel
from mmtransfer.encoders import Taps
from mmtransfer.encoders.loading import load_model
from mmtransfer.ssr import CTCAligner
from mmtransfer.tasks import CTC, Text

#: The model of the aligner knows neither "!" nor "z"; both texts have neighbours that are equal.
TEXTS = ("abbc de a", "ab! ee z")
SYMBOLS = ("", " ", "a", "b", "c", "d", "e")
SAMPLES = torch.tensor([24000, 16000])


class First(torch.nn.Module):
    """A readout of the CTC model: its only layer."""

    out_dim = 16

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features[:, 0]


def build(place: Path, stage: int) -> AdaptedModel:
    torch.manual_seed(0)
    task = Text(language_model=str(place / "language"), stage=stage)
    model = AdaptedModel(load_model(str(place / "model")), "ssr", task, aligner="fixed", depth=2, hidden=40)
    ctc = CTC(vocabulary=SYMBOLS)
    model.readout.aligner = CTCAligner(First(), ctc.head(16), ctc)
    with torch.no_grad():
        for parameter in model.readout.aligner.head.classifier.parameters():
            parameter.mul_(20)
    return model.double()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("equations")
    write_model(folder / "model")
    tiny_language_model(folder / "language")
    return folder


@pytest.fixture(scope="module")
def sound() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 24000, dtype=torch.float64)


def best_path(log_probs: torch.Tensor, symbols: list[int]) -> list[int]:
    """The state of each frame on the best path through blank, symbol, blank, symbol, ..."""
    states = [0, *itertools.chain.from_iterable((symbol, 0) for symbol in symbols)]
    score = {0: log_probs[0, 0].item(), 1: log_probs[0, states[1]].item()}
    back: list[dict[int, int]] = []
    for frame in log_probs[1:]:
        now, came = {}, {}
        for state, symbol in enumerate(states):
            steps = (0, 1, 2) if state % 2 and symbol != states[state - 2] else (0, 1)
            before = {state - step: score[state - step] for step in steps if state - step in score}
            if before:
                came[state] = max(before, key=before.__getitem__)
                now[state] = before[came[state]] + frame[symbol].item()
        score = now
        back.append(came)
    state = max((len(states) - 1, len(states) - 2), key=lambda each: score.get(each, -math.inf))
    path = [state]
    for came in reversed(back):
        path.append(came[path[-1]])
    return path[::-1]


def boundaries(model: AdaptedModel, features: torch.Tensor, text: str) -> tuple[list[int], list[int]]:
    """The last frame of each segment, and the tokens that have one."""
    aligner: Any = model.readout.aligner
    taps = Taps.pack(features, torch.tensor([len(features)]))
    log_probs = aligner.logits(taps).double().log_softmax(-1)
    places = [place for place, character in enumerate(text) if character in SYMBOLS[1:]]
    path = best_path(log_probs, [SYMBOLS.index(text[place]) for place in places])
    onsets = [path.index(2 * number + 1) for number in range(len(places))] + [len(path)]
    task: Any = model.task
    found, kept, end = [], [], 0
    for index, stop in zip(*task._tokenizer.encode_with_ends(text), strict=True):
        symbols = sum(place < stop for place in places)
        # It lasts until the first symbol of the next token begins.
        if symbols and onsets[symbols] > end:
            end = onsets[symbols]
            found.append(end - 1)
            kept.append(index)
    return found, kept


def norm(x: torch.Tensor, module: Any) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + module.variance_epsilon).sqrt() * module.weight


def vectors(connector: Any, features: torch.Tensor, ends: list[int]) -> torch.Tensor:
    """z_j: the decoder's output at the boundaries, each frame seeing from the last boundary before it."""
    x = features @ connector.projection.weight.T
    for layer in connector.layers:
        attention, mlp, size = layer.self_attn, layer.mlp, layer.head_dim
        h = norm(x, layer.input_layernorm)
        q, k, v = (
            (h @ each.weight.T).unflatten(1, (-1, size))
            for each in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        share = q.shape[1] // k.shape[1]
        rows = []
        for frame in range(len(x)):
            first = max((end for end in ends if end < frame), default=0)
            heads = []
            for head in range(q.shape[1]):
                keys, values = (each[first : frame + 1, head // share] for each in (k, v))
                heads.append((keys @ q[frame, head] / math.sqrt(size)).softmax(0) @ values)
            rows.append(torch.cat(heads))
        x = x + torch.stack(rows) @ attention.o_proj.weight.T
        h = norm(x, layer.post_attention_layernorm)
        gate, up = h @ mlp.gate_proj.weight.T, h @ mlp.up_proj.weight.T
        x = x + (gate * gate.sigmoid() * up) @ mlp.down_proj.weight.T
    return norm(x, connector.norm)[ends]


def by_hand(model: AdaptedModel, sound: torch.Tensor) -> tuple[list[torch.Tensor], list[list[int]]]:
    """The vectors and the tokens of each utterance alone."""
    found, tokens = [], []
    for samples, length, text in zip(sound, SAMPLES.tolist(), TEXTS, strict=True):
        features = model.encoder(samples[None, :length]).features
        ends, kept = boundaries(model, features, text)
        found.append(vectors(model.readout.connector, features[:, 0], ends))
        tokens.append(kept)
    return found, tokens


def gradients(loss: torch.Tensor, model: AdaptedModel) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(loss, list(model.readout.connector.parameters()))


def test_the_first_stage(place: Path, sound: torch.Tensor) -> None:
    model = build(place, 1).train()
    assert model.task is not None
    labels = model.task.collate(TEXTS)
    loss = model(sound, lengths=SAMPLES, labels=labels).loss
    found, tokens = by_hand(model, sound)
    assert [len(each) for each in tokens] != [0, 0]
    # Some tokens have no segment, and are left out.
    assert sum(map(len, tokens)) < int((labels[:, 0] >= 0).sum())
    terms = []
    for z, kept in zip(found, tokens, strict=True):
        for vector, index in zip(z, kept, strict=True):
            row = model.head.table[index]
            cosine = vector @ row / (vector.norm() * row.norm())
            terms.append((vector - row).square().sum() + 5 * (1 - cosine))
    expected = torch.stack(terms).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for own, theirs in zip(gradients(loss, model), gradients(expected, model), strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-9, atol=1e-11)


def test_the_second_stage(place: Path, sound: torch.Tensor) -> None:
    model = build(place, 2).train()
    assert model.task is not None
    head: Any = model.head
    loss = model(sound, lengths=SAMPLES, labels=model.task.collate(TEXTS)).loss
    found, _ = by_hand(model, sound)
    table = head.model.get_input_embeddings().weight
    losses, counts = [], []
    for z, text in zip(found, TEXTS, strict=True):
        tail = [*head.tokenizer.encode(text), head.eos]
        given = torch.cat([table[[head.tokenizer.bos]], z, table[tail]])
        wanted = torch.tensor([[-100] * (1 + len(z)) + tail])
        losses.append(head.model(inputs_embeds=given[None], labels=wanted).loss.double())
        counts.append(len(tail))
    expected = sum(each * count for each, count in zip(losses, counts, strict=True)) / sum(counts)
    assert isinstance(expected, torch.Tensor)
    # transformers computes norms, the softmax and its loss in float32.
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for own, theirs in zip(gradients(loss, model), gradients(expected, model), strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-4, atol=1e-5)
