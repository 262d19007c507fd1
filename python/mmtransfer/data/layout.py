"""Which folders of a tree are classes and which are parts; a folder that could be either is refused."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from .audio import SUFFIXES
from .errors import DataError, counted, first, shortened
from .names import VALIDATION, names_a_part, normal, part_of
from .recordings import SPLITS
from .tree import Place, Tree, count_suffixes

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Labelled:
    """A clip, the name of its class folder, and its part, which is empty if it is to be drawn."""

    place: Place
    folder: str
    split: str


def arrange(tree: Tree) -> tuple[list[Labelled], list[str]]:
    """The clips of all parts, and what is left out of the rest.

    Part folders are on top (train/cat) or anywhere below the class folders (cat/train). DataError if one part
    is missing, a clip is in two or in none beside others that are, or a class folder has no audio.
    """
    on_top = _parts_on_top(tree)
    depth = 1 if on_top else 0
    _check_class_folders(tree, on_top)
    inside = [place for place in tree.audio if len(place.parts) >= depth + 2]
    loose = len(tree.audio) - len(inside)
    ignored = [f"{counted(loose, 'clip')} outside class folders"] if loose else []
    if not inside:
        raise DataError(f"{tree.root} has no class folders with audio; found {', '.join(ignored)}")
    splits = _splits(tree.root, inside, on_top, depth)
    clips = [Labelled(place, place.parts[depth], split) for place, split in splits.items()]
    return clips, ignored + _empty_folders(tree, on_top)


def _parts_on_top(tree: Tree) -> dict[str, str]:
    """The part of each top folder, {} if they are classes; DataError if they are something between."""
    root = tree.root
    names = sorted({place.parts[0] for place in tree.audio if len(place.parts) > 1})
    parts = {name: part for name in names if (part := part_of(name))}
    others = [name for name in names if name not in parts]
    if set(SPLITS) <= set(parts.values()):
        doubled = [name for name, part in parts.items() if list(parts.values()).count(part) > 1]
        if twice := [name for name in doubled if parts[name] != VALIDATION]:
            raise DataError(f"{root} has {shortened(twice, 3)} for one part; put their clips together")
        if doubled:
            _logger.warning("%s: %s are one validation part", root, " and ".join(doubled))
        if others:
            raise DataError(
                f"{root} has train and test, and {first(others, 'other folder', 'other folders')} with audio "
                "beside them; move it into one of them, or away"
            )
        return parts
    if names and all(names_a_part(name) for name in names):
        raise DataError(
            f"{root} holds parts of a data set ({shortened(names, 6)}), not classes; name two of them train "
            "and test, or give one alone to have its test part drawn; a class needs another name"
        )
    doubtful = [name for name in parts if not _is_class_train(tree, name)]
    if doubtful:
        raise DataError(
            f"{root} holds {doubtful[0]}, the name of a part of a data set, beside {shortened(others, 3)}; "
            "parts are train and test with the class folders inside, and a class needs another name"
        )
    for name in parts:
        _logger.warning("%s: the folder %s is taken for a class", root, name)
    return {}


def _is_class_train(tree: Tree, name: str) -> bool:
    """Whether `name` can only be the vehicle: called train, with clips but without folders of them."""
    depths = {len(place.parts) for place in tree.audio if place.parts[0] == name}
    return normal(name).casefold() == "train" and depths == {2}


def _check_class_folders(tree: Tree, on_top: dict[str, str]) -> None:
    depth = 1 if on_top else 0
    heard = {place.parts[: depth + 1] for place in tree.audio}
    for folder in tree.folders:
        is_class = len(folder.parts) == depth + 1 and (not on_top or on_top.get(folder.parts[0]) in SPLITS)
        if is_class and folder.parts not in heard:
            inside = [place for place in tree.others if place.parts[: depth + 1] == folder.parts]
            found = f"but {', '.join(count_suffixes(inside))}" if inside else "it is empty"
            raise DataError(
                f"the class folder {tree.root.joinpath(*folder.parts)} holds no {', '.join(SUFFIXES)} files, "
                f"{found}; convert its recordings, or remove the folder"
            )


def _splits(root: Path, places: list[Place], on_top: dict[str, str], depth: int) -> dict[Place, str]:
    """The part of each clip, by the folders above and below its class folder; empty if there are none."""
    below = {
        place: {part for name in place.parts[depth + 1 : -1] if (part := part_of(name))} for place in places
    }
    if on_top:
        found = {place: {on_top[place.parts[0]]} | below[place] for place in places}
    else:
        found = below
    everything = set().union(*found.values())
    unmarked = [place for place in places if not found[place]]
    if everything == {"train"} and unmarked:
        # Trains among other vehicles.
        _logger.warning("%s: folders called train below class folders are taken for no part", root)
        everything = set()
    if not everything:
        return dict.fromkeys(places, "")
    twofold = [place for place in places if len(found[place]) > 1]
    for wrong, problem in ((twofold, "in two parts"), (unmarked, "in no part while others do")):
        if wrong:
            raise DataError(
                f"{root.joinpath(*wrong[0].parts)} lies {problem}, by the names of its folders; "
                "parts are train and test, above all class folders or inside each"
            )
    missing = [split for split in SPLITS if split not in everything]
    if on_top and missing:
        raise DataError(f"{root} has no class folders with audio for {' and '.join(missing)}; add them")
    if missing:
        names = sorted({name for place in places for name in place.parts[depth + 1 : -1] if part_of(name)})
        raise DataError(
            f"{root} has {', '.join(names)} inside its class folders; train and test are needed: rename one"
        )
    return {place: next(iter(found[place])) for place in places}


def _empty_folders(tree: Tree, on_top: dict[str, str]) -> list[str]:
    """The folders without audio beside train and test."""
    names = [folder.parts[0] for folder in tree.folders if len(folder.parts) == 1]
    empty = [name for name in names if on_top and name not in on_top]
    return [first(empty, "folder without audio", "folders without audio")] if empty else []
