"""The result of :func:`mmkernels.ctc_align`, for a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


@dataclass(frozen=True)
class TokenSpan:
    """Frames ``[start, end)`` of one token, without the blanks around it, and its mean log-probability. Its
    ``len`` is the number of frames, as in torchaudio."""

    token: int
    start: int
    end: int
    score: float

    def __len__(self) -> int:
        return self.end - self.start


class Alignment(NamedTuple):
    """Paths of a batch of B utterances of at most T frames through targets of at most U tokens.

    Where there is no path (``feasible`` is False), ``paths`` are -1, ``scores`` and ``ends`` 0 and ``total``
    is -inf.
    """

    #: ``(B, T)`` int64: token of each frame, the blank among them; -1 in padding.
    paths: Tensor
    #: ``(B, T)``: log-probability of that token; 0 in padding. Has the gradient of ``log_probs``.
    scores: Tensor
    #: ``(B, U)`` int64: the exclusive last frame of each token, non-decreasing, as ``segment_pool`` takes it.
    #: A blank belongs to the token before it, blanks at the start to the first token. The last token ends at
    #: the input length, and so do entries past the target length: their segments are empty.
    ends: Tensor
    #: ``(B,)``: sum of the scores, rounded once; without a gradient (``scores.sum(1)`` has one).
    total: Tensor
    #: ``(B,)`` bool: whether there is a path of a score above -inf.
    feasible: Tensor
    #: The class of blanks.
    blank: int = 0

    def spans(self, row: int) -> list[TokenSpan]:
        """Where each token of utterance ``row`` is. Copies the row to the host, so on CUDA it waits for the
        device."""
        path, ends = self.paths[row].tolist(), self.ends[row].tolist()
        scores = self.scores[row].detach().double().tolist()
        found, begin = [], 0
        for end in ends:
            frames = [t for t in range(begin, end) if path[t] != self.blank]
            if frames:
                mean = sum(scores[t] for t in frames) / len(frames)
                found.append(TokenSpan(path[frames[0]], frames[0], frames[-1] + 1, mean))
            begin = end
        return found

    def token_spans(self) -> list[list[TokenSpan]]:
        """:meth:`spans` of every utterance."""
        return [self.spans(row) for row in range(self.paths.shape[0])]
