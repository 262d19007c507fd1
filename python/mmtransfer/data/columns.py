"""The columns of manifests and data sets, by the names that people and programs give them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from .errors import DataError

Kind = Literal["label", "text"]

# Other tools' names for the column of paths. There are none for labels: files that are not there show that a
# path column was taken wrongly, a wrong column of labels would be trained on.
PATH_COLUMNS = (
    "file_name",
    "filename",
    "file_path",
    "filepath",
    "audio",
    "audio_path",
    "audio_file",
    "audio_filepath",
)
TEXT_COLUMNS = ("sentence", "transcript", "transcription")
SPEAKER_COLUMNS = ("speaker_id", "speakerid", "spk_id", "client_id")
SYNONYMS: Mapping[str, tuple[str, ...]] = {
    "path": PATH_COLUMNS,
    "label": (),
    "text": TEXT_COLUMNS,
    "split": (),
    "speaker": SPEAKER_COLUMNS,
}


def check_kind(kind: str | None) -> None:
    """ValueError unless `kind` is "label", "text" or None."""
    if kind not in ("label", "text", None):
        raise ValueError(f"kind must be 'label', 'text' or None, got {kind!r}")


def find_column(source: object, name: str, header: Sequence[str]) -> int | None:
    """The index of the column called `name`, or else by one of its synonyms; None if there is none.

    DataError, naming `source`, for two of one rank.
    """
    for names in ((name,), SYNONYMS[name]):
        found = [index for index, column in enumerate(header) if column in names]
        if len(found) > 1:
            listed = ", ".join(header[index] for index in found)
            raise DataError(f"{source} has the columns {listed} for {name!r}; call one of them {name}")
        if found:
            return found[0]
    return None
