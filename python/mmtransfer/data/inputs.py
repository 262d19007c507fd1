"""How audio files become the input of a model, in a form that a checkpoint can keep."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import SequenceFeatureExtractor, WhisperFeatureExtractor
from transformers.utils import cached_file

from .audio import read_audio
from .errors import DataError
from .features import extract, load_feature_extractor

_FILE = "preprocessor_config.json"


@dataclass(frozen=True, eq=False)
class AudioInput:
    """A feature extractor, and the seconds that clips are cropped to (None: not at all)."""

    extractor: SequenceFeatureExtractor
    max_seconds: float | None = None

    @property
    def sampling_rate(self) -> int:
        return self.extractor.sampling_rate

    @property
    def longest(self) -> float | None:
        """Seconds of the longest clip of which the end counts; None: of any."""
        own = self.extractor.chunk_length if isinstance(self.extractor, WhisperFeatureExtractor) else None
        return min((float(each) for each in (own, self.max_seconds) if each is not None), default=None)

    def load(self, file: str | Path) -> np.ndarray:
        """The samples of a file at the extractor's rate; DataError if it cannot be read."""
        return read_audio(file, self.sampling_rate, self.max_seconds)

    def extract(self, audio: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
        """The extractor's tensors for some clips, with `lengths` in samples."""
        return extract(self.extractor, audio)

    def describe(self) -> dict[str, Any]:
        """Everything, as JSON can have it."""
        return {"max_seconds": self.max_seconds, "extractor": json.loads(self.extractor.to_json_string())}

    @classmethod
    def of(cls, described: Mapping[str, Any]) -> AudioInput:
        """The one that `describe` described; ValueError for an extractor that transformers does not have."""
        options = dict(described["extractor"])
        kind = getattr(transformers, str(options.get("feature_extractor_type")), None)
        if not (isinstance(kind, type) and issubclass(kind, SequenceFeatureExtractor)):
            raise ValueError(
                f"the feature extractor {options.get('feature_extractor_type')!r} is not in transformers"
            )
        return cls(kind.from_dict(options), described["max_seconds"])  # type: ignore[arg-type]


def find_audio_input(source: str | None) -> AudioInput | None:
    """The input of the pretrained model in a folder, or of a hub name that is on this machine; None without.

    Nothing is downloaded.
    """
    if not source:
        return None
    try:
        found = cached_file(source, _FILE, local_files_only=True, _raise_exceptions_for_missing_entries=False)
        return None if found is None else AudioInput(load_feature_extractor(Path(found).parent))
    except (OSError, ValueError, DataError):
        return None
