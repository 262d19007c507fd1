"""Merging of checkpoints on disk: tensors stream from safetensors to safetensors, and no model is loaded."""

from __future__ import annotations
