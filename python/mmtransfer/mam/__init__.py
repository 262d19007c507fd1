"""MAM and L-MAM: attention of a text or image model merged into a speech or audio model (Sundar et al., arXiv
2312.14378)."""

from __future__ import annotations
