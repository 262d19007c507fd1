"""Clips to the inputs of a speech encoder, with the model's own feature extractor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import AutoFeatureExtractor, SequenceFeatureExtractor, WhisperFeatureExtractor

from .audio import check_max_seconds, check_samples
from .errors import DataError
from .recordings import Clip, Recordings


class Collator:
    """Turn a list of clips into a model's input batch; a collate function for a DataLoader or a Trainer.

    Args:
        recordings: where the clips come from.
        feature_extractor: a transformers feature extractor, or the folder or name that it is loaded from.
        max_seconds: clips are cropped to their first `max_seconds`; None keeps them whole.
        pad_to: "longest" pads to the longest clip of the batch, "max" to the extractor's own fixed length
            where it has one (Whisper: 3,000 mel frames, 30 s, all that transformers' WhisperEncoder accepts).

    With Whisper and "longest" the mel frames are bitwise those of the 30 s input, cut to an even count that
    covers the longest clip; the encoder must then slice its position embeddings. AST pads to its fixed length
    either way.

    A call returns a dict: the extractor's tensors (`input_features` or `input_values`, and `attention_mask`
    where the extractor makes one), `lengths` (B,) int64, the true samples per clip at the extractor's rate
    before any padding, and `labels` (B,) int64 where the clips have labels.
    """

    def __init__(
        self,
        recordings: Recordings,
        feature_extractor: SequenceFeatureExtractor | str | Path,
        *,
        max_seconds: float | None = 3.0,
        pad_to: Literal["longest", "max"] = "longest",
    ) -> None:
        if pad_to not in ("longest", "max"):
            raise ValueError(f"pad_to must be 'longest' or 'max', got {pad_to!r}")
        check_max_seconds(max_seconds)
        self.recordings = recordings
        self.extractor = load_feature_extractor(feature_extractor)
        self.max_seconds = max_seconds
        self.pad_to = pad_to

    def __call__(self, clips: Sequence[Clip]) -> dict[str, torch.Tensor]:
        rate = self.extractor.sampling_rate
        audio = [self.recordings.load(clip, rate, self.max_seconds) for clip in clips]
        batch = extract(self.extractor, audio, pad_to=self.pad_to)
        labels = [clip.label for clip in clips]
        if None not in labels:
            batch["labels"] = torch.tensor(labels, dtype=torch.int64)
        return batch


def extract(
    extractor: SequenceFeatureExtractor,
    audio: Sequence[np.ndarray],
    *,
    pad_to: Literal["longest", "max"] = "longest",
) -> dict[str, torch.Tensor]:
    """Features of mono float32 arrays at the extractor's rate, with `lengths` in samples; see `Collator`.

    TypeError or ValueError, with the number of the array, unless each is one finite floating-point channel
    `(samples,)` between -1 and 1 (int16 samples: divide by 32768).
    """
    if not len(audio):
        raise ValueError("audio must hold at least one clip, got none")
    for index, samples in enumerate(audio):
        check_samples(samples, f"audio[{index}]")
    lengths = torch.tensor([len(samples) for samples in audio], dtype=torch.int64)
    padding = "longest"
    if isinstance(extractor, WhisperFeatureExtractor):
        audio = [samples[: extractor.n_samples] for samples in audio]
        lengths = lengths.clamp(max=extractor.n_samples)
        if pad_to == "longest":
            audio = _pad_for_whisper(extractor, audio)
        else:
            padding = "max_length"
    call: Any = extractor  # transformers declares no __call__ on the base class
    rate = extractor.sampling_rate
    features = call(list(audio), sampling_rate=rate, padding=padding, return_tensors="pt")
    return {**features, "lengths": lengths}


def load_feature_extractor(source: SequenceFeatureExtractor | str | Path) -> SequenceFeatureExtractor:
    """A feature extractor from itself, a local folder or a model name; DataError if it cannot be loaded."""
    if isinstance(source, SequenceFeatureExtractor):
        return source
    try:
        return AutoFeatureExtractor.from_pretrained(str(source))
    except (OSError, ValueError) as error:
        reason = str(error).split("\n", 1)[0].removesuffix(".")
        raise DataError(
            f"no audio feature extractor can be loaded from {source} ({reason}); "
            "give the folder of a speech model with its preprocessor_config.json"
        ) from error


def _pad_for_whisper(extractor: WhisperFeatureExtractor, audio: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Zeros up to an even number of mel frames, with half a window of them at least.

    The second half of the last window is then zeros, as in the 30 s input, and not a reflection of the audio.
    """
    two_frames = 2 * extractor.hop_length
    longest = max(len(samples) for samples in audio) + extractor.n_fft // 2
    size = min(-(-longest // two_frames) * two_frames, extractor.n_samples)
    return [np.pad(samples, (0, size - len(samples))) for samples in audio]
