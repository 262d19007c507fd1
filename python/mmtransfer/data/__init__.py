"""The user's recordings, and generated ones.

Everything here needs numpy and soundfile only; `features` also needs torch and transformers and is imported
by name (`from mmtransfer.data.features import Collator`).
"""

from __future__ import annotations

from .audio import SAMPLE_RATE, read_audio, resample
from .errors import DataError
from .folders import from_folder
from .manifests import from_manifest
from .recordings import Clip, Recordings
from .synthetic import synthetic, synthetic_speech

__all__ = [
    "SAMPLE_RATE",
    "Clip",
    "DataError",
    "Recordings",
    "from_folder",
    "from_manifest",
    "read_audio",
    "resample",
    "synthetic",
    "synthetic_speech",
]
