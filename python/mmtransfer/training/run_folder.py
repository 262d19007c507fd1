"""The folder of a fine-tuning run: its files, and whether a run may begin, go on, or has ended there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmtransfer import checkpoint
from mmtransfer.data import DataError
from mmtransfer.data.errors import shown

RUN = "run.json"
RESULTS = "results.json"
STATES = "states"
LOG = "log"
FORMAT = "mmtransfer-finetune"
#: Entries of a description whose own entries differ one by one.
_NESTED = ("options", "task")


class RunFolder:
    """A folder with the checkpoint of a model, and with the states of its training until that has ended.

    Args:
        path: the folder; it is made by `begin`.
        resume: go on with the run that is there.
        force: begin though other files, or another run, are there.

    Attributes:
        goes_on: whether a run is there that `resume` goes on with.

    DataError, naming the folder, if no run may begin there.
    """

    def __init__(self, path: str | Path, *, resume: bool = False, force: bool = False) -> None:
        self.path = Path(path).expanduser()
        if resume and force:
            raise DataError("resume goes on with a run and force begins one; give one of the two")
        if self.path.exists() and not self.path.is_dir():
            raise DataError(f"{self.path} is no folder; give another output")
        self.goes_on = resume and (self.path / RUN).exists()
        if not force and not self.goes_on:
            self._refuse_files()
        # Of a run that was killed while it saved its model there may be the weights alone.
        if not (self.path / RUN).exists() or (self.path / checkpoint.CONFIG).exists():
            try:
                checkpoint.refuse_foreign_files(self.path)
            except FileExistsError as error:
                raise DataError(str(error)) from error

    @property
    def states(self) -> Path:
        return self.path / STATES

    def results(self) -> dict[str, Any] | None:
        """Those of the run that goes on, if it has ended; its states may not be removed yet."""
        if not (self.goes_on and (self.path / RESULTS).exists()):
            return None
        shutil.rmtree(self.states, ignore_errors=True)
        return self._read(RESULTS)

    def begin(self, description: Mapping[str, Any]) -> None:
        """Make the folder ready for a run that is described so, or check that it is the one that is there.

        DataError names the first difference.
        """
        described = json.loads(json.dumps(description))
        for path in self._leftovers():
            path.unlink()
        if self.goes_on:
            earlier = self._read(RUN)
            if (found := _first_difference(earlier, described)) is not None:
                raise DataError(
                    f"the run in {self.path} has {found}; resume it as it began, or use another output"
                )
            return
        self.path.mkdir(parents=True, exist_ok=True)
        for name in (RESULTS, RUN):
            (self.path / name).unlink(missing_ok=True)
        for name in (STATES, LOG):
            shutil.rmtree(self.path / name, ignore_errors=True)
        self._write(RUN, described)

    def end(self, results: Mapping[str, Any]) -> None:
        """Write the results, after which the run is over, and remove the states."""
        self._write(RESULTS, results)
        shutil.rmtree(self.states, ignore_errors=True)

    def _read(self, name: str) -> dict[str, Any]:
        try:
            return json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{self.path / name} cannot be read ({error}); force begins again") from error

    def _write(self, name: str, content: Mapping[str, Any]) -> None:
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"

        def write(path: Path) -> None:
            # Names that are not UTF-8, as JSON escapes them.
            path.write_text(text, encoding="utf-8", errors="backslashreplace")

        checkpoint.replace_file(self.path / name, write)

    def _refuse_files(self) -> None:
        files = list(self.path.iterdir()) if self.path.exists() else []
        if set(files) == set(self._leftovers()):
            return
        if (self.path / RUN).exists():
            raise DataError(
                f"{self.path} holds a run already; resume goes on with it, force begins again, or use "
                "another output"
            )
        raise DataError(f"{self.path} holds other files; force writes there, or use another output")

    def _leftovers(self) -> list[Path]:
        """Files that were not written to their end when a run was killed."""
        names = (RUN, RESULTS, checkpoint.CONFIG, checkpoint.WEIGHTS)
        found = [path for name in names for path in self.path.glob(f".{name}.*")]
        weights = self.path / checkpoint.WEIGHTS
        if (self.path / RUN).exists() and not (self.path / checkpoint.CONFIG).exists() and weights.exists():
            found.append(weights)
        return found


def _first_difference(earlier: Mapping[str, Any], now: Mapping[str, Any], inside: str = "") -> str | None:
    """What one description has and the other has not, by the path of its name; None if they are equal."""
    for name in {**earlier, **now}:
        was, given = earlier.get(name), now.get(name)
        if was == given:
            continue
        # The others are what is said of one thing.
        if (inside or name in _NESTED) and isinstance(was, dict) and isinstance(given, dict):
            return _first_difference(was, given, f"{inside}{name}.")
        return f"{inside}{name} {shown(was)}, not {shown(given)}"
    return None
