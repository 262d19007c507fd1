"""Times of the words of a text in a recording of it."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from mmkernels import ctc_align
from mmtransfer.data import DataError
from mmtransfer.data.audio import check_samples, stream_audio
from mmtransfer.model import AdaptedModel
from mmtransfer.tasks.ctc import CTC

from .emissions import Emissions
from .text import WILDCARDS, Normalizer, Rule, Target, TextWord, encode


@dataclass(frozen=True)
class Token:
    """One token of the alignment: times in seconds, `score` as of a word, `word` its index or None."""

    text: str
    start: float
    end: float
    score: float
    word: int | None


@dataclass(frozen=True)
class Word:
    """One word of the user's text.

    Attributes:
        text: as it was written.
        start, end: seconds.
        score: geometric mean of the probabilities of its tokens over their frames, 0 to 1; None for a word
            that the model cannot write.
        exact: whether all of the word was aligned; otherwise the times are of the part that was, or, without
            a score, the word's share of the time that its neighbours leave. A word of punctuation alone has
            no score, and no duration: start and end are the end of the word before it.
        line: number of its line in the text, from 0.
    """

    text: str
    start: float
    end: float
    score: float | None
    exact: bool
    line: int


@dataclass(frozen=True, eq=False)
class Posteriors:
    """The frames behind an alignment.

    Attributes:
        log_probs: `(T, K)`, float32: of the classes that occur.
        classes: the symbol of each; "*" for the wildcard.
        path: `(T,)` int64: the class of each frame on the best path.
        target: the class of each token.
        seconds_per_frame: from one frame to the next.
        start: seconds at which the first frame begins; a little less or more than 0, by the audio that the
            model's first layers put into a frame.
    """

    log_probs: torch.Tensor
    classes: tuple[str, ...]
    path: torch.Tensor
    target: tuple[int, ...]
    seconds_per_frame: float
    start: float = 0.0


@dataclass(frozen=True, eq=False)
class AlignedText:
    """The words of a text with their times, in order.

    Attributes:
        words: all of them.
        tokens: of the model, without blanks.
        seconds: length of the recording.
        posteriors: the frames that the times were read from.
    """

    words: tuple[Word, ...]
    tokens: tuple[Token, ...]
    seconds: float
    posteriors: Posteriors = field(repr=False)

    @property
    def score(self) -> float:
        """Mean score of the words that have one."""
        scores = [word.score for word in self.words if word.score is not None]
        return sum(scores) / len(scores)


class Aligner:
    """Aligns texts with recordings by a CTC model.

    Emissions are computed in windows that overlap, and aligned in one pass over the whole recording, so that
    nothing has to be cut before, and only the probabilities of the text's classes are held for all frames.

    Args:
        model: an `AdaptedModel` with a CTC task and its `audio`: from `mmtransfer.load`, or from
            `pretrained_ctc` for a model of transformers. It runs where its weights are.
        rules: patterns and replacements for what the model cannot write, see `Normalizer`.
        wildcards: places where the audio may hold words that the text lacks: "start", "end", "between" words.
        penalty: of a wildcard, in nats for each frame, see `mmkernels.ops.ctc_align.with_wildcard`.
        window, context, batch_size: see `Emissions`.

    ValueError for a model of another task, and for options that exclude each other.
    """

    def __init__(
        self,
        model: AdaptedModel,
        *,
        rules: Sequence[Rule] | Mapping[str, str] = (),
        wildcards: Collection[str] = (),
        penalty: float = 0.1,
        window: float = 20.0,
        context: float | None = None,
        batch_size: int = 4,
    ) -> None:
        if not isinstance(model.task, CTC):
            name = "no task" if model.task is None else f"the task {model.task.name}"
            raise ValueError(f"model has {name}; alignment needs the task ctc")
        wildcards = (wildcards,) if isinstance(wildcards, str) else wildcards
        if wrong := [each for each in wildcards if each not in WILDCARDS]:
            raise ValueError(f"wildcards must be of {', '.join(WILDCARDS)}, got {wrong[0]!r}")
        if not 0 <= penalty < math.inf:
            raise ValueError(f"penalty must be at least 0, got {penalty}")
        self.task, self.wildcards, self.penalty = model.task, frozenset(wildcards), penalty
        self.normalizer = Normalizer(model.task, rules)
        self.emissions = Emissions(model, window=window, context=context, batch_size=batch_size)

    @property
    def sampling_rate(self) -> int:
        """Of samples that are given instead of a file."""
        return self.emissions.sampling_rate

    def align(
        self,
        audio: str | Path | np.ndarray,
        text: str,
        *,
        on_window: Callable[[float], None] = lambda seconds: None,
    ) -> AlignedText:
        """The times of all words of `text` in `audio`.

        Args:
            audio: a file, which is streamed, or float samples `(n,)` between -1 and 1 at `sampling_rate`.
            text: what is spoken, in lines of any length.
            on_window: called with the seconds of audio that are done, batch by batch.

        Raises:
            DataError: audio that cannot be read, a text without a character of the vocabulary, audio that is
                too short for its text.
            TypeError, ValueError: samples of another form.
            NotFiniteError: logits of the model that are not finite.
        """
        name = "the samples" if isinstance(audio, np.ndarray) else str(audio)
        words = self.normalizer.words(text)
        if not any(word.spoken for word in words):
            raise DataError(f"the text of {name} has nothing that the model can write: {_shown(text)}")
        target = encode(words, self.task, self.wildcards)
        classes = sorted(set(target.ids) - {len(self.task.vocabulary)})
        samples = _Counted(audio, self.sampling_rate)
        log_probs = self.emissions(samples, [self.task.blank, *classes], name=name, on_window=on_window)
        # The last column is that of the best class, which the wildcard is almost as likely as.
        log_probs[:, -1] -= self.penalty
        return self._read(log_probs, classes, target, words, samples.count / self.sampling_rate, name)

    def _read(
        self,
        log_probs: torch.Tensor,
        classes: list[int],
        target: Target,
        words: list[TextWord],
        seconds: float,
        name: str,
    ) -> AlignedText:
        # Classes count from 1, as 0 is the blank; the wildcard is behind them.
        place = {each: index for index, each in enumerate(classes, start=1)}
        place[len(self.task.vocabulary)] = len(classes) + 1
        ids = [place[each] for each in target.ids]
        found = ctc_align(log_probs[None], torch.tensor([ids]))
        if not bool(found.feasible):
            raise _infeasible(ids, len(log_probs), seconds, name)
        spans = found.spans(0)
        hop, shift = (each / self.sampling_rate for each in (self.emissions.hop, self.emissions.shift))

        def time(frame: int) -> float:
            return min(max(frame * hop + shift, 0.0), seconds)

        symbols = [self._symbol(each) for each in target.ids]
        tokens = [
            Token(
                symbol,
                time(span.start),
                time(span.end),
                math.exp(span.score),
                owners[0] if len(owners) == 1 else None,
            )
            for symbol, span, owners in zip(symbols, spans, target.words, strict=True)
        ]
        posteriors = Posteriors(
            log_probs, ("", *(self._symbol(each) for each in place)), found.paths[0], tuple(ids), hop, shift
        )
        timed = _time_words(words, target, tokens)
        return AlignedText(tuple(timed), tuple(tokens), seconds, posteriors)

    def _symbol(self, index: int) -> str:
        return self.task.vocabulary[index] if index < len(self.task.vocabulary) else "*"


class _Counted:
    """Blocks of samples, counted as they pass."""

    def __init__(self, audio: str | Path | np.ndarray, rate: int) -> None:
        self.count = 0
        if isinstance(audio, np.ndarray):
            check_samples(audio, "audio")
            self._blocks = iter([audio.astype(np.float32, copy=False)])
        else:
            self._blocks = iter(stream_audio(audio, rate))

    def __iter__(self) -> _Counted:
        return self

    def __next__(self) -> np.ndarray:
        block = next(self._blocks)
        self.count += len(block)
        return block


def _time_words(words: list[TextWord], target: Target, tokens: list[Token]) -> list[Word]:
    of_word: dict[int, list[Token]] = {index: [] for index in range(len(words))}
    shares: dict[int, tuple[float, float]] = {}
    for token, owners in zip(tokens, target.words, strict=True):
        if owners and not words[owners[0]].spoken:
            shares |= _share(token, owners, words)
        elif owners:
            # Some sub-word vocabularies have tokens of several words.
            for index, (start, end) in _share(token, owners, words).items():
                of_word[index].append(replace(token, start=start, end=end))
    timed: list[Word] = []
    for index, word in enumerate(words):
        own, score = of_word[index], None
        if own:
            start, end, score = own[0].start, own[-1].end, _mean_score(own)
        elif index in shares:
            start, end = shares[index]
        else:
            # Silent: none before it is at the first sound.
            start = end = timed[-1].end if timed else tokens[0].start
        timed.append(Word(word.text, start, end, score, word.exact, word.line))
    return timed


def _share(token: Token, owners: tuple[int, ...], words: list[TextWord]) -> dict[int, tuple[float, float]]:
    """The times of words that one token stands for, by their lengths."""
    sizes = [len(words[index].text) for index in owners]
    per_character = (token.end - token.start) / sum(sizes)
    found, start = {}, token.start
    for index, size in zip(owners, sizes, strict=True):
        found[index] = (start, start + size * per_character)
        start = found[index][1]
    found[owners[-1]] = (found[owners[-1]][0], token.end)
    return found


def _mean_score(tokens: list[Token]) -> float:
    """The geometric mean over frames, which the tokens' durations count."""
    total = sum(token.end - token.start for token in tokens)
    logs = sum(math.log(max(token.score, 1e-30)) * (token.end - token.start) for token in tokens)
    return math.exp(logs / total)


def _infeasible(ids: list[int], frames: int, seconds: float, name: str) -> DataError:
    needed = len(ids) + sum(a == b for a, b in itertools.pairwise(ids))
    if needed > frames:
        return DataError(
            f"{name} is too short for its text: {seconds:.2f} s are {frames} frames, and the text takes "
            f"{needed}; check that they belong together"
        )
    return DataError(f"{name} cannot be aligned: every path has a probability of 0")


def _shown(text: str) -> str:
    """The beginning of a text, and the characters that occur most."""
    common = "".join(character for character, _ in Counter("".join(text.split())).most_common(10))
    return f"most frequent are {common!r}" if common else "it is empty"
