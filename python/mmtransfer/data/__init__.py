"""The user's recordings, and generated ones.

Everything here needs numpy and soundfile only, and `from_dataset` the package datasets; `features` also needs
torch and transformers and is imported by name (`from mmtransfer.data.features import Collator`).
"""

from __future__ import annotations

from .audio import SAMPLE_RATE, StoredAudio, read_audio, resample
from .errors import DataError
from .folders import from_folder
from .hugging_face import from_dataset
from .loading import load_data
from .manifests import from_manifest
from .recordings import Clip, Recordings
from .synthetic import synthetic, synthetic_speech
from .transcripts import from_transcripts

__all__ = [
    "SAMPLE_RATE",
    "Clip",
    "DataError",
    "Recordings",
    "StoredAudio",
    "from_dataset",
    "from_folder",
    "from_manifest",
    "from_transcripts",
    "load_data",
    "read_audio",
    "resample",
    "synthetic",
    "synthetic_speech",
]
