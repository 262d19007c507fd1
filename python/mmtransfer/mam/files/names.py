"""Names of stored tensors as transformers' models have them: files may have older ones, or prefixes."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from mmtransfer.data.errors import DataError

from .checkpoint import Checkpoint, Stored


def align(target: Checkpoint, other: Checkpoint) -> dict[str, Stored]:
    """For the name of each tensor of the target, the same tensor of another checkpoint, as far as it has it.

    Names that differ are compared as transformers would load both into models without heads. A tensor that is
    tied to another in a model, and so not stored, is the one that it is tied to.
    """
    if other.tensors.keys() == target.tensors.keys():
        return {name: other.tensors[name] for name in target.tensors}
    own, theirs = _plain_names(target), _plain_names(other)
    stored = {theirs(name): each for name, each in other.tensors.items()}
    found = {name: stored[own(name)] for name in target.tensors if own(name) in stored}
    if len(found) < len(target.tensors):
        ties = _find_ties(other, theirs)
        for name in target.tensors:
            for tied in ties.get(own(name), ()) if name not in found else ():
                if tied in stored:
                    found[name] = stored[tied]
    return found


def build_model(checkpoint: Checkpoint) -> nn.Module:
    """The model of a checkpoint without its head, with shapes alone and no weights.

    DataError where transformers knows no such model.
    """
    from transformers import AutoModel

    try:
        with _quiet(), torch.device("meta"):
            return AutoModel.from_config(_read_config(checkpoint), trust_remote_code=False)
    except Exception as error:
        # Configurations and models of several kinds are behind this call; each has its own exceptions.
        reason = " ".join(str(error).split())[:300].removesuffix(".")
        raise DataError(
            f"no model can be built from the config.json of {checkpoint.place} ({reason})"
        ) from error


def find_renaming(model: nn.Module) -> Callable[[str], str]:
    """The name in a model, made by `build_model`, of the tensor that a file has under a name."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    known: Any = model
    mapping = get_model_conversion_mapping(known)
    renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
    converters = [each for each in mapping if isinstance(each, WeightConverter)]
    state = known.state_dict()

    def rename(name: str) -> str:
        return rename_source_key(name, renamings, converters, known.base_model_prefix, state)[0]

    return rename


def _plain_names(checkpoint: Checkpoint) -> Callable[[str], str]:
    """The renaming of a checkpoint; none where no model can be built, or two tensors would get one name."""
    try:
        rename = find_renaming(build_model(checkpoint))
    except DataError:
        return str
    names = {name: rename(name) for name in checkpoint.tensors}
    return rename if len(set(names.values())) == len(names) else str


def _find_ties(checkpoint: Checkpoint, rename: Callable[[str], str]) -> Mapping[str, list[str]]:
    """For each tensor of the whole model that is tied to others, by its name after renaming, those others."""
    import transformers

    architectures = checkpoint.config.get("architectures") or [None]
    kind = getattr(transformers, str(architectures[0]), None)
    if kind is None:
        return {}
    try:
        with _quiet(), torch.device("meta"):
            model = kind(_read_config(checkpoint))
            model.tie_weights()
    except Exception:
        return {}
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(rename(name))
    return {name: [other for other in group if other != name] for group in groups.values() for name in group}


def _read_config(checkpoint: Checkpoint) -> Any:
    from transformers import AutoConfig

    # Said, because transformers would ask on the terminal whether to run code of the checkpoint.
    return AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=False)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers warns of parts that a configuration has no use for."""
    from mmtransfer.encoders.loading import quiet_transformers

    with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()):
        yield
