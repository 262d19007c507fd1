"""Baselines: the head alone, full fine-tuning, and other edits of few parameters."""

from __future__ import annotations

from .methods import MLP, BitFit, Full, Head, Houlsby, LoRA, Partial, Prompt

METHODS = (Head, MLP, Full, Partial, BitFit, Prompt, LoRA, Houlsby)
COMPARED = ("head", "full")

__all__ = ["COMPARED", "METHODS", "MLP", "BitFit", "Full", "Head", "Houlsby", "LoRA", "Partial", "Prompt"]
