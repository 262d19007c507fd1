"""Log-probabilities of a CTC model for recordings of any length, in windows that overlap."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from transformers import WhisperFeatureExtractor

from mmtransfer.data import DataError
from mmtransfer.model import AdaptedModel
from mmtransfer.training.caching import encoder_inputs
from mmtransfer.training.finite import NotFiniteError
from mmtransfer.training.settings import check_integer


class Emissions:
    """Runs a model over audio, window by window.

    Each window sees `context` seconds before and behind the frames that are kept of it, so that these have
    surroundings on both sides. Recordings up to a window long take one pass.

    Args:
        model: with a CTC task and `model.audio`.
        window: seconds of a window; no more than the model takes. Short ones cost accuracy in models that
            look far, or that know positions, as Whisper does.
        context: seconds on each side that are computed and dropped; by default a tenth of the window.
        batch_size: windows at a time.

    Attributes:
        hop: samples from one frame to the next.
        shift: samples from the middle of a frame's hop to the middle of the audio that it hears first.

    Raises:
        ValueError: a window that is not longer than both contexts, a model of another task, or one whose
            frames are not evenly spaced.
    """

    def __init__(
        self,
        model: AdaptedModel,
        *,
        window: float = 20.0,
        context: float | None = None,
        batch_size: int = 4,
    ) -> None:
        check_integer("batch_size", batch_size)
        if model.audio is None:
            raise ValueError(
                "model does not know its feature extractor; set model.audio = AudioInput(extractor)"
            )
        self.model, self.audio, self.batch_size = model.eval(), model.audio, batch_size
        longest = model.audio.longest
        # Without end, as good as any: 11 days.
        window = min(window, 1e6 if longest is None else longest)
        context = window / 10 if context is None else context
        if not 0 <= 2 * context < window:
            raise ValueError(f"window must be longer than two contexts of {context:g} s, got {window:g} s")
        self.hop = self._find_hop(window)
        self.shift = self._find_shift()
        per_second = self.sampling_rate / self.hop
        self._context = round(context * per_second)
        self._window = int(window * per_second) * self.hop
        # Frames from the start of one window to that of the next. A window may have fewer frames than hops.
        self._step = self._window // self.hop - self._lacking - 2 * self._context
        if self._step < 1:
            raise ValueError(f"window must have a frame between its contexts, got {window:g} s")

    @property
    def sampling_rate(self) -> int:
        return self.audio.sampling_rate

    @torch.no_grad()
    def __call__(
        self,
        blocks: Iterable[np.ndarray],
        classes: Sequence[int],
        *,
        name: str = "the audio",
        on_window: Callable[[float], None] = lambda seconds: None,
    ) -> torch.Tensor:
        """Log-probabilities `(T, K + 1)`, float32 on the CPU: K classes, then the best of all classes.

        Args:
            blocks: the samples, in order; no more than a window and a block of them are held.
            classes: those that are kept; the vocabulary may be large.
            name: of the recording, for messages.
            on_window: called with the seconds of audio that a batch of windows has added.

        Raises:
            NotFiniteError: logits that are not finite.
            DataError: audio that is too short for one frame.
        """
        columns = torch.tensor(classes, dtype=torch.int64)
        kept: list[torch.Tensor] = []
        done = 0.0
        for batch, first, last in _batches(
            _windows(blocks, self._window, self._step * self.hop), self.batch_size
        ):
            for index, frames in enumerate(self._run(batch, columns, name)):
                begins = 0 if first and index == 0 else self._context
                ends = None if last and index == len(batch) - 1 else self._context + self._step
                kept.append(frames[begins:ends])
            seconds = sum(map(len, kept)) * self.hop / self.sampling_rate
            on_window(seconds - done)
            done = seconds
        found = torch.cat(kept) if kept else torch.empty(0, len(classes) + 1)
        if not len(found):
            raise DataError(f"{name} is too short for one frame of the model")
        return found

    def _run(self, batch: list[np.ndarray], columns: torch.Tensor, name: str) -> list[torch.Tensor]:
        """The frames of windows of one length."""
        size = len(batch[0])
        if size < self.sampling_rate and self._frames(size) < 1:
            return [torch.empty(0, len(columns) + 1)] * len(batch)
        model, device = self.model, next(self.model.parameters()).device
        extracted = self.audio.extract(batch)
        inputs = encoder_inputs(extracted, self.audio.extractor, model.encoder.description.main_input)
        output = model(**{key: tensor.to(device) for key, tensor in inputs.items()})
        log_probs = output.logits.float().log_softmax(-1)
        if not bool(log_probs.isfinite().all()):
            raise NotFiniteError(f"the logits of {name} are not finite")
        best = log_probs.amax(-1, keepdim=True)
        chosen = torch.cat([log_probs[:, columns.to(device)], best], -1).cpu()
        return list(chosen.split(output.lengths.tolist()))

    def _find_hop(self, window: float) -> int:
        """Samples per frame, from the frames of two lengths, and how many frames less than hops there are."""
        rate = self.sampling_rate
        # Multiples of every usual hop, which is a divisor of 160 ms.
        unit = rate * 4 // 25
        long = int(min(window, 2.0) * rate) // unit
        if long < 2:
            raise ValueError(f"window must be at least 0.32 s, got {window:g} s")
        short = long // 2
        frames = self._frames(long * unit)
        more_frames = frames - self._frames(short * unit)
        hop, rest = divmod((long - short) * unit, max(more_frames, 1))
        if more_frames < 1 or rest:
            raise ValueError("the model's frames are not evenly spaced in time, so they have no times")
        self._lacking = long * unit // hop - frames
        return hop

    def _find_shift(self) -> float:
        if isinstance(self.audio.extractor, WhisperFeatureExtractor):
            # Its windows are centred on the beginning of their hop, and its convolutions on every second one.
            return -self.hop / 2
        if self.model.encoder.description.main_input == "input_values":
            return (self.model.encoder.parts.minimum_length - self.hop) / 2
        return 0.0

    def _frames(self, samples: int) -> int:
        extracted = self.audio.extract([np.zeros(samples, np.float32)])
        inputs = encoder_inputs(extracted, self.audio.extractor, self.model.encoder.description.main_input)
        lengths = inputs["lengths"] if "lengths" in inputs else inputs["attention_mask"].sum(1)
        return int(self.model.encoder.parts.frame_lengths(lengths))


def _windows(blocks: Iterable[np.ndarray], size: int, step: int) -> Iterator[np.ndarray]:
    """Windows of `size` samples every `step`; the last has the rest, more than what windows share."""
    held = np.empty(0, np.float32)
    for block in blocks:
        held = np.concatenate([held, block])
        while len(held) > size:
            yield held[:size]
            held = held[step:]
    if len(held):
        yield held


def _batches(windows: Iterator[np.ndarray], size: int) -> Iterator[tuple[list[np.ndarray], bool, bool]]:
    """Windows of one length, at most `size` of them; whether they begin and end the recording."""
    batch: list[np.ndarray] = []
    first = True
    for window in windows:
        # The shorter one at the end goes alone: many models see padding.
        if batch and (len(batch) == size or len(window) != len(batch[0])):
            yield batch, first, False
            batch, first = [], False
        batch.append(window)
    if batch:
        yield batch, first, True
