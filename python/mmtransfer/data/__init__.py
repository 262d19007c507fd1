"""Audio for the methods: real packages fetched by name, a user's own files, and a generated task.

Everything here needs numpy and soundfile only; `features` and `whisper` also need torch and transformers and
are imported by name (`from mmtransfer.data.features import Collator`).
"""

from __future__ import annotations

from .audio import SAMPLE_RATE, read_audio, resample
from .errors import DataError
from .italian import italian_prompts
from .recordings import Clip, Recordings, from_folder, from_manifest
from .synthetic import synthetic

__all__ = [
    "SAMPLE_RATE",
    "Clip",
    "DataError",
    "Recordings",
    "from_folder",
    "from_manifest",
    "italian_prompts",
    "read_audio",
    "resample",
    "synthetic",
]
